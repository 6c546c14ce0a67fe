"""What clients measure and send beside their factors, as the server adds it up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.aggregation.base import Contribution, State, Strategy
from fedlora.aggregation.coordinate import Coordinatewise
from fedlora.aggregation.robust import Reweighting
from fedlora.aggregation.wrapper import part
from fedlora.errors import ConfigError


def mean_extras(updates: Sequence[Contribution], channel: str) -> dict[str, Tensor]:
    """Weighted means of the extra tensors under ``channel/``, without the prefix.

    Updates that lack a tensor, or have no weight, are no part of its mean.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for update in updates:
        for name, tensor in update.extras.items():
            if name.startswith(f"{channel}/") and update.weight > 0:
                key = name.removeprefix(f"{channel}/")
                sums[key] = sums.get(key, torch.zeros_like(tensor)) + update.weight * tensor
                weights[key] = weights.get(key, 0.0) + update.weight
    return {key: total / weights[key] for key, total in sums.items()}


def require_watched(name: str, inner: Strategy, what: str, instead: str) -> None:
    """Raise ``ConfigError`` where a defence inside would not see what ``name`` takes from clients.

    Args:
        what: the extra tensors, in words.
        instead: what to do about it.
    """
    if deaf := next((layer for layer in inner.layers() if isinstance(layer, Reweighting | Coordinatewise)), None):
        raise ConfigError(
            f"strategy: {deaf.name} does not look at {what}, which a bad client would send around it; {instead}"
        )


def tensors_of(state: State, name: str) -> dict[str, Tensor]:
    """The tensors of a part of a state; none before the first round."""
    return {key: value for key, value in part(state, name).items() if isinstance(value, Tensor)}
