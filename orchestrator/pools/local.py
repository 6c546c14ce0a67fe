"""Clients in this process, one after another, on one copy of the base."""

import time
import traceback
from collections.abc import Iterator, Sequence

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Reply, TrainTask, WorkerStats
from orchestrator.pools import cores


class LocalPool:
    """The reference pool: what others must agree with."""

    workers = 1

    def __init__(self, config: RunConfig):
        self._runtime = ClientRuntime(config, config.threads or cores())

    def members(self) -> list[ClientInfo]:
        return self._runtime.members()

    def base(self) -> BaseInfo:
        return self._runtime.base()

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[Reply]:
        for task in tasks:
            start = time.perf_counter()
            try:
                payload = self._runtime.train(task)
            except FedLoRAError as error:
                yield Reply(task.client, error=str(error))
            except Exception as error:  # noqa: BLE001 - one client's failure must not end the run
                yield Reply(task.client, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            else:
                yield Reply(task.client, payload, seconds=time.perf_counter() - start)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        return [self._runtime.evaluate(task) for task in tasks]

    def stats(self) -> list[WorkerStats]:
        return [self._runtime.stats()]

    def close(self) -> None:
        pass
