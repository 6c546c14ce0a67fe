"""Taking a target's updates out of an adapter by arithmetic: ``adapter - strength * task vector``.

The level is A. It needs no data and no training, and it is blind: what the others built upon the target's updates
stays, and what they share with it is taken from them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.adapter.algebra import accumulate, norm, scaled, stack
from fedlora.adapter.rank import resize
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import Contribution, RoundContext, Strategy
from fedlora.aggregation.cohort import Cohort
from fedlora.aggregation.wrapper import Wrapper
from fedlora.errors import AdapterError, ConfigError, RoundError


@dataclass(frozen=True, eq=False)
class Negated:
    """An adapter after negation.

    Attributes:
        adapter: every module at the rank it had, in balanced factors: the basis is a new one, so whatever a strategy
            or an optimizer keeps in coordinates of the old one is void.
        error: what did not fit the rank: Frobenius norm of all modules together, as a share of the exact result's.
        share: norm of what was taken away, dense tensors included, as a share of the adapter's.
    """

    adapter: AdapterState
    error: float
    share: float


def entered(strategy: Strategy, updates: Sequence[Contribution], ctx: RoundContext) -> Sequence[Contribution]:
    """A round's updates as its rule was given them: with their shares, after clipping and weighing.

    Args:
        updates: as they were sent, the whole round: what clip or krum makes of one depends on the others.
    """
    pending = sorted((p for p in Cohort.of(updates).pending if p.weight > 0), key=lambda p: p.client.id)
    total = sum(p.weight for p in pending)
    given: Sequence[Contribution] = Cohort([replace(p, weight=p.weight / total) for p in pending])
    for layer in strategy.layers():
        if isinstance(layer, Wrapper):
            given = layer.prepare(given, ctx)
    return given


def task_vector(updates: Sequence[Contribution]) -> AdapterState:
    """``sum_k weight_k (trained_k - received_k)`` in update space, as a stack of rank ``sum 2 r_k``.

    Args:
        updates: the target's, at least one; of any rounds and ranks. Weights are used as they are: its shares of
            its rounds give what entered the global adapter.

    Returns:
        Modules with B [out, R] and A [R, in]; dense tensors as plain differences.

    Raises:
        RoundError: without updates.
        AdapterError: for a module with a core, which has no vector in two factors that a strategy could go on with.

    Source: task arithmetic (Ilharco et al., 2023, arXiv 2212.04089).
    """
    if not updates:
        raise RoundError("negation: no update of the target is at hand; keep a contribution log, or replay instead")
    terms: list[dict[str, LowRank]] = []
    dense: dict[str, Tensor] = {}
    for update in updates:
        for state, sign in ((update.trained, 1.0), (update.received, -1.0)):
            _refuse_cores(state, f"client {update.client.id}")
            # what is frozen beside both cancels
            terms.append({path: scaled(one, sign * update.weight) for path, one in state.modules.items()})
            accumulate(dense, state.dense, sign * update.weight)
    return AdapterState(stack(terms), dense)


def negate(adapter: AdapterState, updates: Sequence[Contribution], strength: float = 1.0) -> Negated:
    """``adapter - strength * task_vector(updates)``, brought back to the ranks of the adapter.

    ``B @ A`` is formed only where ``truncate`` does. Memory is that of the target's factors, twice.

    Args:
        adapter: the global one; what is ``frozen`` beside it stays.
        updates: the target's, see ``task_vector``.
        strength: above 0; 1 takes away what was added.

    Raises:
        ConfigError: if strength is not a number above 0.
        RoundError, AdapterError: as ``task_vector``, or if an update is of another adapter.
    """
    if not 0 < strength < math.inf:
        raise ConfigError(f"negation: strength must be a number above 0, not {strength}")
    _refuse_cores(adapter, "the adapter")
    updates = list(updates)  # looked at twice: loaded once
    for update in updates:
        update.trained.check_like(adapter, f"client {update.client.id}")
    vector = task_vector(updates)
    modules: dict[str, LowRank] = {}
    lost = kept = 0.0
    for path, now in adapter.modules.items():
        exact = stack([{path: now}, {path: scaled(vector.modules[path], -strength)}])[path]
        modules[path] = resize(exact, now.rank)
        lost += norm(AdapterState(stack([{path: exact}, {path: scaled(modules[path], -1.0)}]))) ** 2
        kept += norm(AdapterState({path: exact})) ** 2
    dense = {name: tensor - strength * vector.dense[name] for name, tensor in adapter.dense.items()}
    whole = norm(AdapterState(adapter.modules, adapter.dense))
    return Negated(
        AdapterState(modules, dense, adapter.frozen),
        math.sqrt(lost / kept) if kept else 0.0,
        strength * norm(vector) / whole if whole else 0.0,
    )


def _refuse_cores(state: AdapterState, whose: str) -> None:
    for path, update in state.modules.items():
        if update.C is not None:
            raise AdapterError(
                f"{path}: {whose} has a core between fixed factors, and negation would give the factors a new basis;"
                " use subtraction or replay"
            )
