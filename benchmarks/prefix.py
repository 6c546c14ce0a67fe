"""Rounds with and without what frozen lower layers made of a row kept in memory.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/prefix.py --data ../shared/data --write

Two runs of CLINC150 with the upper half of MiniLM adapted, a round of each in turn in one process. The first round
fills the memory; every row is computed by itself then, so that round is the dearer one.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from cohort import processor, spread
from sections import replace_section
from torch import Tensor

from fedlora.config import RunConfig, parse_config
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round

HEADING = "## Frozen layers computed once"


class Arm:
    """A run that is played round by round."""

    def __init__(self, config: RunConfig):
        self.pool = LocalPool(config)
        self.fed, base = open_federation(config, self.pool, lambda event, fields: None)
        self.state, self.seconds = first_state(config, self.fed, base), list[float]()

    def play(self) -> None:
        """One more round."""
        began = time.perf_counter()
        self.state = play_round(self.fed, self.state)
        self.seconds.append(time.perf_counter() - began)


def whole(arm: Arm) -> dict[str, Tensor]:
    """B @ A of every module, since factors are free to turn, and what is trained in full."""
    adapter = arm.state.adapter
    return {path: update.B @ update.A for path, update in adapter.modules.items()} | dict(adapter.dense)


def config_of(data: Path, gb: float, rounds: int, threads: int) -> RunConfig:
    """Twenty clients, the upper three of six layers adapted."""
    content: dict[str, Any] = {
        "model": {"name": "builtin:minilm"},
        "data": {f"{kind}_file": str(data / "clinc150" / f"{kind}.jsonl.gz") for kind in ("train", "test")},
        "clients": {"count": 20, "ranks": [4, 8, 16]},
        "lora": {"r": 16, "lora_alpha": 16, "target_modules": r".*layer\.[345]\..*(query|value)"},
        "training": {
            "learning_rate": 0.003,
            "per_device_train_batch_size": 16,
            "base_dropout": False,
            "prefix_cache_gb": gb,
        },
        "evaluation": {"every": rounds, "per_client": False},
        "rounds": rounds,
        "threads": threads,
        "output_dir": tempfile.mkdtemp(),
    }
    content["data"] |= {"max_length": 32, "client_holdout": 0, "partition": {"method": "dirichlet", "alpha": 0.5}}
    return parse_config(content)


def main(
    data: Annotated[Path, typer.Option(help="folder with clinc150/")],
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    write: Annotated[bool, typer.Option(help="into README.md")] = False,
) -> None:
    """Play both, and say how much faster later rounds are and how far the models are apart."""
    load = os.getloadavg()[0]
    without, kept = (Arm(config_of(data, gb, rounds, threads)) for gb in (0.0, 1.0))
    apart = math.nan
    for number in range(rounds):
        without.play()
        kept.play()
        if not number:  # later on, rounding grows with every step
            one, other = (whole(arm) for arm in (without, kept))
            apart = max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)
    scores = [(arm.state.last or {})["accuracy"] for arm in (without, kept)]
    first = kept.seconds[0] / without.seconds[0]
    text = [
        HEADING,
        "",
        "`.venv/bin/python benchmarks/prefix.py --data ../shared/data --write`: CLINC150, twenty clients, an epoch of"
        " 16 rows a step, ranks 4, 8 and 16 on query and value of the upper three of MiniLM's six layers. A round of"
        " each run in turn.",
        "",
        f"{processor()}, torch {torch.__version__} with {threads} threads; load average {load:.1f} before.",
        "",
        "| | first round, s | later rounds, s | accuracy |",
        "|---|---:|---:|---:|",
    ]
    for name, arm, score in (("every time", without, scores[0]), ("kept", kept, scores[1])):
        later = statistics.median(arm.seconds[1:])
        text.append(f"| {name} | {arm.seconds[0]:.1f} | {later:.1f} | {score:.4f} |")
    text += [
        "",
        f"Later rounds are {spread(without.seconds[1:], kept.seconds[1:])} times faster, the first takes {first:.2f}"
        f" times as long. After it the models differ by {apart:.1e} of the largest value of a tensor.",
        "",
    ]
    typer.echo("\n".join(text))
    if write:
        replace_section(HEADING, "\n".join(text))


if __name__ == "__main__":
    typer.run(main)
