"""Requests that come after others: who was erased stays away, and what was only suppressed can be erased."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.data.partition import hash_of
from fedlora.errors import UnlearningError
from fedlora.plugins import unload_plugins
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, sign_request
from fedlora.unlearning.standing import Standing
from orchestrator import launch
from orchestrator.stores.files import read_config
from orchestrator.unlearning.execute import carry_out
from orchestrator.unlearning.requests import find_request, identity, receive
from orchestrator.unlearning.rollback import plan_for
from orchestrator.unlearning.samples import choose_rows, rows_of
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


def test_where_only_excluded_clients_have_the_rows_nobody_is_asked(run: Path) -> None:
    erased, other = asked(run)[0][:2]
    take_out(run, "client", [erased], "npo", **FORGETS)
    with pytest.raises(UnlearningError, match="excluded already and is not asked again; use rollback"):
        take_out(run, "records", own_names(read_config(run), erased)[:1], "npo", **FORGETS)
    assert take_out(run, "client", [erased]).level in ("E1", "E2")
    with pytest.raises(UnlearningError, match=f"{erased} is excluded already and no round asked it; name only the"):
        take_out(run, "client", [erased, other], "npo", **FORGETS)


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
