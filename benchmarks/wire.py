"""Packed updates on real data: the table of docs/wire.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/wire.py --data ../shared/data

A cell is one run: a rule, how the changes of clients travel, and a seed. All of CLINC150 is learned, by a part of ten
clients of three ranks at a time. Every finished cell is a line in the results file; the command goes on where it was
stopped, and writes the table from what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from cached import SharedPool, shorten
from sections import fill, read_results
from torch import Tensor

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig, parse_config
from fedlora.training.model import Base
from orchestrator.opening import first_state, open_federation
from orchestrator.rounds import play_round
from orchestrator.units import human_bytes

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "wire.md"
SEEDS = (0, 1, 2)
FROZEN = 5

FEEDBACK = {"error_feedback": True}
WIRES: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "int8": {"up": "int8"},
    "int8 + feedback": {"up": "int8", **FEEDBACK},
    "int4": {"up": "int4"},
    "int4 + feedback": {"up": "int4", **FEEDBACK},
    "top 10 %": {"top_k": 0.1},
    "top 10 % + feedback": {"top_k": 0.1, **FEEDBACK},
    "int8, top 10 % + feedback": {"up": "int8", "top_k": 0.1, **FEEDBACK},
}
RULES = ("rbla", "flexlora")  # a fixed basis, which feedback needs, and the rule of the other tables
SETTINGS: Mapping[str, Any] = {
    "name": "wire",
    "model": {"name": "builtin:minilm"},
    "data": {"max_length": 32, "client_holdout": 0, "partition": {"method": "dirichlet", "alpha": 0.5}},
    "clients": {"count": 10, "per_round": 5, "ranks": [4, 8, 16]},
    "lora": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": r".*layer\.5\..*(query|key|value|dense)",
        "modules_to_save": ["classifier", "pooler"],
    },
    "training": {
        "learning_rate": 0.004,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 256,
        "max_steps": 20,
        "base_dropout": False,
    },
    "evaluation": {"every": 1000, "per_client": False},
    "threads": 1,
}


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    rule: str
    wire: str
    seed: int
    rounds: int

    def content(self, data: Path, folder: str) -> dict[str, Any]:
        """What is run, as a configuration file would say it."""
        content: dict[str, Any] = json.loads(json.dumps({**SETTINGS, "seed": self.seed, "rounds": self.rounds}))
        content["data"] |= {f"{kind}_file": str(data / "clinc150" / f"{kind}.jsonl.gz") for kind in ("train", "test")}
        return content | {"strategy": self.rule, "wire": dict(WIRES[self.wire]), "output_dir": folder}

    @property
    def key(self) -> str:
        """What a finished cell is found by: other settings are another cell."""
        return hashlib.sha256(json.dumps(self.content(Path(), ""), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.rule}, {self.wire}, seed {self.seed}, {self.rounds} rounds"


def cells(rounds: int) -> list[Cell]:
    """All of the table, seed by seed."""
    return [
        Cell(rule, wire, seed, rounds)
        for seed, rule, wire in product(SEEDS, RULES, WIRES)
        if rule == "rbla" or "error_feedback" not in WIRES[wire]
    ]


_texts: dict[bytes, Tensor] = {}  # of this process: what the layers below make of each text


class CachedRuntime(ClientRuntime):
    """A runtime that computes the layers below once per text and process."""

    def _load(self) -> Base:
        base = shorten(super()._load(), FROZEN)
        base.model.bert.embeddings._known = _texts
        return base


def play(cell: Cell, data: Path) -> dict[str, Any]:
    """One run, as a line of the results file."""
    began = time.process_time()
    with TemporaryDirectory() as folder:  # of what clients keep
        config: RunConfig = parse_config(cell.content(data, folder))
        fed, base = open_federation(config, SharedPool(config, CachedRuntime(config, 1)), lambda event, fields: None)
        state = first_state(config, fed, base)
        while state.round < fed.rounds:
            state = play_round(fed, state)
    assert state.last is not None
    seconds = round(time.process_time() - began, 1)
    found = {"accuracy": state.last["accuracy"], "bytes_up": state.totals.bytes_up}
    return {"key": cell.key, "cell": str(cell), **found, "bytes_down": state.totals.bytes_down, "seconds": seconds}


# The document ----------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Mapping[str, Any]], rounds: int) -> str:
    """Means over the seeds that are there, and how far from float32 they are, seed by seed."""
    done = {(cell.rule, cell.wire, cell.seed): rows[cell.key] for cell in cells(rounds) if cell.key in rows}
    if not done:
        return "Not played yet."
    text = [
        "| rule | wire | accuracy | points from fp32, by seed | up, a client and round | times fewer than fp32 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for rule, wire in dict.fromkeys((rule, wire) for rule, wire, _ in done):
        lines = {seed: line for (*which, seed), line in done.items() if which == [rule, wire]}
        whole = {seed: done[rule, "fp32", seed] for seed in lines if (rule, "fp32", seed) in done}
        points = [100 * (lines[seed]["accuracy"] - line["accuracy"]) for seed, line in whole.items()]
        times = [line["bytes_up"] / lines[seed]["bytes_up"] for seed, line in whole.items()]
        up = statistics.fmean(line["bytes_up"] for line in lines.values()) / (5 * rounds)
        told = [_spread([100 * line["accuracy"] for line in lines.values()]), ", ".join(f"{p:+.1f}" for p in points)]
        told += [human_bytes(round(up)), f"{statistics.fmean(times):.2f}" if times else ""]
        text.append(f"| {rule} | {wire} | {' | '.join(told)} |")
    return "\n".join([*text, "", f"{len(done)} of {len(cells(rounds))} runs of {rounds} rounds."])


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _play(arguments: tuple[Cell, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return play(*arguments)


def main(
    data: Annotated[Path, typer.Option(help="folder with clinc150/")],
    rounds: Annotated[int, typer.Option(min=1, help="of every run; the table is of runs of as many")] = 30,
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    results: Annotated[Path, typer.Option(help="one line per finished cell")] = HERE / "wire.jsonl",
    only: Annotated[str, typer.Option(help="run the cells whose description holds this, and write no table")] = "",
) -> None:
    """Run what is missing, then write docs/wire.md."""
    rows = read_results(results)
    todo = [cell for cell in cells(rounds) if only in str(cell) and cell.key not in rows]
    typer.echo(f"{len(todo)} cells to run")
    with (
        results.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        for cell, row in zip(todo, pool.map(_play, [(cell, data) for cell in todo]), strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()
            typer.echo(f"{cell}: accuracy {row['accuracy']:.3f}, {row['bytes_up']} bytes up  {row['seconds']} s")
    if not only:
        fill(DOC, "table", table(read_results(results), rounds))


if __name__ == "__main__":
    typer.run(main)
