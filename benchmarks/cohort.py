"""A cohort in one pass against its clients one after another, and against one adapter on the same tokens.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/cohort.py --write

Arms are run in turn, on the same rows; a ratio is the median over the pairs, with its range. ``loop`` is what a
simulation does that trains its clients one after another on a base that is loaded already, with our own plain loop;
``single`` is one adapter over all rows at once: what the base and one adapter cost, the least that a cohort can cost.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from sections import replace_section
from torch import nn

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import insert
from fedlora.config import TrainingConfig
from fedlora.data.text import Example
from fedlora.protocol import PARTS
from fedlora.training.cohort import Member, train_cohort
from fedlora.training.loop import LocalWork, train
from fedlora.training.methods import name_parameters, start_from
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, device_of, load_base
from fedlora.training.steps import StackedOptimizer

HEADING = "## A cohort in one pass"
RANKS = (4, 8, 16)
# model, quantization, adapted layers, clients, rows of each in a step, tokens of a row
CASES: Mapping[str, tuple[str, str, tuple[str, ...], int, int, int]] = {
    "MiniLM": ("builtin:minilm", "none", ("query", "value"), 16, 1, 24),
    "MiniLM, 4 rows": ("builtin:minilm", "none", ("query", "value"), 16, 4, 24),
    "MiniLM, 16 rows": ("builtin:minilm", "none", ("query", "value"), 4, 16, 24),
    "SmolLM2": ("builtin:smollm2-135m", "none", ("q_proj", "v_proj"), 8, 1, 64),
    "SmolLM2 NF4": ("builtin:smollm2-135m", "nf4", ("q_proj", "v_proj"), 8, 1, 64),
}


class Case:
    """A base, clients of mixed ranks on it, and rows for each."""

    def __init__(self, name: str, clients: int | None = None):
        model, quantization, targets, count, self.batch, self.tokens = CASES[name]
        self.count, task = clients or count, "causal-lm" if "smollm2" in model else "sequence-classification"
        labels = tuple(f"intent {i}" for i in range(150)) if task != "causal-lm" else ()
        base = load_base(BaseSpec(model, task, labels, quantization=quantization))
        self.adapted = AdaptedModel(base, AdapterSpec(targets, 2.0))
        self.info, draw = self.adapted.info(), torch.Generator().manual_seed(0)
        vocabulary = base.model.config.vocab_size
        ids = torch.randint(5, vocabulary, (self.count, self.batch, self.tokens), generator=draw).tolist()
        self.rows = [[Example(row, row if not labels else k % 150) for row in own] for k, own in enumerate(ids)]

        self.begun: list[Any] = []
        self.start(8)

    def start(self, rank: int) -> Any:
        """A client's model, its parameters and where it starts."""
        model, name = self.adapted.at_rank(rank), f"r{rank}"
        state = initial_adapter(self.info.sites, self.info.dense, rank, seed=rank)
        insert(model, name, state)
        parameters = name_parameters(model, name, PARTS)
        return model, parameters, start_from(state, parameters, self.adapted.spec.scaling, PARTS)

    def options(self, batch: int, steps: int) -> TrainingConfig:
        """A few steps of AdamW without dropout."""
        how = {"per_device_train_batch_size": batch, "max_steps": steps, "base_dropout": False}
        return TrainingConfig.model_validate({"learning_rate": 1e-3, **how})

    def loop(self, steps: int) -> None:
        """One client after another."""
        for k, rows in enumerate(self.rows):
            model, parameters, _ = self.start(RANKS[k % 3])
            train(LocalWork(model, parameters, rows, self.options(self.batch, steps), k, 0))

    def cohort(self, steps: int) -> None:
        """All clients in one pass, from the adapters that they receive."""
        self.begun = [self.start(RANKS[k % 3])[2] for k in range(self.count)]
        self.together(steps)

    def together(self, steps: int) -> None:
        """The steps of the cohort alone."""
        members = [
            Member(one.tensors, rows, k) for k, (one, rows) in enumerate(zip(self.begun, self.rows, strict=True))
        ]
        model = self.adapted.at_rank(RANKS[0])
        train_cohort(model, f"r{RANKS[0]}", members, self.begun[0].trained, self.options(self.batch, steps), 0)

    def single(self, steps: int) -> None:
        """The steps of one adapter over everybody's rows."""
        rows = [row for own in self.rows for row in own]
        model = self.adapted.at_rank(8)
        parameters = name_parameters(model, "r8", PARTS)
        train(LocalWork(model, parameters, rows, self.options(len(rows), steps), 0, 0))


def ratios(arms: Mapping[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every arm in every pair, the arms in turn after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(pairs):
        for name, arm in arms.items():
            seconds[name].append(timed(arm))
    return seconds


def timed(action: Callable[[], None]) -> float:
    """Seconds, the work of a GPU included."""
    began = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(above: Sequence[float], below: Sequence[float]) -> str:
    """Median and range of the ratios of pairs."""
    found = [one / other for one, other in zip(above, below, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def optimizers(clients: int, pairs: int) -> tuple[float, float, str]:
    """Milliseconds of a step by one AdamW per client and by one over the stacks, and the ratio of the two.

    The tensors are those of MiniLM's twelve adapted layers at rank 8.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = [shape for _ in range(12) for shape in ((8, 384), (384, 8))]
    options = TrainingConfig.model_validate({"learning_rate": 1e-3})
    own = [[nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes] for _ in range(clients)]
    each = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in own]
    stacks = {str(i): torch.randn(clients, *shape, generator=draw) for i, shape in enumerate(shapes)}
    stacked, rates = StackedOptimizer(stacks, options), torch.full((clients,), 1e-3, dtype=torch.float64)
    gradients = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in stacks.items()}
    for k, parameters in enumerate(own):
        for i, parameter in enumerate(parameters):
            parameter.grad = gradients[str(i)][k].clone()

    def one_each() -> None:
        for parameters, optimizer in zip(own, each, strict=True):
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def together() -> None:
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
        factor = (1.0 / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(factor.view(-1, 1, 1))
        stacked.step(gradients, rates)

    def often(step: Callable[[], None]) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(20):
                step()

        return steps

    seconds = ratios({"each": often(one_each), "one": often(together)}, pairs)
    medians = (50 * statistics.median(seconds[name]) for name in ("each", "one"))
    each_ms, one_ms = medians
    return each_ms, one_ms, spread(seconds["each"], seconds["one"])


def section(pairs: int, steps: int, names: Sequence[str]) -> str:
    """The whole section, as Markdown."""
    device, load = device_of("auto"), os.getloadavg()[0]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    text = [
        HEADING,
        "",
        "`.venv/bin/python benchmarks/cohort.py --write`: clients of ranks 4, 8 and 16 on one base, a few steps of"
        " AdamW each. `loop`: one client after another; `cohort`: all in one pass; both put every client's adapter into"
        " the model first. `pass` and `single` are steps alone: those of the cohort, and those of one adapter of rank 8"
        " over the same rows in one batch. Ratios of wall time, median and range over"
        f" {pairs} interleaved runs of {steps} steps, after a warm-up.",
        "",
        f"{where}, torch {torch.__version__} with {torch.get_num_threads()} threads; load average {load:.1f} before.",
        "",
        "| case | clients | rows | tokens | loop, s | cohort, s | pass, s | single, s | loop/cohort | pass/single |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        case = Case(name)
        arms = {arm.__name__: partial(arm, steps) for arm in (case.loop, case.cohort, case.together, case.single)}
        seconds = ratios(arms, pairs)
        medians = " | ".join(f"{statistics.median(values):.2f}" for values in seconds.values())
        against = f"{spread(seconds['loop'], seconds['cohort'])} | {spread(seconds['together'], seconds['single'])}"
        text.append(f"| {name} | {case.count} | {case.batch} | {case.tokens} | {medians} | {against} |")
        typer.echo(text[-1])
    each, one, ratio = optimizers(32, pairs)
    text += [
        "",
        f"A step of AdamW with clipping for 32 clients: {each:.1f} ms one by one, {one:.1f} ms stacked; {ratio} times.",
    ]
    typer.echo(text[-1])
    return "\n".join([*text, ""])


def processor() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main(
    pairs: Annotated[int, typer.Option(min=1)] = 7,
    steps: Annotated[int, typer.Option(min=1)] = 4,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="cases whose name holds this")] = "",
    write: Annotated[bool, typer.Option(help="into README.md")] = False,
) -> None:
    """Run the arms in turn and say what came of it."""
    torch.set_num_threads(threads)
    text = section(pairs, steps, [name for name in CASES if only in name])
    if write:
        replace_section(HEADING, text)


if __name__ == "__main__":
    typer.run(main)
