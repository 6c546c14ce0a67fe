"""The rounds of the contribution log: which a target left its updates in, and what they come to without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.ledger import BaseLedger
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState
from fedlora.aggregation import compose
from fedlora.aggregation.base import RoundContext, State, Strategy
from fedlora.aggregation.combine import hand_out
from fedlora.config import RunConfig
from fedlora.errors import RoundError, UnlearningError
from fedlora.protocol import ClientInfo
from fedlora.seeds import derive_seed
from fedlora.unlearning.subtract import aggregate_without, carrying
from orchestrator.checkpoint import load_latest
from orchestrator.contributions import ContributionLog, LoggedRound, read_log, would_take
from orchestrator.patches import within_budget
from orchestrator.rounds import is_finite
from orchestrator.state import RunState
from orchestrator.stores.files import read_json
from orchestrator.unlearning.rollback import rounds_played


@dataclass(frozen=True)
class Traced:
    """Rounds, by what the log has of a target.

    Attributes:
        used: those whose aggregation took an update of it. Not forget rounds: what it sent there took itself away.
        needed: the first of them and every later one that aggregated anything.
        present: rounds that are in the log.
    """

    used: tuple[int, ...]
    needed: tuple[int, ...]
    present: frozenset[int]

    @property
    def missing(self) -> list[int]:
        """Needed, and not in the log."""
        return [number for number in self.needed if number not in self.present]

    @property
    def held(self) -> list[int]:
        """Rounds in the log with an update of the target."""
        return [number for number in self.used if number in self.present]


@dataclass(frozen=True, eq=False)
class Again:
    """What a run comes to without a target.

    Attributes:
        left_out: rounds that had too few others, and changed nothing.
        rounded: whether the log had rounded what was aggregated.
    """

    adapter: AdapterState
    ledger: BaseLedger
    left_out: tuple[int, ...]
    rounded: bool


def trace(folder: Path, state: RunState, clients: Collection[str]) -> Traced:
    """What the log of a run has of these clients.

    Raises:
        UnlearningError: if its manifest is malformed.
    """
    rows = rounds_played(folder, state)
    took = [row for row in rows if set(row["admitted"]) & set(clients)]
    used = tuple(row["round"] for row in took if not row.get("forgets"))
    needed = tuple(row["round"] for row in rows if used and row["round"] >= used[0] and row["admitted"])
    return Traced(used, needed, frozenset(read_log(folder).entries))


def log_size(folder: Path) -> dict[str, Any]:
    """``rounds`` in the contribution log and its ``bytes``; without one, about how many it would have had."""
    state, _ = load_latest(folder)
    try:
        log = read_log(folder)
    except UnlearningError:
        log = ContributionLog(folder, {})
    if not log.entries and state is not None:
        return {"rounds": [], "bytes": would_take(rounds_played(folder, state), state)}
    return {"rounds": sorted(log.entries), "bytes": log.num_bytes}


def logged_rounds(folder: Path, state: RunState, rounds: Sequence[int]) -> Iterator[LoggedRound]:
    """Rounds of the log, each of them checked.

    Raises:
        UnlearningError: if one is not what was written, or not what the run says of it.
    """
    admitted = {row["round"]: row["admitted"] for row in rounds_played(folder, state)}
    log = read_log(folder)
    for number in rounds:
        logged = log.open(number)
        if [one.client.id for one in logged.updates.pending] != admitted[number]:
            raise UnlearningError(
                f"{folder}: the log of round {number} has other clients than metrics.jsonl; restore both, or use"
                " rollback"
            )
        yield logged


def ledger_at(state: RunState, head: str) -> BaseLedger:
    """The ledger of a run as it stood when ``head`` was its last entry.

    Raises:
        UnlearningError: if it is not part of the run's ledger.
    """
    if not head:
        return BaseLedger()
    for place, entry in enumerate(state.ledger.entries, 1):
        if entry.id == head:
            return BaseLedger(state.ledger.entries[:place])
    raise UnlearningError(f"the log was written beside another base ledger (entry {head[:12]}); use rollback")


def aggregate_again(folder: Path, config: RunConfig, state: RunState, clients: Collection[str]) -> Again:
    """Every round from the clients' first one on once more without them, from the log; nobody trains.

    The model before that round is theirs no more than anybody's. From there every update counts as the change it
    was, see ``carrying``: what the others had learned from the clients' part of the model stays in their changes.

    Raises:
        UnlearningError: as of ``logged_rounds`` and ``ledger_at``.
    """
    strategy = compose(config.strategy)
    rounds = trace(folder, state, clients).needed
    begin = next(logged_rounds(folder, state, rounds[:1]))
    adapter, memory, ledger = begin.adapter, begin.strategy, ledger_at(state, begin.ledger)
    fresh, members = fresh_pair(config, begin), members_of(folder)
    left_out, rounded = [], False
    for logged in logged_rounds(folder, state, rounds):
        ctx = context(config, logged, revive(adapter, fresh), members)
        carried = carrying(strategy, _starts(strategy, ctx, memory, fresh))
        rounded |= logged.dtype != "float32"
        try:
            outcome = aggregate_without(clients, carried, logged.updates, ctx, memory)
            usable = is_finite(outcome)
        except RoundError:  # nobody else, or fewer than the rule needs
            usable = False
        if not usable:
            left_out.append(logged.round)
            continue
        adapter, memory = outcome.adapter, outcome.state
        if outcome.patch:
            who = {one.client.id: one.client.rank for one in logged.updates.pending if one.client.id not in clients}
            provenance = {"round": logged.round, "strategy": strategy.name, "contributors": who}
            ledger = ledger.append(outcome.patch, "patch", provenance)
            ledger, _ = within_budget(ledger, config.ledger.max_rank, logged.round)
    return Again(adapter, ledger, tuple(left_out), rounded)


def context(
    config: RunConfig, logged: LoggedRound, adapter: AdapterState, members: Sequence[ClientInfo]
) -> RoundContext:
    """The context of a logged round, as the run made it."""
    seed = derive_seed(config.seed, logged.round, "", "strategy")
    return RoundContext(logged.round, logged.rank, seed, adapter, members)


def members_of(folder: Path) -> list[ClientInfo]:
    """Who takes part in a run."""
    names = ("rank", "num_examples", "num_heldout", "label_counts")
    rows: list[Mapping[str, object]] = read_json(folder / "partition.json")
    return [ClientInfo(row["client"], **{name: row[name] for name in names}) for row in rows]  # type: ignore[arg-type]


def fresh_pair(config: RunConfig, logged: LoggedRound) -> AdapterState:
    """The adapter that a run gives dead pairs a new row of A from."""
    sites = {path: update.shape for path, update in logged.adapter.modules.items()}
    return initial_adapter(sites, {}, logged.rank, config.seed, config.lora.init)


def _starts(
    strategy: Strategy, ctx: RoundContext, state: State, fresh: AdapterState
) -> Callable[[ClientInfo], AdapterState]:
    """What a client would be sent; one adapter per rank, as in a round."""
    made: dict[int, AdapterState] = {}

    def start(client: ClientInfo) -> AdapterState:
        if client.rank not in made:
            made[client.rank] = hand_out(strategy, client, ctx, state, fresh)
        return made[client.rank]

    return start
