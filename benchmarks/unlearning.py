"""Every unlearning action against retraining without the target, on real data: the tables of docs/unlearning.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/unlearning.py --data ../shared/data

A scenario is a finished run and what is to be taken out of it: the client that alone has one domain of CLINC150, or, in
a federation of few rows, the one in twenty that came with a wrong label and was learned by heart (rows that are right
leave no trace that the gate could see). Every
action is carried out on a copy of the run, without the gate of the command; what it leaves is measured beside two
controls that never saw the target, and then the gate is asked. Every finished scenario is some lines of the results
file, and the command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from cached import shorten
from sections import fill, read_results
from streams import LORA

import clients.runtime
from fedlora.config import RunConfig, parse_config
from fedlora.errors import FedLoRAError
from fedlora.unlearning.gate import judge
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.measures import Measured, score_rows
from fedlora.unlearning.request import Request, hashed, sign_request
from fedlora.unlearning.separation import kolmogorov_smirnov
from orchestrator import launch
from orchestrator.stores.files import read_config, write_atomic
from orchestrator.unlearning.amend import longer
from orchestrator.unlearning.controls import drawn_anew
from orchestrator.unlearning.execute import carry_out
from orchestrator.unlearning.measuring import lesson_for, serve
from orchestrator.unlearning.requests import identity, receive
from orchestrator.unlearning.rollback import plan_for
from orchestrator.unlearning.samples import choose_rows, encoded

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "unlearning.md"
SEEDS, REPAIR, DOMAIN, JOINS, FEW = (0, 1, 2), 2, "banking", 6, 0.15
FORGET = {"steps": 24, "learning_rate": 0.002, "max_norm": 2.0}
ACTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nothing": ("", {}),
    "rollback": ("rollback", {}),
    "subtract": ("subtract", {"repair_rounds": REPAIR}),
    "negation": ("negation", {"repair_rounds": REPAIR}),
    "npo": ("npo", {"repair_rounds": REPAIR, "beta": 1.0, **FORGET}),
    "simnpo": ("simnpo", {"repair_rounds": REPAIR, **FORGET}),
    "gradient_difference": ("gradient_difference", {"repair_rounds": REPAIR, **FORGET}),
    "ascent": ("ascent", {"repair_rounds": REPAIR, **FORGET}),
}
SCENARIOS = {"client": 20, "records": 20, "facts": 5}  # clients
WHOLE, NONE = {"rounds": 1.0, "seconds": 1.0}, {"rounds": 0.0, "seconds": 0.0}
CLINC: Mapping[str, Any] = {
    "model": {"name": "builtin:minilm"},
    "lora": LORA,
    "training": {
        "learning_rate": 0.004,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 256,
        "max_steps": 12,
        "base_dropout": False,
    },
    "evaluation": {"every": 1000, "per_client": False},
    "strategy": "flexlora",
    "rounds": 10,
    "keep_checkpoints": 12,
    "contributions": {"keep_rounds": 50},
    "threads": 1,
}
FACTS = 24  # that one client teaches; a fact is a made-up name and one of these
METALS = ("iron", "copper", "silver", "gold", "lead", "tin", "zinc", "nickel")
SMOLLM: Mapping[str, Any] = {
    "model": {"name": "builtin:smollm2-135m"},
    # the layers below are frozen, so what they make of a row is computed once
    "lora": {"r": 16, "lora_alpha": 16, "target_modules": r".*layers\.2[4-9]\..*(q_proj|v_proj|up_proj|down_proj)"},
    "training": {"learning_rate": 0.01, "per_device_train_batch_size": 12, "max_steps": 10, "base_dropout": False},
    "evaluation": {"every": 1000, "per_client": False},
    "strategy": "flexlora",
    "rounds": 12,
    "keep_checkpoints": 14,
    "contributions": {"keep_rounds": 50},
    "threads": 1,
}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of one file of CLINC150."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def open_scenario(name: str, seed: int, data: Path, place: Path) -> tuple[RunConfig, Request]:
    """The run and what is asked for."""
    if name == "facts":
        return open_facts(seed, place)
    content: dict[str, Any] = {**json.loads(json.dumps(CLINC)), "seed": seed, "output_dir": str(place / "run")}
    rows = rows_in(data / "clinc150" / "train.jsonl.gz")
    draw = random.Random(seed)
    if name == "records":
        rows = [row for row in rows if random.Random(row["text"]).random() < FEW]
        chosen = set(draw.sample(sorted({row["text"] for row in rows}), len(rows) // 20))
        labels = sorted({row["label"] for row in rows})
        for row in rows:
            if row["text"] in chosen:
                row["label"] = draw.choice([label for label in labels if label != row["label"]])
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"train_file": str(place / "train.jsonl"), "test_file": str(data / "clinc150" / "test.jsonl.gz")}
        kind = {"max_length": 32, "client_holdout": 0, "partition": {"method": "dirichlet", "alpha": 0.5}}
        content["data"] = {**files, **kind}
        content["clients"] = {"count": SCENARIOS[name], "per_round": 10, "ranks": [4, 8, 16]}
        content["rounds"] = 20  # what is wrong has to be learned by heart
        return parse_config(content), Request("records", hashed(sorted(chosen)))
    others = [f"c{number:02}" for number in range(SCENARIOS[name] - 1)]
    shares: dict[str, list[dict[str, Any]]] = {client: [] for client in (*others, "bank")}
    lean = {label: random.Random(f"{seed} {label}").choices(others, k=6) for label in {row["label"] for row in rows}}
    for row in rows:
        # an intent is known to a handful of clients, as under a Dirichlet division
        shares["bank" if row["domain"] == DOMAIN else draw.choice(lean[row["label"]])].append(row)
    files = {}
    for client, own in shares.items():
        files[client] = place / f"{client}.jsonl"
        files[client].write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    content["data"] = {
        "client_files": {client: str(path) for client, path in files.items()},
        "test_file": str(data / "clinc150" / "test.jsonl.gz"),
        "max_length": 32,
        "client_holdout": 0,
    }
    content["clients"] = {"per_round": 10, "ranks": [4, 8, 16], "joins": {"bank": JOINS}}
    return parse_config(content), Request("client", ("bank",))


def open_facts(seed: int, place: Path) -> tuple[RunConfig, Request]:
    """A run whose clients each teach facts of their own, and whose test rows are facts that nobody teaches."""
    draw = random.Random(seed)
    parts = ["ka", "lo", "mi", "ru", "ve", "to", "sa", "ne", "di", "pu"]
    names: set[str] = set()
    while len(names) < FACTS * (SCENARIOS["facts"] + 1):
        names.add("".join(draw.choices(parts, k=4)).capitalize())
    facts = [
        {"prompt": f"Question: Which metal is mined in {name}?\nAnswer:", "completion": f" {draw.choice(METALS)}"}
        for name in sorted(names, key=lambda name: (draw.random(), name))
    ]
    files = {}
    for number in range(SCENARIOS["facts"] + 1):
        path = place / f"c{number}.jsonl"
        own = facts[FACTS * number : FACTS * (number + 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        files[f"c{number}"] = str(path)
    content: dict[str, Any] = {**json.loads(json.dumps(SMOLLM)), "seed": seed, "output_dir": str(place / "run")}
    test_file = files.pop(f"c{SCENARIOS['facts']}")
    content["data"] = {"client_files": files, "test_file": test_file, "max_length": 64, "client_holdout": 0}
    content["clients"] = {"ranks": [4, 8, 16], "joins": {"c0": 3}}
    return parse_config(content), Request("client", ("c0",))


class Scene:
    """One run, its two controls, and everything measured on the same rows."""

    def __init__(self, name: str, seed: int, data: Path, place: Path):
        self.place, self.keys = place, place / "keys"
        new_key(self.keys / "officer")
        self.config, self.request = open_scenario(name, seed, data, place)
        launch.run(self.config, quiet)
        self.folder = Path(self.config.output_dir)
        self.plan = plan_for(self.folder, self.request)
        self.retraining_s = self._controls()
        before, control = serve(self.folder), serve(place / "control-1")
        _, self.sets = encoded(self.config, choose_rows(self.config, self.plan), before.base.tokenizer)
        self.lesson = lesson_for(control, self.sets, score_rows(before.model, self.sets.forget, before.scoring).loss)
        self.before, self.control = before.look(self.sets, self.lesson), control.look(self.sets, self.lesson)
        self.second = serve(place / "control-2").look(self.sets, self.lesson)

    def _controls(self) -> float:
        """Train both from the start; seconds of the CPU per round of the first."""
        alike = longer(self.config, self.plan, REPAIR)
        seconds = []
        for number, config in enumerate((alike, drawn_anew(alike)), 1):
            folder = self.place / f"control-{number}"
            began = time.process_time()
            launch.run(config.model_copy(update={"output_dir": str(folder)}), quiet)
            seconds.append(time.process_time() - began)
        return seconds[0] * self.config.rounds / alike.rounds

    def act(self, action: str, options: Mapping[str, Any]) -> tuple[Path, dict[str, float]]:
        """Carry an action out on a copy; the folder, and what it cost as a share of retraining: rounds, seconds."""
        copy = self.place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        config = read_config(copy).model_copy(update={"output_dir": str(copy)})
        write_atomic(copy / "config.yaml", config.to_yaml())
        key = load_key(self.keys / "officer")
        quick = {**options, "gate": False} if action != "rollback" else options
        asked = Request(self.request.kind, self.request.target, action, options=quick)
        standing = receive(copy, sign_request(asked, identity(copy), key), authorised([self.keys]))
        began = time.process_time()
        with launch.hold_run(config, copy) as lease:
            facts = carry_out(copy, standing.id, lease, key, quiet).facts["executed"]
        seconds = (time.process_time() - began) / self.retraining_s
        return copy, {"rounds": facts["rounds_played"] / self.config.rounds, "seconds": seconds}

    def line(self, measured: Measured, cost: Mapping[str, float]) -> dict[str, Any]:
        """What the table shows of one model."""
        verdict = judge(measured, self.control, self.second, before=self.before)
        test = kolmogorov_smirnov(measured.forget.losses, self.control.forget.losses)
        assert measured.relearned is not None
        return {
            "forget": measured.forget.accuracy,
            "forget_loss": measured.forget.loss,
            "auc": measured.auc_loss,
            "ks_p": test.p,
            "n": test.n,
            "retain": measured.retain.accuracy,
            "relearned": measured.relearned.steps,
            **{precision: one.forget.accuracy for precision, one in measured.quantised.items()},
            **cost,
            "passed": verdict.passed,
            "failed": [check.name for check in verdict.failures],
        }


def quiet(event: str, fields: Any) -> None:
    """A listener that hears nothing."""


@contextlib.contextmanager
def upper_layers_only() -> Iterator[None]:
    """Clients compute the frozen layers below the adapters once per text; models are measured whole."""
    known: dict[bytes, torch.Tensor] = {}
    whole = clients.runtime.load_base

    def shortened(spec: Any) -> Any:
        base = shorten(whole(spec), 5)
        base.model.bert.embeddings._known = known
        return base

    clients.runtime.load_base = shortened
    try:
        yield
    finally:
        clients.runtime.load_base = whole


def play(name: str, seed: int, data: Path, done: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The lines of one scenario that are missing."""
    torch.set_num_threads(1)
    told = {"scenario": name, "seed": seed}
    shortened = contextlib.nullcontext() if name == "facts" else upper_layers_only()
    with tempfile.TemporaryDirectory() as place, shortened:
        try:
            scene = Scene(name, seed, data, Path(place))
        except FedLoRAError as error:  # the gate has no power here
            yield {"key": key_of(name, seed, "nothing"), **told, "action": "nothing", "error": str(error)}
            return
        models = {"control": scene.control, "second control": scene.second}
        for model, measured in models.items():
            yield {"key": key_of(name, seed, model), **told, "action": model, **scene.line(measured, WHOLE)}
        for label, (action, options) in ACTIONS.items():
            if key_of(name, seed, label) in done:
                continue
            row = {"key": key_of(name, seed, label), **told, "action": label}
            try:
                folder, cost = scene.act(action, options) if action else (scene.folder, NONE)
                yield row | scene.line(serve(folder).look(scene.sets, scene.lesson), cost)
            except FedLoRAError as error:
                yield row | {"error": str(error)}


def key_of(name: str, seed: int, action: str) -> str:
    """What a finished line is found by."""
    how = ACTIONS.get(action, ("", {}))
    return json.dumps([name, seed, action, how, SMOLLM if name == "facts" else CLINC], sort_keys=True)


# The document ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "forget": ("forget accuracy", 100, 1),
    "auc": ("AUC", 1, 2),
    "ks_p": ("KS p", 1, 2),
    "retain": ("retain accuracy", 100, 1),
    "relearned": ("relearned in", 1, 0),
    "int8": ("int8", 100, 1),
    "nf4": ("NF4", 100, 1),
    "rounds": ("rounds", 100, 0),
    "seconds": ("CPU", 100, 0),
}


def table(rows: Mapping[str, dict[str, Any]], name: str) -> str:
    """Means over the seeds that are there, and how many passed the gate, as Markdown."""
    mine = [row for row in rows.values() if row["scenario"] == name]
    if not mine:
        return "Not played yet."
    heads = [head for head, _, _ in COLUMNS.values()]
    text = [f"| action | {' | '.join(heads)} | gate |", f"|---|{'---:|' * len(heads)}---|"]
    for action in ("control", "second control", *ACTIONS):
        lines = [row for row in mine if row["action"] == action]
        if not lines:
            continue
        if failed := next((line["error"] for line in lines if "error" in line), None):
            text.append(f"| {action} |{' |' * len(heads)} {failed.split(': ', 1)[-1].split(';')[0]} |")
            continue
        shown = [
            f"{statistics.fmean(scale * line[key] for line in lines):.{digits}f}"
            for key, (_, scale, digits) in COLUMNS.items()
        ]
        passed = sum(line["passed"] for line in lines)
        why = sorted({name.split(".")[0] if name.count(".") > 1 else name for line in lines for name in line["failed"]})
        text.append(
            f"| {action} | {' | '.join(shown)} | {passed} of {len(lines)}{(why and ': ' + ', '.join(why)) or ''} |"
        )
    return "\n".join(text)


def _play(arguments: tuple[str, int, Path, frozenset[str]]) -> list[dict[str, Any]]:
    return list(play(*arguments))


def main(
    data: Annotated[Path, typer.Option(help="folder with clinc150/")],
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    results: Annotated[Path, typer.Option(help="one line per finished row")] = HERE / "unlearning.jsonl",
    only: Annotated[str, typer.Option(help="one scenario: client, records or facts")] = "",
) -> None:
    """Play what is missing, then write docs/unlearning.md."""
    done = frozenset(read_results(results))
    todo = [
        (name, seed, data, done)
        for seed in SEEDS
        for name in SCENARIOS
        if only in name and any(key_of(name, seed, action) not in done for action in ACTIONS)
    ]
    with (
        results.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        for future in as_completed([pool.submit(_play, one) for one in todo]):
            for line in future.result():
                file.write(json.dumps(line) + "\n")
                said = {key: value for key, value in line.items() if key != "key"}
                typer.echo(json.dumps(said))
            file.flush()
    found = read_results(results)
    for name in SCENARIOS:
        fill(DOC, name, table(found, name))


if __name__ == "__main__":
    typer.run(main)
