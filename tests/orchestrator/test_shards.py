"""Runs of shards: who is in which, what is combined, and what happens when they are stopped."""

import json
import os
import shutil
import signal
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError, RunInterrupted
from orchestrator import launch
from orchestrator.artifacts import open_run
from orchestrator.checkpoint import load_latest
from orchestrator.cli import app
from orchestrator.results import whole_adapter
from orchestrator.shards import deal, shard_configs
from orchestrator.stores.files import read_config, read_json, read_lines, shard_folders
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config


def sharded(folder: Path, **changes: Any) -> RunConfig:
    """Two rounds of five clients in two shards."""
    clients = {"count": 5, "ranks": [2, 4, 8], "per_round": 4}
    return toy_config(folder, **{"clients": clients, "federation": {"shards": 2}, "rounds": 2, **changes})


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; whoever changes it takes a copy."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    launch.run(sharded(folder), quiet)
    return folder


@pytest.fixture
def run(played: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(played, tmp_path / "run"))


def test_clients_are_dealt_into_groups_of_one_size_by_a_seeded_draw() -> None:
    clients = [f"c{i}" for i in range(11)]
    dealt = deal(clients, 3, seed=0)
    assert sorted(map(len, dealt)) == [3, 4, 4]
    assert sorted(client for group in dealt for client in group) == sorted(clients)
    assert deal(clients[::-1], 3, seed=0) == dealt
    assert deal(clients, 3, seed=1) != dealt


def test_excluding_a_client_moves_nobody_and_concerns_its_shard_alone(tmp_path: Path) -> None:
    config = sharded(tmp_path / "run")
    before = shard_configs(config)
    home = next(number for number, part in before.items() if "c1" not in part.clients.exclude)
    after = shard_configs(sharded(tmp_path / "run", clients__exclude=["c1"]))
    assert after[1 - home] == before[1 - home]
    assert set(after[home].clients.exclude) == {*before[home].clients.exclude, "c1"}


def test_no_client_is_ever_asked_in_another_shard(played: Path) -> None:
    members = [{row["client"] for row in read_json(part / "partition.json")} for part in shard_folders(played).values()]
    assert set.union(*members) == {f"c{i}" for i in range(5)}
    assert not members[0] & members[1]
    for own, part in zip(members, shard_folders(played).values(), strict=True):
        assert all(set(row["selected"]) <= own for row in read_lines(part / "metrics.jsonl"))


def test_together_the_shards_ask_whom_the_same_run_without_shards_asks(played: Path, tmp_path: Path) -> None:
    launch.run(sharded(tmp_path / "plain", federation={"shards": 1}), quiet)
    plain, all_shards = (
        [set(row["selected"]) for row in read_lines(folder / "metrics.jsonl")]
        for folder in (tmp_path / "plain", played)
    )
    assert plain == all_shards


def test_the_adapter_is_the_best_approximation_of_the_mean_by_rows(played: Path) -> None:
    config, (state, _) = read_config(played), load_latest(played)
    assert state is not None
    parts = [(load_latest(part)[0], read_json(part / "partition.json")) for part in shard_folders(played).values()]
    rows = [sum(row["num_examples"] for row in members) for _, members in parts]
    adapters = [whole_adapter(part) for part, _ in parts if part]
    shares = [count / sum(rows) for count in rows]
    for path, update in state.adapter.modules.items():
        products = [one.modules[path].B @ one.modules[path].A for one in adapters]
        mean = sum(share * product.double() for share, product in zip(shares, products, strict=True))
        U, S, Vh = torch.linalg.svd(torch.as_tensor(mean))
        best = (U[:, : config.lora.r] * S[: config.lora.r]) @ Vh[: config.lora.r]
        assert torch.allclose((update.B @ update.A).double(), best, atol=1e-6)  # float32 factors of numbers below 1
    for name, tensor in state.adapter.dense.items():
        average = sum(share * one.dense[name] for share, one in zip(shares, adapters, strict=True))
        assert torch.allclose(tensor, torch.as_tensor(average), atol=1e-6)


def test_the_run_can_be_looked_at_like_any_other(run: Path, tmp_path: Path) -> None:
    summary, rows = read_json(run / "summary.json"), read_lines(run / "metrics.jsonl")
    parts = shard_folders(run)
    of_shards = [read_json(part / "summary.json") for part in parts.values()]
    assert summary["bytes_up"] == sum(one["bytes_up"] for one in of_shards) == sum(row["bytes_up"] for row in rows)
    assert [one["adapter_sha256"] for one in summary["shards"].values()] == [one["adapter_sha256"] for one in of_shards]
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[0]["eval"] is None
    assert rows[1]["eval"]["accuracy"] == summary["final"]["accuracy"]
    assert open_run(run).state.round == 2
    assert "Shards" in (run / "report.html").read_text()

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    assert "shard 1: finished, 2 of 2 rounds committed" in call("runs", "show", str(run)).stdout
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "rain and wind", "label": "weather"}) + "\n")
    assert json.loads(call("eval", str(run), "--data", str(tmp_path / "rows.jsonl"), "--json").stdout)["examples"] == 1
    assert call("export", str(run), "--to", str(tmp_path / "copy")).exit_code == 0
    events: list[str] = []
    launch.resume(run, lambda event, fields: events.append(event))
    assert events == ["already_finished"]


PLACES = [
    *("round.aggregated:1", "commit.renamed:2", "finish.exported:2", "finish.summarised:2"),  # in the first shard
]


def _killed(folder: str, place: str, after: int) -> None:
    """Dies at a place in the shard that comes after so many, or in the combination."""

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        if event == "shard_finished" and fields["shard"] == after - 1:
            os.environ["FEDLORA_FAILPOINT"] = place

    if not after:
        os.environ["FEDLORA_FAILPOINT"] = place
    launch.run(sharded(Path(folder)), listen)


@pytest.mark.parametrize(
    ("place", "after"),
    [
        ("round.aggregated:2", 1),
        *(pytest.param(place, after, marks=pytest.mark.slow) for place in PLACES for after in (0, 1, 2)),
    ],
)
def test_kill_9_anywhere_and_the_same_command_again_end_the_same(
    played: Path, tmp_path: Path, place: str, after: int
) -> None:
    folder = tmp_path / "run"
    process = get_context("spawn").Process(target=_killed, args=(str(folder), place, after))
    process.start()
    process.join()
    if not (after == 2 and place == "round.aggregated:1"):  # the combination has no rounds
        assert process.exitcode == -signal.SIGKILL
    launch.run(sharded(folder), quiet)
    assert weights(folder) == weights(played)
    assert _numbers(folder) == _numbers(played)
    for number, part in shard_folders(folder).items():  # what had finished was not opened again
        opened = [line for line in read_lines(part / "journal.jsonl") if line["event"] in ("run_opened", "run_resumed")]
        assert len(opened) == (2 if number == after and place != "finish.summarised:2" else 1)


def _numbers(folder: Path) -> list[dict[str, Any]]:
    """Of every round, what does not depend on the clock."""
    keys = ("round", "selected", "admitted", "train", "eval", "bytes_up", "bytes_down", "shards")
    return [{key: row.get(key) for key in keys} for row in read_lines(folder / "metrics.jsonl")]


def test_a_run_that_is_stopped_says_how_to_go_on_and_a_shard_can_go_on_alone(played: Path, tmp_path: Path) -> None:
    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed" and fields["shard"] == 1:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(RunInterrupted, match="shard 1: stopped; 1 of 2 rounds .* for the whole run: fedlora resume"):
        launch.run(sharded(folder), stop)
    with pytest.raises(RunFolderError, match="holds a run of another configuration"):  # committed rounds are safe
        launch.run(sharded(folder, seed=7), quiet)
    launch.resume(folder / "shards" / "1", quiet)
    launch.resume(folder, quiet)
    assert weights(folder) == weights(played)


def test_a_shard_that_nobody_is_left_in_is_left_out(tmp_path: Path) -> None:
    own = deal([f"c{i}" for i in range(5)], 3, seed=0)[0]
    config = sharded(tmp_path / "run", federation={"shards": 3}, clients={"count": 5, "exclude": own}, rounds=1)
    launch.run(config, quiet)
    assert list(shard_folders(tmp_path / "run")) == [1, 2]
    assert list(read_json(tmp_path / "run" / "summary.json")["shards"]) == ["1", "2"]


def test_a_shard_of_which_nobody_is_drawn_waits_for_its_turn(tmp_path: Path) -> None:
    clients = {"count": 4, "ranks": [4], "per_round": 1}
    config = sharded(tmp_path / "run", clients=clients, rounds=6, schedule={"quorum": 1.0})
    launch.run(config, quiet)
    drawn = [
        [len(row["admitted"]) for row in read_lines(part / "metrics.jsonl")]
        for part in shard_folders(tmp_path / "run").values()
    ]
    assert [sum(counts) for counts in zip(*drawn, strict=True)] == [1] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"shards": 6}}, "5 clients cannot be dealt into 6 shards; lower it"),
        ({"strategy": "fedsa"}, "fedsa keeps parts on the clients"),
        ({"strategy": [{"fltrust": {"root": "c0"}}, "flexlora"]}, "fltrust.* needs c0 in every round"),
        ({"continual": {"split": 2, "rounds": 1}}, "does not go together with continual"),
        ({"contributions": {}}, "does not go together with contributions: .* shard_retrain"),
    ],
)
def test_what_cannot_be_dealt_into_shards_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        launch.run(sharded(tmp_path / "run", **changes), quiet)


def test_a_folder_elsewhere_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ConfigError, match="played on this machine's disk, and output_dir is memory://runs/x"):
        launch.run(toy_config("memory://runs/x", federation={"shards": 2}), quiet)


def test_validate_tells_the_shards(tmp_path: Path) -> None:
    facts, problems = validate(sharded(tmp_path / "run"))
    assert (facts["shards"], problems) == ("2, of 2 to 3 clients", [])
    _, problems = validate(sharded(tmp_path / "run", federation={"shards": 9}))
    assert "cannot be dealt into 9 shards" in str(problems[0])


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_too(played: Path, tmp_path: Path) -> None:
    launch.run(sharded(tmp_path / "run", pool="ray", ray={"workers": 1}), quiet)
    assert weights(tmp_path / "run") == weights(played)
