"""One task on a runtime, whatever comes of it: how every pool executes clients."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
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

    def train_together(self, tasks: Sequence[TrainTask]) -> list[tuple[bytes, float] | None]:
        """Wire bytes of every client's update and its part of the work; None for one that has to be trained alone."""
        ...


@runtime_checkable
class Answers(Protocol):
    """A runtime whose clients take part in exchanges beside their tasks."""

    def exchange(self, client: str, message: bytes) -> bytes:
        """One client's answer to one message."""
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


def answer(runtime: Runtime, client: str, message: bytes) -> Reply:
    """A client's answer to a message; an exception is an answer too."""
    start = time.perf_counter()
    try:
        if not isinstance(runtime, Answers):
            raise FedLoRAError(f"{type(runtime).__name__} answers no messages")
        return Reply(client, runtime.exchange(client, message), seconds=time.perf_counter() - start)
    except FedLoRAError as error:
        return Reply(client, error=str(error))
    except Exception as error:  # noqa: BLE001 - one client's failure must not end the run
        return Reply(client, None, f"{type(error).__name__}: {error}", f"client {client}\n{traceback.format_exc()}")


def attempt_together(runtime: Runtime, tasks: Sequence[TrainTask]) -> list[Reply]:
    """The answers of a cohort. Whoever cannot be one of it, or fails in it, is tried alone, and so is everybody if the
    pass itself fails; the answers then say why.
    """
    start, why = time.perf_counter(), ""
    found: list[tuple[bytes, float] | None] = [None] * len(tasks)
    if len(tasks) > 1 and isinstance(runtime, TrainsTogether):
        try:
            found = runtime.train_together(tasks)
        except Exception as error:  # noqa: BLE001 - out of memory, or a method that wants the model to itself
            why = f"{type(error).__name__}: {error}"
    seconds, whole = time.perf_counter() - start, sum(answer[1] for answer in found if answer) or 1.0
    return [
        Reply(task.client, answer[0], seconds=seconds * answer[1] / whole)
        if answer
        else replace(attempt(runtime, task), alone=why)
        for task, answer in zip(tasks, found, strict=True)
    ]
