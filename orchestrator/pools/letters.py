"""Small messages to clients on Ray, beside their tasks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

from fedlora.protocol import Reply
from orchestrator.pools.crew import Crew, Worker, first_line

import ray  # isort: skip - after crew, which sets what Ray reads when it is imported
from ray.exceptions import RayError, RayTaskError  # isort: skip


def deliver(
    crew: Crew,
    free: Callable[[float], list[Worker]],
    messages: Mapping[str, bytes],
    retries: int,
    timeout_s: float | None,
) -> dict[str, Reply]:
    """A reply per client, but for those who have not answered in time.

    Every free worker gets its part of the messages. Those of a worker that dies are given out again one by one, so that
    a client that kills its workers takes no other down.

    Args:
        free: workers that have nothing to do, after waiting for one at most so many seconds.
        retries: times a message is given to another worker.
    """
    ends = math.inf if timeout_s is None else time.monotonic() + timeout_s
    left, replies, deaths = dict(messages), dict[str, Reply](), Counter[str]()
    while left and (now := time.monotonic()) < ends:
        workers = free(min(1.0, ends - now))
        suspects = [client for client in left if deaths[client]]
        names = suspects[: len(workers)] or list(left)
        calls = {}
        for place, worker in enumerate(workers[: len(names)]):
            part = {client: left[client] for client in names[place :: len(workers)]}
            calls[worker.actor.exchange.remote(part)] = worker, part
        patience = None if ends == math.inf else max(0.0, ends - time.monotonic())
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=patience) if calls else ([], [])
        for reference in done:
            worker, part = calls[reference]
            try:
                replies |= ray.get(reference)
            except RayTaskError as error:
                replies |= {client: Reply(client, error=str(error.cause), traceback=str(error)) for client in part}
            except RayError as error:
                crew.lose(worker)
                deaths.update(list(part))
                alone = [client for client in part if len(part) == 1 and deaths[client] > retries]
                why = f"its worker died over a message ({first_line(error)})"
                replies |= {client: Reply(client, error=why) for client in alone}
        left = {client: message for client, message in left.items() if client not in replies}
        for reference in late:
            crew.lose(calls[reference][0])  # it hangs over a message that takes milliseconds
    return replies
