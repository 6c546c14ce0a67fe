"""Wrappers for streams of tasks: what keeps clients from unlearning what was frozen.

The hooks themselves run in local training, see ``fedlora.continual``: ``orthogonal``, ``importance``, ``distillation``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.alternating import FFA
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.extras import mean_extras, require_watched, tensors_of
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, described, part
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
        if isinstance(inner.layers()[-1], FFA):
            raise ConfigError(
                "strategy: o_lora keeps a trained A out of what was frozen, and ffa trains no A; use inflora"
            )
        if inner.traits.patches_base or inner.traits.core or inner.traits.head_only:
            raise ConfigError(
                f"strategy: o_lora keeps a trained A out of what was frozen, and {described(inner)} patches the base in"
                " every round or trains no A; use flexlora, zero_pad or fedit"
            )
        self.traits = replace(inner.traits, protects=True)
        self.weight = weight

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("o_lora", weight=self.weight)


@WRAPPERS.register("lwf")
class LwF(Wrapper):
    """Clients go on giving the answers that the model gave when it was last frozen.

    Args:
        weight: of the distance between old and new answers, beside a loss of weight 1.
        temperature: above 1 for softer answers.
    """

    name = "lwf"
    equation = "local loss + weight * T^2 KL(answers of the frozen model || answers now), over earlier labels"
    source = "LwF (Li & Hoiem, 2016, arXiv 1606.09282)"

    def __init__(self, inner: Strategy, weight: float = 1.0, temperature: float = 2.0):
        super().__init__(inner)
        if not (weight >= 0 and temperature > 0):
            raise ConfigError(f"strategy: lwf needs weight >= 0 and temperature > 0, not {weight} and {temperature}")
        _require_freezable(self.name, inner)
        self.traits = replace(inner.traits, protects=True)
        self.weight, self.temperature = weight, temperature

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("lwf", weight=self.weight, temperature=self.temperature)


class Important(Wrapper):
    """Clients are kept from changing weights that earlier tasks depend on.

    Each measures, after training, what the present task depends on, as row and column sums of squared gradients; at a
    freeze the mean over the clients of the last round joins what was important before.

    Args:
        weight: of the penalty.
        samples: rows each client measures on.
        decay: share of the importance of earlier tasks that is left at each freeze.
    """

    def __init__(self, inner: Strategy, weight: float = 1000.0, samples: int = 16, decay: float = 1.0):
        super().__init__(inner)
        if not (weight >= 0 and samples >= 1 and 0 <= decay <= 1):
            raise ConfigError(
                f"strategy: {self.name} needs weight >= 0, samples >= 1 and 0 <= decay <= 1, not weight {weight},"
                f" samples {samples} and decay {decay}"
            )
        _require_freezable(self.name, inner)
        require_watched(self.name, inner, "importance", f"put {self.name} inside it")
        self.traits = replace(inner.traits, protects=True)
        self.traffic = inner.traffic.with_extras("m + n", dense=inner.traffic.dense)
        self.weight, self.samples, self.decay = weight, samples, decay

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding(self.name, weight=self.weight, samples=float(self.samples))

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        known = tensors_of(state, "importance")
        blank = _blank(ctx.adapter)
        extras = {f"importance/{name}": known.get(name, zeros).clone() for name, zeros in blank.items()}
        return {**super().broadcast(client, ctx, state), **extras}

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        updates = list(updates)
        outcome = super().aggregate(updates, ctx, state)
        now = mean_extras(_bounded(updates), "importance")
        kept = {"importance": part(state, "importance"), "now": now or part(state, "now")}
        return replace(outcome, state={**outcome.state, **kept})

    def freeze(self, adapter: AdapterState, ctx: RoundContext, state: State) -> State:
        # sums of rows and of columns of several tasks are those of their sum
        old, now = tensors_of(state, "importance"), tensors_of(state, "now")
        total = {
            name: now.get(name, zeros) + self.decay * old.get(name, zeros) for name, zeros in _blank(adapter).items()
        }
        return {**super().freeze(adapter, ctx, state), "importance": total}


@WRAPPERS.register("ewc")
class EWC(Important):
    """Importance is the diagonal of the Fisher information."""

    name = "ewc"
    equation = "local loss + weight / 2 sum_ij F_ij (B A)_ij^2,  F = mean of squared gradients of log p(y), y ~ p"
    source = "EWC (Kirkpatrick et al., 2017, arXiv 1612.00796), in update space and by row and column sums"


@WRAPPERS.register("mas")
class MAS(Important):
    """Importance is how much the outputs would change."""

    name = "mas"
    equation = "local loss + weight / 2 sum_ij O_ij (B A)_ij^2,  O = mean of squared gradients of mean(f(x)^2)"
    source = "MAS (Aljundi et al., 2018, arXiv 1711.09601), in update space and by row and column sums"

    def __init__(self, inner: Strategy, weight: float = 5.0, samples: int = 16, decay: float = 1.0):
        super().__init__(inner, weight, samples, decay)


@WRAPPERS.register("online_lora")
class OnlineLoRA(Important):
    """Importance is how much the loss of the hardest rows would change."""

    name = "online_lora"
    equation = "local loss + weight / 2 sum_ij O_ij (B A)_ij^2,  O = mean of squared gradients over the hardest rows"
    source = "Online-LoRA (Wei et al., 2024, arXiv 2411.05663), its importance averaged over clients"


def _bounded(updates: Sequence[Contribution]) -> list[Contribution]:
    """Measurements that are not negative, none with more mass than the median of the round has.

    No rule looks at them otherwise: a client could have later tasks stand still by calling everything important.
    """
    present = [update for update in updates if update.weight > 0]
    found = [{n: t.clamp(min=0) for n, t in u.extras.items() if n.startswith("importance/")} for u in present]
    masses = [sum(float(t.sum()) for name, t in own.items() if not name.endswith(":columns")) for own in found]
    limit = statistics.median_low(masses) if masses else 0.0
    shares = [min(1.0, limit / mass) if mass else 1.0 for mass in masses]
    return [
        replace(update, extras={name: share * tensor for name, tensor in own.items()})
        for update, own, share in zip(present, found, shares, strict=True)
    ]


def _blank(adapter: AdapterState) -> dict[str, Tensor]:
    """Importance of nothing yet: a module's row sums [out] and column sums [in], and every tensor trained in full."""
    zeros: dict[str, Tensor] = {}
    for path, update in adapter.modules.items():
        rows, columns = update.shape
        zeros |= {f"{path}:rows": torch.zeros(rows), f"{path}:columns": torch.zeros(columns)}
    return zeros | {f":{name}": torch.zeros_like(tensor) for name, tensor in adapter.dense.items()}


def _require_freezable(name: str, inner: Strategy) -> None:
    if inner.traits.personal:
        raise ConfigError(
            f"strategy: {name} protects what a stream has frozen, and {described(inner)} keeps parts on the clients,"
            " which a stream does not; use flexlora, zero_pad or fedit"
        )
    if inner.traits.head_only:
        raise ConfigError(
            f"strategy: {name} holds on to what adapters have learned, and {described(inner)} trains the head alone;"
            " use flexlora, zero_pad or fedit"
        )
    if inner.traits.patches_base:
        raise ConfigError(
            f"strategy: {name} looks back to the last freeze, and {described(inner)} patches the base in every round;"
            " use flexlora, zero_pad or fedit"
        )
