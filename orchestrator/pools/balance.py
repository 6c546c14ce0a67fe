"""Which task goes next, and how many travel together. Estimates only order work; results do not depend on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedlora.config import TrainingConfig
from fedlora.protocol import BaseInfo, ClientInfo, TrainPlan
from fedlora.training.batches import steps_of

CALL_S = 0.2  # work worth one call: a call costs 1 to 3 ms, and a worker's death repeats one call
LEAST_CALL_S = 0.01  # below, calls cost more than they balance
CALL_BYTES = 64 << 20  # answers of one call are one object, about as large as what was sent


def training_flops(client: ClientInfo, plan: TrainPlan, training: TrainingConfig, base: BaseInfo, length: int) -> float:
    """Estimated operations of one client's round: tokens x (4 P + 6 r sum(out + in)).

    A frozen weight costs two operations per token forward and two for the gradient of its input; a weight of the
    adapter two more for its own gradient. Tokens are rows seen times ``length``, the most a row can have.

    Args:
        client: ``num_examples`` says how many rows a batch or an epoch can have.
        plan: ``rank`` is r.
        training: steps or epochs, batch size.
        base: P parameters, and the (out, in) of every adapted module.
        length: tokens a row is cut to.
    """
    rows, batch = max(client.num_examples, 1), training.per_device_train_batch_size
    accumulation = training.gradient_accumulation_steps
    steps = steps_of(rows, batch, accumulation, training.max_steps, training.num_train_epochs)
    tokens = steps * accumulation * min(batch, rows) * length
    sides = sum(out + into for out, into in base.sites.values())
    return max(1.0, tokens * (4.0 * base.num_parameters + 6.0 * plan.rank * sides))


class Pace:
    """Seconds per unit of estimated cost, as measured: a moving average over calls."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def learn(self, cost: float, seconds: float) -> None:
        """A call with tasks of this total cost took so long."""
        rate = seconds / max(cost, 1e-12)
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate

    def seconds(self, cost: float) -> float | None:
        """What a task of this cost is expected to take; None before the first call has ended."""
        return None if self._rate is None else self._rate * cost


def call_size(costs: Sequence[float], bytes_each: int, pace: Pace, workers: int) -> int:
    """How many of the waiting tasks, from the first on, make the next call.

    One until the pace is known. Then as many as come to ``CALL_S``, but no more than half a worker's share of what
    waits, so that the last calls are small and workers end together.

    Args:
        costs: of the waiting tasks that may share a call, in the order they go out.
        bytes_each: size of what a task is sent.
        pace: of this kind of task.
        workers: that share the queue.
    """
    waiting = pace.seconds(sum(costs))
    if waiting is None:
        return 1
    budget = min(CALL_S, max(waiting / (2 * workers), LEAST_CALL_S))
    most = max(1, CALL_BYTES // max(bytes_each, 1))
    taken, spent = 0, 0.0
    for cost in costs[:most]:
        each = pace.seconds(cost) or 0.0
        if taken and spent + each > budget:
            break
        taken, spent = taken + 1, spent + each
    return max(taken, 1)


def fits(nodes: Iterable[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """How many workers nodes can hold; a worker does not span nodes.

    Args:
        nodes: resources of each node, such as ``{"CPU": 4, "GPU": 1}``.
        needs: of one worker; at least one above zero.
    """
    wanted = {name: need for name, need in needs.items() if need}
    return sum(min(math.floor(node.get(name, 0) / need + 1e-9) for name, need in wanted.items()) for node in nodes)
