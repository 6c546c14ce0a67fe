"""Means of the products: ``flexlora``."""

from collections.abc import Sequence

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import mean_update
from fedlora.aggregation.base import STRATEGIES, Aggregate, Contribution, RoundContext, State, Strategy


@STRATEGIES.register("flexlora")
class FlexLoRA(Strategy):
    """The best rank-r approximation of the exact mean update; each client gets the best at its own rank.

    The mean is kept as a stack of factors and truncated by QR and a small SVD, never multiplied out.
    """

    name = "flexlora"
    equation = "B A = SVD_r(sum_k w_k B_k A_k);  client k receives SVD_{r_k}(B A)"
    source = "FlexLoRA (Bai et al., 2024, arXiv 2402.11505)"

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        mean = mean_update([u.trained for u in updates], [u.weight for u in updates])
        return Aggregate(mean.map(lambda stack: ranks.resize(stack, ctx.rank)), state)
