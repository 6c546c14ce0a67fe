"""One round, on one page. Pools, files and screens are somebody else's business."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedlora.aggregation.base import Aggregate, RoundContext
from fedlora.aggregation.cohort import Cohort
from fedlora.aggregation.combine import combine
from fedlora.errors import QuorumError, RoundError
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.flights import Flight
from orchestrator.inbox import Inbox, Used, describe
from orchestrator.outbox import Outbox
from orchestrator.patches import patch_base
from orchestrator.routing import with_prototype
from orchestrator.schedule import in_order, play, wanted
from orchestrator.scoring import better, evaluate_global
from orchestrator.selection import Record
from orchestrator.state import RunState
from orchestrator.streams import advance, decide, end_task, merge_tasks

MAX_EMPTY_ROUNDS = 3  # in a row; one bad client may cost a round, but a run nobody answers must end


def play_round(fed: Federation, state: RunState) -> RunState:
    """The state after one more round; ``state`` itself is untouched.

    Raises:
        RoundError: if not one update could be used for the third round in a row, or an owner did not forget.
    """
    clock = _Clock()
    fed = fed.now(state)
    number = fed.following(state.round)
    forgets = fed.forgets(number) is not None
    ctx = fed.context(number, state)
    outbox, inbox = Outbox(fed, state, ctx), Inbox(fed, number)
    reach("round.started", number)
    closing = play(fed, state, outbox, inbox)
    clock.lap("train")
    reach("round.trained", number)

    used = inbox.used()
    aggregate, problem = _aggregate(fed, used, ctx, state, outbox.left_out)
    if problem:
        used = []
    if forgets:
        _check_forgotten(fed, inbox, problem)
    if fed.keep:
        fed.keep(ctx, state, used)
    empty = _empty_rounds(state, used, inbox, problem)
    if empty == MAX_EMPTY_ROUNDS:
        lost = [f"{client}: {reason}" for client, reason in {**inbox.failed, **inbox.refused, **inbox.late}.items()]
        reason = problem or lost[0]
        raise RoundError(f"{empty} rounds in a row brought no usable update; in round {number}, {reason}")
    ledger, folded = patch_base(fed, state, aggregate, [u.update.client for u in used], number)
    accepted = {**state.accepted, **{u.flight.client: u.flight.round for u in used}}
    flights = in_order(closing.flights)
    moved = replace(
        state,
        round=number,
        adapter=aggregate.adapter,
        strategy=aggregate.state,
        ledger=ledger,
        accepted=dict(sorted(accepted.items())),
        flights=flights,
        payloads=outbox.payloads(flights),
    )
    fed, moved, stop = end_task(fed, moved, used)
    decision = decide(fed, moved, used)
    moved = merge_tasks(fed, moved, decision)
    clock.lap("aggregate")
    reach("round.aggregated", number)
    moved = with_prototype(fed, moved)
    due = number % fed.evaluate_every == 0 or number == fed.rounds or fed.task_ends(number)
    found = evaluate_global(fed, moved) if due else None
    scores = found.scores if found else None
    clock.lap("evaluate")
    reach("round.evaluated", number)

    asked = [flight.client for flight in outbox.given]
    row = {
        "round": number,
        "selected": asked,
        **describe(inbox, packed=not fed.packing.plain),
        "problem": problem,
        "eval": scores,
        "clients": found and found.spread,
        "bytes_down": outbox.bytes_down,
        "ranks": _count_ranks(outbox.given),
        "strategy": dict(aggregate.metrics) | folded,
        "clock_s": closing.clock_s if fed.fleet else None,
        "in_flight": len(moved.flights),
        "seconds": clock.laps,
    }
    if problem:
        row |= {"admitted": [], "train": None}
    participation = Counter(state.participation) + Counter(u.flight.client for u in used)
    played = replace(
        moved,
        totals=state.totals.plus(row),
        last={"round": number, **scores} if scores else state.last,
        best=better(state.best, scores if fed.all_met(number) else None, number),
        row=row,
        empty_rounds=empty,
        participation=dict(sorted(participation.items())),
        # whoever was sent the round's start has every patch up to there; those of this round come next time
        caught_up={**state.caught_up, **dict.fromkeys(asked, state.ledger.head)} if state.ledger.entries else {},
        records=_records(state, outbox.given, used, inbox),
        clock_s=closing.clock_s,
    )
    if forgets:  # the run goes on to know nothing of whoever has left and came back for this
        known = ("accepted", "participation", "caught_up", "records")
        played = replace(played, row={**row, "forgets": True}, **{name: getattr(state, name) for name in known})
    return advance(fed, played, decision, stop, found)


def _aggregate(
    fed: Federation, used: Sequence[Used], ctx: RoundContext, state: RunState, left_out: int
) -> tuple[Aggregate, str | None]:
    """The strategy's answer; or the model as it is, and why, where too few came or the strategy cannot use them."""
    unchanged = Aggregate(state.adapter, state.strategy)
    expected = wanted(fed, ctx.round)
    if fed.schedule.mode == "sync":
        expected = max(expected - left_out, 0)  # nobody is left of a draw whose clients are all excluded
    needed = math.ceil(fed.schedule.quorum * expected - 1e-9)
    if fed.forgets(ctx.round) is not None:
        needed = 0  # of its own, see ``_check_forgotten``
    if len(used) < needed:
        return unchanged, f"{len(used)} updates came, and schedule.quorum asks for {needed}"
    if not used and not fed.strategy.traits.private:
        return unchanged, None
    try:
        aggregate = combine(fed.strategy, Cohort([u.update for u in used]), ctx, state.strategy)
    except QuorumError as error:
        return unchanged, str(error)
    if not is_finite(aggregate):
        return unchanged, f"{fed.strategy.name} made values that are not finite out of finite updates"
    return aggregate, None


def is_finite(aggregate: Aggregate) -> bool:
    """Whether a model can go on with this."""
    factors = [*aggregate.adapter.tensors().values()]
    factors += [tensor for update in aggregate.patch.values() for tensor in (update.B, update.A)]
    return all(bool(torch.isfinite(tensor).all()) for tensor in factors)


def _check_forgotten(fed: Federation, inbox: Inbox, problem: str | None) -> None:
    """Raise ``RoundError`` unless every owner has forgotten: a run that goes on all the same would seem to have."""
    if not problem:
        left = [client.id for client in fed.owners(inbox.number) if client.id not in inbox.admitted]
        reasons = {**inbox.failed, **inbox.refused}
        problem = f"{left[0]}: {reasons.get(left[0], 'no answer')}" if left else None
    if problem:
        raise RoundError(f"round {inbox.number} is to forget, and did not: {problem}")


def _empty_rounds(state: RunState, used: Sequence[Used], inbox: Inbox, problem: str | None) -> int:
    """Rounds in a row that asked clients and could use none."""
    if used:
        return 0
    nobody = not (inbox.answered or inbox.late or problem)  # a Poisson draw may be empty, and everyone may be out
    return state.empty_rounds + (0 if nobody else 1)


def _records(state: RunState, given: Sequence[Flight], used: Sequence[Used], inbox: Inbox) -> dict[str, Record]:
    """What selection will know of every client that was ever asked."""
    records = dict(state.records)
    for flight in given:
        record = records.get(flight.client, Record())
        records[flight.client] = replace(record, asked=record.asked + 1, last_round=inbox.number)
    for client in inbox.failed:
        if client in records:
            records[client] = replace(records[client], failures=records[client].failures + 1)
    for u in used:
        record = records[u.flight.client]
        loss = u.metrics.get("first_loss", u.metrics.get("loss"))
        records[u.flight.client] = replace(record, used=record.used + 1, loss=loss, seconds=u.seconds)
    return dict(sorted(records.items()))


def _count_ranks(flights: Sequence[Flight]) -> dict[str, int]:
    counts = Counter(flight.plan.rank for flight in flights)
    return {str(rank): counts[rank] for rank in sorted(counts)}


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase] = now - self._last
        self._last = now
