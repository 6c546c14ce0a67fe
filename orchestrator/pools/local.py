"""Clients in this process, one cohort after another, on one copy of the base."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

from clients.attempt import OpenRuntime, answer, attempt_together
from clients.deadline import OutOfTimeError, stopped_after
from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Reply, TrainTask, WorkerStats
from orchestrator.pools import check_one_each, cores
from orchestrator.pools.cohorts import Cohort, Division


class LocalPool:
    """The reference pool: what others must agree with.

    A deadline also stops the client that is training when it passes, if this is the main thread and the client runs
    Python; elsewhere it is looked at between clients. Whoever may be given up trains alone.
    """

    workers = 1

    def __init__(self, config: RunConfig, runtime: OpenRuntime = ClientRuntime):
        self._config = config
        self._runtime = runtime(config, config.threads or cores())
        self._queue: deque[Cohort] = deque()
        self._division: Division | None = None

    def members(self) -> Sequence[ClientInfo]:
        return self._runtime.members()

    def base(self) -> BaseInfo:
        return self._runtime.base()

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        check_one_each(tasks, {task.client for cohort in self._queue for task in cohort})
        self._queue.extend(self._cohorts(tasks) if timeout_s is None else ((task,) for task in tasks))
        return self._replies(timeout_s)

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        replies = {}
        for client, message in messages.items():
            if ends is not None and time.monotonic() >= ends:
                break
            replies[client] = answer(self._runtime, client, message)
        return replies

    def abandon(self, clients: Collection[str]) -> None:
        left = (tuple(task for task in cohort if task.client not in clients) for cohort in self._queue)
        self._queue = deque(cohort for cohort in left if cohort)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        return [self._runtime.evaluate(task) for task in tasks]

    def stats(self) -> list[WorkerStats]:
        return [self._runtime.stats()]

    def close(self) -> None:
        self._queue.clear()

    def _cohorts(self, tasks: Sequence[TrainTask]) -> list[Cohort]:
        if len(tasks) < 2:
            return [(task,) for task in tasks]
        if self._division is None:
            self._division = Division(self._config, self.members(), self.base())
        return self._division.cohorts(tasks)

    def _replies(self, timeout_s: float | None) -> Iterator[Reply]:
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        while self._queue:
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                return
            cohort = self._queue.popleft()
            try:
                with stopped_after(left):
                    replies = attempt_together(self._runtime, cohort)
            except OutOfTimeError:
                late = f"had not answered at the deadline of {timeout_s:g} s and was stopped"
                replies = [Reply(task.client, error=late) for task in cohort]
            yield from replies
