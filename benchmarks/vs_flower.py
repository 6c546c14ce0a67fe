"""The same federated run under FedLoRA, under Flower's simulation, and in a plain PEFT loop, from start to result.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/vs_flower.py minilm --data ../shared/data --pairs 5 --write

Equal in all arms: base, first adapter and head, the rows of every step, rank, adapted layers, optimizer, rounds,
clients per round, and one look at the server's test rows at the end, so that scores agree.
``template`` is a Flower ClientApp that builds its model and loads its rows for every message, as Flower's templates for
Hugging Face models do; ``tuned`` keeps both in its actor; ``peft`` is one process that trains one client after another.
Every run is a process of its own, the arms in turn. Flower needs its extra: ``pip install 'fedlora[flower]'``.
``--json`` prints the ratios.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
ARMS = ("fedlora", "template", "tuned", "peft")


@dataclass(frozen=True)
class Recipe:
    """What every arm does."""

    model: str
    quantization: str
    targets: tuple[str, ...]
    clients: int
    rounds: int
    steps: int
    batch: int
    max_length: int
    test_rows: int
    learning_rate: float
    rank: int = 8

    @property
    def writes(self) -> bool:
        """Whether it is a language model."""
        return "smollm2" in self.model


RECIPES = {
    "minilm": Recipe("builtin:minilm", "none", ("query", "value"), 20, 5, 4, 4, 32, 1500, 1e-2),
    "smollm2": Recipe("builtin:smollm2-135m", "nf4", ("q_proj", "v_proj"), 8, 2, 2, 1, 96, 16, 1e-3),
}


# The plain arms: what a user of PEFT writes ----------------------------------------------------------------------


def build(recipe: Recipe, labels: int) -> tuple[Any, Any]:
    """Model with a fresh adapter, and tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    from fedlora.adapter.directory import from_peft_names, to_peft_names
    from fedlora.adapter.initial import initial_adapter
    from fedlora.seeds import derive_seed
    from fedlora.training.builtin import resolve

    path = resolve(recipe.model)
    torch.manual_seed(derive_seed(0, 0, "", "head"))
    options: dict[str, Any] = {"dtype": torch.float32}
    if recipe.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    if recipe.writes:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, **options)
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM" if recipe.writes else "SEQ_CLS",
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapted = get_peft_model(model, lora)
    own = from_peft_names(get_peft_model_state_dict(adapted), 2 * recipe.rank, use_rslora=False)
    first = initial_adapter({site: update.shape for site, update in own.modules.items()}, own.dense, recipe.rank, 0)
    set_peft_model_state_dict(adapted, to_peft_names(first, 2 * recipe.rank, use_rslora=False))
    return adapted, tokenizer


def tokens(rows: Sequence[Mapping[str, Any]], tokenizer: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """What the collator takes."""
    made = []
    for row in rows:
        if not recipe.writes:
            ids = tokenizer(row["text"], truncation=True, max_length=recipe.max_length)["input_ids"]
            made.append({"input_ids": ids, "labels": row["number"]})
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][: recipe.max_length]
        made.append({"input_ids": whole, "labels": [-100] * min(len(prompt), len(whole)) + whole[len(prompt) :]})
    return made


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """A batch, padded to its longest row."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    short = [longest - len(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + [pad] * k for row, k in zip(rows, short, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - k) + [0] * k for k in short]),
    }
    labels = [
        row["labels"] if isinstance(row["labels"], int) else row["labels"] + [-100] * k
        for row, k in zip(rows, short, strict=True)
    ]
    return batch | {"labels": torch.tensor(labels)}


def learn(model: Any, rows: Sequence[Any], recipe: Recipe, client: str, number: int, pad: int) -> None:
    """A client's steps of a round, over the rows that FedLoRA would take."""
    import torch

    from fedlora.seeds import derive_seed
    from fedlora.training.batches import batch_indices

    model.eval()  # no arm has dropout
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=recipe.learning_rate, weight_decay=0.0)
    order = derive_seed(derive_seed(0, number, client, "train"), 0, "", "batches")
    for places in islice(batch_indices([0] * len(rows), recipe.batch, order, group_by_length=False), recipe.steps):
        batch = padded([rows[place] for place in places], pad)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def score(model: Any, rows: Sequence[Any], pad: int) -> float:
    """Accuracy, or the loss of a language model."""
    import torch

    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for first in range(0, len(rows), 64):
            batch = padded(rows[first : first + 64], pad)
            found = model(**batch)
            loss += float(found.loss) * len(batch["labels"])
            if batch["labels"].ndim == 1:
                right += int((found.logits.argmax(1) == batch["labels"]).sum())
    return right / len(rows) if isinstance(rows[0]["labels"], int) else loss / len(rows)


def play_peft(recipe: Recipe, shares: Mapping[str, Any], test: Sequence[Any], labels: int) -> float:
    """One client after another on one model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, tokenizer = build(recipe, labels)
    rows = {client: tokens(own, tokenizer, recipe) for client, own in shares.items()}
    pad, state = tokenizer.pad_token_id, copied(get_peft_model_state_dict(model))
    for number in range(recipe.rounds):
        total, weight = {name: 0 * tensor for name, tensor in state.items()}, 0
        for client, own in rows.items():
            set_peft_model_state_dict(model, state)
            learn(model, own, recipe, client, number + 1, pad)
            for name, tensor in get_peft_model_state_dict(model).items():
                total[name] += len(own) * tensor.detach()
            weight += len(own)
        state = {name: tensor / weight for name, tensor in total.items()}
    set_peft_model_state_dict(model, state)
    return score(model, tokens(test, tokenizer, recipe), pad)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of one's own."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def play_flower(
    recipe: Recipe, shares: Mapping[str, Any], test: Sequence[Any], labels: int, keep: bool, cpus: int
) -> float:
    """Flower's simulation, FedAvg over the adapter."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    clients, scores = list(shares), []
    client_app, server_app = ClientApp(), ServerApp()
    here = [str(HERE.parent), str(HERE)]

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        sys.path[:0] = [path for path in here if path not in sys.path]
        import torch
        import vs_flower
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        torch.set_num_threads(cpus)
        place = int(context.node_config["partition-id"])
        if "model" not in vs_flower.kept or not keep:
            vs_flower.kept.update(zip(("model", "tokenizer"), vs_flower.build(recipe, labels), strict=True))
        model, tokenizer = vs_flower.kept["model"], vs_flower.kept["tokenizer"]
        if place not in vs_flower.kept or not keep:
            vs_flower.kept[place] = vs_flower.tokens(shares[clients[place]], tokenizer, recipe)
        rows = vs_flower.kept[place]
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        number = int(message.content["config"]["server-round"])
        vs_flower.learn(model, rows, recipe, clients[place], number, tokenizer.pad_token_id)
        content = {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, tokenizer = build(recipe, labels)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=len(clients))
        first = ArrayRecord(copied(get_peft_model_state_dict(model)))
        result = strategy.start(grid=grid, initial_arrays=first, num_rounds=recipe.rounds)
        set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
        torch.set_num_threads(os.cpu_count() or 1)
        scores.append(score(model, tokens(test, tokenizer, recipe), tokenizer.pad_token_id))

    config = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count()}}
    run_simulation(server_app, client_app, len(clients), backend_config=config)  # type: ignore[arg-type]
    return scores[0]


kept: dict[Any, Any] = {}  # what a tuned client keeps in its actor


# Ours ------------------------------------------------------------------------------------------------------------


def play_fedlora(recipe: Recipe, place: Path, threads: int) -> float:
    """The same as a configuration."""
    from fedlora.config import parse_config
    from orchestrator import launch

    content: dict[str, Any] = {
        "model": {"name": recipe.model, "quantization": recipe.quantization},
        "data": {
            "client_files": str(place / "clients" / "*.jsonl"),
            "test_file": str(place / "test.jsonl"),
            "client_holdout": 0,
            "max_length": recipe.max_length,
        },
        "lora": {"r": recipe.rank, "lora_alpha": 2 * recipe.rank, "target_modules": list(recipe.targets)},
        "training": {
            "learning_rate": recipe.learning_rate,
            "per_device_train_batch_size": recipe.batch,
            "max_steps": recipe.steps,
            "base_dropout": False,
            "group_by_length": False,
        },
        "evaluation": {"every": 1000, "at_start": False, "per_client": False},
        "strategy": "fedit",
        "rounds": recipe.rounds,
        "threads": threads,
        "output_dir": str(place / f"run-{time.time_ns()}"),
    }
    summary = launch.run(parse_config(content), lambda event, fields: None)
    return float(summary["final"]["loss" if recipe.writes else "accuracy"])


# The comparison --------------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, data: Path, place: Path) -> None:
    """The files that every arm reads: rows of each client, and test rows."""
    draw = random.Random(0)
    (place / "clients").mkdir()
    if recipe.writes:
        place_of = data / "instruct_stream" / "sciq"
        rows, test = (
            [asked(row) for row in islice(lines(place_of / f"{kind}.jsonl.gz"), count)]
            for kind, count in (("train", 40 * recipe.clients), ("test", recipe.test_rows))
        )
        shares = {f"c{k:02}": rows[k :: recipe.clients] for k in range(recipe.clients)}
    else:
        rows, test = (list(lines(data / "clinc150" / f"{kind}.jsonl.gz")) for kind in ("train", "test"))
        names = sorted({row["label"] for row in rows})
        for row in (*rows, *test):
            row["number"] = names.index(row["label"])
        test = draw.sample(test, recipe.test_rows)
        shares = {f"c{k:02}": [] for k in range(recipe.clients)}
        for label in names:  # every intent is known to a handful of clients
            some = draw.choices(list(shares), k=6)
            for row in rows:
                if row["label"] == label:
                    shares[draw.choice(some)].append(row)
    keys = ("prompt", "completion") if recipe.writes else ("text", "label", "number")
    files = {place / "clients" / f"{client}.jsonl": own for client, own in shares.items()}
    for path, own in {**files, place / "test.jsonl": test}.items():
        path.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in own), encoding="utf-8")


def asked(row: Mapping[str, Any]) -> dict[str, str]:
    """A question and its answer, out of a row of messages."""
    question, answer = (message["content"] for message in row["messages"])
    return {"prompt": f"{question}\n", "completion": answer}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, compressed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def play(arm: str, name: str, place: Path, cpus: int) -> float:
    """One arm in this process; its score."""
    import torch

    torch.set_num_threads(cpus if arm in ("template", "tuned") else os.cpu_count() or 1)
    recipe = RECIPES[name]
    if arm == "fedlora":
        return play_fedlora(recipe, place, os.cpu_count() or 1)
    shares = {path.stem: list(lines(path)) for path in sorted((place / "clients").glob("*.jsonl"))}
    test = list(lines(place / "test.jsonl"))
    labels = 1 + max((row.get("number", 0) for row in test), default=0)
    if arm == "peft":
        return play_peft(recipe, shares, test, labels)
    return play_flower(recipe, shares, test, labels, arm == "tuned", cpus)


def section(name: str, seconds: Mapping[str, Sequence[float]], scores: Mapping[str, float], cpus: int) -> str:
    """The section of README.md."""
    from cohort import processor, spread

    recipe = RECIPES[name]
    text = [
        heading(name),
        "",
        f"`.venv/bin/python benchmarks/vs_flower.py {name} --data ../shared/data --pairs {len(seconds['peft'])}"
        f" --write`: {recipe.clients} clients in every one of {recipe.rounds} rounds, {recipe.steps} steps of"
        f" {recipe.batch} rows each, rank {recipe.rank} on {' and '.join(recipe.targets)}. From the start of the"
        f" process to the score, the arms in turn; Flower's clients have {cpus} core(s) each, the other arms all.",
        "",
        f"{processor()}; load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"| arm | seconds, median and range | {'loss' if recipe.writes else 'accuracy'} | times FedLoRA |",
        "|---|---:|---:|---:|",
    ]
    for arm, values in seconds.items():
        shown = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        text.append(f"| {arm} | {shown} | {scores[arm]:.3f} | {spread(values, seconds['fedlora'])} |")
    return "\n".join([*text, ""])


def heading(name: str) -> str:
    """Of a recipe's section."""
    return f"## Beside Flower and PEFT: {name}"


def main(
    name: Annotated[str, typer.Argument(help=" or ".join(RECIPES))],
    data: Annotated[Path, typer.Option(help="folder with clinc150/ and instruct_stream/")],
    pairs: Annotated[int, typer.Option(min=1)] = 5,
    cpus: Annotated[int, typer.Option(min=1, help="cores of a Flower client")] = 1,
    arms: Annotated[str, typer.Option(help="some of them, by comma")] = ",".join(ARMS),
    arm: Annotated[str, typer.Option(hidden=True)] = "",
    place: Annotated[Path, typer.Option(hidden=True)] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="print the ratios as JSON")] = False,
    write: Annotated[bool, typer.Option(help="into README.md")] = False,
) -> None:
    """Play the arms in turn and say how many times longer the others take."""
    if arm:
        typer.echo(f"score {play(arm, name, place, cpus)}")
        return
    from sections import replace_section

    wanted = arms.split(",")
    seconds: dict[str, list[float]] = {one: [] for one in wanted}
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(RECIPES[name], data, Path(folder))
        for _ in range(pairs):
            for one in wanted:
                own = [sys.executable, __file__, name, "--data", str(data), "--cpus", str(cpus), "--arm", one]
                environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}
                began = time.perf_counter()
                done = subprocess.run(
                    [*own, "--place", folder], capture_output=True, text=True, env=environment, check=False
                )
                seconds[one].append(time.perf_counter() - began)
                told = [line for line in done.stdout.splitlines() if line.startswith("score ")]
                if not told:
                    raise SystemExit(f"{one} failed: {done.stderr[-3000:]}")
                scores[one] = float(told[-1].split()[1])
                typer.echo(f"{one}: {seconds[one][-1]:.1f} s, score {scores[one]:.4f}", err=True)
    if as_json:
        named = {"template": "speedup_vs_template", "tuned": "speedup_vs_tuned", "peft": "speedup_vs_peft_loop"}
        ratios = {
            named[one]: statistics.median(a / b for a, b in zip(values, seconds["fedlora"], strict=True))
            for one, values in seconds.items()
            if one in named
        }
        typer.echo(json.dumps(ratios | {"scores": scores}))
    if write:
        replace_section(heading(name), section(name, seconds, scores, cpus))


if __name__ == "__main__":
    typer.run(main)
