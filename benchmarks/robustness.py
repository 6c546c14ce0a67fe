"""Attacks against rules on real data: the table of docs/robustness.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/robustness.py --jobs 2

A cell is one run: an attack, the share of the clients that carry it out, and a rule. Every finished cell is a line
in the results file; the command goes on where it was stopped, and writes the tables once all cells are there.
Nothing else is left behind: rounds are played without a run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from cached import SharedPool, shorten
from sections import fill, read_results

from clients.attacks import choose, mount
from clients.runtime import ClientRuntime, Learned
from fedlora.config import RunConfig, parse_config
from fedlora.data.text import Example
from fedlora.errors import FedLoRAError
from fedlora.protocol import TrainTask
from fedlora.training.model import Base
from orchestrator.opening import open_federation
from orchestrator.rounds import play_round
from orchestrator.state import RunState

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "robustness.md"
CLIENTS, SEED, FROZEN_LAYERS = 20, 0, 5

ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "label_flip": {"shift": 1},
    "sign_flip": {"scale": 4},
    "scaled_update": {"factor": 10},
    "gaussian": {"std": 1.0},
    "nan": {},
    "alie": {"z": 1.5},
    "free_rider": {},
}
SHARES = (0.1, 0.2, 0.4)
RULES = ("mean", "clip", "krum", "multi_krum", "geometric_median", "coordinate_median", "trimmed_mean", "fltrust")
SETTINGS: Mapping[str, Any] = {
    "name": "robustness",
    "model": {"name": "builtin:minilm"},
    "data": {"name": "builtin:bbc-news", "max_length": 32, "client_holdout": 0, "partition": {"method": "iid"}},
    "clients": {"count": CLIENTS, "per_round": 1.0},
    "lora": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": r".*layer\.5\..*(query|value)",
        "modules_to_save": ["classifier", "pooler"],
    },
    "training": {
        "learning_rate": 0.01,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "base_dropout": False,
    },
    "evaluation": {"every": 100, "per_client": False},
    "rounds": 5,
    "seed": SEED,
    "threads": 1,
    "output_dir": "runs/robustness",
}
# with steps of less noise and time to converge, at the share of the middle row
CONVERGED: Mapping[str, Any] = {
    **SETTINGS,
    "training": {**SETTINGS["training"], "round_decay": 0.8, "per_device_train_batch_size": 32},
    "rounds": 10,
}


@dataclass(frozen=True)
class Cell:
    """One run; no attack is the share 0. A converged one has larger batches, more rounds and a falling rate."""

    attack: str
    share: float
    rule: str
    converged: bool = False

    def content(self) -> dict[str, Any]:
        """What is run, as a configuration file would say it."""
        expected = self.share or 0.2  # what a defence costs where nobody attacks, at the share it is usually set to
        layers: Mapping[str, list[Any]] = {
            "mean": [],
            "krum": [{"krum": {"byzantine": expected}}],
            "multi_krum": [{"multi_krum": {"byzantine": expected}}],
            "trimmed_mean": [{"trimmed_mean": {"trim": expected}}],
            "fltrust": [{"fltrust": {"root": trusted()}}],
        }
        attack = {"name": self.attack, "options": ATTACKS.get(self.attack), "clients": self.share}
        strategy = [*layers.get(self.rule, [self.rule]), "fedit"]
        return {
            **(CONVERGED if self.converged else SETTINGS),
            "strategy": strategy,
            "attack": attack if self.share else None,
        }

    def config(self) -> RunConfig:
        """The same, checked."""
        return parse_config(self.content())

    @property
    def key(self) -> str:
        """What a finished cell is found by: other settings are another cell."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        attack = f"{self.attack} by {self.share:.0%}" if self.share else "no attack"
        return f"{self.rule}, {attack}{', converged' if self.converged else ''}"


def trusted() -> str:
    """A client that attacks at no share: the root of FLTrust."""
    clients = [f"c{i}" for i in range(CLIENTS)]
    attackers = choose(max(SHARES), clients, SEED)
    return next(client for client in clients if client not in attackers)


def all_cells() -> list[Cell]:
    """The clean runs first: they are what the others are compared with."""
    clean = [Cell("", 0.0, rule, converged) for converged in (False, True) for rule in RULES]
    short = [Cell(attack, share, rule) for attack, share, rule in product(ATTACKS, SHARES, RULES)]
    return clean + short + [Cell(attack, 0.2, rule, True) for attack, rule in product(ATTACKS, RULES)]


# Cells that share what they can ----------------------------------------------------------------------------------


class SharedRuntime(ClientRuntime):
    """One base model and one set of rows for all cells of a process.

    The first round's start is the same in every cell, and so is what an honest client makes of it.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config, 1)
        self._first: dict[tuple[str, str], Learned] = {}

    def open(self, config: RunConfig) -> None:
        """Go on with another cell; only its attack may differ in what clients do."""
        if config.training != self._config.training:
            self._first = {}
        self._config = config
        self._assault = mount(config.attack, list(self.corpus.shards), len(self.corpus.labels), config.seed)
        self._shared = {}

    def _learn(self, task: TrainTask, examples: Sequence[Example] | None = None, trains: bool = True) -> Learned:
        own = self.rows.examples("train", task.client).examples
        if task.round > 1 or not trains or (examples is not None and examples is not own):
            return super()._learn(task, examples, trains)
        key = (task.client, task.received)
        if key not in self._first:
            self._first[key] = super()._learn(task)
        return self._first[key]

    def _load(self) -> Base:
        return shorten(super()._load(), FROZEN_LAYERS)


_runtimes: list[SharedRuntime] = []  # of this process


def play(cell: Cell) -> dict[str, Any]:
    """One run, as a line of the results file."""
    torch.set_num_threads(1)
    config = cell.config()
    if not _runtimes:
        _runtimes.append(SharedRuntime(config))
    runtime = _runtimes[0]
    runtime.open(config)
    began = time.process_time()
    row: dict[str, Any] = {"key": cell.key, "attack": cell.attack, "share": cell.share, "rule": cell.rule}
    unusable = 0
    fed, base = open_federation(config, SharedPool(config, runtime), lambda event, fields: None)
    state = RunState(0, fed.fresh, {}, config.sha256(), base.fingerprint)
    finite, refused = True, 0
    try:
        while state.round < config.rounds:
            state = play_round(fed, state)
            assert state.row is not None
            finite = finite and all(torch.isfinite(t).all() for t in state.adapter.tensors().values())
            refused += len(state.row["refused"])
            unusable += state.row["problem"] is not None
        assert state.last is not None
        row |= {"accuracy": state.last["accuracy"], "loss": state.last["loss"]}
    except FedLoRAError as error:
        row |= {"error": f"round {state.round + 1}: {error}"}
    return row | {
        "finite": finite,
        "refused": refused,
        "unusable": unusable,
        "seconds": round(time.process_time() - began, 2),
    }


# The document ----------------------------------------------------------------------------------------------------


def found(rows: Mapping[str, dict[str, Any]], cell: Cell) -> dict[str, Any] | None:
    """The line of a cell, if it is there and of these very settings."""
    return rows.get(cell.key)


def tables(rows: Mapping[str, dict[str, Any]], converged: bool) -> str:
    """A table and what it says, as Markdown."""
    lines_of = {cell: found(rows, cell) for cell in all_cells() if cell.converged == converged}
    clean = (lines_of[Cell("", 0.0, "mean", converged)] or {}).get("accuracy", float("nan"))

    def shown(cell: Cell) -> str:
        line = lines_of[cell]
        if line is None:
            return ""
        if "accuracy" not in line:
            return "failed"
        text = f"{100 * line['accuracy']:.1f}"
        return f"**{text}**" if near(line, clean) else text

    text = [f"| attack | share | {' | '.join(RULES)} |", f"|---|---:|{'---:|' * len(RULES)}"]
    for attack, share in [("", 0.0), *product(ATTACKS, (0.2,) if converged else SHARES)]:
        cells = " | ".join(shown(Cell(attack, share, rule, converged)) for rule in RULES)
        text.append(f"| {attack or 'none'} | {share:.0%} | {cells} |".replace("%", " %"))
    return "\n".join([*text, "", *conclusions(lines_of, clean, converged)])


def near(line: Mapping[str, Any] | None, clean: float) -> bool:
    """Whether a run came within two points of the undefended mean without attackers."""
    return line is not None and line.get("accuracy", -1.0) >= clean - 0.02


def conclusions(lines_of: Mapping[Cell, Mapping[str, Any] | None], clean: float, converged: bool) -> list[str]:
    """What was to be shown, as the numbers have it."""
    said = []
    for attack in ("sign_flip", "scaled_update"):
        mean = (lines_of[Cell(attack, 0.2, "mean", converged)] or {}).get("accuracy", 0.0)
        safe = [rule for rule in RULES if near(lines_of[Cell(attack, 0.2, rule, converged)], clean)]
        said.append(
            f"- {attack} by 20 %: the undefended mean ends at {100 * mean:.1f} % ({100 * (mean - clean):+.1f} points);"
            f" within two points of the clean run: {', '.join(safe) or 'none'}."
        )
    done = [line for line in lines_of.values() if line]
    spoilt = [line for line in done if not line["finite"]]
    hostile = [line for line in done if line["attack"] == "nan"]
    rounds = (CONVERGED if converged else SETTINGS)["rounds"]
    admitted = [line for line in hostile if line["refused"] != round(line["share"] * CLIENTS) * rounds]
    said.append(
        f"- Runs whose global adapter held a value that is not finite after any round: {len(spoilt)} of {len(done)};"
        f" runs with NaN attackers in which one was admitted: {len(admitted)} of {len(hostile)}."
    )
    seconds = sorted(line["seconds"] for line in done)
    said.append(
        f"- {len(done)} runs of {seconds[len(seconds) // 2]:.0f} CPU seconds (median), {sum(seconds) / 60:.0f} minutes."
    )
    return said


def write(rows: Mapping[str, dict[str, Any]]) -> None:
    """Put the tables between the document's markers."""
    for mark, converged in (("tables", False), ("converged", True)):
        fill(DOC, mark, tables(rows, converged))


def main(
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    results: Annotated[Path, typer.Option(help="one line per finished cell")] = HERE / "robustness.jsonl",
    only: Annotated[str, typer.Option(help="run the cells whose description holds this, and write no tables")] = "",
) -> None:
    """Run what is missing, then write docs/robustness.md."""
    rows = read_results(results)
    todo = [cell for cell in all_cells() if only in str(cell) and found(rows, cell) is None]
    typer.echo(f"{len(todo)} cells to run")
    with results.open("a", encoding="utf-8") as file:

        def keep(cell: Cell, row: Mapping[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            typer.echo(f"{cell}: {row.get('accuracy', row.get('error'))}  {row['seconds']} s")

        if jobs == 1:
            for cell in todo:
                keep(cell, play(cell))
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                for cell, row in zip(todo, pool.map(play, todo), strict=True):
                    keep(cell, row)
    if not only:
        write(read_results(results))


if __name__ == "__main__":
    typer.run(main)
