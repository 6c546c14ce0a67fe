"""The Ray pool when clients hang, workers die, and nodes come and go. The runtime is one that trains nothing."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from fedlora.errors import ConfigError, FedLoRAError
from fedlora.protocol import ClientPool, EvalTask, Patch
from orchestrator.pools import crew
from orchestrator.pools.ray import RayPool
from tests.conftest import toy_config
from tests.pools import UnrulySuite, task_for
from tests.unruly import Seated, Unruly

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """One node with three cores and one seat."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "resources": {"seat": 1}, "include_dashboard": False},
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[RayPool]:
    """Two workers for all tests of this module; it has to survive them."""
    folder = tmp_path_factory.mktemp("ray")
    pool = RayPool(toy_config(folder, pool="ray", ray__workers=2, ray__task_retries=1), Unruly)
    yield pool
    pool.close()


def until(pool: RayPool, holds: Callable[[], bool], seconds: float = 90) -> None:
    """Let the pool look after its workers until something is so."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come to pass"
        pool._advance(0.2, True)


def task_ids(count: int) -> list[str]:
    return [f"client-{i}" for i in range(count)]


class TestRayPoolOfUnrulyClients(UnrulySuite):
    @pytest.fixture(scope="class")
    def pool(self, pool: RayPool) -> ClientPool:
        return pool


def test_a_late_reply_is_delivered_by_a_later_call(pool: RayPool) -> None:
    gate = Path(pool._config.output_dir) / "gate"
    until(pool, lambda: pool.workers == 2)
    first = [reply.client for reply in pool.train([task_for(pool, c) for c in ("waits", "a", "b")], timeout_s=1)]
    assert sorted(first) == ["a", "b"]
    second = [reply.client for reply in pool.train([task_for(pool, "c", round=2)], timeout_s=1)]
    assert second == ["c"]
    gate.touch()
    late = list(pool.train([], timeout_s=60))
    assert [(reply.client, reply.payload is not None) for reply in late] == [("waits", True)]


@pytest.mark.slow
def test_late_clients_that_hang_on_every_worker_do_not_keep_scores_waiting(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(pool, lambda: len(pool._crew.live) == 2)
    (Path(pool._config.output_dir) / "gate").unlink(missing_ok=True)
    hanging = task_for(pool, "hangs")
    waiting = task_for(pool, "waits")
    assert list(pool.train([hanging, waiting], timeout_s=0.5)) == []
    monkeypatch.setattr("orchestrator.pools.ray.HELD_UP_S", 1.0)
    (score,) = pool.evaluate([EvalTask("", hanging.adapter)])
    assert score.error is None
    pool.abandon({"hangs", "waits"})


@pytest.mark.parametrize("share", [0.1, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.5, 0.9))])
def test_a_worker_killed_at_a_share_of_its_work_costs_no_client(pool: RayPool, share: float) -> None:
    until(pool, lambda: pool.workers == 2)
    clients, draw = task_ids(40), random.Random(int(100 * share))
    victim, replies = draw.choice([worker.pid for worker in pool.stats()]), []
    for reply in pool.train([task_for(pool, client) for client in clients]):
        replies.append(reply)
        if len(replies) == int(share * len(clients)):
            os.kill(victim, signal.SIGKILL)
    assert sorted(reply.client for reply in replies) == sorted(clients)
    assert [reply.error for reply in replies if reply.payload is None] == []
    again = list(pool.train([task_for(pool, client, round=2) for client in clients]))
    assert sum(reply.payload is not None for reply in again) == len(clients)
    until(pool, lambda: pool.workers == 2)
    assert victim not in [worker.pid for worker in pool.stats()]


def test_a_task_that_kills_its_workers_fails_alone(pool: RayPool) -> None:
    until(pool, lambda: pool.workers == 2)
    list(pool.train([task_for(pool, client, round=2) for client in task_ids(20)]))  # calls carry several from now on
    replies = {r.client: r for r in pool.train([task_for(pool, c) for c in [*task_ids(20), "kills"]])}
    assert "its worker died 2 times" in (replies.pop("kills").error or "")
    assert sorted(replies) == sorted(task_ids(20))
    assert all(reply.payload for reply in replies.values())


@pytest.mark.slow
def test_nothing_is_left_behind_after_many_rounds(pool: RayPool) -> None:
    until(pool, lambda: pool.workers == 2)
    held = []
    for round in range(1, 201):
        ledger = tuple(Patch(f"{round}-{i}", bytes([i, round])) for i in range(3))
        tasks = [task_for(pool, client, round) for client in "abcd"]
        tasks = [type(task)(**{**vars(task), "ledger": ledger, "seed": round}) for task in tasks]
        assert sum(reply.payload is not None for reply in pool.train(tasks)) == len(tasks)
        held.append(references())
    assert max(held[100:]) <= max(held[20:100]) + 5  # what is just being let go; a hundred rounds would leave hundreds
    assert len(pool._shelf) <= 3  # the ledger of the last round


def references() -> int:
    return len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


@pytest.mark.slow
def test_workers_join_with_a_node_and_leave_with_it(tmp_path: Path, cluster: Cluster) -> None:
    settings: dict[str, Any] = {"ray__num_cpus": 0.25, "ray__resources": {"seat": 1}}
    pool = RayPool(toy_config(tmp_path, pool="ray", **settings), Unruly)
    try:
        assert pool.workers == 1
        node = cluster.add_node(num_cpus=1, resources={"seat": 1})
        until(pool, lambda: pool.workers == 2)
        tasks = [task_for(pool, client) for client in task_ids(20)]
        replies = pool.train(tasks)
        received = [next(replies)]
        cluster.remove_node(node)
        received += replies
        assert sorted(reply.client for reply in received if reply.payload) == sorted(task_ids(20))
        until(pool, lambda: pool.workers == 1)
    finally:
        pool.close()


@pytest.mark.slow
def test_a_worker_without_a_place_holds_nobody_up_and_a_run_without_one_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"pool": "ray", "ray__num_cpus": 0.25, "ray__resources": {"seat": 0.5}}
    other = RayPool(toy_config(tmp_path, **half), Unruly)  # takes both halves of the only seat
    try:
        assert other.workers == 2
        blocker = ray.remote(Seated).options(num_cpus=0, resources={"seat": 0.5}).remote()
        os.kill(other.stats()[0].pid, signal.SIGKILL)
        ray.get(blocker.here.remote())  # somebody else has the place of the one that died
        assert sum(r.payload is not None for r in other.train([task_for(other, c) for c in "abcdef"])) == 6
        monkeypatch.setattr(crew, "HOPE_S", 1.0)
        with pytest.raises(FedLoRAError, match="none could be placed for 1 s; start a node that has 0.25 CPU, 0 GPU"):
            RayPool(toy_config(tmp_path, **half), Unruly)
    finally:
        other.close()


def test_a_custom_resource_nobody_has_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 CPU and 0 GPU and 1 tape do not fit this cluster \\(3 CPU, 0 GPU, 0 tape"):
        RayPool(toy_config(tmp_path, pool="ray", ray__resources={"tape": 1}), Unruly)
