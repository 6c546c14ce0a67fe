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

from fedlora.errors import RunFolderError
from orchestrator import launch
from orchestrator.failpoints import FAILPOINTS
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["orchestrator.launch", "tests.conftest"])


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


@pytest.mark.parametrize("failpoint", [f"{name}:2" for name in FAILPOINTS] + ["commit.written:0", "commit.pruned:3"])
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
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
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"Go on with: fedlora resume {folder}" in errors
    assert read_json(folder / "summary.json")["status"] == "interrupted"
    assert json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])["event"] == "run_interrupted"
    state, problems = launch.load_latest(folder)
    assert state is not None
    assert state.round >= 2
    assert problems == []
