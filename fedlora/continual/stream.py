"""The rows of a stream: one corpus for all tasks, and for each task whose rows are its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, concatenate_datasets

from fedlora.config import ContinualConfig, DataConfig, StreamTaskConfig
from fedlora.data.partition import Corpus, open_corpus
from fedlora.data.sources import quiet, read_test
from fedlora.errors import DataError, nearest
from fedlora.seeds import derive_seed

_COLUMNS = {
    "classification": ["text", "label"],
    "messages": ["messages"],
    "prompt": ["prompt", "completion"],
    "text": ["text"],
}


@dataclass(frozen=True)
class Task:
    """One task: its part of the stream's corpus.

    Attributes:
        name: of the task.
        labels: indices of its labels in the corpus's label set; empty for a language model.
        shards, heldout: client -> rows of the training table; a client without rows is absent.
        test: rows of the test table.
    """

    name: str
    labels: tuple[int, ...]
    shards: Mapping[str, Sequence[int]]
    heldout: Mapping[str, Sequence[int]]
    test: Sequence[int]


@dataclass(frozen=True)
class Stream:
    """All rows, and the tasks they belong to. Without a stream there are no tasks."""

    corpus: Corpus
    tasks: tuple[Task, ...] = ()


def open_stream(
    data: DataConfig, continual: ContinualConfig | None, count: int, seed: int, task: str = "auto"
) -> Stream:
    """Read and divide the rows of every task.

    Args:
        data: of all tasks, where a task has none of its own.
        continual: None for a run without a stream.
        count, seed, task: see ``open_corpus``.

    Raises:
        DataError: see ``open_corpus``; also a task without rows, and labels that belong to two tasks or to none.
    """
    if continual is None:
        return Stream(open_corpus(data, count, seed, task))
    if continual.live:
        return _live(data, continual.live.clients or [f"c{i}" for i in range(count)], task)
    parts = [corpus for _, corpus in corpora(data, continual, count, seed, task)]
    if _is_one(continual):
        stream = _cut(Stream(parts[0], _filtered(parts[0], continual, seed)))
    else:
        stream = _joined(list(zip(continual.tasks, parts, strict=True)))
    _check(stream, continual.scenario)
    if continual.replay and continual.replay.balanced and not stream.corpus.labels:
        raise DataError(
            f"continual.replay.balanced: the rows are {stream.corpus.form} and have no labels; leave it out"
        )
    if continual.without:
        # only now: what is left has the tables and the labels that it has beside them
        return _cut(replace(stream, tasks=tuple(stream.tasks[place] for place in continual.present)))
    return _blurred(stream, continual.blur, seed) if continual.blur else stream


def corpora(
    data: DataConfig, continual: ContinualConfig | None, count: int, seed: int, task: str = "auto"
) -> list[tuple[DataConfig, Corpus]]:
    """Every dataset of a run as it was divided, with how it was read: one, or one per task. A live stream has none.

    Args and raises: see ``open_stream``.
    """
    if continual is None or _is_one(continual):
        return [] if continual and continual.live else [(data, open_corpus(data, count, seed, task))]
    return [(one.data or data, _own(data, one, count, seed, task)) for one in continual.tasks]


def labels_of(stream: Stream, tasks: Collection[int]) -> tuple[int, ...]:
    """Indices of the labels of these tasks together; empty for a language model."""
    return tuple(sorted({label for place in tasks for label in stream.tasks[place].labels}))


def _live(data: DataConfig, clients: Sequence[str], task: str) -> Stream:
    """A stream without a training row yet: the test rows say what rows look like."""
    with quiet():
        test = read_test(data, task)
    if test is None:
        raise DataError("data.test_file: a live stream has no rows to hold out; give the server's test rows")
    found = tuple(sorted(set(test.table["label"][:]))) if test.form == "classification" else ()
    labels = tuple(data.labels) if data.labels and found else found
    if odd := next((label for label in found if label not in labels), None):
        raise DataError(f"data.labels lacks {odd!r}, a label of {data.test_file}{nearest(odd, labels)}")
    corpus = Corpus(
        test.form, test.table.select([]), test.table, dict.fromkeys(clients, ()), dict.fromkeys(clients, ()), labels
    )
    return Stream(corpus, (Task("live", tuple(range(len(labels))), {}, {}, range(len(test.table))),))


def _is_one(continual: ContinualConfig) -> bool:
    """Whether all tasks come out of one dataset."""
    return not any(one.data for one in continual.tasks)


# One dataset, divided -----------------------------------------------------------------------------------------------


def _filtered(whole: Corpus, continual: ContinualConfig, seed: int) -> tuple[Task, ...]:
    if not continual.split:
        return tuple(_task(one, whole, whole.labels) for one in continual.tasks)
    groups = _split(whole.labels, continual.split, seed)
    named = zip(continual.names, groups, strict=True)
    return tuple(_task(StreamTaskConfig(name=name, labels=group), whole, whole.labels) for name, group in named)


def _split(labels: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Groups of labels, as equal as can be, in a seeded order."""
    if len(labels) < count:
        raise DataError(f"continual.split: {len(labels)} labels cannot make {count} tasks; list continual.tasks")
    order = list(labels)
    random.Random(derive_seed(seed, 0, "", "label order")).shuffle(order)
    ends = [round(place * len(order) / count) for place in range(count + 1)]
    return [order[begin:end] for begin, end in itertools.pairwise(ends)]


def _task(one: StreamTaskConfig, corpus: Corpus, labels: Sequence[str], first: int = 0, first_test: int = 0) -> Task:
    """A task out of a corpus.

    Args:
        labels: of the whole stream, in index order.
        first, first_test: where the corpus begins in the stream's tables.
    """
    for label in one.labels or ():
        if label not in corpus.labels:
            raise DataError(f"continual: task {one.name} has the label {label!r}{nearest(label, corpus.labels)}")
    wanted = _matching(one, corpus.train)

    def of(rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        kept = {client: [first + row for row in own if row in wanted] for client, own in rows.items()}
        return {client: own for client, own in kept.items() if own}

    indices = tuple(sorted(labels.index(label) for label in one.labels or corpus.labels))
    test = [first_test + row for row in sorted(_matching(one, corpus.test))]
    return Task(one.name, indices, of(corpus.shards), of(corpus.heldout), test)


def _matching(one: StreamTaskConfig, table: Dataset) -> set[int]:
    """Rows of a table that belong to a task."""
    conditions = {column: set(values) for column, values in one.where.items()}
    if one.labels:
        conditions["label"] = set(one.labels)
    rows = set(range(len(table)))
    for column, values in conditions.items():
        if column not in table.column_names:
            raise DataError(
                f"continual: task {one.name} asks for the column {column}{nearest(column, table.column_names)}"
            )
        rows = {row for row, value in enumerate(table[column][:]) if row in rows and str(value) in values}
    return rows


# Tasks with data of their own --------------------------------------------------------------------------------------


def _own(data: DataConfig, one: StreamTaskConfig, count: int, seed: int, task: str) -> Corpus:
    """A task's corpus; ``data`` where it has none of its own."""
    try:
        corpus = open_corpus(one.data or data, count, derive_seed(seed, 0, "", one.name), task)
    except DataError as error:
        raise DataError(f"task {one.name}: {error}") from error
    if not one.prefix or not corpus.labels:
        return corpus

    def named(table: Dataset) -> Dataset:
        return table.map(lambda row: {"label": f"{one.name}/{row['label']}"})

    names = tuple(f"{one.name}/{label}" for label in corpus.labels)
    with quiet():
        return replace(corpus, train=named(corpus.train), test=named(corpus.test), labels=names)


def _joined(parts: Sequence[tuple[StreamTaskConfig, Corpus]]) -> Stream:
    """The tables of all tasks one below the other."""
    forms = {corpus.form for _, corpus in parts}
    if len(forms) > 1:
        detail = ", ".join(f"{one.name}: {corpus.form}" for one, corpus in parts)
        raise DataError(f"continual: all tasks need rows of one form ({detail})")
    labels = tuple(dict.fromkeys(label for _, corpus in parts for label in corpus.labels))
    columns = _COLUMNS[parts[0][1].form]
    tasks, first, first_test = [], 0, 0
    for one, corpus in parts:
        tasks.append(_task(one, corpus, labels, first, first_test))
        first, first_test = first + len(corpus.train), first_test + len(corpus.test)
    try:
        train = concatenate_datasets([corpus.train.select_columns(columns) for _, corpus in parts])
        test = concatenate_datasets([corpus.test.select_columns(columns) for _, corpus in parts])
    except ValueError as error:
        raise DataError(f"continual: the rows of the tasks are not of one kind: {error}") from error
    clients = dict.fromkeys(client for task in tasks for client in task.shards)
    return _cut(Stream(Corpus(forms.pop(), train, test, dict.fromkeys(clients, ()), {}, labels), tuple(tasks)))


def _cut(stream: Stream) -> Stream:
    """Every client's rows are those of its tasks, in stream order; rows of no task are nobody's."""

    def of_all(kind: str) -> dict[str, list[int]]:
        parts = [getattr(task, kind) for task in stream.tasks]
        return {
            client: list(dict.fromkeys(row for part in parts for row in part.get(client, ())))
            for client in stream.corpus.shards
        }

    return replace(stream, corpus=replace(stream.corpus, shards=of_all("shards"), heldout=of_all("heldout")))


# What holds of every stream ------------------------------------------------------------------------------------------


def _check(stream: Stream, scenario: str) -> None:
    for task in stream.tasks:
        if not task.shards:
            raise DataError(f"continual: no client has rows of task {task.name}; check its labels and its data")
        if not task.test:
            raise DataError(f"continual: the test rows have none of task {task.name}; R[t, i] needs some of every task")
    names = stream.corpus.labels
    owners: dict[int, str] = {}
    for task in stream.tasks:
        if scenario == "domain":
            if set(task.labels) != set(stream.tasks[0].labels):
                odd = names[min(set(task.labels) ^ set(stream.tasks[0].labels))]
                raise DataError(
                    f"continual: the label {odd!r} is not in both {stream.tasks[0].name} and {task.name}; scenario:"
                    " domain needs one label set for all tasks (scenario: class or task takes different ones)"
                )
            continue
        for label in task.labels:
            if label in owners:
                raise DataError(
                    f"continual: the label {names[label]!r} is in {owners[label]} and in {task.name}; use scenario:"
                    " domain if it means the same in both, or prefix: true on a task with its own data if it does not"
                )
            owners[label] = task.name


def _blurred(stream: Stream, share: float, seed: int) -> Stream:
    """Every client meets a share of each task's rows, drawn from the seed, together with the task before or after."""
    shards: list[dict[str, list[int]]] = [{} for _ in stream.tasks]
    last = len(stream.tasks) - 1
    for place, task in enumerate(stream.tasks):
        for client, rows in task.shards.items():
            draw = random.Random(derive_seed(seed, place, client, "blur"))
            for row in rows:
                there = place
                if draw.random() < share:
                    there = min(max(place + draw.choice((-1, 1)), 0), last)
                shards[there].setdefault(client, []).append(row)
    tasks = (replace(task, shards=own) for task, own in zip(stream.tasks, shards, strict=True))
    return replace(stream, tasks=tuple(tasks))
