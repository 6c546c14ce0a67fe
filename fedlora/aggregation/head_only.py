"""The baseline without adapters: features stay as the base has them, and only the head learns."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.adapter.algebra import mean_dense
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.averaging import Nested
from fedlora.aggregation.base import STRATEGIES, Aggregate, Contribution, RoundContext, State, Traits
from fedlora.aggregation.cohort import weights_of
from fedlora.aggregation.traffic import Traffic
from fedlora.protocol import ClientInfo, TrainPlan


@STRATEGIES.register("head_only")
class HeadOnly(Nested):
    """What is trained in full, the head of a classifier, is averaged; the low-rank pairs stay as they started.

    From B = 0 the features are those of the base for every client, whatever its rank.
    """

    name = "head_only"
    equation = "h = sum_k w_k h_k over the tensors trained in full;  B and A fixed"
    source = "linear probing (Alain & Bengio, 2016, arXiv 1610.01644), averaged as in FedAvg"
    traits = Traits(linear=True, fixed_gauge=True, head_only=True)
    traffic = Traffic(up="0")

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        parts = frozenset({"dense"})
        return TrainPlan(client.rank, train=parts, send=parts)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        dense = mean_dense((update.trained for update in updates), weights_of(updates))
        return Aggregate(AdapterState(ctx.adapter.modules, dense), state)
