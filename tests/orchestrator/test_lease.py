"""One orchestrator plays a run at a time: with real processes, real signals, and clocks that nobody trusts."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import LeaseHeld, LeaseLost
from orchestrator import launch
from orchestrator.lease import current_holder, hold
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config
from tests.orchestrator.servers import SPAWN, ended, error_of, is_asleep, orchestrator, until


def _hold(folder: str, lease_s: float, ready: Any, go_on: Any) -> None:
    with hold(Path(folder), None, lease_s) as lease:
        ready.set()
        go_on.wait()
        lease.check()


def holding(folder: Path, lease_s: float = 60.0) -> tuple[BaseProcess, Any]:
    """A process that holds a run, and the event that lets it go on to check and release."""
    ready, go_on = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=_hold, args=(str(folder), lease_s, ready, go_on), daemon=True)
    process.start()
    assert ready.wait(60)
    return process, go_on


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The lease itself ------------------------------------------------------------------------------------------------


def test_a_second_holder_is_told_who_holds_the_run_and_touches_nothing(tmp_path: Path) -> None:
    with hold(tmp_path, None, 10.0) as lease:
        before = content(tmp_path)
        with pytest.raises(LeaseHeld, match=f"is being played by process {os.getpid()} on .* since 20"):
            hold(tmp_path, None, 10.0).__enter__()
        assert content(tmp_path) == before
        assert current_holder(tmp_path) == lease.holder
        lease.check()
    assert current_holder(tmp_path) is None


def test_tokens_grow_with_every_holder(tmp_path: Path) -> None:
    tokens = []
    for _ in range(3):
        with hold(tmp_path, None, 10.0) as lease:
            tokens.append(lease.holder.token)
    assert tokens == [1, 2, 3]


def test_a_holder_that_was_killed_is_followed_at_once_with_a_higher_token(tmp_path: Path) -> None:
    process, _ = holding(tmp_path)
    dead = current_holder(tmp_path)
    assert dead is not None
    process.kill()
    process.join()
    start = time.monotonic()
    with hold(tmp_path, None, 60.0) as lease:
        assert lease.holder.token == dead.token + 1
    assert time.monotonic() - start < 5  # of the 60 it would take to call it silent


def test_a_holder_that_is_silent_for_too_long_is_followed_and_knows_it_when_it_wakes_up(tmp_path: Path) -> None:
    process, go_on = holding(tmp_path, lease_s=1.0)
    with ended(process):
        asleep = current_holder(tmp_path)
        os.kill(process.pid or 0, signal.SIGSTOP)
        with pytest.raises(LeaseHeld):  # a second is not over yet
            hold(tmp_path, None, 1.0).__enter__()
        until(lambda: current_holder(tmp_path) is None)
        with hold(tmp_path, None, 1.0) as lease:
            assert asleep is not None
            assert lease.holder.token == asleep.token + 1
            os.kill(process.pid or 0, signal.SIGCONT)
            go_on.set()  # waits for the waiter, which must be awake
            process.join(60)
            assert process.exitcode == 1  # LeaseLost, raised by its check
            lease.check()


def test_a_holder_elsewhere_whose_lock_cannot_be_seen_is_believed_by_its_heartbeat(tmp_path: Path) -> None:
    def lie_about_the_host() -> Path:
        path = max(tmp_path.glob("lease.*.json"))
        path.write_text(path.read_text().replace(os.uname().nodename, "elsewhere").replace("released\n", ""))
        return path

    with hold(tmp_path, None, 1.0) as lease:
        lie_about_the_host()
        with pytest.raises(LeaseHeld, match="on elsewhere"):
            hold(tmp_path, None, 1.0).__enter__()
        lease.check()
    path = lie_about_the_host()
    os.utime(path, (time.time() + 3600,) * 2)  # its clock is an hour ahead of ours
    start = time.monotonic()
    with hold(tmp_path, None, 1.0) as lease:
        assert lease.holder.token == 2
        assert 0.9 < time.monotonic() - start < 10


def test_a_lease_that_was_taken_away_by_hand_is_lost(tmp_path: Path) -> None:
    with hold(tmp_path, None, 10.0) as lease:
        (tmp_path / "lease.1.json").unlink()
        with pytest.raises(LeaseLost, match="lost the run to nobody we know"):
            lease.check()


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_of_two_orchestrators_started_at_once_exactly_one_plays_the_run(tmp_path: Path, seed: int) -> None:
    config = toy_config(tmp_path / "run", rounds=1, seed=seed, training__max_steps=1)
    start_at, late = time.time() + 1.0, random.Random(seed).uniform(-0.02, 0.02)
    first, second = orchestrator(config, start_at=start_at), orchestrator(config, start_at=start_at + late)
    with ended(first, second):
        for process in (first, second):
            process.join(120)
        assert sorted((first.exitcode, second.exitcode)) == [0, 7]
        winner, loser = (first, second) if first.exitcode == 0 else (second, first)
        assert f"is being played by process {winner.pid} on {os.uname().nodename}" in error_of(config, loser)
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "finished"
    assert [row["round"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_overwrite_leaves_a_run_that_is_being_played_alone(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", rounds=1, training__max_steps=1)
    launch.run(config, quiet)
    with hold(tmp_path / "run", None, 60.0):
        before = content(tmp_path / "run")
        with pytest.raises(LeaseHeld):
            launch.run(config, quiet, overwrite=True)
        assert content(tmp_path / "run") == before
    assert launch.run(config, quiet, overwrite=True)["status"] == "finished"
    assert launch.run(config, quiet)["status"] == "finished"  # nobody needs a lease to look


def test_an_orchestrator_that_wakes_up_after_it_was_replaced_cannot_commit(tmp_path: Path) -> None:
    def config(name: str) -> RunConfig:
        return toy_config(tmp_path / name, training__max_steps=1, store__lease_s=1.0)

    folder = tmp_path / "run"
    sleeper = orchestrator(config("run"), sleep_at=("update_admitted", 2))
    with ended(sleeper):
        until(lambda: is_asleep(sleeper))
        until(lambda: current_holder(folder) is None)
        summary = launch.run(config("run"), quiet)
        before = content(folder)
        os.kill(sleeper.pid or 0, signal.SIGCONT)
        sleeper.join(60)
        assert sleeper.exitcode == 7
        assert f"lost the run to process {os.getpid()}" in error_of(config("run"), sleeper)
    after = content(folder)
    # what was left of its round in the journal is all that it could still say
    assert {name for name in after if after[name] != before.get(name)} <= {"journal.jsonl"}
    assert read_lines(folder / "journal.jsonl")[-1]["event"] not in ("run_failed", "round_committed")
    assert summary["adapter_sha256"] == launch.run(config("undisturbed"), quiet)["adapter_sha256"]
