"""Streams of tasks on real data: the tables of docs/streams.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/streams.py clinc150 --data ../shared/data
    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/streams.py text --data ../shared/data
    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/streams.py hidden --data ../shared/data

A cell is one run: a method, a scenario, how unequal the clients are, and a seed. Every finished cell is a line in the
results file; the command goes on where it was stopped, and writes the table from what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
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
from fedlora.continual.plateau import Decision, Losses, Policy, State
from fedlora.errors import FedLoRAError
from fedlora.training.model import Base
from orchestrator.opening import first_state, open_federation
from orchestrator.rounds import play_round

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "streams.md"
SEEDS = (0, 1, 2)

REPLAY = {"continual": {"replay": {"rows": 300, "balanced": True}, "loss_labels": "met"}}
LORA: Mapping[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": r".*layer\.5\..*(query|value)",
    "modules_to_save": ["classifier", "pooler"],
}
HEAD_ALONE = {**LORA, "modules_to_save": ["classifier"]}  # the features are those of the base
METHODS: Mapping[str, Mapping[str, Any]] = {
    "sequential": {"continual": {"freeze": "never"}},
    "incremental": {},
    "o_lora": {"strategy": [{"o_lora": {"weight": 0.5}}, "flexlora"]},
    "ewc": {"strategy": [{"ewc": {"weight": 2000.0}}, "flexlora"]},
    "mas": {"strategy": [{"mas": {"weight": 50.0}}, "flexlora"]},
    "online_lora": {"strategy": [{"online_lora": {"weight": 600.0}}, "flexlora"]},
    "lwf": {"strategy": [{"lwf": {"weight": 1.0}}, "flexlora"]},
    "inflora": {"strategy": ["inflora", "ffa"]},
    "prototypes": {"strategy": ["prototypes", "flexlora"]},
    # a head alone needs larger steps
    "head_only": {"strategy": "head_only", "lora": HEAD_ALONE, "training": {"learning_rate": 0.05}},
    "head_only + prototypes": {"strategy": ["prototypes", "head_only"], "lora": HEAD_ALONE},
    "head_only + discriminant": {
        "strategy": [{"prototypes": {"metric": "mahalanobis", "memory": 1.0}}, "head_only"],
        "lora": HEAD_ALONE,
    },
    "replay": REPLAY,
    "replay + lwf": {**REPLAY, "strategy": ["lwf", "flexlora"]},
    "per task": {"continual": {"isolated": True}},
    "joint": {"continual": {"freeze": "never", "joint": True, "loss_labels": "all"}},
    "plateau": {"continual": {"freeze": "plateau", "loss_labels": "all"}},
}
ONCE = ("mas", "prototypes", "replay + lwf", "per task")  # shown for one seed of one column
CLINC: Mapping[str, Any] = {
    "name": "streams",
    "model": {"name": "builtin:minilm"},
    "data": {"max_length": 32, "client_holdout": 0, "partition": {"method": "dirichlet"}},
    "clients": {"count": 10, "per_round": 5, "ranks": [4, 8, 16]},
    "lora": LORA,
    "training": {
        "learning_rate": 0.004,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 256,
        "max_steps": 12,
        "base_dropout": False,
    },
    "evaluation": {"every": 1000, "per_client": False},
    "strategy": "flexlora",
    "threads": 1,
    "output_dir": "runs/streams",
}
HIDDEN_ROUNDS, WITHIN = 14, 3  # rounds of a task whose boundaries nobody is told, and how late a shift may be noticed
TEXTS = ("dbpedia", "amazon", "agnews", "sst2")


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    table: str
    method: str
    scenario: str
    alpha: float
    seed: int

    def content(self, data: Path) -> dict[str, Any]:
        """What is run, as a configuration file would say it."""
        content: dict[str, Any] = json.loads(json.dumps({**CLINC, "seed": self.seed}))
        changes = METHODS[self.method]
        content["data"]["partition"]["alpha"] = self.alpha
        content["continual"] = {"scenario": self.scenario, **STREAMS[self.table](content, data)}
        content["continual"] |= changes.get("continual", {})
        content["training"] |= changes.get("training", {})
        return {**content, **{key: value for key, value in changes.items() if key not in ("continual", "training")}}

    @property
    def key(self) -> str:
        """What a finished cell is found by: other settings are another cell."""
        return hashlib.sha256(json.dumps(self.content(Path()), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.table}: {self.method}, {self.scenario}, alpha {self.alpha}, seed {self.seed}"


def _clinc150(content: dict[str, Any], data: Path) -> dict[str, Any]:
    content["data"] |= {f"{kind}_file": str(data / "clinc150" / f"{kind}.jsonl.gz") for kind in ("train", "test")}
    return {"split": 10, "rounds": 4, "freeze": "boundaries"}


def _text(content: dict[str, Any], data: Path) -> dict[str, Any]:
    content["data"] = {"client_holdout": 0, "max_length": 96, "partition": content["data"]["partition"]}
    content["lora"]["target_modules"] = r".*layer\.(4|5)\..*(query|value)"
    tasks = []
    for name in TEXTS:
        files = {f"{kind}_file": str(data / "text_stream" / name / f"{kind}.jsonl.gz") for kind in ("train", "test")}
        tasks.append({"name": name, "data": files})
    return {"tasks": tasks, "rounds": 6, "freeze": "boundaries"}


def _hidden(content: dict[str, Any], data: Path) -> dict[str, Any]:
    return {**_clinc150(content, data), "rounds": HIDDEN_ROUNDS}


STREAMS = {"clinc150": _clinc150, "text": _text, "hidden": _hidden}
FROZEN = {"clinc150": 5, "text": 4, "hidden": 5}
CELLS = {
    "clinc150": [
        Cell("clinc150", method, scenario, alpha, seed)
        for scenario, seed, alpha, method in product(("class", "task"), SEEDS, (0.5, 0.1), METHODS)
        if method != "plateau" and (method not in ONCE or (scenario, seed, alpha) == ("class", 0, 0.5))
    ],
    "text": [
        Cell("text", method, "task", 0.5, seed)
        for seed, method in product(SEEDS, ("sequential", "incremental", "o_lora", "joint"))
    ],
    "hidden": [Cell("hidden", "plateau", "class", 0.5, seed) for seed in range(5)],
}

_texts: dict[bytes, Tensor] = {}  # of this process: what the layers below make of each text


class CachedRuntime(ClientRuntime):
    """A runtime that computes the layers below once per text and process."""

    def __init__(self, config: RunConfig, frozen: int):
        super().__init__(config, 1)
        self._frozen = frozen

    def _load(self) -> Base:
        base = shorten(super()._load(), self._frozen)
        base.model.bert.embeddings._known = _texts
        return base


class Witness(Policy):
    """A policy that remembers what it was asked, so that it can be asked again in another unit of the loss."""

    def __init__(self, policy: Policy):
        self.policy, self.name = policy, policy.name
        self.asked: list[tuple[int, Losses, bool]] = []
        self.said: list[tuple[bool, bool]] = []

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        decision = self.policy.observe(state, round, losses, boundary=boundary)
        self.asked.append((round, losses, boundary))
        self.said.append((decision.merge, decision.shift))
        return decision

    def same_at(self, scale: float) -> bool:
        """Whether the decisions are the same where every loss is ``scale`` times as large."""
        state: State = {}
        for (round, losses, boundary), said in zip(self.asked, self.said, strict=True):
            scaled = {client: (scale * loss, weight) for client, (loss, weight) in losses.items()}
            decision = self.policy.observe(state, round, scaled, boundary=boundary)
            if (decision.merge, decision.shift) != said:
                return False
            state = decision.state
        return True

    def found(self, boundaries: list[int]) -> dict[str, Any]:
        """Which boundaries were noticed in time, and what was noticed that is none."""
        shifts = [round for (round, *_), (_, shift) in zip(self.asked, self.said, strict=True) if shift]
        delays = {end: [s - end for s in shifts if 0 < s - end <= WITHIN] for end in boundaries}
        false = [s for s in shifts if not any(0 < s - end <= WITHIN for end in boundaries)]
        merges = [round for (round, *_), (merge, _) in zip(self.asked, self.said, strict=True) if merge]
        return {
            "noticed": sum(bool(found) for found in delays.values()),
            "boundaries": len(boundaries),
            "delays": [found[0] for found in delays.values() if found],
            "false_alarms": false,
            "merges": merges,
            "same_at_10": self.same_at(10.0),
        }


def play(cell: Cell, data: Path) -> dict[str, Any]:
    """One run, as a line of the results file."""
    began = time.process_time()
    config = parse_config(cell.content(data))
    row: dict[str, Any] = {"key": cell.key, "cell": str(cell)}
    pool = SharedPool(config, CachedRuntime(config, FROZEN[cell.table]))
    try:
        fed, base = open_federation(config, pool, lambda event, fields: None)
        assert fed.freezer is not None
        witness = Witness(fed.freezer)
        fed = replace(fed, freezer=witness)
        state = first_state(config, fed, base)
        while state.round < fed.rounds:
            state = play_round(fed, state)
        assert state.stream is not None
        if cell.table == "hidden":
            row |= witness.found(
                [HIDDEN_ROUNDS * task for task in range(1, len(fed.course.names))] if fed.course else []
            )
        row |= {"rows": state.stream.scores.to_json()["rows"], "metrics": state.stream.scores.describe()}
    except FedLoRAError as error:
        row["error"] = str(error)
    return row | {"seconds": round(time.process_time() - began, 1)}


# The document ----------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, dict[str, Any]], name: str) -> str:
    """Means and standard deviations over the seeds that are there, as Markdown; columns without a run are left out."""
    done = {cell: rows[cell.key]["metrics"] for cell in CELLS[name] if "metrics" in rows.get(cell.key, {})}
    if not done:
        return "Not played yet."
    columns = sorted({(cell.scenario, -cell.alpha) for cell in done})
    heads = [f"{scenario}, alpha {-alpha}" for scenario, alpha in columns]
    text = [f"| method | {' | '.join(f'{h}: ACC | forgetting' for h in heads)} |", f"|---|{'---:|---:|' * len(heads)}"]
    for method in dict.fromkeys(cell.method for cell in CELLS[name]):
        shown = []
        for column in columns:
            lines = [m for cell, m in done.items() if (cell.method, cell.scenario, -cell.alpha) == (method, *column)]
            shown += [_spread([100 * line[metric] for line in lines]) for metric in ("ACC", "forgetting")]
        text.append(f"| {method} | {' | '.join(shown)} |")
    seeds = sorted({cell.seed for cell in done})
    return "\n".join([*text, "", f"{len(done)} of {len(CELLS[name])} runs, seeds {', '.join(map(str, seeds))}."])


def hidden(rows: Mapping[str, dict[str, Any]]) -> str:
    """What the detector noticed, by seed."""
    text = [
        "| seed | boundaries noticed within 3 rounds | rounds later | false alarms | freezes | same at 10 x the loss |",
        "|---:|---:|---|---:|---:|---|",
    ]
    for cell in CELLS["hidden"]:
        line = rows.get(cell.key, {})
        if "noticed" in line:
            delays = ", ".join(map(str, line["delays"]))
            same = "yes" if line["same_at_10"] else "no"
            counts = f"{line['noticed']} of {line['boundaries']} | {delays}"
            text.append(f"| {cell.seed} | {counts} | {len(line['false_alarms'])} | {len(line['merges'])} | {same} |")
    return "\n".join(text) if len(text) > 2 else "Not played yet."


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _play(arguments: tuple[Cell, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return play(*arguments)


def main(
    name: Annotated[str, typer.Argument(help="clinc150, text or hidden")],
    data: Annotated[Path, typer.Option(help="folder with clinc150/ and text_stream/")],
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    results: Annotated[Path, typer.Option(help="one line per finished cell")] = HERE / "streams.jsonl",
    only: Annotated[str, typer.Option(help="run the cells whose description holds this, and write no table")] = "",
) -> None:
    """Run what is missing, then write docs/streams.md."""
    rows = read_results(results)
    todo = [cell for cell in CELLS[name] if only in str(cell) and cell.key not in rows]
    typer.echo(f"{len(todo)} cells to run")
    with (
        results.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        for cell, row in zip(todo, pool.map(_play, [(cell, data) for cell in todo]), strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = {key: round(value, 3) for key, value in row.get("metrics", {}).items() if value is not None}
            typer.echo(f"{cell}: {said or row.get('error')}  {row['seconds']} s")
    if not only:
        found = read_results(results)
        fill(DOC, name, hidden(found) if name == "hidden" else table(found, name))


if __name__ == "__main__":
    typer.run(main)
