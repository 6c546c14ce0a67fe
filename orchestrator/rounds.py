"""One round, on one page. Pools, files and screens are somebody else's business."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.adapter.state import AdapterState
from fedlora.adapter.wire import decode_adapter, digest, encode_adapter
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, Strategy
from fedlora.aggregation.combine import apply_delta, combine, hand_out
from fedlora.errors import RoundError, UpdateRefused
from fedlora.protocol import ClientInfo, ClientPool, EvalResult, EvalTask, TrainPlan, TrainTask
from fedlora.seeds import derive_seed
from orchestrator.admission import Expectation, admit
from orchestrator.failpoints import reach
from orchestrator.selection import select
from orchestrator.state import RunState

MAX_EMPTY_ROUNDS = 3  # in a row; one bad client may cost a round, but a run nobody answers must end

Emit = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Federation:
    """What stays the same from round to round.

    Attributes:
        pool: where clients run.
        strategy: how updates are combined.
        members: all clients in their fixed order.
        fresh: the initial adapter at the global rank.
        emit: called with an event's name and fields.
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
    emit: Emit


def play_round(fed: Federation, state: RunState) -> RunState:
    """The state after one more round; ``state`` itself is untouched.

    Raises:
        RoundError: if not one update could be used for the third round in a row.
    """
    clock = _Clock()
    number = state.round + 1
    ctx = RoundContext(number, fed.rank, derive_seed(fed.seed, number, "", "strategy"))
    chosen = select(fed.members, fed.per_round, derive_seed(fed.seed, number, "", "selection"))
    fed.emit("round_started", {"round": number, "selected": [client.id for client in chosen]})
    reach("round.selected", number)

    asked = _prepare(fed, state, ctx, chosen)
    clock.lap("prepare")
    reach("round.planned", number)
    used, outcome = _collect(fed, asked, number)
    empty = 0 if used else state.empty_rounds + 1
    if empty == MAX_EMPTY_ROUNDS:
        reasons = [f"{client}: {reason}" for client, reason in {**outcome["failed"], **outcome["refused"]}.items()]
        raise RoundError(f"{empty} rounds in a row brought no usable update; in round {number}, {reasons[0]}")
    clock.lap("train")
    reach("round.trained", number)

    unchanged = Aggregate(state.adapter, state.strategy)
    aggregate = combine(fed.strategy, used, ctx, state.strategy) if used else unchanged
    clock.lap("aggregate")
    reach("round.aggregated", number)
    due = number % fed.evaluate_every == 0 or number == fed.rounds
    scores, spread = evaluate_global(fed, aggregate.adapter) if due else (None, None)
    clock.lap("evaluate")
    reach("round.evaluated", number)

    row = {
        "round": number,
        "selected": [client.id for client in chosen],
        "admitted": [contribution.client.id for contribution in used],
        **outcome,
        "train": _weighted_metrics(used),
        "eval": scores,
        "clients": spread,
        "bytes_down": sum(len(expected.task.adapter) for expected in asked.values()),
        "ranks": dict(sorted(Counter(str(c.rank) for c in chosen).items(), key=lambda item: int(item[0]))),
        "strategy": dict(aggregate.metrics),
        "seconds": clock.laps,
    }
    participation = Counter(state.participation) + Counter(row["admitted"])
    return replace(
        state,
        round=number,
        adapter=aggregate.adapter,
        strategy=aggregate.state,
        totals=state.totals.plus(row),
        last={"round": number, **scores} if scores else state.last,
        best=_better(state.best, scores, number),
        row=row,
        empty_rounds=empty,
        participation=dict(sorted(participation.items())),
    )


def evaluate_global(fed: Federation, adapter: AdapterState) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Score the global adapter on the server's rows, and on every client's held-out rows.

    Returns:
        ``{"loss", "accuracy", "examples"}``, and the spread over clients (None where they hold nothing out).
    """
    payload = encode_adapter(adapter)
    shards = fed.pool.workers
    tasks = [EvalTask("", payload, shard, shards) for shard in range(shards)]
    if fed.evaluate_clients:
        tasks += [EvalTask(client.id, payload) for client in fed.members if client.num_heldout]
    results = fed.pool.evaluate(tasks)
    broken = next((result for result in results[:shards] if result.error), None)
    if broken is not None:
        raise RoundError(f"the evaluation of the test set failed: {broken.error}")
    for result in results[shards:]:
        if result.error:
            fed.emit("client_not_scored", {"client": result.subject, "reason": result.error})
    server = results[0]
    for result in results[1:shards]:
        server = server + result
    scores = {"loss": server.loss, "accuracy": server.accuracy, "examples": server.num_examples}
    return scores, _spread([result for result in results[shards:] if result.num_examples])


def _prepare(
    fed: Federation, state: RunState, ctx: RoundContext, chosen: Sequence[ClientInfo]
) -> dict[str, Expectation]:
    """A task per client; clients with equal adapters share one encoded payload."""
    payloads: dict[str, bytes] = {}
    decoded: dict[str, AdapterState] = {}
    cache: dict[TrainPlan, str] = {}
    asked = {}
    for client in chosen:
        plan = fed.strategy.plan(ctx, client, state.strategy)
        key = cache.get(plan)
        if key is None:
            at_plan = replace(client, rank=plan.rank)
            payload = encode_adapter(hand_out(fed.strategy, state.adapter, at_plan, ctx, state.strategy, fed.fresh))
            key = cache[plan] = digest(payload)
            # what the client decodes, not what was encoded, is what its delta refers to
            payloads[key], decoded[key] = payload, decode_adapter(payload)
        seed = derive_seed(fed.seed, ctx.round, client.id, "train")
        task = TrainTask(ctx.round, client.id, plan, payloads[key], key, seed)
        asked[client.id] = Expectation(client, task, decoded[key], fed.max_update_norm)
    return asked


def _collect(
    fed: Federation, asked: Mapping[str, Expectation], number: int
) -> tuple[list[Contribution], dict[str, Any]]:
    """Train, and keep what passes admission. A client that fails costs its own update only."""
    used: dict[str, Contribution] = {}
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    bytes_up = 0
    for reply in fed.pool.train([expected.task for expected in asked.values()]):
        if reply.payload is None:
            failed[reply.client] = reply.error or "no answer"
            details = {"reason": failed[reply.client], "traceback": reply.traceback}
            fed.emit("client_failed", {"round": number, "client": reply.client, **details})
            continue
        bytes_up += len(reply.payload)
        try:
            if reply.client not in asked:
                raise UpdateRefused("was not asked in this round")
            if reply.client in used or reply.client in refused:
                raise UpdateRefused("answered twice; the first answer stands")
            expected = asked[reply.client]
            update = admit(reply.payload, expected)
        except UpdateRefused as error:
            refused.setdefault(reply.client, str(error))
            fed.emit("update_refused", {"round": number, "client": reply.client, "reason": str(error)})
            continue
        trained = apply_delta(expected.received, update.delta)
        weight = float(update.num_examples) if fed.weighting == "examples" else 1.0
        used[reply.client] = Contribution(expected.client, weight, trained, expected.received, update.metrics)
        facts = {"bytes": update.wire_bytes, "seconds": reply.seconds, "metrics": dict(update.metrics)}
        fed.emit("update_admitted", {"round": number, "client": reply.client, **facts})
    tokens, dropped = (int(sum(c.metrics.get(name, 0) for c in used.values())) for name in ("tokens", "dropped_rows"))
    outcome = {
        "refused": refused,
        "failed": failed,
        "bytes_up": bytes_up,
        "train_tokens": tokens,
        "dropped_rows": dropped,
    }
    return [used[client] for client in asked if client in used], outcome


def _weighted_metrics(used: Sequence[Contribution]) -> dict[str, float] | None:
    if not used:
        return None
    total = sum(contribution.weight for contribution in used)
    names = ("loss", "first_loss")
    return {name: sum(c.weight * c.metrics.get(name, 0.0) for c in used) / total for name in names}


def _spread(results: Sequence[EvalResult]) -> dict[str, Any] | None:
    """Worst, 10 %, median and best client; the worst loss is the largest."""
    if not results:
        return None

    def order(values: list[float]) -> dict[str, float]:
        return {
            "worst": values[0],
            "p10": values[int(0.1 * (len(values) - 1))],
            "median": values[len(values) // 2],
            "best": values[-1],
        }

    return {
        "accuracy": order(sorted(result.accuracy for result in results)),
        "loss": order(sorted((result.loss for result in results), reverse=True)),
        "count": len(results),
    }


def _better(
    best: Mapping[str, float] | None, scores: Mapping[str, float] | None, number: int
) -> Mapping[str, float] | None:
    """The better of two by metric, then by loss; the earlier one where both tie."""
    if scores is None:
        return best
    if best is None or (scores["accuracy"], -scores["loss"]) > (best["accuracy"], -best["loss"]):
        return {"round": number, **scores}
    return best


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase] = now - self._last
        self._last = now
