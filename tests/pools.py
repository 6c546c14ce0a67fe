"""The suites every client pool passes. A pool's test module subclasses them and provides ``pool``."""

import time
from collections.abc import Sequence

import pytest
import torch

from fedlora.adapter import rank as ranks
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.protocol import ClientPool, EvalTask, TrainPlan, TrainTask
from orchestrator.pools.local import LocalPool
from tests.conftest import toy_config


def tasks_for(pool: ClientPool, round: int = 1) -> list[TrainTask]:
    """One task for every member at its own rank."""
    base = pool.base()
    fresh = initial_adapter(base.sites, base.dense, 8, seed=0)
    payloads = {rank: encode_adapter(fresh.map(lambda u, r=rank: ranks.first(u, r))) for rank in (2, 4, 8)}
    return [
        TrainTask(round, m.id, TrainPlan(m.rank), payloads[m.rank], digest(payloads[m.rank]), seed=index)
        for index, m in enumerate(pool.members())
    ]


def task_for(pool: ClientPool, client: str, round: int = 1) -> TrainTask:
    """A task at rank 2; the pool need not know the client."""
    base = pool.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 2, seed=0))
    return TrainTask(round, client, TrainPlan(2), payload, digest(payload), seed=0)


class UnrulySuite:
    """What the round loop relies on when clients misbehave; ``pool`` runs ``tests.unruly.Unruly``."""

    SLACK_S = 0.5  # of a machine that is busy with other tests

    @pytest.fixture(scope="class")
    def pool(self) -> ClientPool:
        raise NotImplementedError

    def test_a_client_that_never_answers_costs_itself_and_the_call_ends_at_its_deadline(self, pool: ClientPool) -> None:
        tasks = [task_for(pool, client) for client in ("a", "b", "hangs")]
        list(pool.train([task_for(pool, "warm")]))
        start = time.monotonic()
        replies = {reply.client: reply for reply in pool.train(tasks, timeout_s=2)}
        assert 1.9 < time.monotonic() - start < 2 * 1.05 + self.SLACK_S
        assert replies["a"].payload
        assert replies["b"].payload
        assert "deadline of 2 s" in (replies["hangs"].error or "") if "hangs" in replies else True
        pool.abandon(["hangs"])
        again = [task_for(pool, client, round=2) for client in ("a", "b", "c", "hangs")]
        assert sorted(reply.client for reply in pool.train(again) if reply.payload) == ["a", "b", "c", "hangs"]

    def test_whoever_stops_reading_gets_the_rest_from_a_later_call(self, pool: ClientPool) -> None:
        first = next(pool.train([task_for(pool, client) for client in "abcdef"]))
        later = [reply.client for reply in pool.train([task_for(pool, "g")])]
        assert sorted([first.client, *later]) == list("abcdefg")
        assert list(pool.train([])) == []

    def test_what_was_abandoned_is_never_delivered(self, pool: ClientPool) -> None:
        first = next(pool.train([task_for(pool, client) for client in "abcdef"]))
        given_up = [client for client in "abcdef" if client != first.client][:3]
        pool.abandon(given_up)
        assert sorted(reply.client for reply in pool.train([])) == sorted(set("abcdef") - {first.client, *given_up})
        second = [reply.client for reply in pool.train([task_for(pool, client, round=2) for client in given_up])]
        assert sorted(second) == given_up

    def test_a_failure_comes_with_its_traceback_client_and_round(self, pool: ClientPool) -> None:
        replies = {r.client: r for r in pool.train([task_for(pool, client, round=3) for client in ("a", "fails", "b")])}
        assert replies["fails"].error == "RuntimeError: out of luck"
        trace = replies["fails"].traceback or ""
        assert trace.startswith("client fails, round 3\n")
        assert "unruly.py" in trace
        assert replies["a"].payload
        assert replies["b"].payload

    def test_a_client_has_one_task_at_a_time(self, pool: ClientPool) -> None:
        with pytest.raises(ValueError, match="a already has a task out"):
            pool.train([task_for(pool, "a"), task_for(pool, "a", round=2)])
        assert list(pool.train([])) == []


class PoolSuite:
    """What the round loop relies on."""

    @pytest.fixture(scope="class")
    def pool(self) -> ClientPool:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def reference(self, tmp_path_factory: pytest.TempPathFactory) -> ClientPool:
        return LocalPool(toy_config(tmp_path_factory.mktemp("reference")))

    def test_members_and_base_are_those_of_the_local_pool(self, pool: ClientPool, reference: ClientPool) -> None:
        assert list(pool.members()) == list(reference.members())
        mine, other = pool.base(), reference.base()
        assert (mine.fingerprint, mine.sites, mine.labels) == (other.fingerprint, other.sites, other.labels)
        assert all(torch.equal(tensor, other.dense[name]) for name, tensor in mine.dense.items())

    def test_every_task_is_answered_once_with_the_updates_of_the_local_pool(
        self, pool: ClientPool, reference: ClientPool
    ) -> None:
        tasks = tasks_for(pool)
        replies = list(pool.train(tasks))
        assert sorted(reply.client for reply in replies) == sorted(task.client for task in tasks)
        expected = {reply.client: reply.payload for reply in reference.train(tasks)}
        for reply in replies:
            assert reply.payload is not None, reply.error
            mine, other = decode_update(reply.payload), decode_update(expected[reply.client])  # type: ignore[arg-type]
            assert (mine.received, mine.num_examples) == (other.received, other.num_examples)
            for name, tensor in mine.delta.items():
                torch.testing.assert_close(tensor, other.delta[name], rtol=1e-5, atol=1e-6)

    def test_a_client_that_fails_is_reported_and_the_others_are_answered(self, pool: ClientPool) -> None:
        tasks = tasks_for(pool)
        broken = TrainTask(1, "nobody", tasks[0].plan, tasks[0].adapter, tasks[0].received, 0)
        replies = {reply.client: reply for reply in pool.train([broken, *tasks])}
        assert "nobody" in (replies.pop("nobody").error or "")
        assert all(reply.payload is not None for reply in replies.values())

    def test_every_message_is_answered_and_one_that_nobody_understands_costs_nothing(self, pool: ClientPool) -> None:
        replies = pool.exchange({member.id: b"?" for member in pool.members()})
        assert sorted(replies) == sorted(member.id for member in pool.members())
        for client, reply in replies.items():
            assert (reply.client, reply.payload) == (client, None)
            assert "has no privacy.secure_sum" in (reply.error or "")

    def test_scores_come_in_the_order_of_the_tasks_and_shards_add_up(self, pool: ClientPool) -> None:
        payload = tasks_for(pool)[2].adapter
        whole, *shards = pool.evaluate([EvalTask("", payload), *(EvalTask("", payload, i, 3) for i in range(3))])
        total = shards[0] + shards[1] + shards[2]
        assert (total.num_examples, total.num_correct) == (whole.num_examples, whole.num_correct)
        assert total.loss == pytest.approx(whole.loss, rel=1e-5)
        clients: Sequence[str] = [m.id for m in pool.members() if m.num_heldout]
        assert [r.subject for r in pool.evaluate([EvalTask(c, payload) for c in clients])] == clients

    def test_the_base_is_loaded_once_per_worker(self, pool: ClientPool) -> None:
        list(pool.train(tasks_for(pool)))
        stats = pool.stats()
        assert len(stats) == pool.workers
        assert all(worker.base_loads <= 1 for worker in stats)
        assert all(worker.threads >= 1 for worker in stats)
