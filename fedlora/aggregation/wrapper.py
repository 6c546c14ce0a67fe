"""A wrapper takes a strategy and returns one: clipping, robust re-weighting, server optimisers, local methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.averaging import require_equal_ranks
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan
from fedlora.registry import Registry


class Wrapper(Strategy):
    """Passes everything on to ``inner``. A subclass says what it changes, and refuses what it cannot stand on.

    The inner strategy's state is kept under ``inner``, beside what the wrapper itself keeps.
    """

    def __init__(self, inner: Strategy):
        if inner.traits.outermost:
            raise ConfigError(
                f"strategy: {inner.name} chooses a factor after all others have spoken, and {self.name} stands around"
                f" it; put {inner.name} first"
            )
        if inner.traits.private:
            raise ConfigError(
                f"strategy: {inner.name} puts noise on what clients send before anything else sees it, and {self.name}"
                f" stands around it; put {inner.name} first"
            )
        self.inner = inner
        self.traits = inner.traits
        self.traffic = inner.traffic
        self.required = inner.required

    def start(self, fresh: AdapterState, seed: int) -> AdapterState:
        return self.inner.start(fresh, seed)

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return self.inner.plan(ctx, client, part(state, "inner"))

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        if not self.traits.mixed_ranks:
            # before anything is left out or merged, which could hide the client that does not fit
            require_equal_ranks(self.layers()[-1].name, updates, ctx)
        outcome = self.inner.aggregate(self.prepare(updates, ctx), ctx, part(state, "inner"))
        return replace(outcome, state={"inner": outcome.state})

    def prepare(self, updates: Sequence[Contribution], ctx: RoundContext) -> Sequence[Contribution]:
        """The updates as ``inner`` gets them. Default: unchanged."""
        return updates

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        return self.inner.redistribute(adapter, client, ctx, part(state, "inner"))

    def freeze(self, adapter: AdapterState, ctx: RoundContext, state: State) -> State:
        return {"inner": self.inner.freeze(adapter, ctx, part(state, "inner"))}

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        return self.inner.broadcast(client, ctx, part(state, "inner"))

    def layers(self) -> list[Strategy]:
        return [self, *self.inner.layers()]


def looks_at_single_updates(layer: Strategy) -> bool:
    """Whether a wrapper changes, leaves out or weighs single updates before the rule sees them."""
    return isinstance(layer, Wrapper) and type(layer).prepare is not Wrapper.prepare


def require_whole_cohort(name: str, inner: Strategy) -> None:
    """Raise ``ConfigError`` if a layer inside needs every client's extra tensors, which ``name`` would leave out."""
    layers = inner.layers()
    if greedy := next((layer for layer in layers if layer.traits.whole_cohort), None):
        raise ConfigError(
            f"strategy: {greedy.name} must hear from every client, and {name} leaves some out; use fedprox"
        )


def require_free_head(name: str, inner: Strategy) -> None:
    """Raise ``ConfigError`` if a layer inside makes the head itself, which ``name`` would move afterwards."""
    layers = inner.layers()
    if writers := [layer.name for layer in layers if layer.traits.writes_head]:
        writer = writers[-1]  # the layers over it only pass the trait on
        raise ConfigError(
            f"strategy: {writer} makes the head itself, and {name} over it would move it; put {writer} before {name}"
        )


WRAPPERS: Registry[Wrapper] = Registry("wrapper")


def part(state: State, name: str) -> State:
    """A nested state; empty before the first round."""
    found = state.get(name, {})
    assert isinstance(found, Mapping)
    return found


def described(strategy: Strategy) -> str:
    """``server_momentum(clip(flexlora))`` for a stack, the plain name otherwise."""
    if isinstance(strategy, Wrapper):
        return f"{strategy.name}({described(strategy.inner)})"
    return strategy.name
