"""How far a stream of tasks has come: the part of a run's state that only a stream has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.continual.metrics import Scores
from fedlora.protocol import EvalResult


@dataclass(frozen=True, eq=False)
class TaskScores:
    """One look at the tasks of a stream.

    Attributes:
        count: tasks of the whole stream.
        server: task -> result on the server's rows of it.
        clients: client -> task -> result on its held-out rows of it.
    """

    count: int
    server: Mapping[int, EvalResult]
    clients: Mapping[str, Mapping[int, EvalResult]] = field(default_factory=dict)

    def row(self, client: str = "") -> tuple[float | None, ...]:
        """Accuracy on each task, None where it was not looked at; the server's unless a client is named."""
        found = self.clients[client] if client else self.server
        return tuple(found[task].accuracy if task in found else None for task in range(self.count))


@dataclass(frozen=True)
class Progress:
    """What a run remembers of its stream.

    Attributes:
        scores: R[t, i] on the server's rows.
        clients: the same on each client's held-out rows; a client appears with the first task it could be scored on.
        freezes: rounds after which the adapter went into the base; the ledger has the evidence.
        policy: the state of what decides that.
        ended: the rounds with which tasks have ended, where a rule may end them early; else none.
        stop: the state of the rule that may end the present one.
        seen: SHA-256 of the rows of a live stream that have been learned from; else empty.
        prototypes: task -> mean feature of its rows under the bare base; empty unless rows are routed by it.
    """

    scores: Scores = field(default_factory=Scores)
    clients: Mapping[str, Scores] = field(default_factory=dict)
    freezes: tuple[int, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    prototypes: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    ended: tuple[int, ...] = ()
    stop: Mapping[str, Any] = field(default_factory=dict)
    seen: str = ""

    def begun(self, tasks: TaskScores) -> Progress:
        """With the scores before the first task."""
        return replace(self, scores=replace(self.scores, initial=tasks.row()))

    def after_task(self, tasks: TaskScores) -> Progress:
        """With the scores after one more task."""
        done = len(self.scores.rows)
        known = {client: self.clients.get(client, Scores(((),) * done)) for client in tasks.clients}
        clients = {client: scores.with_row(tasks.row(client)) for client, scores in known.items()}
        # who could not be scored this time keeps its place in the matrix
        absent = {client: scores.with_row(()) for client, scores in self.clients.items() if client not in clients}
        return replace(self, scores=self.scores.with_row(tasks.row()), clients=dict(sorted((clients | absent).items())))

    def note(self) -> dict[str, Any]:
        """Plain JSON data."""
        clients = {client: scores.to_json() for client, scores in self.clients.items()}
        prototypes = {str(task): list(mean) for task, mean in self.prototypes.items()}
        rest = {"freezes": list(self.freezes), "policy": dict(self.policy), "prototypes": prototypes}
        rest |= {"ended": list(self.ended), "stop": dict(self.stop), "seen": self.seen}
        return {"scores": self.scores.to_json(), "clients": clients, **rest}

    @staticmethod
    def of(note: Mapping[str, Any]) -> Progress:
        """Inverse of ``note``. Raises KeyError or TypeError for anything else."""
        clients = {client: Scores.from_json(scores) for client, scores in note["clients"].items()}
        prototypes = {int(task): tuple(mean) for task, mean in note["prototypes"].items()}
        known = Scores.from_json(note["scores"]), clients, tuple(note["freezes"]), note["policy"], prototypes
        return Progress(*known, tuple(note["ended"]), note["stop"], note["seen"])
