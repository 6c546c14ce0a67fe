"""The Ray pool, on a real Ray of two workers on this machine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ConfigError, DataError
from fedlora.protocol import ClientPool
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.pools.ray import RayPool
from orchestrator.results import whole_adapter
from tests.conftest import quiet, toy_config
from tests.pools import PoolSuite, tasks_for

pytestmark = pytest.mark.ray


def pids_of(pool: ClientPool) -> list[int]:
    return [worker.pid for worker in pool.stats()]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for this module; pools join it."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class TestRayPool(PoolSuite):
    @pytest.fixture(scope="class")
    def pool(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientPool]:
        pool = RayPool(toy_config(tmp_path_factory.mktemp("ray"), pool="ray", ray__workers=2))
        yield pool
        pool.close()


@pytest.mark.slow
def test_a_worker_killed_in_a_round_is_replaced_and_its_task_is_done_again(tmp_path: Path) -> None:
    pool = RayPool(toy_config(tmp_path, pool="ray", ray__workers=2, training__max_steps=20))
    try:
        tasks = tasks_for(pool)
        pids = pids_of(pool)
        replies = []
        for reply in pool.train(tasks):
            if not replies:
                os.kill(pids[0], signal.SIGKILL)
            replies.append(reply)
        assert sorted(reply.client for reply in replies) == sorted(task.client for task in tasks)
        assert all(reply.payload is not None for reply in replies)
        assert len(set(pids) & set(pids_of(pool))) == 1
        assert len(list(pool.train(tasks_for(pool, round=2)))) == len(tasks)
    finally:
        pool.close()


@pytest.mark.slow
def test_without_retries_a_killed_worker_costs_its_own_client_only(tmp_path: Path) -> None:
    pool = RayPool(toy_config(tmp_path, pool="ray", ray__workers=2, ray__task_retries=0, training__max_steps=20))
    try:
        tasks, pids = tasks_for(pool), pids_of(pool)
        replies = []
        for reply in pool.train(tasks):
            if not replies:
                os.kill(pids[0], signal.SIGKILL)
            replies.append(reply)
        failed = [reply for reply in replies if reply.payload is None]
        assert len(replies) == len(tasks)
        assert len(failed) == 1
        assert "its worker died" in (failed[0].error or "")
    finally:
        pool.close()


def test_a_run_on_ray_ends_with_the_scores_of_the_local_run(tmp_path: Path) -> None:
    local = launch.run(toy_config(tmp_path / "local"), quiet)
    ray = launch.run(toy_config(tmp_path / "ray", pool="ray", ray__workers=2), quiet)
    assert ray["final"]["loss"] == pytest.approx(local["final"]["loss"], rel=1e-4)
    assert ray["final"]["accuracy"] == pytest.approx(local["final"]["accuracy"], abs=0.02)
    assert [worker["base_loads"] for worker in ray["workers"]] == [1, 1]
    assert (ray["bytes_up"], ray["bytes_down"]) == (local["bytes_up"], local["bytes_down"])


def test_an_error_of_ours_in_a_worker_arrives_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file missing.jsonl"):
        RayPool(toy_config(tmp_path, pool="ray", ray__workers=1, data__train_file="missing.jsonl"))


def test_workers_that_do_not_fit_the_cluster_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 workers of 1 CPU and 0 GPU do not fit"):
        RayPool(toy_config(tmp_path, pool="ray", ray__workers=64))


@pytest.mark.slow
def test_ledger_and_personal_parts_reach_every_worker_also_one_that_starts_late(tmp_path: Path) -> None:
    strategy = ["personal_head", "fedex_het"]
    settings = {"strategy": strategy, "rounds": 3, "clients__per_round": 4}
    here = launch.run(toy_config(tmp_path / "local", **settings), quiet)
    killed: list[int] = []

    def kill_once(event: str, fields: Any) -> None:
        if event == "worker_ready":
            killed.append(fields["pid"])
        if event == "round_committed" and fields["round"] == 2:
            os.kill(killed[0], signal.SIGKILL)  # its successor starts with an empty ledger and no client of its own

    there = launch.run(toy_config(tmp_path / "ray", pool="ray", ray__workers=2, **settings), kill_once)
    one, other = (load_latest(tmp_path / name)[0] for name in ("local", "ray"))
    assert one is not None
    assert other is not None
    assert [e.provenance for e in other.ledger.entries] == [e.provenance for e in one.ledger.entries]
    for path, update in whole_adapter(one).modules.items():
        twin = whole_adapter(other).modules[path]
        torch.testing.assert_close(twin.B @ twin.A, update.B @ update.A, rtol=1e-4, atol=1e-5)
    assert there["final"]["accuracy"] == pytest.approx(here["final"]["accuracy"], abs=0.05)
