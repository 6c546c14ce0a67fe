"""Means of the factors: ``fedit``, ``zero_pad``, ``rbla`` and ``hetlora``.

All of them average B and A separately. The product of two means is not the mean of the products; the
error is ``sum_k w_k (B_k - mean B)(A_k - mean A)``, second order in how far clients drift apart.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import accumulate, mean_dense, mean_factors, norm
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import STRATEGIES, Aggregate, Contribution, RoundContext, State, Strategy, Traits
from fedlora.aggregation.cohort import Cohort, weights_of
from fedlora.aggregation.combine import apply_delta
from fedlora.errors import ConfigError, RankError
from fedlora.protocol import ClientInfo, Method, TrainPlan


@STRATEGIES.register("fedit")
class FedIT(Strategy):
    """FedAvg on the factors. Every client needs the global rank."""

    name = "fedit"
    equation = "B = sum_k w_k B_k,  A = sum_k w_k A_k"
    source = "FedIT (Zhang et al., 2023, arXiv 2305.05644)"
    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=False)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        return Aggregate(equal_mean(self.name, updates, ctx), state)


class Nested(Strategy):
    """Clients of rank r hold the first r components of one shared basis."""

    traits = Traits(linear=True, fixed_gauge=True)

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        return adapter.map(lambda update: ranks.first(update, client.rank))


@STRATEGIES.register("zero_pad")
class ZeroPad(Nested):
    """Pad every client to the global rank with zeros, then average the factors.

    Components that few clients have are diluted by the zeros of the others.
    """

    name = "zero_pad"
    equation = "B = sum_k w_k [B_k, 0],  A = sum_k w_k [A_k; 0];  client k receives the first r_k components"
    source = "the padding baseline of HetLoRA (Cho et al., 2024, arXiv 2401.06432)"

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        return Aggregate(padded_mean(updates, ctx.rank), state)


@STRATEGIES.register("rbla")
class RBLA(Nested):
    """Average every component over the clients that have it; what nobody has this round stays as it was."""

    name = "rbla"
    equation = "row i of A, column i of B: sum_k w_k x_k / sum_k w_k over the clients with r_k > i"
    source = "RBLA (Chen et al., 2024, arXiv 2408.08699)"

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        return Aggregate(component_mean(updates, ctx), state)


@STRATEGIES.register("hetlora")
class HetLoRA(Nested):
    """Zero-padding with weights by the norm of what each client learned, and ranks that shrink.

    Clients are penalised for their last components; where that made them smaller, the client's rank is cut
    to ``gamma`` of what it was, for good. Norms replace the weights of the configuration.

    Args:
        gamma: share of the components that is not penalised; at least the last one is.
        penalty: factor in front of the norm of the last components; 0 leaves the loss alone.
        prune: whether ranks shrink.
    """

    name = "hetlora"
    equation = (
        "w_k ~ ||B_k A_k||_F;  B = sum_k w_k [B_k, 0],  A = sum_k w_k [A_k; 0];  r_k <- gamma r_k if its tail shrank"
    )
    source = "HetLoRA (Cho et al., 2024, arXiv 2401.06432), eqs. 3 to 5"
    traits = Traits(fixed_gauge=True, weighted=False)

    def __init__(self, gamma: float = 0.99, penalty: float = 0.005, prune: bool = True):
        if not 0 < gamma < 1 or penalty < 0:
            raise ConfigError(f"strategy: hetlora needs 0 < gamma < 1 and penalty >= 0, not {gamma} and {penalty}")
        self.gamma, self.penalty, self.prune = gamma, penalty, prune

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        rank = min(client.rank, _number(state.get(client.id, client.rank)))
        method = Method.of("tail_penalty", gamma=self.gamma, weight=self.penalty)
        return TrainPlan(rank, methods=(method,) if self.penalty and self._kept(rank) < rank else ())

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        sizes = [norm(AdapterState(u.trained.modules)) if u.weight > 0 else 0.0 for u in updates]
        if not sum(sizes) > 0:
            sizes = [u.weight for u in updates]
        shares = [size / sum(sizes) for size in sizes]
        adapter = mean_factors((_padded(u.trained, ctx.rank) for u in updates), shares)
        kept = dict(state)
        if self.prune:
            for update in updates:
                if update.weight > 0 and self._tail_shrank(update):
                    kept[update.client.id] = self._kept(update.client.rank)
        ranks_now = [_number(kept.get(u.client.id, u.client.rank)) for u in updates]
        return Aggregate(adapter, kept, {"mean_rank": sum(ranks_now) / len(ranks_now)})

    def _kept(self, rank: int) -> int:
        return max(1, int(self.gamma * rank))

    def _tail_shrank(self, update: Contribution) -> bool:
        kept = self._kept(update.client.rank)
        before, after = (_tail(state, kept) for state in (update.received, update.trained))
        return kept < update.client.rank and after < before


def require_equal_ranks(name: str, updates: Sequence[Contribution], ctx: RoundContext) -> None:
    """Raise ``RankError``, naming the client, unless every update has the global rank."""
    for _ in equal_ranks(name, updates, ctx):
        pass


def equal_ranks(name: str, updates: Iterable[Contribution], ctx: RoundContext) -> Iterator[Contribution]:
    """The updates, each checked as ``require_equal_ranks`` does when its turn comes: one look at each is enough."""
    for update in updates:
        _require_rank(name, update.client, update.trained, ctx)
        yield update


def equal_mean(name: str, updates: Sequence[Contribution], ctx: RoundContext) -> AdapterState:
    """Weighted mean of the factors of clients that all have the global rank, checked as ``equal_ranks`` does.

    In a round it is the mean of what was received plus the mean of the deltas: what many received is added once,
    and no client's own adapter is made.
    """
    if not isinstance(updates, Cohort) or any(pending.change is None for pending in updates.pending):
        return mean_factors((u.trained for u in equal_ranks(name, updates, ctx)), weights_of(updates))
    starts: dict[int, tuple[AdapterState, float]] = {}
    moved: dict[str, Tensor] = {}
    for pending in updates.pending:
        assert pending.change is not None
        received, delta = pending.change()
        _require_rank(name, pending.client, received, ctx)
        accumulate(moved, delta, pending.weight)
        starts[id(received)] = received, starts.get(id(received), (received, 0.0))[1] + pending.weight
    return apply_delta(mean_factors(*zip(*starts.values(), strict=True)), moved)


def padded_mean(updates: Sequence[Contribution], rank: int) -> AdapterState:
    """Weighted mean of the factors after padding to ``rank`` with zeros."""
    return mean_factors((_padded(u.trained, rank) for u in updates), weights_of(updates))


def component_mean(updates: Sequence[Contribution], ctx: RoundContext) -> AdapterState:
    """Each component averaged over the clients that have it; others as in the global adapter."""
    # B^T and A have one row per component
    rows = {path: (torch.zeros_like(u.B.T), torch.zeros_like(u.A)) for path, u in ctx.adapter.modules.items()}
    mass = {path: torch.zeros(u.rank, 1, dtype=u.A.dtype) for path, u in ctx.adapter.modules.items()}
    for update in updates:
        for path, mine in update.trained.modules.items():
            B, A = rows[path]
            B[: mine.rank] += update.weight * mine.B.T
            A[: mine.rank] += update.weight * mine.A
            mass[path][: mine.rank] += update.weight
    modules = {}
    for path, current in ctx.adapter.modules.items():
        held, share = mass[path] > 0, mass[path].clamp(min=1e-30)
        B, A = rows[path]
        modules[path] = LowRank(
            torch.where(held, B / share, current.B.T).T.contiguous(), torch.where(held, A / share, current.A)
        )
    return AdapterState(modules, mean_dense((u.trained for u in updates), [u.weight for u in updates]))


def _require_rank(name: str, client: ClientInfo, adapter: AdapterState, ctx: RoundContext) -> None:
    for path, module in adapter.modules.items():
        if module.rank != ctx.rank:
            raise RankError(
                f"{path}: client {client.id} sent rank {module.rank} to {name}, which needs"
                f" equal ranks (global rank {ctx.rank}); use flexlora or fedex_het"
            )


def _padded(state: AdapterState, rank: int) -> AdapterState:
    return state.map(lambda update: ranks.pad(update, rank))


def _tail(state: AdapterState, kept: int) -> float:
    """Sum over modules of ||B's last columns|| times ||A's last rows||."""
    pairs = state.modules.values()
    return sum(float(torch.linalg.norm(u.B[:, kept:]) * torch.linalg.norm(u.A[kept:])) for u in pairs)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
