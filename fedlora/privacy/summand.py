"""What a client puts into a secure sum, and what comes out of it: the mean of all changes, and of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import SecureSumError
from fedlora.privacy.fixed_point import FixedPoint, Ring

LOSSES = ("loss", "first_loss")  # weighted means
COUNTS = ("steps", "tokens", "rows", "dropped_rows")  # sums
CUT = "cut_values"  # how many values of the changes were beyond the clip: a sum as well
LARGEST_LOSS = 1024.0
_BESIDE = len(LOSSES) + 1 + len(COUNTS) + 1  # losses, the weight, counts, and how many values were cut
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Summed:
    """What the server learns of a round.

    Attributes:
        delta: weighted mean of the changes, by tensor name, in float32.
        losses: weighted means.
        counts: sums.
    """

    delta: Mapping[str, Tensor]
    losses: Mapping[str, float]
    counts: Mapping[str, int]


def count_numbers(shapes: Shapes) -> int:
    """Numbers that one client sends for tensors of these shapes."""
    return sum(map(math.prod, shapes.values())) + _BESIDE


def to_ring(delta: Mapping[str, Tensor], metrics: Mapping[str, float], weight: int, clip: float, total: int) -> Ring:
    """One client's numbers before they are masked: its change and losses times its weight, the weight, and counts.

    Args:
        weight: whole, of at least 1; secret like the rest.
        clip: what values of the change are cut to.
        total: the most that all weights of the sum come to.

    Raises:
        SecureSumError: if something is not finite: cut to size it would not be noticed.
    """
    values = [tensor.detach().double().cpu().reshape(-1).numpy() for _, tensor in sorted(delta.items())]
    numbers = np.concatenate([*values, np.empty(0)])
    losses = np.array([metrics.get(name, 0.0) for name in LOSSES])
    if not (np.isfinite(numbers).all() and np.isfinite(losses).all()):
        raise SecureSumError("its change or its loss has values that are not finite")
    counts = [weight, *(int(metrics.get(name, 0)) for name in COUNTS), int((np.abs(numbers) > clip).sum())]
    return np.concatenate(
        [
            FixedPoint(clip, total).encode(numbers, weight),
            FixedPoint(LARGEST_LOSS, total).encode(losses, weight),
            np.array(counts, np.int64).view(np.uint64),
        ]
    )


def from_ring(opened: Ring, shapes: Shapes, clients: int, clip: float, total: int) -> Summed:
    """Inverse of ``to_ring``, for the sum over so many clients.

    Raises:
        SecureSumError: if no such sum can come from clients that play by the rules.
    """
    size = count_numbers(shapes) - _BESIDE
    numbers, losses, tail = np.split(opened, [size, size + len(LOSSES)])
    weight, *counts, cut = (int(number) for number in tail)
    of_changes, of_losses = FixedPoint(clip, total), FixedPoint(LARGEST_LOSS, total)
    sound = clients <= weight <= total and all(number < 1 << 62 for number in (*counts, cut))
    if not (sound and of_changes.within(numbers, weight, clients) and of_losses.within(losses, weight, clients)):
        raise SecureSumError("what was opened is no sum of honest answers; a client's shares or numbers are wrong")
    flat, delta, start = torch.from_numpy(of_changes.mean(numbers, weight)).float(), {}, 0
    for name, shape in sorted(shapes.items()):
        delta[name] = flat[start : start + math.prod(shape)].reshape(shape).clone()
        start += math.prod(shape)
    means = of_losses.mean(losses, weight)
    return Summed(
        delta,
        {name: float(mean) for name, mean in zip(LOSSES, means, strict=True)},
        dict(zip((*COUNTS, CUT), (*counts, cut), strict=True)),
    )
