"""A stored round once more, without the target: containment by re-aggregation, and FedEraser's calibration.

The level is A. The other clients of later rounds started from an adapter that the target had shaped: subtraction
contains, and only replay erases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.cohort import Cohort, Pending
from fedlora.aggregation.combine import combine
from fedlora.aggregation.staleness import moved_to
from fedlora.aggregation.wrapper import Wrapper
from fedlora.errors import AdapterError, ConfigError, RoundError
from fedlora.protocol import ClientInfo


def aggregate_without(
    targets: Collection[str], strategy: Strategy, updates: Sequence[Contribution], ctx: RoundContext, state: State
) -> Aggregate:
    """What ``combine`` gives for a stored round whose targets never took part.

    Targets are no members of ``ctx`` either: what is counted per registered client counts the others. A target that was
    not asked in this round changes nothing else.

    Args:
        targets: client ids.
        strategy: of the run.
        updates: as the strategy saw them; a ``Cohort`` stays one, and the targets' updates are never loaded.
        ctx: of the round.
        state: before the round. It must be free of the targets already: that of a re-aggregated round before, or
            from before their first.

    Raises:
        RoundError: if nobody else took part.
        ConfigError: if the strategy cannot do without a target.
    """
    if needed := sorted(set(targets) & set(strategy.required)):
        raise ConfigError(
            f"strategy: {strategy.name} needs {', '.join(needed)} in every round; it cannot be taken out of one"
        )
    pending = Cohort.of(updates).pending
    others = Cohort([update for update in pending if update.client.id not in targets])
    if not len(others):
        raise RoundError(
            f"round {ctx.round}: without {', '.join(sorted(targets))} none of its {len(pending)} updates is left;"
            " leave the round out"
        )
    members = [member for member in ctx.members if member.id not in targets]
    return combine(strategy, others, replace(ctx, members=members), state)


def carrying(strategy: Strategy, start: Callable[[ClientInfo], AdapterState]) -> Strategy:
    """A strategy whose rule takes every update for the same change of what its client would be sent now.

    Stored updates are adapters that grew from the model with the target: to average those again would bring the target
    back with every one of them. Wrappers see the updates as they were, so that clipping shortens and krum compares
    what clients did. An update whose client would be sent what it was sent stays as it is, bit for bit; so does one
    that came late, whose change the ``staleness`` wrapper carries over itself.

    Args:
        strategy: its rule has a fixed basis or takes mixed ranks: products are added where the basis is another one.
        start: what a client, at the rank it was planned at, would be sent at the start of the round.

    Raises:
        ConfigError: if the rule can be given neither.
    """
    if isinstance(strategy, Wrapper):
        outer = copy.copy(strategy)
        outer.inner = carrying(strategy.inner, start)
        return outer
    if not strategy.traits.fixed_gauge and not strategy.traits.mixed_ranks:
        raise ConfigError(f"strategy: {strategy.name} can only take a change of the adapter that it was made to")
    return _Carrying(strategy, start)


class _Carrying(Wrapper):
    """Keeps nothing of its own: its state is that of the rule."""

    def __init__(self, rule: Strategy, start: Callable[[ClientInfo], AdapterState]):
        super().__init__(rule)
        self.name, self._start = rule.name, start

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        moved = Cohort([self._moved(pending) for pending in Cohort.of(updates).pending])
        return self.inner.aggregate(moved, ctx, state)

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        return self.inner.redistribute(adapter, client, ctx, state)

    def _moved(self, pending: Pending) -> Pending:
        start, fixed = self._start(pending.client), self.traits.fixed_gauge

        def load() -> Contribution:
            update = pending.load()
            if update.staleness or _equal(start, update.received):
                return update
            return replace(update, trained=moved_to(start, update, fixed), received=start)

        # only what nobody has touched has one, and that is never late
        change = pending.change
        return replace(pending, load=load, change=(lambda: (start, change()[1])) if change and fixed else None)


def _equal(left: AdapterState, right: AdapterState) -> bool:
    mine, theirs = left.tensors(), right.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def calibrated(stored: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``||stored|| * fresh / ||fresh||``, tensor by tensor: how far a client went then, and where it would go now.

    Args:
        stored: a client's delta by tensor name, see ``make_delta``, from the contribution log.
        fresh: its delta after a few steps from the adapter without the target, in the same names and shapes. How
            long a factor is depends on its basis, so both adapters should have come from one start.

    Returns:
        One tensor per name, in the precision of ``fresh``; zeros where the fresh one has no direction.

    Raises:
        AdapterError: if names or shapes differ.

    Source: FedEraser (Liu et al., 2021, arXiv 2012.13891).
    """
    if odd := sorted(set(stored) ^ set(fresh)):
        where = "stored" if odd[0] in stored else "fresh"
        raise AdapterError(f"{odd[0]}: only the {where} delta has it ({len(odd)} such tensors); send the same parts")
    for name, tensor in stored.items():
        if tensor.shape != fresh[name].shape:
            came, expected = list(fresh[name].shape), list(tensor.shape)
            raise AdapterError(f"{name}: the fresh delta is {came}, the stored one {expected}; train at the same rank")
    return {name: _lengthened(tensor, vector_norm(stored[name].double())) for name, tensor in fresh.items()}


def _lengthened(tensor: Tensor, length: Tensor) -> Tensor:
    """A tensor of this norm in the same direction; 0 stays 0."""
    size = vector_norm(tensor.double())
    return (tensor * (length / size)).to(tensor.dtype) if size > 0 else tensor.clone()
