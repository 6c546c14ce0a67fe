"""What a stream of tasks did to the scores: accuracy, forgetting, backward and forward transfer.

Libraries mean different things by these names. Ours, with R[t, i] the score on task i after task t, R_init[i] the one
before the first task, and T the number of tasks learned so far:

    ACC                mean_i R[T-1, i]
    AIA                mean_t mean_{i<=t} R[t, i]
    forgetting         mean_{i<T-1} (max_{t<T-1} R[t, i] - R[T-1, i])
    BWT                mean_{i<T-1} (R[T-1, i] - R[i, i])
    FWT                mean_{i>0} (R[i-1, i] - R_init[i])
    learning_accuracy  mean_i R[i, i]

Tasks count from 0 in the order of the stream; i and t run over the tasks learned so far. A metric is None where a
score it needs was not measured, and where there is nothing to average. A task without any score, such as one that a
client has no data for, is left out of all means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.errors import DataError

Row = tuple[float | None, ...]


@dataclass(frozen=True)
class Scores:
    """The matrix R of one stream, for the federation or for one client. Higher scores are better.

    Attributes:
        rows: R[t], the scores on all tasks after task t; None where there is none. A row may end early.
        initial: R_init, the scores on all tasks before the first one was learned.

    Raises:
        DataError: for a score that is not a finite number.
    """

    rows: tuple[Row, ...] = ()
    initial: Row | None = None

    def __post_init__(self) -> None:
        for after, row in enumerate([self.initial or (), *self.rows], start=-1):
            for task, score in enumerate(row):
                if score is not None and not math.isfinite(score):
                    when = "before the first task" if after < 0 else f"after task {after}"
                    raise DataError(f"score on task {task} {when}: {score} is not a number; use None if not measured")

    def with_row(self, row: Sequence[float | None]) -> Scores:
        """The scores with those after one more task."""
        return replace(self, rows=(*self.rows, tuple(row)))

    def to_json(self) -> dict[str, Any]:
        """The same as plain lists."""
        return {"rows": [list(row) for row in self.rows], "initial": self.initial and list(self.initial)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scores:
        """Inverse of ``to_json``."""
        initial = data["initial"]
        return Scores(tuple(tuple(row) for row in data["rows"]), None if initial is None else tuple(initial))

    def describe(self) -> dict[str, float | None]:
        """All metrics by the names at the top of this file."""
        return {
            "ACC": self.acc,
            "AIA": self.aia,
            "forgetting": self.forgetting,
            "BWT": self.bwt,
            "FWT": self.fwt,
            "learning_accuracy": self.learning_accuracy,
        }

    @property
    def acc(self) -> float | None:
        """ACC: ``mean_i R[T-1, i]``, the accuracy at the end."""
        return _mean(self._at(self._last, i) for i in self._tasks)

    @property
    def aia(self) -> float | None:
        """AIA: ``mean_t mean_{i<=t} R[t, i]``, the accuracy on what was learned, on average along the way."""
        seen = [[self._at(t, i) for i in self._tasks if i <= t] for t in range(len(self.rows))]
        return _mean(_mean(scores) for scores in seen if scores)

    @property
    def forgetting(self) -> float | None:
        """``mean_{i<T-1} (max_{t<T-1} R[t, i] - R[T-1, i])``; negative where tasks ended better than ever before.

        The maximum is over what was measured, also before task i was learned.
        """

        def best(i: int) -> float | None:
            return max((score for t in range(self._last) if (score := self._at(t, i)) is not None), default=None)

        return _mean(_less(best(i), self._at(self._last, i)) for i in self._tasks if i < self._last)

    @property
    def bwt(self) -> float | None:
        """BWT: ``mean_{i<T-1} (R[T-1, i] - R[i, i])``, what later tasks did to earlier ones."""
        return _mean(_less(self._at(self._last, i), self._at(i, i)) for i in self._tasks if i < self._last)

    @property
    def fwt(self) -> float | None:
        """FWT: ``mean_{i>0} (R[i-1, i] - R_init[i])``, what earlier tasks did to ones not yet learned."""
        return _mean(_less(self._at(i - 1, i), self._at(-1, i)) for i in self._tasks if i > 0)

    @property
    def learning_accuracy(self) -> float | None:
        """``mean_i R[i, i]``, the accuracy on each task right after it was learned."""
        return _mean(self._at(i, i) for i in self._tasks)

    @property
    def _last(self) -> int:
        return len(self.rows) - 1

    @property
    def _tasks(self) -> list[int]:
        """The tasks learned so far that were measured at least once."""
        return [i for i in range(len(self.rows)) if any(self._at(t, i) is not None for t in range(len(self.rows)))]

    def _at(self, t: int, i: int) -> float | None:
        """R[t, i], where t = -1 is before the first task."""
        row = self.rows[t] if t >= 0 else self.initial or ()
        return row[i] if i < len(row) else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(found) else None


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
