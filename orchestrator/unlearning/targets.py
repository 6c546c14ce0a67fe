"""Classes and data files as names of rows: what they come to where clients are simulated."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from datasets import Dataset

from fedlora.config import DataConfig, RunConfig, parse_config
from fedlora.continual.stream import corpora, open_stream
from fedlora.data.partition import Corpus, hash_of, name_column
from fedlora.data.sources import normalise, quiet, read_file
from fedlora.errors import DataError, UnlearningError, nearest
from orchestrator.stores.files import read_config
from orchestrator.unlearning.requests import read_requests


def as_learned(folder: Path, names: Collection[str] | None = None) -> RunConfig:
    """The configuration of a run that reads rows again which approximate requests left out. They are in its weights, so
    where somebody asks for them once more they are not gone yet. What was erased stays out.

    Args:
        names: SHA-256 of the names of rows to read again, where they were left out like that; default all.
    """
    content = read_config(folder).resolved()
    back = _suppressed(folder) if names is None else _suppressed(folder) & set(names)
    content["forgetting"] = []  # no run is to be played like this
    for data in (content["data"], *(task["data"] for task in (content["continual"] or {}).get("tasks", []))):
        if data:
            data["forget"] = [name for name in data["forget"] if name not in back]
    return parse_config(content)


def _suppressed(folder: Path) -> set[str]:
    """SHA-256 of the names of rows that were taken out at a level below erasure, and by nobody since."""
    suppressed, erased = set[str](), set[str]()
    for standing in read_requests(folder).values():
        if "purged" not in standing.facts:
            continue  # refused, or the run is still as it was
        names = set(standing.facts["planned"]["plan"]["records"])
        erased |= names if standing.erased else set()
        suppressed = (suppressed | names) - erased
    return suppressed


def rows_with_labels(config: RunConfig, labels: Collection[str]) -> tuple[str, ...]:
    """SHA-256 of the names of all rows with these labels that clients train on or hold out, sorted.

    Raises:
        UnlearningError: if there is no such label, or no client has a row with it.
    """
    if config.continual and config.continual.live:
        raise UnlearningError("the rows of a live stream are not kept here, so there are none of a class to leave out")
    found: set[str] = set()
    known: dict[str, None] = {}
    met: set[str] = set()
    with quiet():
        parts = corpora(config.data, config.continual, config.clients.count, config.seed, config.model.task)
        for data, corpus in parts:
            known |= dict.fromkeys(corpus.labels)
            if not corpus.labels:
                continue
            column, names = corpus.train["label"][:], corpus.train[name_column(corpus.train, data)][:]
            rows = {row for held in (corpus.shards, corpus.heldout) for own in held.values() for row in own}
            wanted = {row for row in rows if column[row] in labels}
            met |= {column[row] for row in wanted}
            found |= {hash_of(names[row]) for row in wanted}
    for label in labels:
        if label not in known:
            raise UnlearningError(f"the run has no label {label}{nearest(label, known)}")
        if label not in met:
            raise UnlearningError(f"no client has a row with the label {label}")
    return tuple(sorted(found))


def owners_of(config: RunConfig, smaller: RunConfig) -> tuple[list[str], list[str]]:
    """Who has rows that a smaller configuration leaves out, and whose rows they are all.

    Raises:
        UnlearningError: if nobody has, or what is left cannot be a run.
    """
    read = (config.clients.count, config.seed, config.model.task)
    before = open_stream(config.data, config.continual, *read).corpus
    try:
        after = open_stream(smaller.data, smaller.continual, *read).corpus
    except DataError as error:
        raise UnlearningError(f"without these rows the run cannot be played: {error}") from error
    owners = [client for client in before.shards if _rows(before, client) > _rows(after, client)]
    if not owners:
        raise UnlearningError(
            "no client has a row of these names; data.id_column says what names a row (default: its text), and the file"
            " has one name a line"
        )
    return owners, [client for client in owners if not after.shards[client]]


def _rows(corpus: Corpus, client: str) -> int:
    return len(corpus.shards[client]) + len(corpus.heldout[client])


def rows_in_file(config: RunConfig, path: Path) -> tuple[str, ...]:
    """SHA-256 of the names of the rows in a file of the format of a training file, sorted.

    Where tasks have data of their own, the file is read as that of each task whose format it has.

    Raises:
        DataError: if it cannot be read, or holds rows without a name.
    """
    table, problems = read_file(str(path)), []
    found: set[str] = set()
    with quiet():
        for data in _readings(config):
            try:
                found |= _named(table, data, path, config.model.task)
            except DataError as error:
                problems.append(error)
    if not found:
        raise problems[0]
    return tuple(sorted(found))


def _readings(config: RunConfig) -> Iterable[DataConfig]:
    tasks = config.continual.tasks if config.continual else []
    own = [task.data for task in tasks if task.data]
    return own if own and len(own) == len(tasks) else [config.data, *own]


def _named(table: Dataset, data: DataConfig, path: Path, task: str) -> set[str]:
    rows = normalise(table, data.model_copy(update={"label_column": None}), str(path), "causal-lm")
    return {hash_of(name) for name in rows.table[name_column(rows.table, data)][:]}
