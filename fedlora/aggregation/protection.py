"""Wrappers for streams of tasks: what keeps a client from unlearning earlier tasks.

The hooks themselves run in local training, see ``fedlora.continual.orthogonal``.
"""

from __future__ import annotations

from fedlora.aggregation.base import RoundContext, State, Strategy
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, described
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan


@WRAPPERS.register("o_lora")
class OLoRA(Wrapper):
    """The adapter of each task is pushed out of the directions that earlier tasks read from.

    It reads what was frozen from the base ledger, so nothing more travels; without a freeze it does nothing.

    Args:
        weight: of the penalty; 0 is plain training.
    """

    name = "o_lora"
    equation = "local loss + weight * sum over modules ||A Q||_F^2,  Q an orthonormal basis of the frozen rows"
    source = "O-LoRA (Wang et al., 2023, arXiv 2310.14152), with a basis in the place of the frozen A"

    def __init__(self, inner: Strategy, weight: float = 0.5):
        super().__init__(inner)
        if not weight >= 0:
            raise ConfigError(f"strategy: o_lora.weight must be at least 0, not {weight}")
        if inner.traits.patches_base or inner.traits.core or inner.traits.head_only:
            raise ConfigError(
                f"strategy: o_lora keeps a trained A out of what was frozen, and {described(inner)} patches the base in"
                " every round or trains no A; use flexlora, zero_pad or fedit"
            )
        self.weight = weight

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("o_lora", weight=self.weight)
