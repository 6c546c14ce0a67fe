"""How well two samples of scores can be told apart. Plain statistics: no model is seen here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.errors import VerificationError

_EXACT = 100_000  # products of sample sizes up to which the p value is counted rather than approximated: 0.1 s


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Probability that a member scores higher than another, ties counting one half (Mann-Whitney).

    Args:
        members: scores of rows that may have been trained on; higher means known better.
        others: scores of rows that were not.

    Returns:
        1/2 where scores tell nothing. Far below is as telling as far above: the rows were forgotten too thoroughly.

    Raises:
        VerificationError: for an empty sample, or a score that is not a number.
    """
    found, rest = _sample(members, "members"), _sample(others, "others")
    below = np.searchsorted(rest, found, "left").sum() + np.searchsorted(rest, found, "right").sum()
    return float(below) / (2 * len(found) * len(rest))


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """The two-sample test.

    Attributes:
        statistic: the largest distance between the two distribution functions, 0 to 1.
        p: of a distance at least as large between two samples of one distribution.
        n, m: sizes of the samples.
    """

    statistic: float
    p: float
    n: int
    m: int


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> KolmogorovSmirnov:
    """Two-sample, two-sided; p is exact up to n * m = 100,000, and too large rather than too small with ties.

    Raises:
        VerificationError: for an empty sample, or a score that is not a number.
    """
    left, right = _sample(one, "the first sample"), _sample(other, "the second sample")
    n, m = len(left), len(right)
    pooled = np.concatenate([left, right])
    # both steps as multiples of 1 / (n * m): no rounding decides which of two equal distances is larger
    steps = np.searchsorted(left, pooled, "right") * m - np.searchsorted(right, pooled, "right") * n
    largest = int(np.abs(steps).max())
    p = _exact_p(largest, n, m) if n * m <= _EXACT else _asymptotic_p(largest / (n * m), n, m)
    return KolmogorovSmirnov(largest / (n * m), p, n, m)


def exposure(canary: float, references: Sequence[float]) -> float:
    """log2 of the number of candidates over the rank of the canary's loss among them, ties counting one half.

    Args:
        canary: loss of a made-up row that was trained on.
        references: losses of rows drawn like it that were not.

    Returns:
        Bits: 0 for the least likely of all, log2(n + 1) for the most likely, about 1.4 on average for a row that
        was never seen.

    Raises:
        VerificationError: without references, or for a loss that is not a number.

    Source: The Secret Sharer (Carlini et al., 2019), section 4.2, the rank taken among sampled candidates.
    """
    rest = _sample(references, "references")
    if math.isnan(canary):
        raise VerificationError("the canary's loss is not a number")
    below, upto = np.searchsorted(rest, canary, "left"), np.searchsorted(rest, canary, "right")
    return math.log2(len(rest) + 1) - math.log2(1 + (below + upto) / 2)


def auc_error(n: int, m: int) -> float:
    """Standard error of the difference of two independent ``auc`` of such samples that nothing tells apart."""
    return math.sqrt(2 * (n + m + 1) / (12 * n * m))


def ks_critical(n: int, m: int) -> float:
    """Kolmogorov-Smirnov distance that chance exceeds once in twenty times, for all but the smallest samples."""
    return 1.358 * math.sqrt((n + m) / (n * m))


def share_error(count: int, n: int) -> float:
    """Standard error of the difference of two independent shares such as ``count`` of ``n``.

    One success and one failure are added, so that a share of 0 or 1 is not taken for certain.
    """
    share = (count + 1) / (n + 2)
    return math.sqrt(2 * share * (1 - share) / n)


def _sample(scores: Sequence[float], name: str) -> np.ndarray:
    array = np.sort(np.asarray(scores, dtype=np.float64))
    if not len(array):
        raise VerificationError(f"{name}: no scores; nothing can be told from an empty set")
    if np.isnan(array[-1]):  # sorted last
        raise VerificationError(f"{name}: a score is not a number; did the model diverge?")
    return array


def _exact_p(largest: int, n: int, m: int) -> float:
    """Share of the orders of n + m values in which the distance reaches ``largest`` / (n * m).

    Source: Hodges, 1958, the inside method: paths of the pooled order that stay below the distance.
    """
    inside = [float(j * n < largest) for j in range(m + 1)]
    for i in range(1, n + 1):
        stay = i / (i + m)
        inside[0] = inside[0] * stay if i * m < largest else 0.0
        for j in range(1, m + 1):
            inside[j] = inside[j] * stay + inside[j - 1] if abs(i * m - j * n) < largest else 0.0
    return min(1.0, max(0.0, 1.0 - inside[m]))


def _asymptotic_p(statistic: float, n: int, m: int) -> float:
    scaled = statistic * math.sqrt(n * m / (n + m))
    if scaled < 0.2:  # the series converges slowly there, and p is 1 to twelve digits
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))))
