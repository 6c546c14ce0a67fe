"""When a round is over: with everybody, with the first ones, at a deadline, or every so many updates.

Each way fills the round's inbox and says what is still out afterwards and what the virtual clock then shows. With a
simulated fleet the order of arrival follows from the fleet, so that whoever is not waited for is not trained at all,
and whoever comes later is trained when its answer is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedlora.protocol import Reply
from orchestrator.federation import Federation
from orchestrator.flights import Flight
from orchestrator.inbox import Inbox
from orchestrator.outbox import Outbox
from orchestrator.selection import how_many
from orchestrator.state import RunState

PATIENCE = 3  # async: clients that fail in a row, times those in flight, before a round goes on without


@dataclass(frozen=True)
class Closing:
    """How a round ended.

    Attributes:
        flights: what is still out and will count later.
        clock_s: virtual time.
    """

    flights: tuple[Flight, ...]
    clock_s: float


def play(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    """Give out tasks and take answers until the round is over."""
    if fed.forgets(inbox.number) is not None:
        return _forgetting(fed, state, outbox, inbox)
    state = replace(state, flights=_not_too_old(fed, state, inbox))
    way = _buffered if fed.schedule.mode == "async" else _synchronous
    closing = way(fed, state, outbox, inbox)
    if inbox.number < fed.rounds:
        return closing
    fed.abandon(closing.flights)  # nobody will ask for them
    return Closing((), closing.clock_s)


def _not_too_old(fed: Federation, state: RunState, inbox: Inbox) -> tuple[Flight, ...]:
    """What is out and still worth waiting for; the rest is given up, and its worker is free again."""
    old = [flight for flight in state.flights if inbox.number - flight.round > fed.schedule.max_staleness]
    for flight in old:
        inbox.fail(flight.client, f"has not answered since round {flight.round}; given up by schedule.max_staleness")
    fed.abandon(old)
    return tuple(flight for flight in state.flights if flight not in old)


def wanted(fed: Federation, number: int) -> int:
    """Updates a round waits for, where everybody answers."""
    per_round = min(how_many(fed.per_round, len(fed.members)), max(len(fed.with_rows(number)), 1))
    if fed.schedule.mode == "async":
        return min(fed.schedule.buffer, per_round, max(len(fed.askable(number)), 1))
    return per_round


# Forget rounds ---------------------------------------------------------------------------------------------------


def _forgetting(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    """The owners of what is to be forgotten, however long they take; the virtual clock stands still.

    What is still out was learned from a model that had not forgotten yet: it is given up.
    """
    fed.abandon(state.flights)
    owners = fed.owners(inbox.number)
    names = [client.id for client in owners]
    fed.emit("round_started", {"round": inbox.number, "selected": names, "wanted": len(owners)})
    _run(fed, outbox, inbox, outbox.give(owners, state.clock_s))
    return Closing((), state.clock_s)


# Synchronous rounds ----------------------------------------------------------------------------------------------


def _synchronous(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    target = wanted(fed, inbox.number)
    asked = min(math.ceil(target * fed.schedule.over_selection - 1e-9), len(fed.members))
    busy = {flight.client for flight in state.flights}
    now = state.clock_s
    chosen = outbox.choose(asked, busy, now)
    if not chosen and fed.fleet is not None and not state.flights:
        later = fed.fleet.next_online_s(now, {member.id for member in fed.askable(inbox.number)})
        now = later if later < math.inf else now
        chosen = outbox.choose(asked, busy, now)
    fed.emit("round_started", {"round": inbox.number, "selected": [client.id for client in chosen], "wanted": target})
    new = outbox.give(chosen, now)
    target = max(target - outbox.left_out, 1)
    if fed.schedule.over_selection == 1:
        target = len(new)  # a Poisson draw has its own size, and a required client comes on top
    if fed.fleet is None:
        return _by_real_clock(fed, state, outbox, inbox, new, target)
    return _by_virtual_clock(fed, state, outbox, inbox, new, target, now)


def _by_virtual_clock(
    fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox, new: Sequence[Flight], target: int, now: float
) -> Closing:
    limit = math.inf if fed.schedule.deadline_s is None else now + fed.schedule.deadline_s
    coming = sorted((flight for flight in new if flight.due_s is not None), key=_due)
    on_time = [flight for flight in coming if _due(flight) <= limit][:target]
    for flight in new:
        if flight.due_s is None:
            inbox.fail(flight.client, "dropped out (simulated)")
    last = _due(on_time[-1]) if on_time else now
    # without a deadline a lost connection is noticed; with one, the round waits for whoever might still answer
    closes = last if len(on_time) == target or limit == math.inf else limit
    if not new and state.flights:
        closes = max(closes, min(map(_due, state.flights)))  # everybody is out: wait for the first of them
    older = [flight for flight in state.flights if _due(flight) <= closes]
    _run(fed, outbox, inbox, sorted([*older, *on_time], key=_due))
    out = [flight for flight in state.flights if _due(flight) > closes]
    for flight in coming:
        if flight not in on_time:
            inbox.miss(flight.client, f"due after {_due(flight) - now:.1f} s; the round closed at {closes - now:.1f} s")
            out += [flight] if fed.schedule.late == "keep" else []
    return Closing(tuple(out), closes)


def _by_real_clock(
    fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox, new: Sequence[Flight], target: int
) -> Closing:
    out = {flight.client: flight for flight in (*state.flights, *new)}
    fresh = {flight.client for flight in new}
    awaited = set(fresh)
    begun = time.monotonic()
    limit = fed.schedule.deadline_s
    # a round in which everybody is still out waits for one of them
    needed = min(target, len(fresh)) or min(1, len(out))
    for reply in fed.give(map(outbox.task, out.values()), limit):
        _take(outbox, inbox, out, reply)
        awaited.discard(reply.client)
        if fed.schedule.over_selection > 1 and len(inbox.admitted & fresh if fresh else inbox.admitted) >= needed:
            break
        if not awaited and (fresh or inbox.admitted):
            break
    for reply in fed.give((), 0.0) if out.keys() - fresh else ():
        _take(outbox, inbox, out, reply)  # from earlier rounds, and here already
    passed = time.monotonic() - begun
    for client in [client for client in out if client in fresh]:
        inbox.miss(client, f"no answer when the round closed after {passed:.1f} s")
    if fed.schedule.late == "drop":
        fed.abandon(out.values())
        out = {}
    return Closing(tuple(out.values()), state.clock_s + passed)


# Buffered asynchronous rounds -------------------------------------------------------------------------------------


def _buffered(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    """FedBuff (Nguyen et al., 2022, arXiv 2106.06639): a new client starts whenever one ends."""
    fed.emit("round_started", {"round": inbox.number, "selected": [], "wanted": wanted(fed, inbox.number)})
    if fed.fleet is None:
        return _buffered_by_real_clock(fed, state, outbox, inbox)
    return _buffered_by_virtual_clock(fed, state, outbox, inbox)


def _buffered_by_virtual_clock(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    assert fed.fleet is not None
    places, target = how_many(fed.per_round, len(fed.members)), wanted(fed, inbox.number)
    limit = math.inf if fed.schedule.deadline_s is None else fed.schedule.deadline_s
    flights, now, turn, tries = list(state.flights), state.clock_s, 0, 0
    came: list[Flight] = []
    while len(came) < target and tries < PATIENCE * (places + target):
        free = places - len(flights)
        if free > 0:
            busy = {flight.client for flight in (*flights, *came)} | inbox.answered
            flights += outbox.give(outbox.choose(free, busy, now, turn), now)
            turn += 1
        if not flights:
            able = {member.id for member in fed.askable(inbox.number)}
            unasked = able - {flight.client for flight in came} - inbox.answered
            later = fed.fleet.next_online_s(now, unasked)
            if later == math.inf:
                break  # everyone has answered
            now, tries = later, tries + 1
            continue
        first = min(flights, key=lambda flight: _noticed(flight, limit))
        flights.remove(first)
        now = max(now, _noticed(first, limit))
        if first.due_s is None:
            tries += 1
            inbox.fail(first.client, "dropped out (simulated)")
        elif first.due_s - first.given_s > limit:
            tries += 1
            inbox.fail(first.client, f"had not answered after schedule.deadline_s={limit:g}")
        else:
            came.append(first)
    _run(fed, outbox, inbox, came)
    return Closing(tuple(flights), now)


def _buffered_by_real_clock(fed: Federation, state: RunState, outbox: Outbox, inbox: Inbox) -> Closing:
    places, target = how_many(fed.per_round, len(fed.members)), wanted(fed, inbox.number)
    limit = math.inf if fed.schedule.deadline_s is None else fed.schedule.deadline_s
    out = {flight.client: flight for flight in state.flights}
    begun, now, turn = time.monotonic(), state.clock_s, 0
    while len(inbox.admitted) < target and len(inbox.failed) + len(inbox.refused) < PATIENCE * places:
        busy = out.keys() | inbox.answered
        new = outbox.give(outbox.choose(max(places - len(out), 0), busy, 0.0, turn), now)
        out |= {flight.client: flight for flight in new}
        if not out:
            break  # everyone has answered, and the buffer is not full
        turn += 1
        first = min(flight.given_s for flight in out.values()) + limit
        timeout = None if limit == math.inf else max(first - now, 0.0)
        reply = next(iter(fed.give(map(outbox.task, out.values()), timeout)), None)
        now = state.clock_s + time.monotonic() - begun
        if reply is not None:
            _take(outbox, inbox, out, reply)
        elif limit == math.inf:
            break  # the pool has nothing out any more, whatever we think
        hung = [flight for flight in out.values() if now - flight.given_s >= limit]
        fed.abandon(hung)
        for flight in hung:
            del out[flight.client]
            inbox.fail(flight.client, f"had not answered after schedule.deadline_s={limit:g}")
    return Closing(tuple(out.values()), now)


def _run(fed: Federation, outbox: Outbox, inbox: Inbox, flights: Sequence[Flight]) -> None:
    """Train these now, all of them."""
    out = {flight.client: flight for flight in flights}
    for reply in fed.give(map(outbox.task, flights), None):
        _take(outbox, inbox, out, reply)
    for client in out:
        inbox.fail(client, "no answer")


def _take(outbox: Outbox, inbox: Inbox, out: dict[str, Flight], reply: Reply) -> None:
    """Sort a reply in; its client has nothing out any more."""
    flight = out.pop(reply.client, None)
    inbox.take(reply, outbox.expectation(flight) if flight else None, flight)


def _due(flight: Flight) -> float:
    return math.inf if flight.due_s is None else flight.due_s


def _noticed(flight: Flight, limit: float) -> float:
    """When the server is done with a flight: it answers, is given up, or, where it is lost, at once."""
    return flight.given_s if flight.due_s is None else min(flight.due_s, flight.given_s + limit)


def in_order(flights: Iterable[Flight]) -> tuple[Flight, ...]:
    """Sorted by what a run remembers of them, so that equal states have equal bytes."""
    return tuple(sorted(flights, key=lambda flight: (flight.round, flight.client)))
