"""Exact unlearning of clients: back to before they took part, and the rounds once more without them.

A run without a client is the same configuration with ``clients.exclude``: the client keeps its place in every draw and
is never asked. Up to the first round that would have asked it, both runs are the same, so a checkpoint from before that
round belongs to both, and what follows is played again. Nothing is undone, nothing is approximated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clients.private_state import PrivateState
from fedlora.config import RunConfig
from fedlora.errors import CheckpointError, UnlearningError
from orchestrator import launch
from orchestrator.checkpoint import checkpoints, commit, load, load_latest
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_lines, write_atomic

Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Rollback:
    """What it takes to have a run as if some clients had never been there.

    Attributes:
        clients: who is taken out.
        first: the first round they had a part in; None if they never had.
        start: the committed round that the replay begins from; None where no checkpoint is old enough, and everything
            is played again.
        rounds: committed so far.
        level: E1 where the replay gives the bytes of a run that never had them, else E2.
        doubts: why it is not E1.
    """

    clients: tuple[str, ...]
    first: int | None
    start: int | None
    rounds: int
    level: str
    doubts: tuple[str, ...] = ()

    @property
    def replayed(self) -> int:
        """Rounds to play again."""
        return 0 if self.first is None else self.rounds - (self.start or 0)

    @property
    def cost(self) -> float:
        """Rounds to play again, as a share of all."""
        return self.replayed / max(self.rounds, 1)


def plan_rollback(folder: Path, clients: Collection[str]) -> Rollback:
    """Where a replay without these clients begins, and what may be claimed of it. Changes nothing.

    Raises:
        UnlearningError: if nothing is committed yet.
    """
    config = read_config(folder)
    state, _ = load_latest(folder)
    if state is None:
        raise UnlearningError(f"{folder} has no committed round, so there is nothing to unlearn; start it anew without")
    rows = read_lines(folder / "metrics.jsonl")
    first = _first_part(config, rows, clients, state)
    start = _start(folder, config, first, clients) if first is not None else state.round
    doubts = _doubts(folder, config, rows, start or 0)
    return Rollback(tuple(sorted(clients)), first, start, state.round, "E2" if doubts else "E1", tuple(doubts))


def replay(folder: Path, plan: Rollback, work: Path, listen: Listener) -> dict[str, Any]:
    """Play the rounds again without the clients, in a folder of its own; the run itself stays as it is.

    A replay that was stopped anywhere goes on from its last committed round.

    Args:
        work: a folder that is not there yet, or one that a replay of this very plan left.

    Returns:
        The summary of the run without the clients.

    Raises:
        FedLoRAError: what a run may raise.
    """
    prepare(folder, plan, work)
    return launch.resume(work, listen)


def without(config: RunConfig, clients: Collection[str]) -> RunConfig:
    """The configuration of a run that never had these clients."""
    excluded = sorted({*config.clients.exclude, *clients})
    return config.model_copy(update={"clients": config.clients.model_copy(update={"exclude": excluded})})


def prepare(folder: Path, plan: Rollback, work: Path) -> None:
    """The folder of the run without the clients, as it stood after round ``plan.start``; whole, or not at all."""
    if work.exists():
        return
    config = without(read_config(folder), plan.clients)
    scratch = work.with_name(f".{work.name}")
    if scratch.exists():
        shutil.rmtree(scratch)
    write_atomic(scratch / "config.yaml", config.model_copy(update={"output_dir": str(work)}).to_yaml())
    if plan.start is not None:
        # older ones too: they are as clean, and a later request may need one
        for state in _up_to(folder, plan.start):
            commit(scratch, replace(state, config_sha256=config.sha256()), config.keep_checkpoints)
            PrivateState(folder / "private", config.keep_checkpoints).copy(scratch / "private", state.accepted)
        before = [row for row in read_lines(folder / "metrics.jsonl") if row["round"] <= plan.start]
        write_atomic(scratch / "metrics.jsonl", _lines(before))
    scratch.rename(work)


def _first_part(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], clients: Collection[str], state: RunState
) -> int | None:
    """The first round in which one of the clients had any part."""
    everywhere = config.attack is not None or bool(config.continual and config.continual.routing == "prototype")
    if everywhere and state.round:
        return 1  # a colluder learns from the rows of its group, a prototype is over everybody's
    return next((row["round"] for row in rows if set(row["selected"]) & set(clients)), None)


def _start(folder: Path, config: RunConfig, first: int, clients: Collection[str]) -> int | None:
    """The newest checkpoint from before round ``first`` with which a replay can begin."""
    for path in reversed(checkpoints(folder)):
        with contextlib.suppress(CheckpointError):
            state = load(path)
            if state.round < first and PrivateState(folder / "private", 1).holds(state.accepted):
                return state.round
    return None


def _up_to(folder: Path, last: int) -> list[RunState]:
    """The states that checkpoints hold up to round ``last``, oldest first."""
    states = []
    for path in checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            state = load(path)
            states += [state] if state.round <= last else []
    if not states or states[-1].round != last:
        raise UnlearningError(f"{folder}: the checkpoint of round {last} is not there any more; plan again")
    return states


def _doubts(folder: Path, config: RunConfig, rows: Sequence[Mapping[str, Any]], start: int) -> list[str]:
    """Reasons for which a replay may differ in bytes from a run that never had the clients."""
    doubts = []
    facts = launch.facts(config, None, ())
    for line in read_lines(folder / "journal.jsonl"):
        if line["event"] in ("run_opened", "run_resumed"):
            other = [key for key in ("fedlora", "python", "versions", "cpu", "machine") if line[key] != facts[key]]
            if other:
                doubts.append(f"a session was played with another {', '.join(other)}")
                break
    schedule = config.schedule
    loose = schedule.mode == "async" or schedule.deadline_s is not None or schedule.over_selection > 1
    if loose and config.fleet is None:
        doubts.append("which answers came in time was left to a real clock")
    lost = [row["round"] for row in rows if row["round"] <= start and (row["failed"] or row["late"])]
    if lost and config.fleet is None:
        doubts.append(f"clients failed or were late in round {lost[0]}, which another run need not repeat")
    return doubts


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
