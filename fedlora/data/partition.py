"""Dividing rows among clients, with flwr-datasets' partitioners."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.sources import Rows, quiet, read_client_files, read_test, read_train
from fedlora.errors import DataError, nearest
from fedlora.seeds import derive_seed

_ROW = "__row__"
NAMES = {"classification": "text", "text": "text", "prompt": "prompt", "messages": "messages"}  # of a row, by form
_BY_COLUMN = ("dirichlet", "natural", "pathological", "shards")


@dataclass(frozen=True)
class Corpus:
    """All rows of a federation.

    Attributes:
        form: see ``sources``.
        train: every client's rows in one table.
        test: the server's rows.
        shards: client -> indices into ``train`` that it trains on.
        heldout: client -> indices into ``train`` that it keeps for evaluation.
        labels: the label set in index order; empty unless ``form`` is classification.
    """

    form: str
    train: Dataset
    test: Dataset
    shards: Mapping[str, Sequence[int]]
    heldout: Mapping[str, Sequence[int]]
    labels: tuple[str, ...]

    def label_counts(self, client: str) -> dict[str, int]:
        """Rows per label of a client's shard; topics or other keys are not labels."""
        if not self.labels:
            return {}
        column = self.train.select(self.shards[client])["label"]
        return dict(sorted(Counter(column[:]).items()))


def open_corpus(data: DataConfig, count: int, seed: int, task: str = "auto") -> Corpus:
    """Read, split and divide the rows.

    Args:
        data: what to read and how to divide it.
        count: number of clients, where clients have no files of their own.
        seed: the run's root seed; of what is drawn here where ``data.seed`` does not say otherwise.
        task: of the model; ``causal-lm`` reads a text as text even where there is a label column.

    Raises:
        DataError: see ``sources``; also empty shards and labels outside the label set.
    """
    with quiet():
        return _open(data, count, seed if data.seed is None else data.seed, task)


def _open(data: DataConfig, count: int, seed: int, task: str) -> Corpus:
    test = read_test(data, task)
    if not (data.name or data.train_file or data.client_files):
        return _without_training_rows(data, test, seed)
    if data.client_files:
        train, shards = _from_files(data, task)
    else:
        train = read_train(data, task)
        shards = {}
    if test is None:
        train, test, shards = _split_off_test(train, shards, data.test_fraction, seed)
    if test.form != train.form:
        raise DataError(f"data: the test rows ({test.origin}) are {test.form}, the training rows {train.form}")
    if data.max_train_rows and not shards:
        train = Rows(train.form, _sample(train.table, data.max_train_rows, seed, "train"), train.origin)
    if not shards:
        shards = partition(train.table, data.partition, count, seed, train.origin)
    table = test.table if not data.max_test_rows else _sample(test.table, data.max_test_rows, seed, "test")
    labels = _label_set(train, test, data) if train.form == "classification" else ()
    if "" in shards:
        raise DataError("data: a client has no name; every value of data.partition.by and every file needs one")
    kept, heldout = {}, {}
    gone = forgotten(train.table, data)
    for client, rows in shards.items():
        order = np.random.default_rng(derive_seed(seed, 0, client, "holdout")).permutation(np.asarray(rows))
        size = int(len(order) * data.client_holdout)
        # held-out rows stay shuffled: evaluation may look at the first few only
        heldout[client] = [row for row in order[:size].tolist() if row not in gone]
        kept[client] = sorted(row for row in order[size:].tolist() if row not in gone)
    return Corpus(train.form, train.table, table, kept, heldout, labels)


def _without_training_rows(data: DataConfig, test: Rows | None, seed: int) -> Corpus:
    """Of a server whose clients keep their rows to themselves: its own test rows, or none."""
    labels = tuple(data.labels or ())
    if test is None:
        nothing: dict[str, list[str]] = {"text": [], "label": []} if labels else {"text": []}
        test = Rows("classification" if labels else "text", Dataset.from_dict(nothing), "no rows")
    table = test.table if not data.max_test_rows else _sample(test.table, data.max_test_rows, seed, "test")
    if test.form == "classification":
        _check_labels([test], labels)
    return Corpus(test.form, table.select([]), table, {}, {}, labels)


def forgotten(table: Dataset, data: DataConfig) -> set[int]:
    """Rows that are to be left out: those whose name has one of the hashes in ``data.forget``.

    Raises:
        DataError: if there is nothing that could name a row.
    """
    if not data.forget:
        return set()
    column = name_column(table, data)
    wanted = set(data.forget)
    return {row for row, name in enumerate(table[column][:]) if hash_of(name) in wanted}


def name_column(table: Dataset, data: DataConfig) -> str:
    """The column that names a row.

    Raises:
        DataError: if the table has no such column.
    """
    column = data.id_column or next(name for name in NAMES.values() if name in table.column_names)
    if column not in table.column_names:
        raise DataError(
            f"data.id_column: the training rows have no column {column}{nearest(column, table.column_names)}"
        )
    return column


def hash_of(name: Any) -> str:
    """What a row is called where its name must not be known: SHA-256 of it in UTF-8, as JSON unless it is a text."""
    text = name if isinstance(name, str) else json.dumps(name, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def partition(
    table: Dataset, how: PartitionConfig, count: int, seed: int, origin: str = "data"
) -> dict[str, list[int]]:
    """Row indices of every client.

    Returns:
        ``{"c0": [...], ...}``, or the values of the ``by`` column as names for ``natural``.

    Raises:
        DataError: unknown column, more clients than rows, or a client that would be left without rows.
    """
    column = how.by or ("label" if "label" in table.column_names else None)
    if how.method in _BY_COLUMN:
        if column is None:
            raise DataError(f"data.partition: {how.method} needs data.partition.by, a column of {table.column_names}")
        if column not in table.column_names:
            raise DataError(
                f"data.partition.by: {origin} has no column {column}{nearest(column, table.column_names)}"
                f" (columns: {table.column_names})"
            )
    if len(table) < count and how.method not in ("natural", "sizes"):
        raise DataError(
            f"data: {len(table)} rows of {origin} cannot be divided among {count} clients; lower clients.count"
        )
    partitioner = _partitioner(how, column, count, derive_seed(seed, 0, "", "partition") % 2**32)
    if column and how.method in _BY_COLUMN:
        values = table[column][:]
        if None in values:
            raise DataError(f"data.partition.by: row {values.index(None)} of {origin} has no {column}")
        columns: dict[str, Any] = {_ROW: list(range(len(table))), column: values}
    else:
        # these partitioners take rows in order, and files are often sorted by label
        shuffle = np.random.default_rng(derive_seed(seed, 0, "", "row order"))
        columns = {_ROW: shuffle.permutation(len(table)).tolist()}
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        # a progress bar with no switch of its own, and warnings about draws that are repeated
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(i)[_ROW] for i in range(partitioner.num_partitions)]
    except (ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise DataError(
            f"data.partition: {how.method} over {count} clients failed: {cause[:200]}. Raise alpha, lower"
            " clients.count, or lower data.partition.min_rows"
        ) from error
    if how.method == "natural":
        ids = partitioner.partition_id_to_natural_id
        names = [str(ids[i]) for i in range(len(parts))]
    else:
        names = [f"c{i}" for i in range(len(parts))]
    shards = {name: [int(row) for row in part] for name, part in zip(names, parts, strict=True)}
    empty = sorted(name for name, rows in shards.items() if not rows)
    if empty:
        raise DataError(f"data.partition: client {empty[0]} gets no rows from {how.method} ({len(empty)} such clients)")
    return shards


def _partitioner(how: PartitionConfig, column: str | None, count: int, seed: int) -> Any:
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when the package is imported: nothing leaves this machine
    from flwr_datasets import partitioner as flwr

    if how.method == "dirichlet":
        return flwr.DirichletPartitioner(count, column, how.alpha, min_partition_size=how.min_rows, seed=seed)
    if how.method == "natural":
        return flwr.NaturalIdPartitioner(column)
    if how.method == "pathological":
        return flwr.PathologicalPartitioner(count, column, how.classes_per_client, "random", shuffle=True, seed=seed)
    if how.method == "shards":
        return flwr.ShardPartitioner(count, column, num_shards_per_partition=how.shards_per_client, seed=seed)
    if how.method == "sizes":
        if not how.sizes:
            raise DataError("data.partition: sizes needs data.partition.sizes, the rows of each client")
        return flwr.SizePartitioner(how.sizes)
    simple = {
        "iid": flwr.IidPartitioner,
        "linear": flwr.LinearPartitioner,
        "square": flwr.SquarePartitioner,
        "exponential": flwr.ExponentialPartitioner,
    }
    return simple[how.method](count)


def _from_files(data: DataConfig, task: str) -> tuple[Rows, dict[str, list[int]]]:
    silos = read_client_files(data, task)
    forms = {rows.form for rows in silos.values()}
    if len(forms) > 1:
        detail = ", ".join(f"{client}: {rows.form}" for client, rows in silos.items())
        raise DataError(f"data.client_files: all clients need rows of one form ({detail})")
    shared = set.intersection(*(set(rows.table.column_names) for rows in silos.values()))
    tables, shards, start = [], {}, 0
    for client, rows in silos.items():
        tables.append(rows.table.select_columns(sorted(shared)))
        shards[client] = list(range(start, start + len(rows.table)))
        start += len(rows.table)
    return Rows(forms.pop(), concatenate_datasets(tables), "data.client_files"), shards


def _split_off_test(
    train: Rows, shards: dict[str, list[int]], fraction: float, seed: int
) -> tuple[Rows, Rows, dict[str, list[int]]]:
    """Hold out a seeded share: of every client's own rows where clients have files, else of all rows.

    What a client with a file holds out depends on nobody else: it comes to the same rows alone, on its own machine.
    """
    draw = np.random.default_rng(derive_seed(seed, 0, "", "test split"))
    groups: dict[Any, list[int]] = dict(shards)
    if not groups:
        keys = train.table["label"][:] if train.form == "classification" else [None] * len(train.table)
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
    held = []
    for name, rows in groups.items():
        own = np.random.default_rng(derive_seed(seed, 0, name, "test split")) if shards else draw
        held += own.permutation(rows)[: int(len(rows) * fraction)].tolist()
    held.sort()
    if not held and fraction:
        raise DataError(
            f"data: {len(train.table)} rows of {train.origin} are too few to hold out a test set; give data.test_file"
        )
    taken = set(held)
    kept = [row for row in range(len(train.table)) if row not in taken]
    position = {row: index for index, row in enumerate(kept)}
    moved = {client: [position[row] for row in rows if row not in taken] for client, rows in shards.items()}
    test = Rows(train.form, train.table.select(held), f"{train.origin} (held out)")
    return Rows(train.form, train.table.select(kept), train.origin), test, moved


def _sample(table: Dataset, size: int, seed: int, purpose: str) -> Dataset:
    order = np.random.default_rng(derive_seed(seed, 0, "", f"sample {purpose}")).permutation(len(table))
    return table.select(sorted(order[:size].tolist()))


def _label_set(train: Rows, test: Rows, data: DataConfig) -> tuple[str, ...]:
    labels = tuple(data.labels) if data.labels else tuple(sorted(set(train.table["label"][:])))
    if len(labels) < 2:
        raise DataError(f"data: {train.origin} has only the label {labels[0]!r}; a classifier needs at least two")
    _check_labels([train, test], labels)
    return labels


def _check_labels(tables: Sequence[Rows], labels: Sequence[str]) -> None:
    """Raise ``DataError`` for a row with a label that is not in the label set."""
    known = set(labels)
    for rows in tables:
        for row, label in enumerate(rows.table["label"][:]):
            if label not in known:
                raise DataError(
                    f"data: row {row} of {rows.origin} has the label {label!r}, which is not in the label set of"
                    f" {len(labels)}{nearest(label, labels)}"
                )
