"""A stored round once more, without the target: containment by re-aggregation, and FedEraser's calibration.

The level is A. The other clients of later rounds started from an adapter that the target had shaped: subtraction
contains, and only replay erases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.linalg import vector_norm

from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.cohort import Cohort
from fedlora.aggregation.combine import combine
from fedlora.errors import AdapterError, ConfigError, RoundError


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
