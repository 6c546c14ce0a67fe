"""Whose turn which task of a stream is: a pure function of the round and the client, the same everywhere."""

from __future__ import annotations

import bisect
import functools
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
        left: before each task, the rounds of those that are left out there; empty for none at all. Nobody plays them,
            and every other round keeps its number, and with it its draws.
    """

    names: tuple[str, ...]
    rounds: tuple[int, ...]
    shuffled: bool = False
    stagger: int = 0
    joint: bool = False
    seed: int = 0
    ended: tuple[int, ...] = ()
    left: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(settings: ContinualConfig, seed: int) -> Course:
        """The course of a configuration."""
        how = (settings.order == "shuffled", settings.stagger, settings.joint, seed)
        names, rounds, present = settings.names, settings.task_rounds, settings.present
        before = (-1, *present)
        left = tuple(rounds[last + 1 : place] for last, place in zip(before, present, strict=False))
        kept = tuple(names[place] for place in present), tuple(rounds[place] for place in present)
        return Course(*kept, *how, left=left if any(left) else ())

    def after(self, ended: tuple[int, ...]) -> Course:
        """The course once the first tasks have ended with these rounds."""
        return self if ended == self.ended else replace(self, ended=ended)

    @functools.cached_property
    def last_rounds(self) -> tuple[int, ...]:
        """The round with which each task ends, or ends at the latest."""
        lasts = list(self.ended)
        for place in range(len(lasts), len(self.names)):
            lasts.append((lasts[-1] if lasts else 0) + self._gap(place) + self.rounds[place])
        return tuple(lasts)

    @functools.cached_property
    def skipped(self) -> frozenset[int]:
        """The numbers of rounds that nobody plays."""
        starts = (0, *self.last_rounds)
        gaps = ((starts[place], self._gap(place)) for place in range(len(self.names)))
        return frozenset(number for start, gap in gaps for number in range(start + 1, start + 1 + gap))

    @property
    def total(self) -> int:
        """Rounds of the whole stream, at most."""
        return self.last_rounds[-1]

    def at(self, number: int) -> int:
        """Position of round ``number`` [1-based] in the stream; the last task after its end."""
        return min(bisect.bisect_left(self.last_rounds, number), len(self.names) - 1)

    def following(self, number: int) -> int:
        """The round after round ``number``, or after the start for 0."""
        if number and not (self.ends(number) and number < self.total):
            return number + 1
        return number + 1 + self._gap(self.at(number) + 1 if number else 0)

    def left_out(self, number: int) -> int:
        """How many tasks were left out before round ``number``."""
        return sum(map(len, self.left[: self.at(number) + 1]))

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

    def _gap(self, place: int) -> int:
        """Rounds that are left out before a task."""
        return sum(self.left[place]) if self.left else 0

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
