"""Which rows and labels a task has: a client's own, its buffer of earlier ones, held-out and test rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from clients.live import open_live
from clients.ranks import assign_ranks
from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.continual.replay import kept_rows, met_rows
from fedlora.continual.stream import Task, labels_of, open_stream
from fedlora.data.partition import Corpus
from fedlora.data.text import Encoded, Example
from fedlora.errors import DataError
from fedlora.protocol import ClientInfo, EvalTask, TrainTask

LATE_S = 30.0  # how long a worker waits for rows that the server has seen


class ClientRows:
    """The rows of every client of a run, as tokens.

    Args:
        encode: from rows, and what they are called where they cannot be read, to tokens.
    """

    def __init__(self, config: RunConfig, encode: Callable[[Sequence[dict[str, Any]], str], Encoded]):
        self._config, self._encode = config, encode
        self.stream = open_stream(config.data, config.continual, config.clients.count, config.seed, config.model.task)
        self.corpus: Corpus = self.stream.corpus
        self.live = open_live(config, self.corpus)
        self._course = Course.of(config.continual, config.seed) if config.continual else None
        self._encoded: dict[tuple[Any, ...], Encoded] = {}

    def members(self) -> list[ClientInfo]:
        """Every client of the run, with its rank and what it holds."""
        clients = list(self.corpus.shards)
        settings = self._config.clients
        ranks = assign_ranks(clients, settings.ranks, self._config.lora.r, settings.declared, self._config.seed)
        return [
            ClientInfo(
                id=client,
                rank=ranks[client],
                num_examples=len(self.corpus.shards[client]),
                num_heldout=self._cut(len(self.corpus.heldout[client])),
                label_counts=self.corpus.label_counts(client),
                stages=tuple(
                    (len(task.shards.get(client, ())), self._cut(len(task.heldout.get(client, ()))))
                    for task in self.stream.tasks
                ),
            )
            for client in clients
        ]

    def own(self, task: TrainTask) -> Encoded:
        """Tokens of the rows that a task trains on."""
        live = self.live
        if live is None:
            return self.examples("train", task.client, task.stage)
        given_up = time.monotonic() + LATE_S
        while not live.has(task.round):  # a file system may show a file here later than elsewhere
            if time.monotonic() >= given_up:
                raise DataError(f"continual.live: only {live.come} rows of {live.origin} are to be seen here")
            time.sleep(0.2)
        if task.seen not in ("", live.sha256(task.round)):
            raise DataError(f"continual.live: the rows of {live.origin} are others here than the server sees")
        places = live.present(task.client, task.round)
        if not places:
            raise DataError(f"client {task.client} has no rows to train on in round {task.round}")
        return self._encode(live.rows(places), f"rows of {task.client}")

    def stage_of(self, client: str, task: TrainTask) -> int | None:
        """The task of the stream that a client is in when another one is given ``task``."""
        return task.stage if self._course is None else self._course.after(task.ended).task_of(client, task.round)

    def awaited(self, task: TrainTask) -> bool:
        """Whether rows of a live stream are still to come for a task."""
        return self.live is not None and not self.live.has(task.round)

    def examples(self, kind: str, client: str, stage: int | None = None) -> Encoded:
        """Tokens of a client's ``train`` or ``heldout`` rows, or of the server's ``test`` rows; made once."""
        if (kind, client, stage) not in self._encoded:
            where = f"{kind} rows of {client}" if client else "test rows"
            where += "" if stage is None else f" of task {self.stream.tasks[stage].name}"
            self._encoded[kind, client, stage] = self._encode(self._table(kind, client, stage).to_list(), where)
        return self._encoded[kind, client, stage]

    def buffer(self, task: TrainTask, size: int) -> Encoded:
        """So many of the rows of earlier tasks that a client has met."""
        if self.live:
            return self._buffer(self.live.earlier(task.client, task.round), task.client, size)
        earlier = self._met(task) - {task.stage}
        key = "replay", task.client, size, tuple(sorted(earlier))
        if key not in self._encoded:
            mine = met_rows(self.stream.tasks, earlier, task.client)
            self._encoded[key] = self._buffer(mine, task.client, size)
        return self._encoded[key]

    def competing(self, task: TrainTask, examples: Sequence[Example]) -> tuple[int, ...]:
        """The labels that compete in the loss of a task, those of its rows always among them; none for all."""
        settings = self._config.continual
        if self._course is None or settings is None or settings.loss_labels == "all" or task.stage is None:
            return ()
        met = {task.stage} if settings.loss_labels == "task" else self._met(task)
        labels = labels_of(self.stream, met)
        present = {example.labels for example in examples if isinstance(example.labels, int)}
        return tuple(sorted({*labels, *present})) if labels else ()

    def earlier_labels(self, task: TrainTask) -> tuple[int, ...] | None:
        """The labels a client has met before its present task; None where they are the same in every task."""
        settings = self._config.continual
        apart = settings is not None and settings.scenario != "domain" and self.corpus.labels and not self.live
        if self._course is None or task.stage is None or not apart:
            return None
        return labels_of(self.stream, self._met(task) - {task.stage})

    def scored_among(self, task: EvalTask) -> tuple[int, ...]:
        """The labels that a test row is scored against; none for all."""
        settings = self._config.continual
        if settings is None or task.stage is None or settings.scenario == "domain":
            return ()
        # a row of a task nobody has met yet is scored against that task's labels too
        return labels_of(self.stream, {task.stage} | (task.met if settings.scenario == "class" else set()))

    def _met(self, task: TrainTask) -> frozenset[int]:
        """The tasks of the stream that a client has met up to and with its present one."""
        assert self._course is not None
        return self._course.after(task.ended).met_by(task.client, task.round)

    def _buffer(self, mine: Sequence[int], client: str, size: int) -> Encoded:
        """So many of the rows a client has met, as tokens."""
        settings, live, train = self._config.continual, self.live, self.corpus.train
        assert settings is not None
        assert settings.replay is not None
        labels: Mapping[int, str] | None = None
        if settings.replay.balanced:
            found = (row["label"] for row in live.rows(mine)) if live else train.select(mine)["label"][:]
            labels = dict(zip(mine, found, strict=True))
        rows = kept_rows(mine, client, size, labels, self._config.seed)
        return self._encode(live.rows(rows) if live else train.select(rows).to_list(), f"buffer of {client}")

    def _cut(self, rows: int) -> int:
        """Held-out rows of which only so many are looked at."""
        limit = self._config.evaluation.max_rows_per_client
        return rows if limit is None else min(rows, limit)

    def _table(self, kind: str, client: str, stage: int | None) -> Dataset:
        corpus = self.corpus
        rows: Corpus | Task = corpus if stage is None else self.stream.tasks[stage]
        if kind == "test":
            return corpus.test if isinstance(rows, Corpus) else corpus.test.select(rows.test)
        if kind == "heldout":
            own = rows.heldout.get(client, ())
            return corpus.train.select(own[: self._cut(len(own))])
        if not rows.shards.get(client):
            raise DataError(f"client {client} has no rows to train on")
        return corpus.train.select(rows.shards[client])
