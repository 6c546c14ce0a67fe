"""Crashes and interruptions: the run that was killed ends as the run that was not."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import CheckpointError, RunFolderError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.failpoints import FAILPOINTS
from orchestrator.state import pack
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["orchestrator.launch", "clients.runtime", "tests.conftest"])


def _run_until_killed(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, clients__per_round=4), quiet)


def _resume(folder: str) -> None:
    launch.resume(Path(folder), quiet)


def in_a_process(function: Any, *arguments: Any) -> int | None:
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_a_process(_run_until_killed, str(folder), "") == 0
    return folder


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# every fifth place, with the first and the last commit; make test-all and benchmarks/reliability.py visit all of them
PLACES = [pytest.param(f"{name}:2", marks=[pytest.mark.slow] * bool(i % 5)) for i, name in enumerate(FAILPOINTS)]


@pytest.mark.parametrize("failpoint", [*PLACES, "commit.written:0", "commit.pruned:3"])
def test_kill_9_anywhere_then_resume_gives_the_same_bytes(tmp_path: Path, undisturbed: Path, failpoint: str) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_run_until_killed, str(folder), failpoint) == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    resumed, expected = (read_json(f / "summary.json") for f in (folder, undisturbed))
    assert resumed["adapter_sha256"] == expected["adapter_sha256"]
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed))
    assert without_times(rows) == without_times(expected_rows)
    assert resumed["bytes_up"] == expected["bytes_up"]
    assert (folder / "report.html").exists()


# What a strategy keeps, on the server or on the clients, is back too ---------------------------------------------

STATEFUL: dict[str, Any] = {
    "fedex_het": "fedex_het",
    "fedsa": "fedsa",
    "hetlora": {"hetlora": {"gamma": 0.6}},
    "momentum": [{"server_momentum": {"beta": 0.9}}, "flexlora"],
    "scaffold": ["scaffold", "zero_pad"],
}


def _play_strategy(folder: str, strategy: Any, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, clients__per_round=4, strategy=strategy, rounds=4), quiet)


FAST = ("fedsa",)  # what clients keep, and what the server keeps of them; the others are slow tests


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STATEFUL]
)
def test_mixed_ranks_resume_bit_identically_under_rules_that_keep_state(tmp_path: Path, name: str) -> None:
    strategy = STATEFUL[name]
    undisturbed = tmp_path / "undisturbed"
    assert in_a_process(_play_strategy, str(undisturbed), strategy, "") == 0
    expected = load_latest(undisturbed)[0]
    assert expected is not None
    # after the clients of round 3 have stored what they keep, and after a round that was committed but not logged
    for failpoint in ("round.aggregated:3", "commit.renamed:3"):
        folder = tmp_path / failpoint
        assert in_a_process(_play_strategy, str(folder), strategy, failpoint) == -signal.SIGKILL
        assert in_a_process(_resume, str(folder)) == 0
        state = load_latest(folder)[0]
        assert state is not None
        note, tensors = pack(state)
        expected_note, expected_tensors = pack(expected)
        assert all(torch.equal(tensor, expected_tensors[key]) for key, tensor in tensors.items())
        assert (note["strategy"], note["ledger"]) == (expected_note["strategy"], expected_note["ledger"])
        rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed))
        assert without_times(rows) == without_times(expected_rows)
        assert private_files(folder) == private_files(undisturbed)
    facts = {"fedex_het": state.ledger.entries, "fedsa": private_files(folder), "scaffold": private_files(folder)}
    assert facts.get(name, state.strategy)  # the test is about something


# A stream of tasks: scores, buffers, what decides about freezing, and the freeze itself -----------------------------

STREAM: dict[str, Any] = {
    "continual": {
        "split": 2,
        "rounds": 2,
        "loss_labels": "met",
        "replay": {"rows": 6},
        "freeze": {"period": {"rounds": 1}},
    },
    "strategy": [{"o_lora": {}}, {"server_momentum": {}}, "zero_pad"],
    "clients__per_round": 4,
    "rounds": 4,
}


def _play_stream(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, **STREAM), quiet)


@pytest.fixture(scope="module")
def undisturbed_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "run"
    assert in_a_process(_play_stream, str(folder), "") == 0
    return folder


AROUND = ["round.frozen:2", "commit.ledger:2"]
FARTHER = ["round.trained:2", "round.evaluated:2", "commit.renamed:2", "round.answered:3"]


@pytest.mark.parametrize("failpoint", [*AROUND, *(pytest.param(point, marks=pytest.mark.slow) for point in FARTHER)])
def test_kill_9_around_a_freeze_then_resume_gives_the_same_bytes(
    tmp_path: Path, undisturbed_stream: Path, failpoint: str
) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_play_stream, str(folder), failpoint) == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    resumed, expected = (read_json(f / "summary.json") for f in (folder, undisturbed_stream))
    assert resumed["stream"]["freezes"] == [1, 2, 3]
    assert resumed["adapter_sha256"] == expected["adapter_sha256"]
    assert resumed["stream"] == expected["stream"]
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed_stream))
    assert without_times(rows) == without_times(expected_rows)


# Tasks that are merged before the scores, also at the end of the run, and tasks that are kept apart -----------------

AFTER_A_FREEZE: dict[str, Any] = {
    "merged": {"merge": {"dare": {"p": 0.3}}},
    "isolated": {"isolated": True, "routing": "prototype"},
}
KILLED = [("merged", "round.frozen:2"), ("isolated", "commit.ledger:2")]
KILLED_TOO = [
    *(("merged", "commit.ledger:4"), ("merged", "round.evaluated:2"), ("merged", "round.frozen:4")),
    ("isolated", "round.evaluated:4"),
]


def _play_tasks(folder: str, kind: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    continual = {"split": 2, "rounds": 2, **AFTER_A_FREEZE[kind]}
    launch.run(toy_config(folder, continual=continual, clients__per_round=4, rounds=4), quiet)


@pytest.fixture(scope="module")
def undisturbed_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for kind in AFTER_A_FREEZE:
        assert in_a_process(_play_tasks, str(folder / kind), kind, "") == 0
    return folder


@pytest.mark.parametrize(
    ("kind", "failpoint"), [*KILLED, *(pytest.param(*both, marks=pytest.mark.slow) for both in KILLED_TOO)]
)
def test_kill_9_where_tasks_are_merged_or_kept_then_resume_gives_the_same_bytes(
    tmp_path: Path, undisturbed_tasks: Path, kind: str, failpoint: str
) -> None:
    folder, whole = tmp_path / "run", undisturbed_tasks / kind
    assert in_a_process(_play_tasks, str(folder), kind, failpoint) == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    resumed, expected = (read_json(f / "summary.json") for f in (folder, whole))
    assert resumed["stream"] == expected["stream"]
    assert resumed["final"] == expected["final"]
    assert adapters(folder) == adapters(whole)
    assert len(adapters(whole)) == {"merged": 1, "isolated": 3}[kind]
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, whole))
    assert without_times(rows) == without_times(expected_rows)
    state, expected_state = (load_latest(f)[0] for f in (folder, whole))
    assert state is not None
    assert expected_state is not None
    assert state.ledger.head == expected_state.ledger.head


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "adapter").rglob("*.safetensors"))}


def private_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "private").rglob("*.safetensors"))}


def test_a_damaged_ledger_entry_is_named_and_an_older_checkpoint_does_not_hide_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch.run(toy_config(folder, strategy="flora", rounds=2), quiet)
    state, _ = load_latest(folder)
    assert state is not None
    path = folder / "ledger" / f"{state.ledger.entries[0].payload_sha256}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"ledger entry {path} is truncated or altered"):
        launch.resume(folder, quiet)


def test_a_damaged_checkpoint_repeats_its_round_and_says_so(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_run_until_killed, str(folder), "round.selected:3") == -signal.SIGKILL
    path = folder / "checkpoints" / "round-0002" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    heard: list[tuple[str, Any]] = []
    summary = launch.resume(folder, lambda event, fields: heard.append((event, fields)))
    assert summary["adapter_sha256"] == read_json(undisturbed / "summary.json")["adapter_sha256"]
    assert heard[0][0] == "checkpoint_damaged"
    assert "round-0002" in heard[0][1]["reason"]


def test_a_finished_run_is_not_run_again(undisturbed: Path) -> None:
    heard: list[str] = []
    summary = launch.resume(undisturbed, lambda event, fields: heard.append(event))
    assert heard == ["already_finished"]
    assert summary["status"] == "finished"


def test_another_configuration_does_not_touch_the_folder(undisturbed: Path) -> None:
    before = sorted(str(p) for p in undisturbed.rglob("*"))
    with pytest.raises(RunFolderError, match=r"another configuration \(different: seed\)"):
        launch.run(toy_config(undisturbed, clients__per_round=4, seed=5), quiet)
    assert sorted(str(p) for p in undisturbed.rglob("*")) == before


def test_a_config_edited_after_the_start_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", rounds=1)
    launch.run(config, quiet)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("rounds: 1", "rounds: 2"))
    with pytest.raises(RunFolderError, match="was changed since the run started"):
        launch.resume(tmp_path / "run", quiet)


def test_overwrite_replaces_runs_and_nothing_else(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", rounds=1)
    first = launch.run(config, quiet)
    assert launch.run(config, quiet, overwrite=True)["adapter_sha256"] == first["adapter_sha256"]
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("x")
    with pytest.raises(RunFolderError, match="not a run folder"):
        launch.run(toy_config(precious, rounds=1), quiet, overwrite=True)
    assert (precious / "chapter.txt").exists()


def test_a_folder_with_the_users_own_files_is_never_deleted(tmp_path: Path) -> None:
    config = toy_config(tmp_path, rounds=1)
    (tmp_path / "config.yaml").write_text(toy_config(tmp_path, rounds=5).to_yaml())
    (tmp_path / "train.jsonl").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="it holds train.jsonl"):
            launch.run(config, quiet, overwrite)
    assert (tmp_path / "train.jsonl").read_text() == "precious"


def test_a_run_that_failed_before_its_first_commit_does_not_block_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Exception, match="no file"):
        launch.run(toy_config(folder, data__train_file="missing.jsonl"), quiet)
    assert read_json(folder / "summary.json")["status"] == "failed"
    assert launch.run(toy_config(folder, rounds=1), quiet)["status"] == "finished"


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="Ctrl-C"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow)],
)
def test_a_stopped_run_ends_with_a_sentence_and_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    (tmp_path / "c.yaml").write_text(toy_config(folder, rounds=10_000).to_yaml())
    command = [sys.executable, "-m", "orchestrator", "run", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(read_lines(folder / "metrics.jsonl")) < 2:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"Go on with: fedlora resume {folder}" in errors
    assert read_json(folder / "summary.json")["status"] == "interrupted"
    assert json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])["event"] == "run_interrupted"
    state, problems = launch.load_latest(folder)
    assert state is not None
    assert state.round >= 2
    assert problems == []
