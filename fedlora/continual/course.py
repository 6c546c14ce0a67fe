"""Whose turn which task of a stream is: a pure function of the round and the client, the same everywhere."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from fedlora.config import ContinualConfig
from fedlora.seeds import derive_seed


@dataclass(frozen=True)
class Course:
    """A stream's tasks in time.

    Attributes:
        names: of the tasks, in stream order.
        rounds: of each task.
        shuffled: every client meets the tasks in an order of its own.
        stagger: rounds by which a client may be behind, drawn once per client.
        joint: everybody trains on the rows of all tasks all the time.
        seed: the run's root seed.
    """

    names: tuple[str, ...]
    rounds: tuple[int, ...]
    shuffled: bool = False
    stagger: int = 0
    joint: bool = False
    seed: int = 0

    @staticmethod
    def of(settings: ContinualConfig, seed: int) -> Course:
        """The course of a configuration."""
        how = (settings.order == "shuffled", settings.stagger, settings.joint, seed)
        return Course(settings.names, settings.task_rounds, *how)

    @property
    def total(self) -> int:
        """Rounds of the whole stream."""
        return sum(self.rounds)

    def at(self, number: int) -> int:
        """Position of round ``number`` [1-based] in the stream; the last task after its end."""
        ends = itertools.accumulate(self.rounds)
        return next((place for place, end in enumerate(ends) if number <= end), len(self.rounds) - 1)

    def ends(self, number: int) -> bool:
        """Whether a task ends with this round."""
        return number in itertools.accumulate(self.rounds)

    def task_of(self, client: str, number: int) -> int | None:
        """The task whose rows a client trains on in this round; None for those of all tasks."""
        return None if self.joint else self._order(client)[self.at(number - self._delay(client))]

    def met_by(self, client: str, number: int) -> frozenset[int]:
        """The tasks a client has met up to and with this round."""
        if self.joint:
            return frozenset(range(len(self.names)))
        return frozenset(self._order(client)[: self.at(number - self._delay(client)) + 1])

    def met(self, number: int) -> frozenset[int]:
        """The tasks that somebody may have met up to and with this round."""
        everything = self.joint or self.shuffled
        return frozenset(range(len(self.names) if everything else self.at(number) + 1))

    def _order(self, client: str) -> list[int]:
        order = list(range(len(self.names)))
        if self.shuffled:
            random.Random(derive_seed(self.seed, 0, client, "task order")).shuffle(order)
        return order

    def _delay(self, client: str) -> int:
        """Rounds this client is behind."""
        if not self.stagger:
            return 0
        return random.Random(derive_seed(self.seed, 0, client, "task delay")).randint(0, self.stagger)
