"""Scores of a model: over the server's rows, over every client's, and which round was the best."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.adapter.wire import encode_adapter
from fedlora.aggregation.combine import hand_out
from fedlora.errors import RoundError
from fedlora.protocol import EvalResult, EvalTask
from orchestrator.federation import Federation
from orchestrator.progress import TaskScores
from orchestrator.routing import routed
from orchestrator.state import RunState


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a model is.

    Attributes:
        scores: ``{"loss", "accuracy", "examples"}``, and ``probe_perplexity`` or ``probe_accuracy`` where asked for.
        spread: over clients; None where they hold nothing out or were not asked.
        tasks: of a stream, one by one.
    """

    scores: dict[str, float]
    spread: dict[str, Any] | None
    tasks: TaskScores | None = None


def evaluate_global(fed: Federation, state: RunState) -> Evaluation:
    """Score the global model on the server's rows, and on every client's held-out rows.

    Under a strategy with personal parts there is no one global model: every client scores its own on its own
    held-out rows, and the scores are over all of these rows together. In a stream the rows are those of the tasks met
    so far; at the start, and where a task ends, every task of the stream is looked at.
    """
    if fed.strategy.traits.personal:
        return _evaluate_personal(fed, state)
    found = _evaluate_stream(fed, state) if fed.course is not None else _evaluate_once(fed, state)
    return replace(found, scores=found.scores | _ability(fed, state)) if fed.probe else found


def _ability(fed: Federation, state: RunState) -> dict[str, float]:
    """Scores on the rows of general ability: perplexity of a language model, accuracy of a classifier's features."""
    payload, patches, shards = encode_adapter(state.adapter), state.ledger.patches(), fed.pool.workers
    looks = [EvalTask("", payload, shard, shards, patches, probe=True) for shard in range(shards)]
    results = fed.pool.evaluate(looks)
    if broken := next((result for result in results if result.error), None):
        raise RoundError(f"the evaluation of the probe failed: {broken.error}")
    scores = _scores(results)
    if fed.probe == "causal-lm":
        return {"probe_perplexity": math.exp(min(scores["loss"], 700.0))}
    return {"probe_accuracy": scores["accuracy"]}


def _evaluate_once(fed: Federation, state: RunState) -> Evaluation:
    payload, patches = encode_adapter(state.adapter), state.ledger.patches()
    shards = fed.pool.workers
    tasks = [EvalTask("", payload, shard, shards, patches) for shard in range(shards)]
    if fed.evaluate_clients:
        tasks += [EvalTask(client.id, payload, ledger=patches) for client in fed.taking_part if client.num_heldout]
    results = fed.pool.evaluate(tasks)
    broken = next((result for result in results[:shards] if result.error), None)
    if broken is not None:
        raise RoundError(f"the evaluation of the test set failed: {broken.error}")
    return Evaluation(_scores(results[:shards]), _client_spread(fed, results[shards:]))


def _evaluate_stream(fed: Federation, state: RunState) -> Evaluation:
    assert fed.course is not None
    count = len(fed.course.names)
    met = fed.course.met(state.round) if state.round else frozenset(range(count))
    every = range(count) if not state.round or fed.course.ends(state.round) else sorted(met)
    payload, patches, shards = encode_adapter(state.adapter), state.ledger.patches(), fed.pool.workers
    tasks = [
        # before training a task is scored against the labels that it will compete with right before its turn
        EvalTask("", payload, shard, shards, patches, stage=task, met=met if state.round else frozenset(range(task)))
        for task in every
        for shard in range(shards)
    ]
    if fed.evaluate_clients:
        tasks += [
            EvalTask(client.id, payload, ledger=patches, stage=task, met=met)
            for client in fed.taking_part
            for task in sorted(met)
            if client.stages[task][1]
        ]
    tasks = routed(fed, state, tasks)
    server: dict[int, EvalResult] = {}
    clients: dict[str, dict[int, EvalResult]] = {}
    for task, result in zip(tasks, fed.pool.evaluate(tasks), strict=True):
        if result.error and not task.subject:
            raise RoundError(f"the evaluation of the test set failed: {result.error}")
        if result.error:
            fed.emit("client_not_scored", {"client": task.subject, "reason": result.error})
            continue
        assert task.stage is not None
        found = clients.setdefault(task.subject, {}) if task.subject else server
        found[task.stage] = found[task.stage] + result if task.stage in found else result
    scores = _scores([result for task, result in server.items() if task in met])
    each = [functools.reduce(operator.add, own.values()) for own in clients.values()]
    return Evaluation(scores, _spread(each), TaskScores(count, server, clients))


def _evaluate_personal(fed: Federation, state: RunState) -> Evaluation:
    patches, ctx = state.ledger.patches(), fed.context(state.round + 1, state)
    tasks = []
    for client in fed.taking_part:
        if client.num_heldout:
            plan = fed.strategy.plan(ctx, client, state.strategy)
            at_plan = replace(client, rank=plan.rank)
            payload = encode_adapter(
                hand_out(fed.strategy, at_plan, ctx, state.strategy, fed.fresh_pair(state.freezes, state.round))
            )
            accepted = state.accepted.get(client.id, 0)
            tasks.append(EvalTask(client.id, payload, ledger=patches, keep=plan.keep, accepted=accepted))
    results = fed.pool.evaluate(tasks)
    if all(result.error for result in results):
        raise RoundError(
            f"no client could score its personal model: {results[0].error if results else 'no rows held out'}"
        )
    return Evaluation(_scores([result for result in results if not result.error]), _client_spread(fed, results))


def _client_spread(fed: Federation, results: Sequence[EvalResult]) -> dict[str, Any] | None:
    for result in results:
        if result.error:
            fed.emit("client_not_scored", {"client": result.subject, "reason": result.error})
    return _spread([result for result in results if result.num_examples])


def _scores(results: Sequence[EvalResult]) -> dict[str, float]:
    total = results[0]
    for result in results[1:]:
        total = total + result
    return {"loss": total.loss, "accuracy": total.accuracy, "examples": total.num_examples}


def better(
    best: Mapping[str, float] | None, scores: Mapping[str, float] | None, number: int
) -> Mapping[str, float] | None:
    """The better of two by metric, then by loss; the earlier one where both tie."""
    if scores is None:
        return best
    if best is None or (scores["accuracy"], -scores["loss"]) > (best["accuracy"], -best["loss"]):
        return {"round": number, **scores}
    return best


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
