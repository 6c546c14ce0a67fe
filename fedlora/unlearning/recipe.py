"""How to forget, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.config import ForgettingConfig
from fedlora.errors import ConfigError
from fedlora.unlearning.forget_losses import FORGET_LOSSES


@dataclass(frozen=True)
class Recipe:
    """How to forget.

    Attributes:
        steps: of AdamW at a constant ``learning_rate``.
        max_norm: of the change of all trained tensors together, in effective units (B times the scaling). There is
            no default, since it goes with the size of the adapter; infinity is no bound, for comparisons only.
        loss: one of ``FORGET_LOSSES``.
        options: of the loss.
        retain_weight: of the loss on the retain rows, above 0.
        batch_size: rows of either kind per step.

    Raises:
        ConfigError: for a value out of its range.
    """

    steps: int
    learning_rate: float
    max_norm: float
    loss: str = "npo"
    options: Mapping[str, Any] = field(default_factory=dict)
    retain_weight: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            if not getattr(self, key) >= 1:
                raise ConfigError(f"unlearning: {key} must be at least 1, not {getattr(self, key)}")
        for key in ("learning_rate", "retain_weight"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"unlearning: {key} must be a number above 0, not {getattr(self, key)}")
        if not self.max_norm > 0:
            raise ConfigError(f"unlearning: max_norm must be above 0, not {self.max_norm}")


def recipe_of(asked: ForgettingConfig) -> Recipe:
    """What a configuration says of how to forget.

    Raises:
        ConfigError: an unknown loss, or options it does not take.
    """
    FORGET_LOSSES.create(asked.loss, **asked.options)
    how = asked.model_dump(include={"steps", "learning_rate", "max_norm", "loss", "options"})
    return Recipe(**how, retain_weight=asked.retain_weight, batch_size=asked.batch_size)
