"""Means of the factors: ``fedit`` and ``zero_pad``.

Both average B and A separately. The product of two means is not the mean of the products; the
error is ``sum_k w_k (B_k - mean B)(A_k - mean A)``, second order in how far clients drift apart.
"""

from collections.abc import Sequence

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import mean_factors
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import (
    STRATEGIES,
    Aggregate,
    Contribution,
    RoundContext,
    State,
    Strategy,
    Traits,
)
from fedlora.errors import RankError
from fedlora.protocol import ClientInfo


@STRATEGIES.register("fedit")
class FedIT(Strategy):
    """FedAvg on the factors. Every client needs the global rank."""

    name = "fedit"
    equation = "B = sum_k w_k B_k,  A = sum_k w_k A_k"
    source = "FedIT (Zhang et al., 2023, arXiv 2305.05644)"
    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=False)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        for update in updates:
            for path, module in update.trained.modules.items():
                if module.rank != ctx.rank:
                    raise RankError(
                        f"{path}: client {update.client.id} sent rank {module.rank} to fedit, which needs"
                        f" equal ranks (global rank {ctx.rank}); use flexlora or zero_pad"
                    )
        return Aggregate(mean_factors([u.trained for u in updates], [u.weight for u in updates]), state)


@STRATEGIES.register("zero_pad")
class ZeroPad(Strategy):
    """Pad every client to the global rank with zeros, then average the factors.

    Components that few clients have are diluted by the zeros of the others.
    """

    name = "zero_pad"
    equation = "B = sum_k w_k [B_k, 0],  A = sum_k w_k [A_k; 0];  client k receives the first r_k components"
    source = "the padding baseline of HetLoRA (Cho et al., 2024, arXiv 2401.06432)"
    traits = Traits(linear=True, fixed_gauge=True)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        padded = [u.trained.map(lambda update: ranks.pad(update, ctx.rank)) for u in updates]
        return Aggregate(mean_factors(padded, [u.weight for u in updates]), state)

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        return adapter.map(lambda update: ranks.first(update, client.rank))
