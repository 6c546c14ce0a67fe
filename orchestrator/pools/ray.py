"""Clients on Ray actors: on this machine, or on a cluster.

Ray holds nothing that matters. Each distinct adapter is put into the object store once; a task travels
as a reference and a few numbers; replies are taken as they arrive. A worker that dies is replaced, and
its task is given to another one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone

import ray
from ray.exceptions import RayActorError, RayTaskError

from clients.ray_actor import RayWorker
from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError, ModelError
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Reply, TrainTask, WorkerStats
from orchestrator.pools import cores


class RayPool:
    """Actors that each hold one copy of the base."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._settings = config.ray
        self._started_here = _connect(config)
        self.workers = self._settings.workers or _default_workers(self._settings.num_cpus)
        self._threads = config.threads or max(1, math.floor(self._settings.num_cpus))
        self._actors: list[Any] = [self._spawn() for _ in range(self.workers)]
        self._members: list[ClientInfo] = self._ask_first("members")

    def members(self) -> list[ClientInfo]:
        return self._members

    def base(self) -> BaseInfo:
        return self._ask_first("base")

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[Reply]:
        yield from (reply for _, reply in self._spread(tasks, _train, _train_failed))

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        results = dict(self._spread(tasks, _evaluate, _evaluate_failed))
        return [results[index] for index in range(len(tasks))]

    def stats(self) -> list[WorkerStats]:
        return [ray.get(actor.stats.remote()) for actor in self._actors]

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [ray.get(actor.pid.remote()) for actor in self._actors]

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started_here and ray.is_initialized():
            ray.shutdown()
            self._started_here = False

    def _spread(
        self, tasks: Sequence[Any], call: Callable[..., Any], failed: Callable[[Any, str], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Hand tasks to free workers; yield (index of the task, result) as they finish."""
        references: dict[str, Any] = {}
        for task in tasks:
            if task.adapter not in references:
                references[task.adapter] = ray.put(task.adapter)
        waiting = deque((index, 0) for index in range(len(tasks)))
        idle = list(range(len(self._actors)))
        running: dict[Any, tuple[int, int, int, float]] = {}
        while waiting or running:
            while waiting and idle:
                index, tries = waiting.popleft()
                slot = idle.pop(0)
                task = tasks[index]
                reference = call(self._actors[slot], references[task.adapter], replace(task, adapter=b""))
                running[reference] = (index, tries, slot, time.perf_counter())
            done, _ = ray.wait(list(running), num_returns=1)
            index, tries, slot, start = running.pop(done[0])
            try:
                result = ray.get(done[0])
            except RayActorError as error:
                # the worker is gone: a fresh one takes its place, and the task is tried elsewhere
                self._actors[slot] = self._spawn()
                if tries < self._settings.task_retries:
                    waiting.appendleft((index, tries + 1))
                else:
                    yield (
                        index,
                        failed(tasks[index], f"its worker died {tries + 1} times ({_first_line(error)})"),
                    )
            except RayTaskError as error:
                yield index, failed(tasks[index], f"{type(error.cause).__name__}: {error.cause}")
            else:
                yield index, _finish(tasks[index], result, time.perf_counter() - start)
            idle.append(slot)

    def _spawn(self) -> Any:
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if name in os.environ}
        return RayWorker.options(  # type: ignore[attr-defined]
            num_cpus=self._settings.num_cpus,
            num_gpus=self._settings.num_gpus,
            runtime_env={"env_vars": threads | offline},
        ).remote(self._config.resolved(), self._threads)

    def _ask_first(self, method: str) -> Any:
        try:
            return ray.get(getattr(self._actors[0], method).remote())
        except RayTaskError as error:
            if isinstance(error.cause, FedLoRAError):
                raise error.cause from None  # it already says what to do
            raise
        except RayActorError as error:
            raise ModelError(f"the first Ray worker died while it started: {_first_line(error)}") from error


def _train(actor: Any, adapter: Any, task: TrainTask) -> Any:
    return actor.train.remote(adapter, task)


def _train_failed(task: TrainTask, reason: str) -> Reply:
    return Reply(task.client, error=reason)


def _evaluate(actor: Any, adapter: Any, task: EvalTask) -> Any:
    return actor.evaluate.remote(adapter, task)


def _evaluate_failed(task: EvalTask, reason: str) -> EvalResult:
    return EvalResult(task.subject, 0.0, 0, 0, 0, error=reason)


def _finish(task: TrainTask | EvalTask, result: Any, seconds: float) -> Any:
    if isinstance(task, EvalTask):
        return result
    payload, error, trace = result
    return Reply(task.client, payload, error, trace, seconds)


def _connect(config: RunConfig) -> bool:
    """Join a cluster, or start Ray on this machine; whether it was started here."""
    if ray.is_initialized():
        return False
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # a worker each gets num_cpus; more logical cores than real ones only queue at the scheduler
            wanted = (config.ray.workers or 1) * config.ray.num_cpus
            ray.init(num_cpus=max(cores(), math.ceil(wanted)), include_dashboard=False, **quiet)
    except ConnectionError as error:
        raise FedLoRAError(f"ray: no cluster answers at {address}: {_first_line(error)}") from error
    return True


def _default_workers(num_cpus: float) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1) // num_cpus))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
