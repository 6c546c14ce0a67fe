"""Accuracy against epsilon on real data: the table of docs/privacy.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/privacy.py --data ../shared/data

A cell is one run: a rule, how much noise, and a seed. All of CLINC150 is dealt to 1,500 clients of ten rows; a round
draws each of them with chance 0.1. Every finished cell is a line in the results file; the command goes on where it was
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

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "privacy.md"
SEEDS = (0, 1, 2)
FROZEN = 5
CLIP, DELTA = 6.0, 1e-4

RULES = ("head_only", "ffa")  # 58 thousand numbers that travel, and 6 thousand more
NOISES: Sequence[float | None] = (None, 0.5, 1.0, 2.0)  # None is the rule alone: no clipping, no noise
SETTINGS: Mapping[str, Any] = {
    "name": "privacy",
    "model": {"name": "builtin:minilm"},
    "data": {"max_length": 32, "client_holdout": 0, "partition": {"method": "iid"}},
    "clients": {"count": 1500, "per_round": 150, "selection": "poisson", "ranks": 8},
    "lora": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": r".*layer\.5\..*(query|value)",
        "modules_to_save": ["classifier"],
    },
    "training": {
        "optim": "sgd",  # the size of its changes is that of the gradient, not of the number of coordinates
        "learning_rate": 4.0,
        "per_device_train_batch_size": 10,
        "per_device_eval_batch_size": 256,
        "max_steps": 3,
        "base_dropout": False,
    },
    "evaluation": {"every": 1000, "per_client": False},
    "weighting": "uniform",
    "threads": 1,
}


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    rule: str
    noise: float | None
    seed: int
    rounds: int

    def content(self, data: Path, folder: str) -> dict[str, Any]:
        """What is run, as a configuration file would say it."""
        content: dict[str, Any] = json.loads(json.dumps({**SETTINGS, "seed": self.seed, "rounds": self.rounds}))
        content["data"] |= {f"{kind}_file": str(data / "clinc150" / f"{kind}.jsonl.gz") for kind in ("train", "test")}
        private = {"dp": {"clip": CLIP, "noise_multiplier": self.noise, "delta": DELTA}}
        return content | {"strategy": [private, self.rule] if self.noise else self.rule, "output_dir": folder}

    @property
    def key(self) -> str:
        """What a finished cell is found by: other settings are another cell."""
        return hashlib.sha256(json.dumps(self.content(Path(), ""), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.rule}, noise {self.noise or 'none'}, seed {self.seed}, {self.rounds} rounds"


def cells(rounds: int) -> list[Cell]:
    """All of the table, seed by seed."""
    return [Cell(rule, noise, seed, rounds) for seed, rule, noise in product(SEEDS, RULES, NOISES)]


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
    assert state.row is not None
    seconds = round(time.process_time() - began, 1)
    found = {"accuracy": state.last["accuracy"], "epsilon": state.row["strategy"].get("epsilon")}
    return {"key": cell.key, "cell": str(cell), **found, "seconds": seconds}


# The document ----------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Mapping[str, Any]], rounds: int) -> str:
    """Means over the seeds that are there; epsilon is the same for all of them."""
    done = {cell: rows[cell.key] for cell in cells(rounds) if cell.key in rows}
    if not done:
        return "Not played yet."
    head = [f"noise {noise:g}" if noise else "without" for noise in NOISES]
    text = [f"| rule | {' | '.join(head)} |", "|---|" + "---:|" * len(NOISES)]
    spent = [next((line["epsilon"] for cell, line in done.items() if cell.noise == noise), None) for noise in NOISES]
    text.append(f"| epsilon | {' | '.join('' if one is None else f'{one:.2f}' for one in spent)} |")
    for rule in RULES:
        found = [
            [100 * line["accuracy"] for cell, line in done.items() if (cell.rule, cell.noise) == (rule, noise)]
            for noise in NOISES
        ]
        text.append(f"| {rule} | {' | '.join(map(_spread, found))} |")
    return "\n".join([*text, "", f"{len(done)} of {len(cells(rounds))} runs of {rounds} rounds."])


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _play(arguments: tuple[Cell, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return play(*arguments)


def main(
    data: Annotated[Path, typer.Option(help="folder with clinc150/")],
    rounds: Annotated[int, typer.Option(min=1, help="of every run; the table is of runs of as many")] = 40,
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    results: Annotated[Path, typer.Option(help="one line per finished cell")] = HERE / "privacy.jsonl",
    only: Annotated[str, typer.Option(help="run the cells whose description holds this, and write no table")] = "",
) -> None:
    """Run what is missing, then write docs/privacy.md."""
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
            typer.echo(f"{cell}: accuracy {row['accuracy']:.3f}, epsilon {row['epsilon']}  {row['seconds']} s")
    if not only:
        fill(DOC, "table", table(read_results(results), rounds))


if __name__ == "__main__":
    typer.run(main)
