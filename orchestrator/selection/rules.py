"""The plain rules of selection."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from orchestrator.selection.base import SELECTORS, Draw, Selector


@SELECTORS.register("uniform")
class Uniform(Selector):
    """Everyone with the same chance, without replacement."""

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        size = min(draw.count, len(candidates))
        return _ids(candidates, np.random.default_rng(draw.seed).choice(len(candidates), size=size, replace=False))


@SELECTORS.register("weighted")
class Weighted(Selector):
    """By number of examples, without replacement."""

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        return _ids(candidates, race(_rows(candidates), draw.count, np.random.default_rng(draw.seed)))


@SELECTORS.register("round_robin")
class RoundRobin(Selector):
    """Whoever was asked least often, then in member order."""

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        turns = ((draw.record(client).asked, i) for i, client in enumerate(candidates))
        return _ids(candidates, [i for _, i in heapq.nsmallest(draw.count, turns)])


@SELECTORS.register("poisson")
class Poisson(Selector):
    """Each on its own with chance ``count / registered``: what privacy accounting by sampling assumes.

    The number of clients varies from round to round, and may be 0.
    """

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        chance = draw.count / max(draw.registered, 1)
        return _ids(candidates, np.flatnonzero(np.random.default_rng(draw.seed).random(len(candidates)) < chance))


@SELECTORS.register("power_of_choice")
class PowerOfChoice(Selector):
    """Of ``d`` clients drawn by number of examples, those with the highest loss; never asked ones first.

    The loss is the one a client last reported, as in the paper's variant that asks for none in advance. A client that
    was asked and reported nothing comes last.

    Source: Cho et al., 2020 (arXiv 2010.01243), pi_rpow-d.

    Args:
        d: clients drawn; default twice as many as are asked, and never fewer than these.
    """

    def __init__(self, d: int | None = None):
        if d is not None and (isinstance(d, bool) or not isinstance(d, int) or d < 1):
            raise ConfigError(f"selection: power_of_choice.d is a whole number of at least 1, not {d!r}")
        self.d = d

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        size = max(draw.count, 2 * draw.count if self.d is None else self.d)
        drawn = race(_rows(candidates), size, np.random.default_rng(draw.seed))

        def loss(i: int) -> float:
            record = draw.record(candidates[i])
            if record.asked == 0:
                return math.inf
            return -math.inf if record.loss is None else record.loss

        # equals stay as they were drawn: member order would favour the first members
        return _ids(candidates, sorted(drawn.tolist(), key=loss, reverse=True)[: draw.count])


def race(weights: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Indices drawn one after the other, each by weight among those left; at most ``count``, in the order drawn.

    Weights of 0 come after all others.

    Source: the exponential keys of Efraimidis and Spirakis, 2006, "Weighted random sampling with a reservoir".
    """
    keys = draw.exponential(size=len(weights)) / np.maximum(weights, 1e-300)
    return np.argsort(keys, kind="stable")[:count]


def _rows(candidates: Sequence[ClientInfo]) -> np.ndarray:
    return np.array([client.num_examples for client in candidates], dtype=float)


def _ids(candidates: Sequence[ClientInfo], chosen: Iterable[int]) -> list[str]:
    """In member order."""
    return [candidates[i].id for i in sorted(int(i) for i in chosen)]
