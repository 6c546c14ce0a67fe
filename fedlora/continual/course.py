"""Whose turn which task of a stream is: a pure function of the round and the client, the same everywhere."""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from dataclasses import dataclass, replace

from fedlora.config import ContinualConfig
from fedlora.seeds import derive_seed


@dataclass(frozen=True)
class Course:
    """A stream's tasks in time.

    Attributes:
        names: of the tasks, in stream order.
        rounds: of each task, the most it takes where a rule may end it before.
        ended: the rounds with which the first tasks ended, so far as these are known.
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
    ended: tuple[int, ...] = ()

    @staticmethod
    def of(settings: ContinualConfig, seed: int) -> Course:
        """The course of a configuration."""
        how = (settings.order == "shuffled", settings.stagger, settings.joint, seed)
        return Course(settings.names, settings.task_rounds, *how)

    def after(self, ended: tuple[int, ...]) -> Course:
        """The course once the first tasks have ended with these rounds."""
        return self if ended == self.ended else replace(self, ended=ended)

    @functools.cached_property
    def last_rounds(self) -> tuple[int, ...]:
        """The round with which each task ends, or ends at the latest."""
        left = itertools.accumulate(self.rounds[len(self.ended) :], initial=self.ended[-1] if self.ended else 0)
        return (*self.ended, *itertools.islice(left, 1, None))

    @property
    def total(self) -> int:
        """Rounds of the whole stream, at most."""
        return self.last_rounds[-1]

    def at(self, number: int) -> int:
        """Position of round ``number`` [1-based] in the stream; the last task after its end."""
        return min(bisect.bisect_left(self.last_rounds, number), len(self.names) - 1)

    def ends(self, number: int) -> bool:
        """Whether a task ends with this round."""
        return number in self.last_rounds

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
