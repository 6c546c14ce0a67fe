"""The framework's half of an aggregation: whatever every strategy would otherwise repeat."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.cohort import Cohort
from fedlora.errors import ConfigError, RoundError
from fedlora.protocol import ClientInfo


def apply_delta(received: AdapterState, delta: Mapping[str, Tensor]) -> AdapterState:
    """The client's adapter after training: received plus delta; parts that did not travel stay."""
    flat = received.tensors()
    return AdapterState.from_tensors({name: flat[name] + delta[name] if name in delta else flat[name] for name in flat})


def make_delta(received: AdapterState, trained: AdapterState, send: frozenset[str]) -> dict[str, Tensor]:
    """Trained minus received for the parts in ``send``, by tensor name."""
    before, after = received.tensors(), trained.tensors()
    return {name: after[name] - before[name] for name in after if part_of(name) in send}


def part_of(name: str) -> str:
    """``A``, ``B``, ``C``, ``frozen.A``, ``frozen.B`` or ``dense`` for a tensor name of ``AdapterState.tensors``."""
    path, _, part = name.rpartition(":")
    return part if path else "dense"


def combine(strategy: Strategy, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
    """Aggregate with normalised weights and in client order, whatever order updates came in.

    Raises:
        RoundError: if no update has any weight.
        ConfigError: if what comes back is not an ``Aggregate``.
    """
    pending = Cohort.of(updates).pending
    total = sum(update.weight for update in pending)
    if not total > 0 and (pending or not strategy.traits.private):
        raise RoundError(f"round {ctx.round}: no update carries any weight ({len(pending)} admitted)")
    ordered = sorted((p for p in pending if p.weight > 0), key=lambda p: p.client.id)
    outcome = strategy.aggregate(Cohort([replace(p, weight=p.weight / total) for p in ordered]), ctx, state)
    if not isinstance(outcome, Aggregate):
        came = type(outcome).__name__
        raise ConfigError(f"strategy: aggregate of {strategy.name} returned {came}; return Aggregate(adapter, state)")
    return outcome


def hand_out(
    strategy: Strategy, client: ClientInfo, ctx: RoundContext, state: State, fresh: AdapterState
) -> AdapterState:
    """The adapter a client receives, with pairs that could never learn again given a fresh row of A.

    Args:
        client: at the rank it was planned at.
        ctx: its ``adapter`` is revived already, so that every client's fresh rows are the same ones.
        fresh: an initial adapter at the global rank.
    """
    return ranks.revive(strategy.redistribute(ctx.adapter, client, ctx, state), fresh)


def serve_ranks(strategy: Strategy, ranks: Mapping[str, int], rank: int) -> tuple[dict[str, int], int]:
    """The ranks a federation trains at under this strategy.

    A strategy that needs equal ranks gets everyone at the smallest one: what each client can afford, and the
    usual way such a rule is compared with those for mixed ranks.

    Args:
        ranks: rank of every client, as configured.
        rank: of the global adapter, as configured.

    Returns:
        Rank of every client, and of the global adapter.
    """
    if strategy.traits.mixed_ranks:
        return dict(ranks), rank
    smallest = min(ranks.values())
    return dict.fromkeys(ranks, smallest), smallest
