"""What stays the same from round to round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.packing import PLAIN, Packing
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import RoundContext, Strategy
from fedlora.config import ForgettingConfig, ScheduleConfig, TrainingConfig
from fedlora.continual.course import Course
from fedlora.continual.merging import Merging
from fedlora.continual.plateau import Policy
from fedlora.data.live import LiveStream
from fedlora.protocol import ClientInfo, ClientPool, Reply, TrainTask
from fedlora.seeds import derive_seed
from orchestrator.fleet import Fleet
from orchestrator.flights import Flight
from orchestrator.local_privacy import LocalSpending
from orchestrator.privacy import Spending
from orchestrator.selection import Selector, how_many
from orchestrator.state import RunState

if TYPE_CHECKING:
    from orchestrator.inbox import Used

Emit = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Federation:
    """A run's fixed parts.

    Attributes:
        pool: where clients run.
        strategy: how updates are combined.
        members: all clients in their fixed order, excluded ones too: draws are made among everybody.
        fresh: the usual initial adapter at the global rank; what ``strategy.start`` was given.
        selector: who is asked.
        schedule: when a round closes.
        training: as configured; only what it says about the work of a task is read.
        fleet: simulated devices; None where a real clock decides.
        ledger_rank: rank per module the base's patches are recompressed to; None where nothing may be lost.
        emit: called with an event's name and fields.
        excluded: clients that are never asked and never scored.
        joins: the first round of clients that come later.
        course: of a stream of tasks; None without one.
        stops: of every task of the stream, what may end it before its rounds are over.
        live: the rows that go on coming in; None where all are there.
        freezer: says when the adapter goes into the base; None without a stream.
        merging: how what was frozen becomes one model; None for the plain sum.
        isolated: every task of a stream has an adapter of its own, and the base stays bare.
        prototypes: rows find the adapter they are scored with by features; else by the task they belong to.
        init: how a fresh A is drawn.
        probe: task of the model where its general ability is scored too; empty where it is not.
        keep: called with what every round's aggregation was given, before the round is committed; None without a log.
        forgetting: rounds in which owners of rows forget them, and nobody learns.
        packing: how the values of updates travel.
        masked: whether they travel under masks, as integers of 64 bits.
        spending: what differential privacy costs; None without.
        local: what the noise of the clients' own comes to; None without.
        out: round of the task each client has from this process and has not answered.
    """

    pool: ClientPool
    strategy: Strategy
    members: Sequence[ClientInfo]
    fresh: AdapterState
    seed: int
    rounds: int
    rank: int
    per_round: int | float
    weighting: str
    max_update_norm: float
    evaluate_every: int
    evaluate_clients: bool
    ledger_rank: int | None
    emit: Emit
    selector: Selector
    schedule: ScheduleConfig
    training: TrainingConfig
    fleet: Fleet | None = None
    excluded: frozenset[str] = frozenset()
    joins: Mapping[str, int] = field(default_factory=dict)
    course: Course | None = None
    stops: Sequence[Policy | None] = ()
    live: LiveStream | None = None
    freezer: Policy | None = None
    merging: Merging | None = None
    isolated: bool = False
    prototypes: bool = False
    init: str = "kaiming"
    probe: str = ""
    keep: Callable[[RoundContext, RunState, Sequence[Used]], None] | None = None
    forgetting: Sequence[ForgettingConfig] = ()
    packing: Packing = PLAIN
    masked: bool = False
    spending: Spending | None = None
    local: LocalSpending | None = None
    out: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def places(self) -> Mapping[str, int]:
        """Where each member stands in the fixed order; looked up, so that a round costs what its clients cost."""
        return {member.id: place for place, member in enumerate(self.members)}

    def now(self, state: RunState) -> Federation:
        """As it stands after the rounds of ``state``: where tasks have ended early, the stream is a shorter one."""
        if self.course is None or state.stream is None or state.stream.ended == self.course.ended:
            return self
        course = self.course.after(state.stream.ended)
        return replace(self, course=course, rounds=course.total)

    @property
    def ended(self) -> tuple[int, ...]:
        """The rounds with which tasks have ended, where a rule may end them early."""
        return self.course.ended if self.course else ()

    def stage(self, client: str, number: int) -> int | None:
        """The task of the stream whose rows a client trains on in a round; None for all its rows."""
        return self.course.task_of(client, number) if self.course else None

    def task_ends(self, number: int) -> bool:
        """Whether a task of a stream ends with this round."""
        return self.course is not None and self.course.ends(number)

    def all_met(self, number: int) -> bool:
        """Whether scores of this round are over everything there is to learn, so that rounds can be compared."""
        return self.course is None or len(self.course.met(number)) == len(self.course.names)

    def following(self, number: int) -> int:
        """The round after round ``number``."""
        return self.course.following(number) if self.course else number + 1

    def fresh_pair(self, freezes: int, number: int) -> AdapterState:
        """The usual initial adapter after so many freezes: the same for everybody, and another one each time.

        Args:
            number: the last round that was played. An isolated task has its own pair, whichever others are left out.
        """
        if self.isolated and self.course:
            freezes += self.course.left_out(self.course.following(number))
        if not freezes:
            return self.fresh
        sites = {path: update.shape for path, update in self.fresh.modules.items()}
        seed = derive_seed(self.seed, freezes, "", "fresh pair")
        return initial_adapter(sites, self.fresh.dense, self.rank, seed, self.init)

    @functools.cached_property
    def taking_part(self) -> Sequence[ClientInfo]:
        """The members without those that are excluded."""
        return [member for member in self.members if member.id not in self.excluded]

    def with_rows(self, number: int) -> Sequence[ClientInfo]:
        """The members who have rows to train on in a round, as that round finds them."""
        there = self.members
        if self.joins:
            there = [member for member in there if self.joins.get(member.id, 1) <= number]
        if self.course is None:
            return there
        present = (self.present(member, number) for member in there)
        return [member for member in present if member.num_examples]

    def askable(self, number: int) -> Sequence[ClientInfo]:
        """Those of ``with_rows`` that are not excluded."""
        return [member for member in self.with_rows(number) if member.id not in self.excluded]

    def forgets(self, number: int) -> int | None:
        """The entry of ``forgetting`` that a round belongs to; None for an ordinary round."""
        return next((place for place, one in enumerate(self.forgetting) if number in one.rounds), None)

    def owners(self, number: int) -> Sequence[ClientInfo]:
        """Who forgets in a round, in member order."""
        place = self.forgets(number)
        named = set() if place is None else set(self.forgetting[place].clients)
        return [self.present(member, number) for member in self.members if member.id in named]

    def present(self, member: ClientInfo, number: int) -> ClientInfo:
        """A member as a round finds it, with the rows that it trains on.

        Whoever forgets does so at the rank of the global adapter: at a lower one it would not receive all of it, and
        where its answer is the only one, the rest would be gone. How many rows it forgets is not the server's to know.
        """
        if self.forgets(number) is not None:
            return replace(member, rank=self.rank, num_examples=1)
        if self.live:
            return replace(member, num_examples=self.live.counts(number).get(member.id, 0))
        return member.at(self.stage(member.id, number))

    def context(self, number: int, state: RunState) -> RoundContext:
        """Round ``number`` from this state, with pairs that could never learn again revived."""
        seed = derive_seed(self.seed, number, "", "strategy")
        adapter = revive(state.adapter, self.fresh_pair(state.freezes, state.round))
        planned = how_many(self.per_round, len(self.members))
        sampling = self.spending.sampling if self.spending else 1.0
        return RoundContext(number, self.rank, seed, adapter, self.members, planned, sampling)

    def give(self, tasks: Iterable[TrainTask], timeout_s: float | None) -> Iterator[Reply]:
        """Give out those tasks that are not out already, and yield answers as they come."""
        fresh = [task for task in tasks if self.out.get(task.client) != task.round]
        self.out.update((task.client, task.round) for task in fresh)
        for reply in self.pool.train(fresh, timeout_s):
            self.out.pop(reply.client, None)
            yield reply

    def abandon(self, flights: Iterable[Flight]) -> None:
        """Give up what these clients have out."""
        clients = {flight.client for flight in flights} & self.out.keys()
        if clients:
            self.pool.abandon(clients)
        for client in clients:
            del self.out[client]
