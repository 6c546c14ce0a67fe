"""A pool around another one whose rounds give the server the mean of all changes, and no single one.

A round takes four exchanges: keys, shares, the tasks with masked answers, and what opens their sum. For each client in
the sum it yields an update that holds the mean of all of them. A rule that is linear in the changes makes of so many
copies of the mean what it would have made of the changes, so that nothing behind the pool has to know.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from fedlora.adapter.wire import decode_parcel, encode_update
from fedlora.aggregation import compose
from fedlora.aggregation.combine import part_of
from fedlora.aggregation.dp import DP
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, SecureSumError, WireError
from fedlora.privacy.fixed_point import Ring
from fedlora.privacy.messages import (
    AskKeys,
    AskMasked,
    AskOpened,
    AskShares,
    Keys,
    Message,
    Opened,
    Sealed,
    Session,
    decode_masked,
    read,
)
from fedlora.privacy.secure_sum import needed, unmask
from fedlora.privacy.summand import Shapes, Summed, count_numbers, from_ring
from fedlora.protocol import BaseInfo, ClientInfo, ClientPool, EvalResult, EvalTask, Reply, TrainTask, WorkerStats
from orchestrator.pools import check_one_each

M = TypeVar("M", bound=Message)


@dataclass(eq=False)
class _Sum:
    """One sum on its way.

    Attributes:
        tasks: by client.
        threshold: clients without whom it fails.
        ends: when answers have to be there, by ``time.monotonic``; None for as long as they take.
        lost: what became of whoever dropped out.
        sent: bytes that came, by client.
        masked: replies of those in the sum, without their numbers.
    """

    tasks: Mapping[str, TrainTask]
    threshold: int
    ends: float | None
    lost: dict[str, Reply] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    masked: dict[str, Reply] = field(default_factory=dict)

    @property
    def left_s(self) -> float | None:
        """Seconds until the answers have to be there."""
        return None if self.ends is None else max(0.0, self.ends - time.monotonic())

    def require(self, came: Collection[str], what: str) -> None:
        """Raise ``SecureSumError`` if fewer clients than the threshold are left."""
        if len(came) < self.threshold:
            raise SecureSumError(f"{len(came)} of {len(self.tasks)} clients {what}, and {self.threshold} are needed")

    def drop(self, client: str, reason: str) -> None:
        """A client whose answer cannot be used."""
        self.lost[client] = Reply(client, error=reason)


class SecurePool:
    """Sums the answers of every call of ``train``; all else is the inner pool's."""

    def __init__(self, inner: ClientPool, config: RunConfig):
        assert config.privacy.secure_sum
        self._inner, self._settings = inner, config.privacy.secure_sum
        self._uniform = config.weighting == "uniform"
        self._measured = config.privacy.local is None  # clients say nothing but their change otherwise
        # the server cannot shorten what it does not see: clients do it for dp
        layers = compose(config.strategy).layers()
        self._longest = next((layer.clip for layer in layers if isinstance(layer, DP)), None)
        self._members = {member.id: member for member in inner.members()}

    @property
    def workers(self) -> int:
        return self._inner.workers

    def members(self) -> Sequence[ClientInfo]:
        return self._inner.members()

    def base(self) -> BaseInfo:
        return self._inner.base()

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        """One reply per task, none before the sum is open. Nothing is out afterwards.

        Args:
            timeout_s: whoever has not answered by then is left out of the sum. Opening it may take as long again.
        """
        check_one_each(tasks, ())
        _check_alike(tasks)
        return self._replies({task.client: task for task in tasks}, timeout_s) if tasks else iter(())

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        return self._inner.exchange(messages, timeout_s)

    def abandon(self, clients: Collection[str]) -> None:
        self._inner.abandon(clients)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        return self._inner.evaluate(tasks)

    def stats(self) -> Sequence[WorkerStats]:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()

    def _replies(self, tasks: Mapping[str, TrainTask], timeout_s: float | None) -> Iterator[Reply]:
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        job = _Sum(tasks, needed(self._settings.threshold, len(tasks)), ends)
        try:
            summed = self._sum(job, timeout_s)
        except SecureSumError as error:
            for client in tasks:
                yield job.lost.get(client) or Reply(client, error=f"there is no secure sum: {error}")
            return
        yield from job.lost.values()
        for place, (client, reply) in enumerate(job.masked.items()):
            task, metrics = tasks[client], _metrics(summed, place, len(job.masked)) if self._measured else {}
            told = client, task.round, task.received, summed.delta, self._rows(task), metrics
            yield replace(reply, payload=encode_update(*told), sent_bytes=job.sent[client])

    def _sum(self, job: _Sum, timeout_s: float | None) -> Summed:
        job.require(job.tasks, "were asked")
        session = self._agree(job)
        sealed = self._deal(job, session)
        shapes = _shapes(next(iter(job.tasks.values())))
        total = self._collect(job, session, sealed, count_numbers(shapes))
        if timeout_s is not None:
            job.ends = time.monotonic() + timeout_s
        opened = self._open(job, session, list(sealed))
        total = unmask(total, session, sealed, opened, list(job.masked))
        return from_ring(total, shapes, len(job.masked), self._settings.clip, session.total)

    def _agree(self, job: _Sum) -> Session:
        """Everybody's keys."""
        first = next(iter(job.tasks.values()))
        asked = AskKeys(round=first.round, received=first.received).encode()
        keys = self._ask(job, dict.fromkeys(job.tasks, asked), Keys)
        job.require(keys, "sent keys")
        heaviest = 1 if self._uniform else max(self._rows(task) for task in job.tasks.values())
        return Session(
            round=first.round,
            received=first.received,
            threshold=job.threshold,
            heaviest=heaviest,
            clip=self._settings.clip,
            longest=self._longest,
            keys=keys,
        )

    def _deal(self, job: _Sum, session: Session) -> dict[str, Sealed]:
        """Everybody's shares, which only their receivers can read."""
        asked = AskShares(session=session).encode()
        sealed = self._ask(job, dict.fromkeys(session.keys, asked), Sealed)
        for client in list(sealed):
            if set(sealed[client].shares) != session.keys.keys() - {client}:
                del sealed[client]
                job.drop(client, "has not dealt shares to everybody")
        job.require(sealed, "dealt shares")
        return sealed

    def _collect(self, job: _Sum, session: Session, sealed: Mapping[str, Sealed], count: int) -> Ring:
        """The sum of the masked answers [count]; ``job.masked`` then has whose they are."""
        tasks = []
        for client in sealed:
            shares = {other: sealed[other].shares[client] for other in sealed if other != client}
            mask = AskMasked(session=session.id, shares=shares).encode().decode()
            tasks.append(replace(job.tasks[client], mask=mask))
        total = np.zeros(count, np.uint64)
        for reply in self._inner.train(tasks, job.left_s):
            if reply.payload is None:
                job.lost[reply.client] = reply
                continue
            job.sent[reply.client] += len(reply.payload)
            try:
                total += decode_masked(reply.payload, session.id, count)
            except WireError as error:
                job.drop(reply.client, str(error))
            else:
                job.masked[reply.client] = replace(reply, payload=None)
        silent = [client for client in sealed if client not in job.masked and client not in job.lost]
        if silent:
            self._inner.abandon(silent)
        for client in silent:
            job.drop(client, "had not answered when the sum was closed")
        job.masked = {client: job.masked[client] for client in sealed if client in job.masked}
        job.require(job.masked, "sent masked updates")
        return total

    def _open(self, job: _Sum, session: Session, dealt: Sequence[str]) -> dict[str, Opened]:
        """What clients give away to open the sum. Who does not is in it all the same."""
        survivors = list(job.masked)
        asked = AskOpened(session=session.id, survivors=survivors).encode()
        opened = self._ask(replace(job, lost={}), dict.fromkeys(survivors, asked), Opened)
        gone = set(dealt) - set(survivors)
        whole = {c: o for c, o in opened.items() if (set(o.seeds), set(o.keys)) == (set(survivors), gone)}
        job.require(whole, "helped to open the sum")
        return whole

    def _ask(self, job: _Sum, messages: Mapping[str, bytes], kind: type[M]) -> dict[str, M]:
        """The answers of one exchange, in the order of the tasks."""
        found = {}
        replies = self._inner.exchange(messages, job.left_s)
        for client in messages:
            reply = replies.get(client) or Reply(client, error="no answer in time")
            if reply.payload is None:
                job.lost[client] = reply
                continue
            job.sent[client] = job.sent.get(client, 0) + len(reply.payload)
            try:
                found[client] = read(kind, reply.payload)
            except WireError as error:
                job.drop(client, str(error))
        return found

    def _rows(self, task: TrainTask) -> int:
        """That a client has registered for a task."""
        return self._members[task.client].at(task.stage).num_examples


def _check_alike(tasks: Sequence[TrainTask]) -> None:
    """Raise ``ConfigError`` unless all answers will have the same tensors, of which the sum means something."""
    for task in tasks:
        first = tasks[0]
        if (task.round, task.received, task.plan.send) != (first.round, first.received, first.plan.send):
            raise ConfigError(
                f"privacy.secure_sum: {first.client} and {task.client} train different adapters, and their changes have"
                " no sum; use one rank and a rule that treats all clients alike, such as fedit"
            )


def _shapes(task: TrainTask) -> Shapes:
    """Of the tensors that a client sends back."""
    received, _ = decode_parcel(task.adapter)
    return {name: tuple(t.shape) for name, t in received.tensors().items() if part_of(name) in task.plan.send}


def _metrics(summed: Summed, place: int, clients: int) -> dict[str, float]:
    """What one of so many replies says was measured: the mean losses, and its part of every count."""
    counts = {name: (place + 1) * n // clients - place * n // clients for name, n in summed.counts.items()}
    return {**summed.losses, **counts}
