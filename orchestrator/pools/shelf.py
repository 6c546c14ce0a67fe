"""What tasks carry, in Ray's object store: every distinct adapter and every patch of the ledger once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray

from fedlora.protocol import EvalTask, TrainTask


class Shelf:
    """References by content. An adapter is freed with the last task that needs it, a patch with the last ledger."""

    def __init__(self) -> None:
        self._adapters: dict[bytes, Any] = {}
        self._patches: dict[str, Any] = {}
        self._ledgers: dict[str, tuple[str, ...]] = {}  # the ids of a ledger's patches, by the id of its last one
        self._users: Counter[bytes | str] = Counter()  # tasks that are out, by adapter and by ledger
        self._latest = ""

    def put(self, task: TrainTask | EvalTask) -> None:
        """Place what a task needs; ``drop`` it when the task is done."""
        if task.adapter not in self._adapters:
            self._adapters[task.adapter] = ray.put(task.adapter)
        head = ledger_of(task)
        if head not in self._ledgers:
            for patch in task.ledger:
                if patch.id not in self._patches:
                    self._patches[patch.id] = ray.put(patch.payload)
            self._ledgers[head] = tuple(patch.id for patch in task.ledger)
        self._users[task.adapter] += 1
        self._users[head] += 1
        before, self._latest = self._latest, head  # kept between the calls of a round, which all name it
        if before != head:
            self._forget_ledger(before)

    def drop(self, task: TrainTask | EvalTask) -> None:
        """A task is done with what it needed."""
        for key in (task.adapter, ledger_of(task)):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
        if task.adapter not in self._users:
            self._adapters.pop(task.adapter, None)
        self._forget_ledger(ledger_of(task))

    def adapter(self, task: TrainTask | EvalTask) -> Any:
        """Reference to the bytes of a task's adapter."""
        return self._adapters[task.adapter]

    def patches(self, task: TrainTask | EvalTask) -> list[tuple[str, Any]]:
        """(id, reference) of every patch. Inside a list Ray does not fetch them: a worker gets those it lacks."""
        return [(identity, self._patches[identity]) for identity in self._ledgers[ledger_of(task)]]

    def __len__(self) -> int:
        return len(self._adapters) + len(self._patches)

    def _forget_ledger(self, head: str) -> None:
        if head in self._users or head == self._latest or head not in self._ledgers:
            return
        del self._ledgers[head]
        needed = set(self._needed())
        self._patches = {identity: ref for identity, ref in self._patches.items() if identity in needed}

    def _needed(self) -> Iterator[str]:
        for ledger in self._ledgers.values():
            yield from ledger


def ledger_of(task: TrainTask | EvalTask) -> str:
    """The id of the last patch, which stands for the whole ledger: it is a hash over all before it."""
    return task.ledger[-1].id if task.ledger else ""
