"""Clients with seeded changes that take part in secure sums, and a pool that loses answers and writes all down."""

import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from clients.noop import NoopRuntime
from clients.secure import SecureClient
from fedlora.adapter.wire import decode_parcel, encode_update
from fedlora.config import RunConfig
from fedlora.privacy.messages import read_request
from fedlora.protocol import BaseInfo, ClientInfo, ClientPool, EvalResult, EvalTask, Reply, TrainTask, WorkerStats

ROWS = (16, 7, 30, 11, 5, 23, 9, 14)


class Summing(NoopRuntime):
    """Everybody has other rows and another change; it is masked where the configuration says so."""

    def __init__(self, config: RunConfig, threads: int):
        super().__init__(config, threads)
        self._secure = SecureClient.of(config, Path(config.output_dir) / "private")

    def members(self) -> Sequence[ClientInfo]:
        return [replace(m, num_examples=ROWS[place % len(ROWS)]) for place, m in enumerate(super().members())]

    def train(self, task: TrainTask) -> bytes:
        rows = next(member.num_examples for member in self.members() if member.id == task.client)
        metrics = {"loss": 1.0 + rows / 10, "first_loss": 2.0, "steps": 2, "tokens": 10 * rows + 1}
        if self._secure:
            return self._secure.masked(task, change(task), rows, metrics)
        return encode_update(task.client, task.round, task.received, change(task), rows, metrics)

    def exchange(self, client: str, message: bytes) -> bytes:
        assert self._secure is not None
        return self._secure.answer(client, message)


class Deadly(Summing):
    """``c3`` takes its worker down when it is asked to deal shares: once in round 1, and always in round 2."""

    def __init__(self, config: RunConfig, threads: int):
        super().__init__(config, threads)
        self._died = Path(config.output_dir) / "died"

    def exchange(self, client: str, message: bytes) -> bytes:
        request = read_request(message)
        deals = client == "c3" and request.stage == "shares"
        if deals and (request.session.round == 2 or not self._died.exists()):
            self._died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().exchange(client, message)


def change(task: TrainTask) -> dict[str, torch.Tensor]:
    """What a client comes to: of the size that training has."""
    draw = torch.Generator().manual_seed(task.seed)
    received, _ = decode_parcel(task.adapter)
    return {name: 0.01 * torch.randn(t.shape, generator=draw) for name, t in received.tensors().items()}


@dataclass
class Leaky:
    """A pool between the server and its clients.

    Attributes:
        lost: whose answers never come, by stage: keys, shares, masked or opened.
        seen: every byte that went from or to the server in rounds.
        workers: of the inner pool.
    """

    inner: ClientPool
    lost: Mapping[str, Collection[str]] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)
    workers: int = 1

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        self.seen += [task.adapter for task in tasks] + [task.mask.encode() for task in tasks]
        for reply in self.inner.train(tasks, timeout_s):
            if reply.client in self.lost.get("masked", ()):
                yield Reply(reply.client, error="lost on the way")
            else:
                self.seen += [bytes(reply.payload)] if reply.payload is not None else []
                yield reply

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        self.seen += messages.values()
        lost = {
            client for client, message in messages.items() if client in self.lost.get(read_request(message).stage, ())
        }
        replies = self.inner.exchange(messages, timeout_s)
        self.seen += [bytes(reply.payload) for reply in replies.values() if reply.payload is not None]
        return {client: reply for client, reply in replies.items() if client not in lost}

    def members(self) -> Sequence[ClientInfo]:
        return self.inner.members()

    def base(self) -> BaseInfo:
        return self.inner.base()

    def abandon(self, clients: Collection[str]) -> None:
        self.inner.abandon(clients)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        return self.inner.evaluate(tasks)

    def stats(self) -> Sequence[WorkerStats]:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()
