"""Work that is out: given to a client, and not in the model yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.protocol import Method, TrainPlan


@dataclass(frozen=True)
class Flight:
    """A task without its bytes: what a run must remember of it to give it out again after a crash.

    Attributes:
        round: whose start the client trains from.
        client: who.
        plan: as in the task.
        received: SHA-256 of the payload, which the run's state keeps as long as a flight refers to it.
        seed: of the training.
        patches: entries of the base ledger that come with it.
        accepted: round of the client's last update that counted.
        given_s, due_s: virtual time at which it was given out and the answer is there; ``due_s`` is None where a
            real clock decides, and for a client that drops out.
        stage: as in the task.
    """

    round: int
    client: str
    plan: TrainPlan
    received: str
    seed: int
    patches: int = 0
    accepted: int = 0
    given_s: float = 0.0
    due_s: float | None = None
    stage: int | None = None

    def note(self) -> dict[str, Any]:
        """Plain JSON data."""
        plan = {part: sorted(getattr(self.plan, part)) for part in ("train", "send", "keep")}
        methods = [[method.name, [list(option) for option in method.options]] for method in self.plan.methods]
        return {**asdict(self), "plan": {"rank": self.plan.rank, **plan, "methods": methods}}

    @staticmethod
    def of(note: Mapping[str, Any]) -> Flight:
        """Inverse of ``note``. Raises KeyError or TypeError for anything else."""
        plan = dict(note["plan"])
        parts = {part: frozenset(plan[part]) for part in ("train", "send", "keep")}
        methods = tuple(
            Method(name, tuple((key, value) for key, value in options)) for name, options in plan["methods"]
        )
        return Flight(**{**note, "plan": TrainPlan(plan["rank"], **parts, methods=methods)})
