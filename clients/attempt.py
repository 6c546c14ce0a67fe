"""One task on a runtime, whatever comes of it: how every pool executes clients."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Reply, TrainTask, WorkerStats


class Runtime(Protocol):
    """What a worker needs of whatever trains: ``clients.runtime.ClientRuntime``, or one that only pretends to."""

    def members(self) -> Sequence[ClientInfo]:
        """Every client of the run."""
        ...

    def base(self) -> BaseInfo:
        """The base model, loaded by the first call that needs it."""
        ...

    def train(self, task: TrainTask) -> bytes:
        """Wire bytes of the client's update."""
        ...

    def evaluate(self, task: EvalTask) -> EvalResult:
        """Score an adapter."""
        ...

    def stats(self) -> WorkerStats:
        """What this process has used."""
        ...


@runtime_checkable
class TrainsTogether(Protocol):
    """A runtime that can train several clients in one pass."""

    def train_together(self, tasks: Sequence[TrainTask]) -> list[bytes | None]:
        """Wire bytes of every client's update; None for one that has to be trained alone."""
        ...


OpenRuntime = Callable[[RunConfig, int], Runtime]  # from a configuration and torch threads; importable by its name


def open_runtime(config: RunConfig, threads: int) -> Runtime:
    """The runtime that trains. Importing it brings PEFT and transformers, which only a worker needs."""
    from clients.runtime import ClientRuntime

    return ClientRuntime(config, threads)


def attempt(runtime: Runtime, task: TrainTask) -> Reply:
    """The client's answer; an exception is an answer too, with its traceback where it is not one of ours."""
    start = time.perf_counter()
    try:
        payload = runtime.train(task)
    except FedLoRAError as error:
        return Reply(task.client, error=str(error), seconds=time.perf_counter() - start)
    except Exception as error:  # noqa: BLE001 - one client's failure must not end the run
        trace = f"client {task.client}, round {task.round}\n{traceback.format_exc()}"
        return Reply(task.client, None, f"{type(error).__name__}: {error}", trace, time.perf_counter() - start)
    return Reply(task.client, payload, seconds=time.perf_counter() - start)


def attempt_together(runtime: Runtime, tasks: Sequence[TrainTask]) -> list[Reply]:
    """The answers of a cohort. Whoever cannot be one of it, or fails in it, is tried alone, and so is everybody if the
    whole cohort fails.
    """
    start = time.perf_counter()
    found: list[bytes | None] = [None] * len(tasks)
    if len(tasks) > 1 and isinstance(runtime, TrainsTogether):
        with contextlib.suppress(Exception):  # out of memory, or a method that wants the model to itself
            found = runtime.train_together(tasks)
    seconds = (time.perf_counter() - start) / max(1, sum(payload is not None for payload in found))
    return [
        attempt(runtime, task) if payload is None else Reply(task.client, payload, seconds=seconds)
        for task, payload in zip(tasks, found, strict=True)
    ]
