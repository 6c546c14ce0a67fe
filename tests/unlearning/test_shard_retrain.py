"""Taking something out of a run of shards: one shard is played again, and the others are let alone."""

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlora.config import RunConfig
from fedlora.data.partition import open_corpus
from fedlora.errors import RunInterrupted, UnlearningError
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, hashed, sign_request
from orchestrator import launch
from orchestrator.shards import deal
from orchestrator.stores.files import read_config, read_json, read_lines, shard_folders
from orchestrator.unlearning.artefacts import snapshot
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.execute import carry_out, estimates
from orchestrator.unlearning.lineage import lineage
from orchestrator.unlearning.requests import find_request, identity, read_requests, receive
from orchestrator.unlearning.rollback import plan_for
from tests.conftest import quiet, toy_config

CLIENTS = [f"c{i}" for i in range(5)]
FIRST, SECOND = deal(CLIENTS, 2, seed=0)
LATE = SECOND[0]  # comes in round 2
HOME = 1


def config_of(folder: Path, **changes: Any) -> RunConfig:
    """Two rounds of two shards; one client comes late."""
    clients = {"count": 5, "ranks": [2, 4, 8], "joins": {LATE: 2}}
    settings = {"clients": clients, "federation": {"shards": 2}, "rounds": 2, "keep_checkpoints": 9}
    return toy_config(folder, **{**settings, **changes})


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "run"
    launch.run(config_of(folder), quiet)
    return folder


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never had the client."""
    folder = tmp_path_factory.mktemp("control") / "run"
    launch.run(config_of(folder, clients__exclude=[LATE]), quiet)
    return folder


@pytest.fixture
def run(played: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(played, tmp_path / "run"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "officer")
    return tmp_path / "keys"


def ask(folder: Path, keys: Path, kind: str, target: tuple[str, ...], **more: Any) -> str:
    """A request that is noted and not carried out."""
    wanted = Request(kind, target, **{"action": "shard_retrain", **more})
    return receive(folder, sign_request(wanted, identity(folder), load_key(keys / "officer")), authorised([keys])).id


def finish(folder: Path, keys: Path, name: str, listen: Callable[[str, Any], None] = quiet) -> None:
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, load_key(keys / "officer"), listen)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Folders of shards in which a file has come, gone or changed."""
    paths = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    return {path.split("/")[1] for path in paths if path.startswith("shards/")}


def test_only_the_shard_of_the_client_changes_and_the_run_is_one_that_never_had_it(
    run: Path, control: Path, keys: Path
) -> None:
    before = snapshot(run)
    shown: dict[str, torch.Tensor] = {}

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        if event == "unlearning" and fields["phase"] == "contained":
            shown.update(safetensors.torch.load(weights(run)))

    name = ask(run, keys, "client", (LATE,), now=True)
    played_before = weights(run)
    finish(run, keys, name, listen)
    after, standing = snapshot(run), find_request(run, name)
    assert (standing.phase, standing.level) == ("certified", "E1")
    assert weights(run) == weights(control) != played_before
    assert standing.facts["executed"]["adapter_sha256"] == read_json(control / "summary.json")["adapter_sha256"]
    assert changed(before, after) == {str(HOME)}
    assert weights(run / "shards" / str(HOME)) == weights(control / "shards" / str(HOME))
    configs = [[read_config(part).sha256() for part in shard_folders(folder).values()] for folder in (run, control)]
    assert configs[0] == configs[1]
    # the late client cost its shard one round of two
    assert standing.facts["executed"]["rounds_played"] == 1
    assert standing.facts["verified"]["shards_played_again"] == [HOME]
    gone = set(standing.facts["purged"]["files"])
    assert {"adapter/adapter_model.safetensors", f"shards/{HOME}/adapter/adapter_model.safetensors"} <= gone
    assert not any(path.startswith(f"shards/{1 - HOME}") for path in gone)
    assert not any(LATE in row["selected"] for path in run.rglob("metrics.jsonl") for row in read_lines(path))
    assert verify_certificate(run, name, authorised([keys])) == []
    # until then the model of the shard that never saw the client was in use
    alone = safetensors.torch.load(weights(run / "shards" / str(1 - HOME)))
    for path in [name.removesuffix("lora_A.weight") for name in alone if name.endswith("lora_A.weight")]:
        used, own = (one[f"{path}lora_B.weight"] @ one[f"{path}lora_A.weight"] for one in (shown, alone))
        assert torch.allclose(used, own, atol=1e-6)  # the factors were balanced anew, in float32
    # it is a finished run, and stays so; asking once more finds nothing to do
    events: list[str] = []
    launch.resume(run, lambda event, fields: events.append(event))
    assert events == ["already_finished"]
    assert ask(run, keys, "client", (LATE,), now=True) == name
    opened = [line.get("request") for line in read_lines(run / "shards" / str(HOME) / "journal.jsonl")]
    assert set(opened) == {None, name}
    (run / "shards" / "0" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    assert any("shards/0/adapter" in problem for problem in verify_certificate(run, name, authorised([keys])))


def test_the_plan_says_what_one_shard_costs(played: Path) -> None:
    wanted = Request("client", (LATE,), "shard_retrain")
    possible = {one.action: one for one in estimates(played, wanted, plan_for(played, wanted))}
    assert (possible["shard_retrain"].level, possible["shard_retrain"].cost) == ("E1", 1 / 4)
    assert "is a run of shards, which rollback does not know; use shard_retrain" in possible["rollback"].reason
    early = Request("client", (FIRST[0],), "shard_retrain")
    costs = {one.action: one.cost for one in estimates(played, early, plan_for(played, early))}
    assert costs["shard_retrain"] == 2 / 4
    told = lineage(played, client=LATE)
    assert told[0] == f"client {LATE} is in shard {HOME} of 2; the run's adapter and checkpoint are made of all"
    assert told[-1].strip().endswith("a replay without it begins from the checkpoint of round 1")


@pytest.mark.slow
def test_records_are_played_out_of_the_shard_that_has_them(run: Path, keys: Path, tmp_path: Path) -> None:
    config = read_config(run)
    corpus = open_corpus(config.data, 5, config.seed)
    held = {c: {*corpus.train.select([*corpus.shards[c], *corpus.heldout[c]])["text"][:]} for c in CLIENTS}
    others = set.union(*(held[client] for client in FIRST))
    target = next(text for text in corpus.train.select(corpus.shards[LATE])["text"][:] if text not in others)
    before = snapshot(run)
    name = ask(run, keys, "records", hashed([target]))
    finish(run, keys, name)
    assert changed(before, snapshot(run)) == {str(HOME)}
    launch.run(config_of(tmp_path / "control", data__forget=list(hashed([target]))), quiet)
    assert weights(run) == weights(tmp_path / "control")
    parts = shard_folders(run)
    assert [read_config(part).data.forget for part in parts.values()] == [[], list(hashed([target]))]
    assert (find_request(run, name).level, verify_certificate(run, name, authorised([keys]))) == ("E1", [])


@pytest.mark.slow
def test_the_last_client_of_a_shard_takes_the_shard_with_it(keys: Path, tmp_path: Path) -> None:
    folder, dealt = tmp_path / "run", deal(["c0", "c1", "c2"], 2, seed=0)
    clients = {"count": 3, "ranks": [4]}
    launch.run(config_of(folder, clients=clients, rounds=1), quiet)
    (alone,) = dealt[1]
    finish(folder, keys, ask(folder, keys, "client", (alone,)))
    launch.run(config_of(tmp_path / "control", clients={**clients, "exclude": [alone]}, rounds=1), quiet)
    assert list(shard_folders(folder)) == list(shard_folders(tmp_path / "control")) == [0]
    assert weights(folder) == weights(tmp_path / "control")
    assert find_request(folder, "R1").facts["executed"]["rounds_played"] == 0
    assert verify_certificate(folder, "R1", authorised([keys])) == []


PLACES = [
    *(f"request.{phase}:1" for phase in ("planned", "contained", "executed", "verified", "purged")),
    *("round.aggregated:2", "commit.renamed:2", "finish.exported:2", "journal.taken:2", "journal.told:0"),
    *("publish.removed.checkpoints:0", "publish.moved.checkpoints:0", "publish.moved.config.yaml:0"),
    *(f"publish.shard:{HOME}", "publish.done:0", "certificate.written:1"),
]


def _killed(folder: str, keys: str, name: str, place: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = place
    finish(Path(folder), Path(keys), name)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_kill_9_in_any_phase_and_the_same_command_again_end_the_same(
    run: Path, control: Path, keys: Path, place: str
) -> None:
    before = snapshot(run)
    name = ask(run, keys, "client", (LATE,), now=True)
    process = get_context("spawn").Process(target=_killed, args=(str(run), str(keys), name, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert ask(run, keys, "client", (LATE,), now=True) == name
    finish(run, keys, name)
    assert weights(run) == weights(control)
    assert changed(before, snapshot(run)) == {str(HOME)}
    assert verify_certificate(run, name, authorised([keys])) == []
    for folder in (run, run / "shards" / str(HOME)):
        lines = [line for line in read_lines(folder / "journal.jsonl") if line.get("request") == name]
        assert [line["event"] for line in lines].count("run_finished") == 1
    assert sorted(path.name for path in (run / "unlearning").iterdir()) == [
        *(".lock", f"{name}.html", f"{name}.json", "requests.jsonl")
    ]


def test_a_run_that_has_not_finished_is_to_end_first(keys: Path, tmp_path: Path) -> None:
    folder, refused = tmp_path / "run", "is a run of shards that has not finished; let it end .fedlora resume"

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        if event == "shard_finished" and fields["shard"] == 0:
            with pytest.raises(UnlearningError, match=refused):
                ask(folder, keys, "client", (LATE,))
            with pytest.raises(UnlearningError, match=refused):
                plan_for(folder, Request("client", (LATE,)))
        if event == "run_started" and "shard" not in fields:  # all shards have finished, and the whole has not
            ask(folder, keys, "client", (LATE,))
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        launch.run(config_of(folder, rounds=1), listen)
    assert find_request(folder, "R1").phase == "received"
    assert launch.resume(folder, quiet)["status"] == "finished"
    finish(folder, keys, "R1")
    assert find_request(folder, "R1").level == "E1"


@pytest.mark.parametrize(
    ("place", "action", "message"),
    [
        ("", "rollback", "is a run of shards, which rollback does not know; use shard_retrain"),
        ("shards/1", "shard_retrain", "is a shard of .*; ask for it there"),
    ],
)
def test_what_would_leave_traces_in_the_whole_is_refused(
    run: Path, keys: Path, place: str, action: str, message: str
) -> None:
    before = snapshot(run)
    with pytest.raises(UnlearningError, match=message):
        finish(run / place, keys, ask(run / place, keys, "client", (LATE,), action=action))
    assert snapshot(run) == before
    assert all(not standing.is_open for standing in read_requests(run).values())


@pytest.mark.slow
def test_several_clients_one_after_the_other_and_all_at_once_end_the_same(
    run: Path, keys: Path, played: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(played, tmp_path / "other"))
    finish(run, keys, ask(run, keys, "client", (LATE,)))
    finish(run, keys, ask(run, keys, "client", (FIRST[0],)))
    finish(other, keys, ask(other, keys, "client", (LATE, FIRST[0])))
    launch.run(config_of(tmp_path / "control", clients__exclude=[FIRST[0], LATE]), quiet)
    assert weights(run) == weights(other) == weights(tmp_path / "control")
    assert [verify_certificate(run, name, authorised([keys])) for name in ("R1", "R2")] == [[], []]


def test_a_run_without_shards_has_no_shard_to_play_again(tmp_path: Path, keys: Path) -> None:
    folder = tmp_path / "plain"
    launch.run(config_of(folder, federation={"shards": 1}, rounds=1), quiet)
    with pytest.raises(UnlearningError, match="has no shards .*; use rollback"):
        finish(folder, keys, ask(folder, keys, "client", (LATE,)))
