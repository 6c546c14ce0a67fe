"""The rows that a gate looks at: of the target, like them and never seen, and of the others.

Clients are simulated where the run is, so their rows can be read here. Rows are named by their places in the tables
of the corpus; what they say is kept nowhere.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fedlora.config import RunConfig
from fedlora.data.partition import Corpus, forgotten, open_corpus
from fedlora.data.text import Example, encode
from fedlora.errors import DataError, UnlearningError
from fedlora.seeds import derive_seed
from fedlora.unlearning.gate import Tolerances
from fedlora.unlearning.measures import Sets
from orchestrator.unlearning.rollback import Rollback

LARGEST = 200  # rows of a set: what chance does to a share is 5 points then
INSTEAD = "rollback erases without statistics, and --option gate=false leaves it at suppression"


@dataclass(frozen=True)
class Rows:
    """Places in the tables of a corpus.

    Attributes:
        forget: rows of the target, in the training table.
        heldout: rows like them that no model saw, in the table ``heldout_from``.
        heldout_from: ``train`` where the target's clients hold out enough themselves, else ``test``.
        retain: training rows of the other clients.
    """

    forget: tuple[int, ...]
    heldout: tuple[int, ...]
    heldout_from: str
    retain: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain lists."""
        lists = {name: list(getattr(self, name)) for name in ("forget", "heldout", "retain")}
        return lists | {"heldout_from": self.heldout_from}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Rows:
        """Inverse of ``to_json``."""
        return Rows(tuple(data["forget"]), tuple(data["heldout"]), data["heldout_from"], tuple(data["retain"]))


def choose_rows(config: RunConfig, plan: Rollback) -> Rows:
    """At most ``LARGEST`` rows of each kind, the same for the same run and target.

    Args:
        config: of the run as it learned the target, see ``as_learned``.

    Raises:
        UnlearningError: if rows cannot be read here, or are too few to tell anything.
    """
    corpus, owners = rows_of(config), plan.askable(config.clients.exclude)
    data = config.data.model_copy(update={"forget": list(plan.records)})
    named = forgotten(corpus.train, data)
    gone = {row for client in owners for row in corpus.shards[client] if row in named or not plan.records}
    forget = _drawn(gone, config, "forget")
    spare = {row for client in owners for row in corpus.heldout[client]} - named
    least = Tolerances().rows
    heldout, place = _alike(corpus, forget, corpus.train, spare, config), "train"
    if len(heldout) < least:
        heldout, place = _alike(corpus, forget, corpus.test, range(len(corpus.test)), config), "test"
    kept = trained_on(config, corpus) - gone - named
    rows = Rows(forget, heldout, place, _drawn(kept, config, "retain"))
    few = {"to forget": len(forget), "like them that no model saw": len(heldout), "of other clients": len(rows.retain)}
    if short := [f"{count} rows {kind}" for kind, count in few.items() if count < least]:
        raise UnlearningError(f"the gate needs {least} rows of each kind and finds {', '.join(short)}; {INSTEAD}")
    return rows


def trained_on(config: RunConfig, corpus: Corpus) -> set[int]:
    """Training rows of every client that a run asks."""
    left = [client for client in corpus.shards if client not in config.clients.exclude]
    return {row for client in left for row in corpus.shards[client]}


def rows_of(config: RunConfig) -> Corpus:
    """Every row of a run.

    Raises:
        UnlearningError: if they cannot be read on this machine.
    """
    try:
        return open_corpus(config.data, config.clients.count, config.seed, config.model.task)
    except DataError as error:
        raise UnlearningError(
            f"the gate looks at rows, and they cannot be read on this machine ({error}); {INSTEAD}"
        ) from error


def encoded(config: RunConfig, rows: Rows, tokenizer: Any) -> tuple[Rows, Sets]:
    """The rows that have a token to learn from, and their tokens."""
    corpus = rows_of(config)

    def tokens(table: Dataset, places: Sequence[int]) -> dict[int, Example]:
        found = {}
        for place, row in zip(places, table.select(places).to_list(), strict=True):
            with contextlib.suppress(DataError):  # nothing to learn from
                found[place] = encode([row], corpus.form, tokenizer, config.data.max_length, corpus.labels).examples[0]
        return found

    forget, retain = tokens(corpus.train, rows.forget), tokens(corpus.train, rows.retain)
    heldout = tokens(corpus.train if rows.heldout_from == "train" else corpus.test, rows.heldout)
    left = Rows(tuple(forget), tuple(heldout), rows.heldout_from, tuple(retain))
    return left, Sets([*forget.values()], [*heldout.values()], [*retain.values()])


def _drawn(rows: Collection[int], config: RunConfig, purpose: str) -> tuple[int, ...]:
    draw = random.Random(derive_seed(config.seed, 0, "", f"gate {purpose}"))
    return tuple(sorted(draw.sample(sorted(rows), min(LARGEST, len(rows)))))


def _alike(
    corpus: Corpus, forget: Sequence[int], table: Dataset, rows: Collection[int], config: RunConfig
) -> tuple[int, ...]:
    """Rows of a table with the labels of those to forget, of none more than there are of it: membership inference
    would tell labels apart."""
    if not corpus.labels:
        return _drawn(rows, config, "held out")
    wanted = Counter(corpus.train.select(forget)["label"][:])
    labels, order = table["label"][:], sorted(rows)
    random.Random(derive_seed(config.seed, 0, "", "gate held out")).shuffle(order)
    found = []
    for row in order:
        if wanted[labels[row]] > 0:
            wanted[labels[row]] -= 1
            found.append(row)
    return tuple(sorted(found))
