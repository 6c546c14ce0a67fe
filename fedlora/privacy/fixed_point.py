"""Real numbers as integers modulo 2**64, where sums are exact in any order and a mask can hide a number perfectly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ring: TypeAlias = npt.NDArray[np.uint64]
Reals: TypeAlias = npt.NDArray[np.float64]
MOST_WEIGHT = 1 << 32  # of a round; beyond, a step would no longer be small beside float32


@dataclass(frozen=True)
class FixedPoint:
    """Weighted numbers in the ring, for sums whose weights are whole numbers of at least 1.

    Attributes:
        clip: numbers beyond -clip and clip are cut to these.
        total: the most that the weights of a sum come to, up to MOST_WEIGHT. No sum wraps around below it.
    """

    clip: float
    total: int

    @property
    def bits(self) -> int:
        """A number of ``clip`` at weight 1 is ``2**bits`` steps. One bit stays for the sign and one for rounding."""
        return 62 - self.total.bit_length()

    @property
    def error(self) -> float:
        """The most by which a weighted mean is off the mean of the cut numbers: half a step, and float64's rounding."""
        return self.clip * (2.0 ** -(self.bits + 1) + 2.0**-50)

    def encode(self, numbers: Reals, weight: int) -> Ring:
        """``weight`` times each number, in steps."""
        steps = np.clip(numbers / self.clip, -1.0, 1.0) * (float(weight) * 2.0**self.bits)
        return np.rint(steps).astype(np.int64).view(np.uint64)

    def mean(self, total: Ring, weight: int) -> Reals:
        """The weighted mean, from a sum of what ``encode`` gave and the sum of its weights."""
        return total.view(np.int64).astype(np.float64) * (self.clip / (float(weight) * 2.0**self.bits))

    def within(self, total: Ring, weight: int, clients: int) -> bool:
        """Whether a sum is one that so many clients can have come to; what a mask is left on hardly ever is."""
        most = weight * 2**self.bits + clients
        return bool((np.abs(total.view(np.int64).astype(np.float64)) <= most).all())
