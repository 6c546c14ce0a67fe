"""The live stream of a configuration: a folder, or a list on a Redis server."""

from __future__ import annotations

from pathlib import Path

import pyarrow
from datasets import Dataset

from clients.redis_list import RedisList
from fedlora.config import RunConfig
from fedlora.continual.stream import open_stream
from fedlora.data.live import LiveFolder, LiveStream, Row, Source
from fedlora.data.partition import NAMES, Corpus, hash_of
from fedlora.data.sources import LABEL_COLUMNS, normalise, quiet
from fedlora.errors import DataError, nearest

COLUMNS = ("text", "prompt", "completion", "messages", *LABEL_COLUMNS)  # that a row may have to be learned from


def open_live(config: RunConfig, corpus: Corpus | None = None) -> LiveStream | None:
    """The rows that go on coming in; None for a run without such.

    Args:
        corpus: of the run, which says what rows look like and who the clients are; read where it is not given.
    """
    live = config.continual.live if config.continual else None
    if live is None:
        return None
    corpus = (
        corpus
        or open_stream(config.data, config.continual, config.clients.count, config.seed, config.model.task).corpus
    )
    source: Source | None = RedisList(live.source) if live.source.startswith(("redis://", "rediss://")) else None

    def read(rows: list[Row], origin: str) -> list[Row]:
        given = (live.by, config.data.id_column, config.data.text_column, config.data.label_column)
        needed = {name for name in (*given, *COLUMNS) if name} & set().union(*rows)
        try:
            with quiet():
                table = Dataset.from_list([{key: row.get(key) for key in sorted(needed)} for row in rows])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(f"continual.live: the rows of {origin} have values of different types: {error}") from error
        with quiet():
            found = normalise(table, config.data, origin, config.model.task)
        if found.form != corpus.form:
            raise DataError(f"continual.live: {origin} has {found.form} rows, the test rows are {corpus.form}")
        parsed: list[Row] = found.table.to_list()
        for row in parsed:
            if corpus.labels and row["label"] not in corpus.labels:
                raise DataError(
                    f"continual.live: {origin} has the label {row['label']!r}, which is not in the label set of"
                    f" {len(corpus.labels)}{nearest(row['label'], corpus.labels)}; data.labels lists it"
                )
        return parsed

    gone, column = set(config.data.forget), config.data.id_column or NAMES[corpus.form]

    def left_out(row: Row) -> bool:
        return bool(gone) and hash_of(row.get(column)) in gone

    source = source or LiveFolder(Path(live.source))
    return LiveStream(source, live.rows, live.window, list(corpus.shards), live.by, read, left_out)
