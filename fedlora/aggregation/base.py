"""The Strategy contract: three pure methods over an explicit state.

A new strategy is a class with ``aggregate`` and a line of traits. The framework does the rest:
scaling, filling parts that did not travel, remembering what each client was sent, validation,
normalised weights, client order, checkpointing of the state.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, Union

from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.state import AdapterState
from fedlora.protocol import ClientInfo, TrainPlan
from fedlora.registry import Registry

State: TypeAlias = Mapping[str, Union["State", Tensor, float, int, str]]


@dataclass(frozen=True)
class Traits:
    """What a strategy promises; unsound combinations are refused because of these.

    Attributes:
        exact: the new adapter's product is exactly the weighted mean of the clients' products.
        linear: the aggregate is a linear function of what clients send.
        fixed_gauge: clients share one basis from round to round, so factor coordinates keep their meaning.
        mixed_ranks: clients may have different ranks.
    """

    exact: bool = False
    linear: bool = False
    fixed_gauge: bool = False
    mixed_ranks: bool = True


@dataclass(frozen=True)
class RoundContext:
    """What a strategy may know of the round.

    Attributes:
        round: 1-based.
        rank: rank of the global adapter (``lora.r``).
        seed: for strategies that draw random numbers; already specific to the round.
    """

    round: int
    rank: int
    seed: int


@dataclass(frozen=True, eq=False)
class Contribution:
    """One admitted update, as a strategy sees it.

    Attributes:
        client: who sent it.
        weight: its share; the weights of a round sum to 1.
        trained: the client's whole adapter after training, in effective units.
        received: the adapter it started from.
        metrics: what the client measured.
    """

    client: ClientInfo
    weight: float
    trained: AdapterState
    received: AdapterState
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The new global adapter, the strategy's new state, and numbers for the log."""

    adapter: AdapterState
    state: State = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Strategy(ABC):
    """How updates become the next global adapter. Stateless: what must be kept goes in ``state``."""

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    traits: ClassVar[Traits] = Traits()

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        """What ``client`` trains and sends this round. Default: everything, at its own rank."""
        return TrainPlan(rank=client.rank)

    @abstractmethod
    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        """Combine at least one update, given in client order. Must not change its arguments."""

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        """The adapter as ``client`` receives it. Default: the best approximation at its rank."""
        return adapter.map(lambda update: ranks.resize(update, client.rank))


STRATEGIES: Registry[Strategy] = Registry("strategy")
