"""The local pool."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.protocol import ClientPool
from orchestrator.pools.local import LocalPool
from tests.conftest import toy_config
from tests.pools import PoolSuite, UnrulySuite, task_for
from tests.unruly import Unruly


class TestLocalPool(PoolSuite):
    @pytest.fixture(scope="class")
    def pool(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientPool]:
        pool = LocalPool(toy_config(tmp_path_factory.mktemp("local")))
        yield pool
        pool.close()


class TestLocalPoolOfUnrulyClients(UnrulySuite):
    @pytest.fixture(scope="class")
    def pool(self, tmp_path_factory: pytest.TempPathFactory) -> ClientPool:
        return LocalPool(toy_config(tmp_path_factory.mktemp("unruly")), Unruly)


def test_a_deadline_leaves_tasks_that_were_not_started_in_the_queue(tmp_path: Path) -> None:
    pool = LocalPool(toy_config(tmp_path), Unruly)
    stopped = list(pool.train([task_for(pool, client) for client in ("hangs", "a", "b")], timeout_s=0.2))
    assert [(reply.client, reply.payload) for reply in stopped] == [("hangs", None)]
    pool.abandon(["b"])
    assert [reply.client for reply in pool.train([])] == ["a"]


def test_a_deadline_gives_back_the_alarm_it_borrowed(tmp_path: Path) -> None:
    pool, rung = LocalPool(toy_config(tmp_path), Unruly), threading.Event()
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    before = signal.setitimer(signal.ITIMER_REAL, 0.4)
    started = time.monotonic()
    try:
        reply = next(pool.train([task_for(pool, "hangs")], timeout_s=0.1))
        assert "deadline of 0.1 s" in (reply.error or "")
        assert time.monotonic() - started < 0.35
        assert rung.wait(10)
        assert time.monotonic() - started >= 0.39
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)
