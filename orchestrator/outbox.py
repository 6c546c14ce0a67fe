"""What goes out in a round: clients are chosen, planned for and sent the adapter at their rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from fedlora.adapter.wire import decode_parcel, digest, encode_adapter
from fedlora.aggregation.base import RoundContext
from fedlora.aggregation.combine import hand_out
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan, TrainTask
from fedlora.seeds import derive_seed
from orchestrator.admission import Expectation, Form
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.fleet import examples_of
from orchestrator.flights import Flight
from orchestrator.selection import Draw
from orchestrator.state import RunState


class Outbox:
    """Gives out tasks of one round. Clients with equal plans share one encoded payload."""

    def __init__(self, fed: Federation, state: RunState, ctx: RoundContext):
        self._fed, self._state, self._ctx = fed, state, ctx
        self._payloads: dict[str, bytes] = dict(state.payloads)
        self._forms: dict[tuple[str, frozenset[str]], Form] = {}
        self._planned: dict[TrainPlan, str] = {}
        self._expected: dict[tuple[int, str], Expectation] = {}
        self._patches = state.ledger.patches()
        self._fresh = fed.fresh_pair(state.freezes, state.round)  # the same for every plan
        self.given: list[Flight] = []
        self.bytes_down = 0
        self.left_out = 0  # of the draws, since they are excluded

    def choose(self, count: int, busy: Collection[str], now_s: float, turn: int = 0) -> list[ClientInfo]:
        """Whom to ask, in member order: a draw among those who are there and have nothing out, and who is required.

        Args:
            count: how many to draw.
            busy: ids that must not be asked.
            now_s: virtual time; without a simulated fleet everyone is always there.
            turn: tells the draws of one round apart.
        """
        fed, fleet = self._fed, self._fed.fleet
        able = fed.with_rows(self._ctx.round)
        there = [member for member in able if member.id not in busy] if busy else able
        if fleet is not None:
            there = [member for member in there if fleet.is_online(member.id, now_s)]
        if not there:
            return []
        seed = derive_seed(fed.seed, self._ctx.round, str(turn) if turn else "", "selection")
        draw = Draw(self._ctx.round, seed, count, len(fed.members), self._state.records)
        drawn = {*fed.selector.select(there, draw), *(() if turn else fed.strategy.required)}
        # a selection from a plug-in may name anybody
        places = sorted(fed.places[client] for client in drawn if client in fed.places and client not in busy)
        kept = [place for place in places if fed.members[place].id not in fed.excluded]
        self.left_out += len(places) - len(kept)
        places = kept
        chosen = [self._now(fed.members[place]) for place in places]
        return [client for client in chosen if client.num_examples or fed.course is None]

    def give(self, clients: Sequence[ClientInfo], now_s: float) -> list[Flight]:
        """A flight per client, due where a fleet is simulated."""
        reach("round.selected", self._ctx.round)
        flights = [self._flight(client, now_s) for client in clients]
        self.given += flights
        for flight in flights:
            missing = self._state.ledger.missing(self._state.caught_up.get(flight.client, ""))
            self.bytes_down += len(self._payloads[flight.received]) + sum(len(patch.payload) for patch in missing)
        reach("round.planned", self._ctx.round)
        return flights

    def task(self, flight: Flight) -> TrainTask:
        """The whole task of a flight, of this round or of one before."""
        return self.expectation(flight).task

    def expectation(self, flight: Flight) -> Expectation:
        """What the answer to a flight must look like."""
        key = flight.round, flight.client
        if key not in self._expected:
            payload, patches = self._payloads[flight.received], self._patches[: flight.patches]
            which = flight.round, flight.client, flight.plan, payload, flight.received, flight.seed
            seen = self._fed.live.sha256(flight.round) if self._fed.live else ""
            forget = self._fed.forgets(flight.round)
            task = TrainTask(*which, patches, flight.accepted, flight.stage, self._fed.ended, seen, forget)
            member = self._fed.members[self._fed.places[flight.client]]
            client = _at_rank(self._fed.present(member, flight.round), flight.plan.rank)
            form = self._form(flight.received, flight.plan.send)
            self._expected[key] = Expectation(client, task, form, self._fed.max_update_norm)
        return self._expected[key]

    def payloads(self, flights: Sequence[Flight]) -> dict[str, bytes]:
        """Those that these flights refer to."""
        wanted = {flight.received for flight in flights}
        return {key: payload for key, payload in sorted(self._payloads.items()) if key in wanted}

    def _now(self, member: ClientInfo) -> ClientInfo:
        """A member as this round finds it."""
        return self._fed.present(member, self._ctx.round)

    def _flight(self, client: ClientInfo, now_s: float) -> Flight:
        fed, ctx, state = self._fed, self._ctx, self._state
        plan = fed.strategy.plan(ctx, client, state.strategy)
        if leaking := plan.send & plan.keep:
            raise ConfigError(f"strategy: {fed.strategy.name} plans to send {sorted(leaking)}, which it calls personal")
        received = self._payload(client, plan)
        seed = derive_seed(fed.seed, ctx.round, client.id, "train")
        accepted = state.accepted.get(client.id, 0)
        stage = fed.stage(client.id, ctx.round)
        flight = Flight(ctx.round, client.id, plan, received, seed, len(self._patches), accepted, now_s, stage=stage)
        if fed.fleet is None or fed.forgets(ctx.round) is not None or fed.fleet.drops_out(client.id, ctx.round):
            return flight  # owners are waited for: no simulated device decides whether something is forgotten
        down = len(self._payloads[received])
        up = self.expectation(flight).form.num_bytes * (2 if fed.masked else 1)
        examples = examples_of(client.num_examples, fed.training)
        return replace(flight, due_s=now_s + fed.fleet.seconds(client.id, ctx.round, examples, down, up))

    def _payload(self, client: ClientInfo, plan: TrainPlan) -> str:
        """SHA-256 of what this client is sent."""
        if plan not in self._planned:
            fed, ctx, state = self._fed, self._ctx, self._state
            client = _at_rank(client, plan.rank)
            handed = hand_out(fed.strategy, client, ctx, state.strategy, self._fresh)
            payload = encode_adapter(handed, fed.strategy.broadcast(client, ctx, state.strategy))
            self._planned[plan] = digest(payload)
            self._payloads[self._planned[plan]] = payload
        return self._planned[plan]

    def _form(self, received: str, send: frozenset[str]) -> Form:
        if (received, send) not in self._forms:
            # what the client decodes, not what was encoded, is what its delta refers to
            adapter, extras = decode_parcel(self._payloads[received])
            self._forms[received, send] = Form(adapter, send, extras, self._fed.packing)
        return self._forms[received, send]


def _at_rank(client: ClientInfo, rank: int) -> ClientInfo:
    return client if client.rank == rank else replace(client, rank=rank)
