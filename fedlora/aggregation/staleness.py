"""Late updates: what they changed still counts, for less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlora.adapter.algebra import scaled, stack
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Contribution, RoundContext, Strategy
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper
from fedlora.errors import ConfigError


@WRAPPERS.register("staleness")
class Staleness(Wrapper):
    """Weigh an update by its age, and carry its change over to the model of today.

    An update that started ``tau`` rounds ago is a change of an older model. It becomes today's global adapter
    plus that change: by coordinates where the basis is fixed, by products elsewhere.

    Args:
        exponent: a in (1 + tau)^-a; 0 ignores age.
    """

    name = "staleness"
    equation = "w_k ~ w_k (1 + tau_k)^-a;  x_k <- x + (trained_k - received_k) for tau_k > 0"
    source = "polynomial weight of FedAsync (Xie et al., 2019, arXiv 1903.03934)"

    def __init__(self, inner: Strategy, exponent: float = 0.5):
        super().__init__(inner)
        if exponent < 0:
            raise ConfigError(f"strategy: staleness.exponent must be at least 0, not {exponent}")
        if not inner.traits.weighted:
            raise ConfigError(
                f"strategy: staleness changes weights, but {inner.name} uses its own; put staleness inside it, directly"
                " over the rule"
            )
        if not inner.traits.fixed_gauge and not inner.traits.mixed_ranks:
            raise ConfigError(f"strategy: {inner.name} cannot take a late update's change; use flexlora or fedit")
        self.exponent = exponent

    def prepare(self, updates: Sequence[Contribution], ctx: RoundContext) -> Sequence[Contribution]:
        aged = [
            update
            if not update.staleness
            else replace(
                self._carried_over(update, ctx), weight=update.weight * (1 + update.staleness) ** -self.exponent
            )
            for update in updates
        ]
        total = sum(update.weight for update in aged)
        return [replace(update, weight=update.weight / total) for update in aged]

    def _carried_over(self, update: Contribution, ctx: RoundContext) -> Contribution:
        fixed = self.traits.fixed_gauge
        today = self.inner.redistribute(ctx.adapter, update.client, ctx, {}) if fixed else ctx.adapter
        return replace(update, trained=moved_to(today, update, fixed))


def moved_to(adapter: AdapterState, update: Contribution, by_coordinate: bool) -> AdapterState:
    """``adapter`` plus what the update changed.

    Args:
        by_coordinate: whether factor coordinates mean the same in both: ``adapter`` then has the client's ranks. Else
            products are added, and modules come back as a stack of the ranks of all three.
    """
    trained, received = update.trained, update.received
    if by_coordinate:
        today, before, after = adapter.tensors(), received.tensors(), trained.tensors()
        return AdapterState.from_tensors({n: today[n] + after[n] - before[n] for n in after})
    minus = {path: scaled(module, -1.0) for path, module in received.whole().modules.items()}
    modules = stack([adapter.whole().modules, trained.whole().modules, minus])
    return AdapterState(modules, {n: adapter.dense[n] + t - received.dense[n] for n, t in trained.dense.items()})
