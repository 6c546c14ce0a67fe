"""Server optimisers: the round's mean change as a gradient.

Momentum works over any rule: where the basis changes from round to round, its velocity is kept as a low-rank
update in product space. Adam, Yogi and Adagrad divide coordinate by coordinate, which means something only
where the coordinates do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import norm, scaled, stack
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.coordinate import require_fixed_gauge
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, part, require_free_head
from fedlora.errors import ConfigError


class ServerOptimizer(Wrapper):
    """One per stack: a second one would take the first one's steps for gradients."""

    def __init__(self, inner: Strategy):
        super().__init__(inner)
        layers = inner.layers()
        if other := next((layer.name for layer in layers if isinstance(layer, ServerOptimizer)), None):
            raise ConfigError(f"strategy: {self.name} over {other} would be two server optimisers; keep one")
        require_free_head(self.name, inner)


@WRAPPERS.register("server_momentum")
class ServerMomentum(ServerOptimizer):
    """Heavy-ball momentum on the server.

    Args:
        beta: share of the last step that is taken again, 0 <= beta < 1.
    """

    name = "server_momentum"
    equation = "v <- beta v + (aggregate - x),  x <- x + v;  in product space unless the basis is fixed"
    source = "FedAvgM (Hsu et al., 2019, arXiv 1909.06335)"

    def __init__(self, inner: Strategy, beta: float = 0.9):
        super().__init__(inner)
        if not 0 <= beta < 1:
            raise ConfigError(f"strategy: server_momentum needs 0 <= beta < 1, not {beta}")
        self.beta = beta
        self.traits = replace(inner.traits, exact=False, linear=inner.traits.linear and inner.traits.fixed_gauge)
        if inner.traits.patches_base:
            # the velocity, of rank 2 g at most, goes into the base with the patch
            self.traffic = replace(inner.traffic, patch=f"{inner.traffic.patch} + min(2*g, m, n)*(m + n)")

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        outcome = super().aggregate(updates, ctx, state)
        old = part(state, "velocity")
        step = self._by_coordinate if self.traits.fixed_gauge else self._by_product
        return step(outcome, ctx, {name: tensor for name, tensor in old.items() if isinstance(tensor, Tensor)})

    def _by_coordinate(self, outcome: Aggregate, ctx: RoundContext, old: Mapping[str, Tensor]) -> Aggregate:
        before, after = ctx.adapter.tensors(), outcome.adapter.tensors()
        velocity = {name: after[name] - before[name] + (self.beta * old[name] if old else 0.0) for name in after}
        moved = AdapterState.from_tensors({name: before[name] + velocity[name] for name in after})
        return replace(outcome, adapter=moved, state={**outcome.state, "velocity": velocity})

    def _by_product(self, outcome: Aggregate, ctx: RoundContext, old: Mapping[str, Tensor]) -> Aggregate:
        before, after = ctx.adapter.whole(), outcome.adapter.whole()
        last = AdapterState.from_tensors(old)
        again = {path: scaled(update, self.beta) for path, update in last.modules.items()}
        minus = {path: scaled(update, -1.0) for path, update in before.modules.items()}
        change = stack([after.modules, outcome.patch, minus, again])
        velocity = AdapterState(
            {path: _shrunk(update, 2 * ctx.rank) for path, update in change.items()},
            {n: t - before.dense[n] + (self.beta * last.dense[n] if old else 0.0) for n, t in after.dense.items()},
        )
        dense = {name: before.dense[name] + tensor for name, tensor in velocity.dense.items()}
        modules, patch = dict(outcome.adapter.modules), outcome.patch
        if again and self.traits.patches_base:
            patch = stack([patch, again])
        elif again:
            modules = {p: ranks.resize(u, ctx.rank) for p, u in stack([after.modules, again]).items()}
        return replace(
            outcome,
            adapter=AdapterState(modules, dense),
            state={**outcome.state, "velocity": velocity.tensors()},
            metrics={**outcome.metrics, "velocity_norm": norm(velocity)},
            patch=patch,
        )


class Adaptive(ServerOptimizer):
    """Divides every coordinate's step by the size of its steps so far.

    Args:
        learning_rate: eta of the server.
        beta1: share of the last mean step that is kept.
        beta2: the same for squares (not used by Adagrad).
        tau: added to the root; smaller is more adaptive.
    """

    source = "Reddi et al., 2021 (arXiv 2003.00295), algorithm 2"

    def __init__(
        self,
        inner: Strategy,
        learning_rate: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ):
        super().__init__(inner)
        require_fixed_gauge(self.name, inner, "server_momentum")
        if not (learning_rate > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and tau > 0):
            raise ConfigError(
                f"strategy: {self.name} needs learning_rate > 0, tau > 0 and betas from 0 to below 1, not"
                f" {learning_rate}, {tau}, {beta1} and {beta2}"
            )
        self.learning_rate, self.beta1, self.beta2, self.tau = learning_rate, beta1, beta2, tau
        self.traits = replace(inner.traits, exact=False, linear=False, idempotent=False, weighted=False)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        outcome = super().aggregate(updates, ctx, state)
        means, squares = part(state, "mean"), part(state, "square")
        mean: dict[str, Tensor] = {}
        square: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}
        before = ctx.adapter.tensors()
        for name, tensor in outcome.adapter.tensors().items():
            change = tensor - before[name]
            m, v = means.get(name), squares.get(name)
            m = m if isinstance(m, Tensor) else torch.zeros_like(change)
            v = v if isinstance(v, Tensor) else torch.full_like(change, self.tau**2)
            mean[name] = self.beta1 * m + (1 - self.beta1) * change
            square[name] = self.second_moment(v, change.square())
            moved[name] = before[name] + self.learning_rate * mean[name] / (square[name].sqrt() + self.tau)
        kept = {**outcome.state, "mean": mean, "square": square}
        return replace(outcome, adapter=AdapterState.from_tensors(moved), state=kept)

    @abstractmethod
    def second_moment(self, old: Tensor, squared: Tensor) -> Tensor:
        """The running square after a step whose square is given."""


@WRAPPERS.register("adam")
class Adam(Adaptive):
    """FedAdam."""

    name = "adam"
    equation = "m <- b1 m + (1 - b1) d,  v <- b2 v + (1 - b2) d^2,  x <- x + eta m / (sqrt(v) + tau)"

    def second_moment(self, old: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * old + (1 - self.beta2) * squared


@WRAPPERS.register("yogi")
class Yogi(Adaptive):
    """FedYogi."""

    name = "yogi"
    equation = "m <- b1 m + (1 - b1) d,  v <- v - (1 - b2) d^2 sign(v - d^2),  x <- x + eta m / (sqrt(v) + tau)"

    def second_moment(self, old: Tensor, squared: Tensor) -> Tensor:
        return old - (1 - self.beta2) * squared * (old - squared).sign()


@WRAPPERS.register("adagrad")
class Adagrad(Adaptive):
    """FedAdagrad."""

    name = "adagrad"
    equation = "m <- b1 m + (1 - b1) d,  v <- v + d^2,  x <- x + eta m / (sqrt(v) + tau)"

    def second_moment(self, old: Tensor, squared: Tensor) -> Tensor:
        return old + squared


def _shrunk(update: LowRank, rank: int) -> LowRank:
    return update if update.rank <= rank else ranks.truncate(update, min(rank, *update.shape))
