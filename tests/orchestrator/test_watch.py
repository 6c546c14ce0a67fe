"""Following a run that another process plays, over its folder and over a server."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.errors import FedLoRAError, RunFolderError, RunInterrupted
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.lease import current_holder
from orchestrator.stores.files import read_lines
from orchestrator.watch import open_source, watch
from tests.conftest import quiet, toy_config
from tests.orchestrator.servers import Server, ended, is_asleep, orchestrator, serve, until


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from serve()


class Heard:
    """A listener that remembers, and can act on an event."""

    def __init__(self, **actions: Any):
        self._actions = actions
        self.events: list[str] = []

    def __call__(self, event: str, fields: Any) -> None:
        self.events.append(event)
        if action := self._actions.get(event):
            action()


def events(folder: Path) -> list[str]:
    return [record["event"] for record in read_lines(folder / "journal.jsonl")]


@pytest.mark.parametrize("over", ["folder", "server"])
def test_a_run_is_followed_from_its_past_to_its_end(tmp_path: Path, server: Server, over: str) -> None:
    folder = tmp_path / "run"
    config = toy_config(folder, name=f"followed-{over}", store__redis=server.url, rounds=2, training__max_steps=1)
    process = orchestrator(config, sleep_at=("round_started", 2))
    with ended(process):
        until(lambda: is_asleep(process))
        source = open_source(str(folder) if over == "folder" else f"followed-{over}", server.url)
        # the past is told while the run stands still; then it goes on
        heard = Heard(round_committed=lambda: os.kill(process.pid or 0, signal.SIGCONT))
        code, last = watch(source, heard)
        process.join(60)
    assert (code, last["event"]) == (0, "run_finished")
    assert heard.events == events(folder)


@pytest.mark.parametrize("over", ["folder", "server"])
def test_a_run_that_fails_or_is_stopped_ends_its_watch_with_the_same_exit_code(
    tmp_path: Path, server: Server, over: str
) -> None:
    def stop(event: str, fields: Any) -> None:
        if event == "round_committed":
            raise KeyboardInterrupt

    store = {"redis": server.url}
    failing = toy_config(tmp_path / "failing", name=None, store=store, data__train_file="missing.jsonl")
    stopped = toy_config(tmp_path / "stopped", name=None, store=store)
    with pytest.raises(FedLoRAError) as failure:
        launch.run(failing, quiet)
    with pytest.raises(RunInterrupted):
        launch.run(stopped, stop)
    for name, error in (("failing", failure.value), ("stopped", RunInterrupted())):
        run = str(tmp_path / name) if over == "folder" else name
        heard = Heard()
        code, last = watch(open_source(run, server.url), heard)
        assert code == error.exit_code
        assert last["reason"]
        assert heard.events == events(tmp_path / name)


def test_a_run_that_was_killed_is_waited_for_until_somebody_resumes_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = orchestrator(toy_config(folder, rounds=2, training__max_steps=1), sleep_at=("round_started", 2))
    with ended(process):
        until(lambda: is_asleep(process))
    assert current_holder(folder) is None
    heard = Heard(run_silent=lambda: launch.resume(folder, quiet))
    assert watch(open_source(str(folder), None), heard)[0] == 0
    assert heard.events.index("run_silent") < heard.events.index("run_resumed")
    assert [event for event in heard.events if event != "run_silent"] == events(folder)


def test_a_journal_that_is_torn_or_replaced_is_followed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(toy_config(tmp_path).to_yaml())
    source, path = open_source(str(tmp_path), None), tmp_path / "journal.jsonl"
    assert source.records() == []
    path.write_text('{"event": "a"}\n{"eve')
    assert source.records() == [{"event": "a"}]
    path.write_text('{"event": "a"}\n{"event": "b"}\n')
    assert source.records() == [{"event": "b"}]
    path.write_text('{"event": "new"}\n')
    assert source.records() == [{"event": "new"}]


def test_a_server_that_goes_away_is_waited_for(tmp_path: Path, server: Server) -> None:
    config = toy_config(tmp_path / "run", name="waited-for", store__redis=server.url, rounds=1)
    launch.run(config, quiet)
    source = open_source("waited-for", server.url)
    server.kill()

    def come_back() -> None:
        server.restart_empty()
        launch.run(config, quiet, overwrite=True)

    heard = Heard(store_down=come_back)
    assert watch(source, heard)[0] == 0
    assert heard.events == ["store_down", "store_up", *events(tmp_path / "run")]


def test_what_does_not_exist_is_answered_with_what_does(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match="there are no run folders here. A run elsewhere needs --redis"):
        open_source("nothing", None)
    launch.run(toy_config("runs/first", name="nice", rounds=1, store__redis=server.url), quiet)
    with pytest.raises(RunFolderError, match="nothing is not a run folder; run folders here: runs/first"):
        open_source("nothing", None)
    with pytest.raises(RunFolderError, match=r"knows no run nothing; it knows nice \([0-9a-f]{12}, finished\)"):
        open_source("nothing", server.url)
    with pytest.raises(RunFolderError, match="redis://127.0.0.1:1/0 does not answer"):
        open_source("nothing", "redis://127.0.0.1:1/0")


def test_the_command_prints_rounds_and_a_summary_or_raw_events(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch.run(toy_config(folder, rounds=1), quiet)
    told = CliRunner().invoke(app, ["watch", str(folder)])
    assert told.exit_code == 0
    assert "round   1" in told.output
    assert "bytes up, down" in told.output
    raw = CliRunner().invoke(app, ["watch", str(folder), "--json"])
    assert [json.loads(line) for line in raw.output.splitlines()] == read_lines(folder / "journal.jsonl")
    process_says = CliRunner().invoke(app, ["watch", str(tmp_path / "other")])
    assert "is not a run folder" in str(process_says.exception)
