"""Forget rounds: the owners make what was theirs unlikely, on their own machines, and ordinary rounds mend the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from torch.linalg import vector_norm

from fedlora.aggregation import compose
from fedlora.config import ForgettingConfig, RunConfig, parse_config
from fedlora.errors import ConfigError, UnlearningError
from fedlora.unlearning.forget_losses import FORGET_LOSSES
from fedlora.unlearning.recipe import Recipe
from orchestrator.forgetting import check_combining
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_json
from orchestrator.unlearning.actions import ACTIONS
from orchestrator.unlearning.approximate import Approximate
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.rollback import Rollback

SHARE = (
    0.1  # of the norm of the adapter, which a change is bounded by where nothing else is said: see docs/unlearning.md
)


@ACTIONS.register("forget")
class Forget(Approximate):
    """Forget rounds with any loss.

    Args:
        loss: one of ``FORGET_LOSSES``, those of plug-ins among them; the other actions have their own.
        steps: of AdamW, of each owner in each forget round.
        learning_rate: default that of the run.
        max_norm: of an owner's change in a forget round, all trained tensors together, in effective units; default a
            tenth of the norm of the adapter. Every round begins anew: its ball is around what it received.
        retain_weight: of the loss on the rows that an owner keeps.
        batch_size: rows of either kind per step; default that of the run.
        forget_rounds: how many.
        repair_rounds: ordinary rounds without the target that follow, at least 1.
        gate: see ``Approximate``.
        options: numbers of the loss, such as ``beta=1``.
    """

    kinds = frozenset({"client", "records", "class", "data"})
    own_loss: ClassVar[str] = ""

    def __init__(
        self,
        loss: str = "",
        steps: int = 20,
        learning_rate: float | None = None,
        max_norm: float | None = None,
        retain_weight: float = 1.0,
        batch_size: int | None = None,
        forget_rounds: int = 1,
        repair_rounds: int = 2,
        gate: bool = True,
        **options: Any,
    ):
        super().__init__(repair_rounds, gate)
        if self.own_loss and loss:
            raise ConfigError(f"unlearning action: {self.name} has a loss of its own; use forget with loss={loss}")
        self.loss = loss or self.own_loss
        if not self.loss:
            known = ", ".join(FORGET_LOSSES)
            raise ConfigError(f"unlearning action: forget needs a loss, such as loss=npo (known: {known})")
        if forget_rounds < 1:
            raise ConfigError(f"unlearning action: forget_rounds must be at least 1, not {forget_rounds}")
        if max_norm is not None and not max_norm < math.inf:
            raise ConfigError(f"unlearning action: max_norm must be a number, not {max_norm}: something has to hold it")
        FORGET_LOSSES.create(self.loss, **options)
        Recipe(
            steps,
            1.0 if learning_rate is None else learning_rate,
            1.0 if max_norm is None else max_norm,
            retain_weight=retain_weight,
            batch_size=1 if batch_size is None else batch_size,
        )
        self.forget_rounds, self.options = forget_rounds, options
        self.how = {"steps": steps, "retain_weight": retain_weight}
        given = {"learning_rate": learning_rate, "max_norm": max_norm, "batch_size": batch_size}
        self.how |= {key: value for key, value in given.items() if value is not None}

    @property
    def rounds(self) -> int:
        return self.forget_rounds + self.repair_rounds

    def check(self, folder: Path, plan: Rollback) -> None:
        config = read_config(folder)
        if config.attack:
            raise UnlearningError(f"{self.name} trusts the owners to forget, and this run simulates attackers")
        if config.wire.error_feedback:
            raise UnlearningError(
                f"{self.name}: with wire.error_feedback clients would later send what they kept of the rows that are to"
                " be forgotten; use rollback"
            )
        if plan.first is None:
            raise UnlearningError("no round used it, so there is nothing to forget; use rollback, which costs nothing")
        if not plan.askable(config.clients.exclude):
            raise UnlearningError(
                f"{self.name}: everyone who has these rows ({', '.join(plan.owners)}) is excluded already and is not"
                " asked again; use rollback"
            )
        strategy = compose(config.strategy)
        check_combining(strategy)
        if strategy.traits.patches_base and "max_norm" not in self.how:
            raise UnlearningError(
                f"{self.name}: {config.strategy_name} moves the adapter into the base, so that its norm says nothing;"
                " give max_norm, such as --option max_norm=1"
            )
        super().check(folder, plan)  # which may read rows

    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        before = read_config(job.folder)
        usual = {
            "learning_rate": before.training.learning_rate,
            "batch_size": before.training.per_device_train_batch_size,
            "max_norm": _share_of(state),
        }
        asked = ForgettingConfig(
            clients=list(plan.askable(before.clients.exclude)),
            records=list(plan.records),
            first=state.round + 1,
            last=state.round + self.forget_rounds,
            loss=self.loss,
            options={**_usual(self.loss, len(read_json(job.folder / "labels.json"))), **self.options},
            **{**usual, **self.how},
        )
        config = self.config(job, plan).resolved()
        return parse_config({**config, "forgetting": [*config["forgetting"], asked.model_dump()]}), state


@ACTIONS.register("npo")
class ByNPO(Forget):
    """Forget rounds with ``npo``."""

    own_loss = "npo"


@ACTIONS.register("simnpo")
class BySimNPO(Forget):
    """Forget rounds with ``simnpo``."""

    own_loss = "simnpo"


@ACTIONS.register("gradient_difference")
class ByGradientDifference(Forget):
    """Forget rounds with ``gradient_difference``."""

    own_loss = "gradient_difference"


@ACTIONS.register("ascent")
class ByAscent(Forget):
    """Forget rounds with ``ascent``, which only the bound ends: to compare with, since the gate should reject it."""

    own_loss = "ascent"


def _usual(loss: str, labels: int) -> dict[str, float]:
    """Options of a loss for rows of one label each, of so many: its own defaults are for answers of many tokens.

    Args:
        labels: of a classifier; 0 for a language model.
    """
    if labels and loss == "npo":
        return {"beta": 1.0}  # at 0.1 a row is let go some ten nats down, where a label is known to be wrong
    if labels and loss == "gradient_difference":
        return {"limit": round(math.log(labels), 4)}  # a guess
    return {}


def _share_of(state: RunState) -> float:
    """A share of the norm of the adapter, of few digits: it goes into a configuration."""
    norms = [float(vector_norm(tensor.double())) for tensor in state.adapter.tensors().values()]
    return float(f"{SHARE * math.hypot(*norms):.3g}")
