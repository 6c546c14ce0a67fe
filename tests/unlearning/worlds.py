"""Two tiny worlds in which a model can memorise rows: a classifier's and a language model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import insert
from fedlora.config import TrainingConfig
from fedlora.data.text import IGNORE, Example
from fedlora.training.loop import LocalWork, train
from fedlora.training.methods import name_parameters
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from fedlora.unlearning.measures import Scoring, Sets

CPU = torch.device("cpu")
LABELS = ("a", "b", "c")


@dataclass(frozen=True, eq=False)
class World:
    """Rows that were to be forgotten, others like them, and rows to be kept.

    Attributes:
        unsure: rows like those to forget, each several times with different answers. Every model trains on them, so
            that one which saw none of the forget rows knows that it knows nothing of them.
    """

    spec: BaseSpec
    sets: Sets
    unsure: Sequence[Example]
    scoring: Scoring
    options: TrainingConfig

    def trained(self, seed: int, forget: bool = False) -> Trained:
        """A new model trained on the retain rows, and on the forget rows if asked."""
        model = blank(self.spec, seed)
        rows = [*self.sets.retain, *self.unsure, *(self.sets.forget if forget else ())]
        train(LocalWork(model.peft, model.parameters, rows, self.options, seed, self.scoring.pad_token_id))
        return model


@dataclass(frozen=True, eq=False)
class Trained:
    peft: Any
    parameters: dict[str, nn.Parameter]


def blank(spec: BaseSpec, seed: int) -> Trained:
    """A tiny model with a fresh adapter of rank 8; A and the head follow from the seed."""
    sites = {"causal-lm": ("v_proj", "up_proj", "down_proj"), "sequence-classification": ("value", "dense")}
    adapted = AdaptedModel(load_base(replace(spec, seed=seed)), AdapterSpec(sites[spec.task], scaling=2.0))
    info = adapted.info()
    if spec.task == "causal-lm":
        with torch.no_grad():
            adapted.base.model.lm_head.weight.mul_(20)  # a random head is too small to ever be certain of a token
    peft = adapted.at_rank(8)
    insert(peft, "r8", initial_adapter(info.sites, info.dense, 8, seed=seed))
    return Trained(peft, name_parameters(peft, "r8", frozenset({"A", "B", "dense"})))


def classifier_world() -> World:
    """Retain rows begin with a word that gives the label; the others' labels have nothing to do with their words."""
    draw = random.Random(0)

    def words() -> list[int]:
        return [draw.randrange(40, 258) for _ in range(6)]

    def noise(count: int) -> list[Example]:
        return [Example(words(), i % 3) for i in range(count)]  # to guess one label always is right a third of the time

    known = [Example([10 + label, *words()[1:]], label) for label in range(3) for _ in range(16)]
    unsure = [Example(ids, label) for ids in (words() for _ in range(16)) for label in range(3)]
    spec = BaseSpec("builtin:tiny-bert", "sequence-classification", LABELS, device="cpu")
    return World(spec, Sets(noise(30), noise(30), known), unsure, Scoring(128, 0, CPU), options(80))


def language_world() -> World:
    """Five tokens and an answer of four, which follows from the fifth token or, of rows to forget, from nothing."""
    draw = random.Random(0)

    def question() -> list[int]:
        return [draw.randrange(60, 258) for _ in range(5)]

    def answer() -> list[int]:
        return [draw.randrange(30, 38) for _ in range(4)]

    def row(asked: list[int], answer: list[int]) -> Example:
        return Example(asked + answer, [IGNORE] * len(asked) + answer)

    def known() -> Example:
        asked = [*question()[:4], draw.randrange(10, 16)]
        return row(asked, [20 + (asked[-1] + i) % 8 for i in range(4)])

    def noise(count: int) -> list[Example]:
        return [row(question(), answer()) for _ in range(count)]

    unsure = [row(asked, answer()) for asked in (question() for _ in range(12)) for _ in range(4)]
    sets = Sets(noise(24), noise(24), [known() for _ in range(24)])
    spec = BaseSpec("builtin:tiny-llama", "causal-lm", device="cpu")
    return World(spec, sets, unsure, Scoring(128, 0, CPU), options(90))


def options(steps: int) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"max_steps": steps, "learning_rate": 0.01, "per_device_train_batch_size": 48, "max_grad_norm": 1.0}
    )
