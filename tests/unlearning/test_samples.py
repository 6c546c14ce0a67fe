"""What a gate looks at: which rows, which controls, which lesson, and what it cannot look at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.data.partition import open_corpus
from fedlora.errors import UnlearningError, VerificationError
from fedlora.plugins import load_plugins, unload_plugins
from fedlora.unlearning.request import Request
from orchestrator import launch
from orchestrator.stores.files import write_atomic
from orchestrator.unlearning.actions import ACTIONS
from orchestrator.unlearning.controls import drawn_anew
from orchestrator.unlearning.measuring import lesson_for, serve
from orchestrator.unlearning.rollback import Rollback, plan_for, without
from orchestrator.unlearning.samples import choose_rows, encoded
from tests.conftest import quiet
from tests.unlearning.test_rollback import asked, config_of

PLUGIN = str(Path(__file__).with_name("tampering.py"))


@pytest.fixture
def plugged() -> Iterator[None]:
    load_plugins([PLUGIN])
    yield
    unload_plugins()


def test_the_second_control_has_other_draws_and_the_same_rows_in_the_same_hands(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    other = drawn_anew(without(config, ["c0"]))
    assert other.seed != config.seed
    assert other.clients.exclude == ["c0"]
    mine, theirs = (open_corpus(one.data, 6, one.seed) for one in (config, other))
    assert (mine.shards, mine.heldout) == (theirs.shards, theirs.heldout)
    assert mine.test["text"][:] == theirs.test["text"][:]
    assert mine.shards != open_corpus(config.data, 6, other.seed).shards
    assert drawn_anew(other).data.seed == config.seed


def rows_for(folder: Path, config: RunConfig, request: Request) -> tuple[Any, Any]:
    launch.run(config, quiet)
    return choose_rows(config, plan_for(folder, request)), open_corpus(config.data, 6, config.seed)


def test_rows_to_forget_are_the_clients_and_held_out_rows_have_their_labels(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", rounds=1)
    rows, corpus = rows_for(tmp_path / "run", config, Request("client", ("c0",)))
    assert set(rows.forget) == set(corpus.shards["c0"])
    assert rows.heldout_from == "test"
    labels = [
        sorted(table.select(places)["label"][:])
        for table, places in ((corpus.train, rows.forget), (corpus.test, rows.heldout))
    ]
    assert set(labels[1]) <= set(labels[0])
    assert all(labels[1].count(label) <= labels[0].count(label) for label in set(labels[0]))
    assert not set(rows.retain) & set(rows.forget)
    assert set(rows.retain) <= {row for client in corpus.shards for row in corpus.shards[client] if client != "c0"}


def test_a_client_that_holds_out_enough_is_compared_with_its_own_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", rounds=1, data__client_holdout=0.4)
    rows, corpus = rows_for(tmp_path / "run", config, Request("client", ("c0",)))
    assert rows.heldout_from == "train"
    assert set(rows.heldout) <= set(corpus.heldout["c0"])
    labels = [corpus.train.select(places)["label"][:] for places in (rows.forget, rows.heldout)]
    assert all(labels[1].count(label) <= labels[0].count(label) for label in set(labels[1]))


def test_a_class_is_compared_with_test_rows_of_that_class(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", rounds=1, data__client_holdout=0.4)
    rows, corpus = rows_for(tmp_path / "run", config, Request("class", ("animals",)))
    assert rows.heldout_from == "test"  # the owners' held-out rows of the class are to be forgotten too
    assert set(corpus.test.select(rows.heldout)["label"][:]) == {"animals"}


def test_rows_that_left_no_trace_prove_nothing(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path / "run", rounds=1), tmp_path / "run"
    launch.run(config, quiet)
    control = serve(folder)
    rows = choose_rows(config, plan_for(folder, Request("client", (asked(folder)[0][0],))))
    sets = encoded(config, rows, control.base.tokenizer)[1]
    with pytest.raises(VerificationError, match="they left no trace that can be seen, so passing would prove nothing"):
        lesson_for(control, sets, before=99.0)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("changes", "first", "message"),
    [
        (
            {"continual": {"split": 2, "rounds": 2}, "rounds": 4},
            1,
            "nothing does not know streams of tasks; use rollback",
        ),
        ({"strategy": "fedsa"}, 1, "under fedsa there is no one global model that a gate could look at; use rollback"),
        ({}, None, "no round used the target, so a gate has nothing to see; use rollback"),
    ],
)
def test_what_a_gate_cannot_look_at_is_refused(
    tmp_path: Path, changes: dict[str, Any], first: int | None, message: str
) -> None:
    write_atomic(tmp_path / "run" / "config.yaml", config_of(tmp_path / "run", **changes).to_yaml())
    with pytest.raises(UnlearningError, match=message):
        ACTIONS.create("nothing").check(tmp_path / "run", Rollback(("c0",), (), (), first, None, 4, "E1"))
