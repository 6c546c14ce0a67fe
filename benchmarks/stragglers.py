"""Rounds that wait and rounds that do not, by a virtual clock: the table of docs/scheduling.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/stragglers.py            to standard output
    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/stragglers.py --write    and into docs/scheduling.md

Thirty percent of the clients are ten times slower than the others. Every row is a whole run with real training; only
the time is simulated, from each client's speed and bandwidth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from robustness import SETTINGS as ROBUSTNESS
from robustness import SharedPool, SharedRuntime
from sections import fill

from fedlora.config import parse_config
from orchestrator.opening import open_federation
from orchestrator.rounds import play_round
from orchestrator.state import RunState

DOC = Path(__file__).parent.parent / "docs" / "scheduling.md"
UPDATES = 200  # that every row may spend
SPEEDS = [20.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]  # dealt to the clients in turn

SETTINGS: Mapping[str, Any] = {
    "name": "stragglers",
    "model": {"name": "builtin:minilm"},
    "data": {
        "name": "builtin:bbc-news",
        "max_length": 32,
        "client_holdout": 0,
        "partition": {"method": "dirichlet", "alpha": 0.5, "min_rows": 16},
    },
    "clients": {"count": 20, "per_round": 10},
    "lora": ROBUSTNESS["lora"],  # what its runtime computes once per text lies below these layers
    "training": {
        "learning_rate": 0.003,
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
        "base_dropout": False,
    },
    "evaluation": {"every": 1, "per_client": False},
    "strategy": ["staleness", "flexlora"],
    "fleet": {"examples_per_s": SPEEDS, "mbit_per_s": 20, "jitter": 0.1},
    "seed": 0,
    "threads": 1,
    "output_dir": "runs/stragglers",
}

ROWS: Mapping[str, Mapping[str, Any]] = {
    "synchronous": {},
    "over-selected 1.3 times": {"over_selection": 1.3},
    "deadline 10 s, late dropped": {"deadline_s": 10},
    "deadline 10 s, late kept": {"deadline_s": 10, "late": "keep"},
    "asynchronous, buffer 5": {"mode": "async", "buffer": 5},
    "asynchronous, buffer 10": {"mode": "async", "buffer": 10},
}


_runtimes: dict[int, SharedRuntime] = {}  # by seed, which decides the partition; the base is computed once per text


def play(schedule: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One run of ``UPDATES`` updates: clock and accuracy after every round."""
    content = {**SETTINGS, "schedule": schedule, "rounds": 10_000, "seed": seed}
    config = parse_config(content)
    if seed not in _runtimes:
        _runtimes[seed] = SharedRuntime(config)
    _runtimes[seed].open(config)
    fed, base = open_federation(config, SharedPool(config, _runtimes[seed]), lambda event, fields: None)
    state = RunState(0, fed.fresh, {}, config.sha256(), base.fingerprint)
    curve, updates, slow = [], 0, 0
    stragglers = {member.id for i, member in enumerate(fed.members) if SPEEDS[i % len(SPEEDS)] < 20}
    while updates < UPDATES:
        state = play_round(fed, state)
        row = state.row
        assert row is not None
        updates += len(row["admitted"])
        slow += len(stragglers.intersection(row["admitted"]))
        curve.append((row["clock_s"], row["eval"]["accuracy"]))
    return {"curve": curve, "rounds": state.round, "slow": slow / updates}


def reached(curve: list[tuple[float, float]], target: float) -> float | None:
    """When a run was at this accuracy for the first time."""
    return next((clock for clock, accuracy in curve if accuracy >= target), None)


def table(seeds: int) -> str:
    runs = {name: [play(schedule, seed) for seed in range(seeds)] for name, schedule in ROWS.items()}
    # the accuracy a synchronous run ends at: the mean over its last five rounds, since single rounds jump
    ends = [sum(accuracy for _, accuracy in run["curve"][-5:]) / 5 for run in runs["synchronous"]]
    lines = [
        "| rounds | aggregations | updates of slow clients | virtual time | final accuracy"
        " | time to the accuracy of the synchronous run | times faster |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    waited = [reached(run["curve"], end) for run, end in zip(runs["synchronous"], ends, strict=True)]
    for name, found in runs.items():
        times = [reached(run["curve"], end) for run, end in zip(found, ends, strict=True)]
        known = [time for time in times if time is not None]
        missed = f" ({len(known)} of {seeds} seeds)" if len(known) < seeds else ""
        ratios = [was / time for was, time in zip(waited, times, strict=True) if was and time]
        final = [sum(accuracy for _, accuracy in run["curve"][-5:]) / 5 for run in found]
        rounds, slow = (_mean([run[key] for run in found]) for key in ("rounds", "slow"))
        lasted = _mean([run["curve"][-1][0] for run in found])
        lines.append(
            f"| {name} | {rounds:.0f} | {100 * slow:.0f} % | {lasted:.0f} s | {100 * _mean(final):.1f} % "
            f"| {_mean(known):.0f} s{missed} | {_mean(ratios):.1f} |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    write: Annotated[bool, typer.Option("--write", help="put the table into docs/scheduling.md")] = False,
) -> None:
    """Play every row and print the table."""
    torch.set_num_threads(1)
    text = table(seeds)
    typer.echo(text)
    if write:
        fill(DOC, "stragglers", text)


if __name__ == "__main__":
    typer.run(main)
