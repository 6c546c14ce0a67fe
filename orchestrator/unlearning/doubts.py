"""Why a replay may not give the bytes of a run that never had the target, as far as the run folder tells before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.plugins import load_plugins
from fedlora.unlearning.levels import ERASES
from orchestrator import launch
from orchestrator.stores.files import read_lines
from orchestrator.unlearning.requests import read_requests

COMPARED = ("fedlora", "python", "versions", "cpu", "machine", "plugins")
UNTIMED = ("uniform", "weighted", "round_robin", "poisson", "power_of_choice")  # rules of selection that see no clock


def doubts_about(folder: Path, config: RunConfig, rows: Sequence[Mapping[str, Any]], start: int) -> list[str]:
    """Reasons for which a replay may differ in bytes from a run that never had the target.

    Args:
        rows: of the committed rounds.
        start: the committed round that it begins from.
    """
    doubts = []
    now = launch.facts(config, None, load_plugins(config.plugins))
    if other := {key for line in sessions(folder) for key in COMPARED if line[key] != now[key]}:
        doubts.append(f"a session was played with another {', '.join(sorted(other))}")
    selection = config.clients.selection
    rule = selection if isinstance(selection, str) else next(iter(selection))
    if rule not in UNTIMED and config.fleet is None:
        doubts.append(f"clients.selection: {rule} may go by how long clients took")
    schedule = config.schedule
    loose = schedule.mode == "async" or schedule.deadline_s is not None or schedule.over_selection > 1
    if loose and config.fleet is None:
        doubts.append("which answers came in time was left to a real clock")
    if config.privacy.local and config.privacy.local.noise == "secret":
        doubts.append("privacy.local: noise is secret, and clients of another run draw other noise")
    lost = [row["round"] for row in rows if row["round"] <= start and (row["failed"] or row["late"])]
    if lost and config.fleet is None:
        doubts.append(f"clients failed or were late in round {lost[0]}, which another run need not repeat")
    if apart := [row["round"] for row in rows if row.get("alone")]:
        doubts.append(f"a cohort was taken apart in round {apart[0]}, which another run need not repeat")
    return [*doubts, *_suppressed(folder, start)]


def sessions(folder: Path) -> list[dict[str, Any]]:
    """What the journal says of the machine of every session."""
    return [line for line in read_lines(folder / "journal.jsonl") if line["event"] in ("run_opened", "run_resumed")]


def threads(folder: Path) -> set[int]:
    """Threads that workers trained with, which the last bits of a sum depend on."""
    return {line["threads"] for line in read_lines(folder / "journal.jsonl") if line["event"] == "worker_ready"}


def _suppressed(folder: Path, start: int) -> list[str]:
    """Targets that the state after round ``start`` has learned from all the same, a sentence each."""
    held: dict[str, tuple[int, str]] = {}
    for known in read_requests(folder).values():
        if known.phase != "certified":
            continue
        noted = known.facts["planned"]["plan"]
        if known.level in ERASES:  # what it played again was played without all who had left by then
            began = noted["start"] or 0
            held = {name: (first, told) for name, (first, told) in held.items() if first <= began}
        else:  # where no round used the target, the state was changed at the end all the same
            held[known.id] = (noted["first"] or noted["rounds"], f"{known.request} (level {known.level})")
    return [
        f"{name} only suppressed {told}, which is in the state after round {start} that the replay begins from"
        for name, (first, told) in held.items()
        if first <= start
    ]
