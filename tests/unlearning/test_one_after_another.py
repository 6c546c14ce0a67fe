"""Requests that come after others: who was erased stays away, and what was only suppressed can be erased."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.data.partition import forgotten, hash_of
from fedlora.errors import UnlearningError
from fedlora.plugins import unload_plugins
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, sign_request
from fedlora.unlearning.standing import Standing
from orchestrator import launch
from orchestrator.stores.files import read_config
from orchestrator.unlearning.execute import carry_out
from orchestrator.unlearning.requests import find_request, identity, receive
from orchestrator.unlearning.rollback import plan_for, without
from orchestrator.unlearning.samples import choose_rows, rows_of
from orchestrator.unlearning.targets import as_learned
from tests.conftest import quiet
from tests.unlearning.test_forget_rounds import moved
from tests.unlearning.test_rollback import adapter_of, asked, config_of

FORGETS = {"gate": False, "steps": 2, "repair_rounds": 1}
# asks all owners, whatever was excluded before
CARELESS = """from fedlora.config import parse_config
from orchestrator.unlearning.actions import ACTIONS
from orchestrator.unlearning.forget_rounds import ByNPO


@ACTIONS.register("careless")
class Careless(ByNPO):
    def change(self, job, plan, state):
        config, state = super().change(job, plan, state)
        content = config.resolved()
        content["forgetting"][-1]["clients"] = list(plan.owners)
        return parse_config(content), state
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four rounds; c1 comes in round 3."""
    folder = tmp_path_factory.mktemp("trained")
    new_key(folder / "keys" / "officer")
    launch.run(config_of(folder / "run", keep_checkpoints=20), quiet)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with keys beside."""
    shutil.copytree(trained.parent / "keys", tmp_path / "keys")
    return moved(trained, tmp_path / "run")


def take_out(folder: Path, kind: str, target: Any, action: str = "rollback", **options: Any) -> Standing:
    """Carry a request out; where it stands then."""
    keys = folder.parent / "keys"
    key, request = load_key(keys / "officer"), Request(kind, tuple(target), action, options=options)
    standing = receive(folder, sign_request(request, identity(folder), key), authorised([keys]))
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, standing.id, lease, key, quiet)
    return find_request(folder, standing.id)


# Who was erased stays away ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_erased_client_is_not_asked_to_forget_a_class_it_had(run: Path) -> None:
    corpus = rows_of(read_config(run))
    erased = next(
        client for client in asked(run)[0] if "animals" in corpus.train.select(corpus.shards[client])["label"]
    )
    take_out(run, "client", [erased])
    gone = set(corpus.shards[erased]) | set(corpus.heldout[erased])
    wanted = Request("class", ("animals",), "npo")
    plan = plan_for(run, wanted)
    assert erased in plan.owners  # it has such rows, and its copy is its own
    rows = choose_rows(read_config(run), plan)
    assert not gone & {*rows.forget, *rows.retain}
    assert take_out(run, "class", ["animals"], "npo", **FORGETS).level == "S"
    (entry,) = read_config(run).forgetting
    assert entry.clients == [client for client in plan.owners if client != erased] == asked(run)[4]
    assert not any(erased in row for row in asked(run))


@pytest.mark.slow
def test_a_run_that_asked_an_excluded_client_again_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(CARELESS)
    new_key(tmp_path / "keys" / "officer")
    folder = tmp_path / "run"
    launch.run(config_of(folder, rounds=2, plugins=[str(tmp_path / "careless.py")]), quiet)
    try:
        erased = asked(folder)[0][0]
        take_out(folder, "client", [erased])
        before = adapter_of(folder)
        corpus = rows_of(read_config(folder))
        label = corpus.train[corpus.shards[erased][0]]["label"]
        with pytest.raises(UnlearningError, match=f"careless made a run that asked {erased} again, which was excluded"):
            take_out(folder, "class", [label], "careless", **FORGETS)
        assert adapter_of(folder) == before
    finally:
        unload_plugins()


@pytest.mark.slow
def test_where_only_excluded_clients_have_the_rows_nobody_is_asked(run: Path) -> None:
    erased, other = asked(run)[0][:2]
    take_out(run, "client", [erased], "npo", **FORGETS)
    with pytest.raises(UnlearningError, match="excluded already and is not asked again; use rollback"):
        take_out(run, "records", own_names(read_config(run), erased)[:1], "npo", **FORGETS)
    assert take_out(run, "client", [erased]).level in ("E1", "E2")
    with pytest.raises(UnlearningError, match=f"{erased} is excluded already and no round asked it; name only the"):
        take_out(run, "client", [erased, other], "npo", **FORGETS)


# What was only suppressed can be erased ---------------------------------------------------------------------------


def control_of(folder: Path) -> bytes:
    """The adapter of a run of its configuration from the start, in a folder of its own."""
    control = read_config(folder).model_copy(update={"output_dir": str(folder.with_name("control"))})
    launch.run(control, quiet)
    return adapter_of(folder.with_name("control"))


def newcomer(folder: Path) -> str:
    """A client that the first round did not ask."""
    rows = asked(folder)
    return next(client for row in rows[1:] for client in row if client not in rows[0])


@pytest.mark.slow
def test_suppressed_records_are_erased_by_a_rollback_and_their_forget_round_with_them(run: Path) -> None:
    config, owner = read_config(run), newcomer(run)
    names = own_names(config, owner)[:2]
    assert take_out(run, "records", names, "npo", **FORGETS).level == "S"
    assert [one.clients for one in read_config(run).forgetting] == [[owner]]
    done = take_out(run, "records", names)
    plan = done.facts["planned"]["plan"]
    first = next(number for number, row in enumerate(asked(run), 1) if owner in row)
    assert (done.level, plan["owners"], plan["first"], plan["start"]) == ("E1", [owner], first, first - 1)
    left = read_config(run)
    assert (left.forgetting, left.data.forget, left.rounds) == ([], sorted(names), config.rounds + 2)
    assert adapter_of(run) == control_of(run)
    # and what was erased is gone, under whatever name it is asked for again
    with pytest.raises(UnlearningError, match="no client has a row of these names"):
        plan_for(run, Request("data", tuple(names)))


@pytest.mark.slow
def test_a_rollback_begins_before_the_records_that_were_only_suppressed(run: Path) -> None:
    config, early, late = read_config(run), asked(run)[0][0], newcomer(run)
    suppressed, other = own_names(config, early)[0], own_names(config, late)[0]
    take_out(run, "records", [suppressed], "npo", **FORGETS)
    assert plan_for(run, Request("records", (other,))).first != 1
    plan = plan_for(run, Request("records", (suppressed, other)))
    assert (set(plan.owners), plan.first, plan.start) == ({early, late}, 1, 0)
    assert take_out(run, "records", [other]).level == "E1"
    (entry,) = read_config(run).forgetting
    assert (entry.clients, entry.records) == ([early], [suppressed])  # it was asked, and is no part of this request


@pytest.mark.slow
def test_a_class_is_still_there_after_it_was_suppressed_and_not_after_it_was_erased(run: Path) -> None:
    names = plan_for(run, Request("class", ("food",))).records
    take_out(run, "class", ["food"], "npo", **FORGETS)
    found = plan_for(run, Request("class", ("food",)))
    assert (found.records, found.first) == (names, 1)
    take_out(run, "data", names[:1])
    assert plan_for(run, Request("class", ("food",))).records == names[1:]
    assert read_config(run).forgetting[0].records == list(names[1:])


def test_what_is_forgotten_once_more_keeps_both_forget_rounds(run: Path) -> None:
    owner = newcomer(run)
    first, second = own_names(read_config(run), owner)[:2]
    take_out(run, "records", [first], "npo", **FORGETS)
    assert len(rows_learned(run, [first, second])) == 2
    take_out(run, "records", [first, second], "npo", **FORGETS)
    entries = read_config(run).forgetting
    assert [(one.first, one.records) for one in entries] == [(5, [first]), (7, sorted([first, second]))]
    left = without(read_config(run), records=[first]).forgetting
    assert [(one.first, one.records) for one in left] == [(7, [second])]


def rows_learned(folder: Path, names: list[str]) -> set[int]:
    """Rows of these names among those that the run, as it learned them, has its clients train on."""
    config = as_learned(folder, names)
    corpus = rows_of(config)
    named = forgotten(corpus.train, config.data.model_copy(update={"forget": names}))
    return {row for rows in corpus.shards.values() for row in rows if row in named}


def own_names(config: RunConfig, client: str) -> list[str]:
    """SHA-256 of the names of rows that one client alone has."""
    corpus = rows_of(config)
    texts = corpus.train["text"][:]
    others = {
        texts[row]
        for held in (corpus.shards, corpus.heldout)
        for one, rows in held.items()
        if one != client
        for row in rows
    }
    return [hash_of(texts[row]) for row in corpus.shards[client] if texts[row] not in others]
