"""Tasks of a stream: where a run without some of them parts from this one, and what of a state or a log is left of it.

A run without a task is the same configuration with ``continual.without``: nobody plays its rounds. All other rounds
keep their numbers, and with them their draws, learning rates and joins, so that up to the task both runs are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.continual.metrics import Row, Scores
from fedlora.errors import UnlearningError, nearest
from orchestrator.progress import Progress
from orchestrator.scoring import better
from orchestrator.state import RunState


def course_of(config: RunConfig, state: RunState) -> Course:
    """The course of a stream of tasks as it has come so far.

    Raises:
        UnlearningError: for a run without tasks.
    """
    if config.continual is None or config.continual.live or state.stream is None:
        raise UnlearningError("the run has no tasks that could be taken out; name clients, records, classes or data")
    return Course.of(config.continual, config.seed).after(state.stream.ended)


def parting(config: RunConfig, state: RunState, tasks: Collection[str]) -> int | None:
    """The first round that ends otherwise without these tasks, 0 for the start; None where it was not played yet.

    The round before a task's first one counts where it would be the last of the run, which is not frozen then, and
    where tasks are isolated: the fresh pair it ends with is that of the task.

    Raises:
        UnlearningError: for tasks that are not there, not there any more, or all that there are.
    """
    course = course_of(config, state)
    assert config.continual is not None
    for task in tasks:
        if task in config.continual.without:
            raise UnlearningError(f"task {task} is left out of the run already (continual.without)")
        if task not in course.names:
            raise UnlearningError(f"the run has no task {task}{nearest(task, course.names)}")
    kept = [place for place, name in enumerate(course.names) if name not in tasks]
    if not kept:
        raise UnlearningError("it would leave no task; to give up everything, delete the run")
    first = next(place for place, name in enumerate(course.names) if name in tasks)
    before = course.last_rounds[first - 1] if first else 0
    number = before if config.continual.isolated or kept[-1] < first else course.following(before)
    return number if number <= state.round else None


def unplayed_rounds(config: RunConfig, state: RunState, tasks: Collection[str]) -> list[int]:
    """The rounds so far that a run without these tasks does not play."""
    if not config.continual or config.continual.live:
        return []
    course = course_of(config, state)
    return [
        number
        for number in range(1, state.round + 1)
        if number in course.skipped or course.names[course.at(number)] in tasks
    ]


def without_tasks(
    state: RunState, course: Course, tasks: Collection[str], rows: Iterable[Mapping[str, Any]]
) -> RunState:
    """A state from before the tasks as a run without them has it: nobody looks at them.

    Args:
        course: of the run with the tasks.
        rows: what was logged up to the state, see ``rows_without``.
    """
    if state.stream is None or not tasks:
        return state
    kept = [place for place, name in enumerate(course.names) if name not in tasks]
    best = None
    for row in rows:
        # the best round is looked for once all tasks were met, which may be earlier now
        if row["round"] <= state.round and set(kept) <= course.met(row["round"]):
            best = better(best, row["eval"], row["round"])
    own = rows_without([state.row], tasks) if state.row else []
    return replace(state, stream=_narrowed(state.stream, kept), row=own[0] if own else None, best=best)


def rows_without(rows: Iterable[Mapping[str, Any]], tasks: Collection[str]) -> list[dict[str, Any]]:
    """Logged rounds without those of the tasks, and without any score over the rows of a task."""
    left, met = [], False
    for row in rows:
        told = row.get("stream") or {}
        if told.get("task") in tasks:
            met = True
            continue
        after = {"eval": None, "clients": None} if met else {}
        if "accuracy" in told:
            told = {**told, "accuracy": {name: score for name, score in told["accuracy"].items() if name not in tasks}}
        left.append({**row, **after, **({"stream": told} if told else {})})
    return left


def _narrowed(stream: Progress, kept: Collection[int]) -> Progress:
    """What is remembered of a stream of which only these tasks are left."""

    def of(scores: Scores) -> Scores:
        rows = tuple(_columns(row, kept) for place, row in enumerate(scores.rows) if place in kept)
        return Scores(rows, None if scores.initial is None else _columns(scores.initial, kept))

    prototypes = {new: stream.prototypes[old] for new, old in enumerate(sorted(kept)) if old in stream.prototypes}
    clients = {client: of(scores) for client, scores in stream.clients.items()}
    clients = {client: scores for client, scores in clients.items() if any(_known(row) for row in scores.rows)}
    ended = tuple(number for place, number in enumerate(stream.ended) if place in kept)
    return replace(stream, scores=of(stream.scores), clients=clients, prototypes=prototypes, ended=ended)


def _columns(row: Row, kept: Collection[int]) -> Row:
    return tuple(score for place, score in enumerate(row) if place in kept)


def _known(row: Row) -> bool:
    return any(score is not None for score in row)
