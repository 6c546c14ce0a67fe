"""The Strategy contract: pure methods over an explicit state.

A new strategy is a class with ``aggregate`` and a line of traits. The framework does the rest:
scaling, filling parts that did not travel, the base ledger, remembering what each client was sent,
validation, normalised weights, client order, checkpointing of the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, Union

from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.traffic import Traffic
from fedlora.protocol import ClientInfo, TrainPlan
from fedlora.registry import Registry

State: TypeAlias = Mapping[str, Union["State", Tensor, float, int, str]]


@dataclass(frozen=True)
class Traits:
    """What a strategy promises; unsound combinations are refused because of these.

    Attributes:
        exact: the new adapter and base together are exactly the weighted mean of what the clients trained.
        linear: the aggregate is a linear function of what clients send.
        fixed_gauge: clients share one basis from round to round, so factor coordinates keep their meaning.
        mixed_ranks: clients may have different ranks.
        idempotent: equal updates come back unchanged, in the first round of a run.
        weighted: the weights it is given are the weights it uses.
        patches_base: moves a part of the update into the base ledger.
        personal: clients keep a part of the adapter to themselves, so there is no one global model to score.
        core: trains a core between two fixed factors.
        whole_cohort: keeps books on every client's extra tensors, so no client may be left out around or inside it.
        whole_update: what travels shows the change of a client's whole update; not so where a factor stays at home.
        freezes: hands out components that a client sees and does not train.
        protects: keeps what a stream has frozen from being forgotten, and does nothing before a freeze.
        outermost: chooses a factor after the rule has spoken, so that nothing may move the adapter around it.
        head_only: trains no low-rank pair, only what is trained in full.
        writes_head: makes the head itself, so no layer over it may move or keep it.
        private: puts noise on what clients send before anything else sees it, so nothing may stand around it; a round
            that nobody answered is aggregated too, or the noise would tell.
    """

    exact: bool = False
    linear: bool = False
    fixed_gauge: bool = False
    mixed_ranks: bool = True
    idempotent: bool = True
    weighted: bool = True
    patches_base: bool = False
    personal: bool = False
    core: bool = False
    whole_cohort: bool = False
    whole_update: bool = True
    freezes: bool = False
    protects: bool = False
    outermost: bool = False
    head_only: bool = False
    writes_head: bool = False
    private: bool = False

    @property
    def takes_means(self) -> bool:
        """Whether clients that received the same may all send the mean of their changes, and nothing is lost."""
        return self.linear and self.fixed_gauge and self.weighted and not self.patches_base


@dataclass(frozen=True)
class RoundContext:
    """What a strategy may know of the round.

    Attributes:
        round: 1-based.
        rank: rank of the global adapter (``lora.r``).
        seed: for strategies that draw random numbers; already specific to the round.
        adapter: the global adapter at the start of the round, which what clients received was made from.
        members: every registered client, in a fixed order.
        planned: clients that every round of the run is planned for, however many answer.
        sampling: chance with which each client is drawn, on its own; 1 where draws are not like that.
    """

    round: int
    rank: int
    seed: int
    adapter: AdapterState = field(default_factory=AdapterState)
    members: Sequence[ClientInfo] = ()
    planned: int = 1
    sampling: float = 1.0


@dataclass(frozen=True, eq=False)
class Contribution:
    """One admitted update, as a strategy sees it.

    Attributes:
        client: who sent it; its rank is the one it was planned at.
        weight: its share; the weights of a round sum to 1.
        trained: the client's whole adapter after training, in effective units.
        received: the adapter it started from.
        metrics: what the client measured.
        extras: its answer to ``Strategy.broadcast``, with the same names and shapes.
        staleness: rounds that were aggregated between its start and now; 0 in a synchronous round.
    """

    client: ClientInfo
    weight: float
    trained: AdapterState
    received: AdapterState
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    staleness: int = 0


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round comes to.

    Attributes:
        adapter: the new global adapter, of rank ``ctx.rank`` at most, with all its modules and dense tensors.
        state: the strategy's new state; one that keeps nothing passes on what it was given.
        metrics: plain numbers for the log, not tensors.
        patch: what moves into the base, by module path; the framework appends it to the ledger.
    """

    adapter: AdapterState
    state: State = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    patch: Mapping[str, LowRank] = field(default_factory=dict)


class Strategy(ABC):
    """How updates become the next global adapter. Stateless: what must be kept goes in ``state``.

    ``equation`` and ``source`` are what ``fedlora strategies show`` prints. A class that does not say its ``name`` gets
    the one it is registered under.
    """

    name: str
    equation: str = ""
    source: str = ""
    traits: Traits = Traits()
    traffic: Traffic = Traffic()
    required: tuple[str, ...] = ()  # clients every round must ask, such as FLTrust's root

    def start(self, fresh: AdapterState, seed: int) -> AdapterState:
        """The adapter the federation starts from, given the usual one: B = 0 and a seeded A."""
        return fresh

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        """What ``client`` trains and sends this round. Default: everything, at its own rank."""
        return TrainPlan(rank=client.rank)

    @abstractmethod
    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        """Combine at least one update, given in client order; none only where ``traits.private``.

        Must not change its arguments.
        """

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        """The adapter as ``client`` receives it. Default: the best approximation at its rank."""
        return adapter.map(lambda update: ranks.resize(update, client.rank))

    def freeze(self, adapter: AdapterState, ctx: RoundContext, state: State) -> State:
        """What is kept when ``adapter`` has gone into the base and a fresh pair starts. Default: nothing."""
        return {}

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        """Extra tensors that travel to ``client`` beside the adapter, and come back changed. Default: none."""
        return {}

    def layers(self) -> list[Strategy]:
        """This strategy and those inside it, the rule at the core last."""
        return [self]


STRATEGIES: Registry[Strategy] = Registry("strategy")
