"""The secure pool: its mean is the plain one whoever drops out, and nothing it has seen is a client's change."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.privacy.fixed_point import FixedPoint
from fedlora.privacy.secure_sum import needed
from fedlora.privacy.summand import to_ring
from fedlora.protocol import TrainPlan, TrainTask
from orchestrator.pools.local import LocalPool
from orchestrator.pools.secure import SecurePool
from tests.conftest import toy_config
from tests.summing import ROWS, Deadly, Leaky, Summing, change

EIGHT: dict[str, Any] = {"clients__count": 8, "clients__ranks": [4], "strategy": "fedit", "privacy__secure_sum": {}}
NAMES = [f"c{i}" for i in range(8)]
THRESHOLD = needed(0.66, 8)


def opened(tmp_path: Path, lost: Mapping[str, Sequence[str]] | None = None, **changes: Any) -> tuple[SecurePool, Leaky]:
    config = toy_config(tmp_path, **{**EIGHT, **changes})
    between = Leaky(LocalPool(config, Summing), lost or {})
    return SecurePool(between, config), between


def tasks_of(pool: SecurePool, number: int = 1, names: Sequence[str] = NAMES) -> list[TrainTask]:
    base = pool.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 4, seed=0))
    received = digest(payload)
    return [TrainTask(number, name, TrainPlan(4), payload, received, seed=NAMES.index(name)) for name in names]


def plain_mean(tasks: Sequence[TrainTask], uniform: bool = False) -> dict[str, torch.Tensor]:
    weights = [1 if uniform else ROWS[NAMES.index(task.client)] for task in tasks]
    total: dict[str, torch.Tensor] = {}
    for task, weight in zip(tasks, weights, strict=True):
        for name, tensor in change(task).items():
            total[name] = total.get(name, torch.zeros(())) + weight * tensor.double() / sum(weights)
    return total


def assert_mean(replies: Sequence[Any], tasks: Sequence[TrainTask], uniform: bool = False) -> None:
    expected = plain_mean(tasks, uniform)
    assert sorted(reply.client for reply in replies) == sorted(task.client for task in tasks)
    for reply in replies:
        update = decode_update(reply.payload)
        assert update.num_examples == ROWS[NAMES.index(reply.client)]
        for name, tensor in expected.items():
            apart = float((update.delta[name].double() - tensor).norm())
            assert apart <= 1e-6 * float(tensor.norm())


STAGES = ("keys", "shares", "masked", "opened")
DROPS = [{}] + [{stage: gone} for stage in STAGES for gone in (("c2",), ("c0", "c7"))]
DROPS += [{"keys": ("c1",), "masked": ("c6",)}, {"shares": ("c3",), "opened": ("c4",)}]


@pytest.mark.parametrize("lost", DROPS, ids=str)
def test_the_mean_is_the_plain_one_with_0_1_and_2_of_8_clients_dropping_at_each_stage(
    tmp_path: Path, lost: dict[str, tuple[str, ...]]
) -> None:
    pool, _ = opened(tmp_path, lost)
    tasks = tasks_of(pool)
    replies = list(pool.train(tasks))
    assert sorted(reply.client for reply in replies) == NAMES
    # whoever sent a masked update is in the sum, helped or not
    gone = {client for stage in STAGES[:3] for client in lost.get(stage, ())}
    assert {reply.client for reply in replies if reply.payload is None} == gone
    assert_mean([r for r in replies if r.payload], [task for task in tasks if task.client not in gone])


def test_equal_weights_are_equal(tmp_path: Path) -> None:
    pool, _ = opened(tmp_path, weighting="uniform")
    tasks = tasks_of(pool)
    assert_mean(list(pool.train(tasks)), tasks, uniform=True)


WORDS = {
    "keys": "sent keys",
    "shares": "dealt shares",
    "masked": "sent masked updates",
    "opened": "helped to open the sum",
}


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_nobody_has_an_update_and_the_reason_is_told(tmp_path: Path, stage: str) -> None:
    pool, between = opened(tmp_path, {stage: NAMES[:3]})
    replies = {reply.client: reply for reply in pool.train(tasks_of(pool))}
    assert sorted(replies) == NAMES
    assert not any(reply.payload for reply in replies.values())
    assert f"there is no secure sum: 5 of 8 clients {WORDS[stage]}, and {THRESHOLD} are needed" == replies["c7"].error
    between.lost = {}
    again = tasks_of(pool, 2)
    assert_mean(list(pool.train(again)), again)  # the next round is not troubled by it


def test_two_clients_are_not_even_asked(tmp_path: Path) -> None:
    pool, between = opened(tmp_path)
    replies = list(pool.train(tasks_of(pool, names=["c0", "c1"])))
    assert [reply.error for reply in replies] == [
        "there is no secure sum: 2 of 2 clients were asked, and 3 are needed"
    ] * 2
    assert not between.seen


def test_counts_add_up_and_losses_are_means(tmp_path: Path) -> None:
    pool, _ = opened(tmp_path, privacy__secure_sum={"clip": 0.01})
    tasks = tasks_of(pool)
    found = [decode_update(reply.payload).metrics for reply in pool.train(tasks) if reply.payload]
    assert sum(metrics["tokens"] for metrics in found) == sum(10 * rows + 1 for rows in ROWS)
    assert sum(metrics["steps"] for metrics in found) == 2 * 8
    beyond = sum(int((tensor.abs() > 0.01).sum()) for task in tasks for tensor in change(task).values())
    assert sum(metrics["cut_values"] for metrics in found) == beyond > 0
    expected = sum(rows * (1 + rows / 10) for rows in ROWS) / sum(ROWS)
    assert all(metrics["loss"] == pytest.approx(expected, rel=1e-9) for metrics in found)


# What the server has seen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [{}, {"masked": ("c2",)}, {"shares": ("c2",), "masked": ("c3",)}], ids=str)
def test_nothing_the_server_has_seen_is_a_clients_change(tmp_path: Path, lost: dict[str, tuple[str, ...]]) -> None:
    pool, between = opened(tmp_path, lost)
    tasks = tasks_of(pool)
    replies = [reply for reply in pool.train(tasks) if reply.payload]
    everything = b"\0".join(between.seen) + b"\0".join(bytes(reply.payload or b"") for reply in replies)
    plain = {task.client: flat(change(task)) for task in tasks}
    total = max(ROWS) * (8 - len(lost.get("keys", ())))
    for client, numbers in plain.items():
        rows = ROWS[NAMES.index(client)]
        ring = to_ring({"": torch.from_numpy(numbers)}, {}, rows, 1.0, total)[: len(numbers)]
        for form in (numbers, numbers.astype(np.float32), rows * numbers, ring):
            for start in range(0, len(form) - 4, 4):  # no four values in a row, in any form
                piece = form[start : start + 4].tobytes()
                assert piece not in everything
                assert base64.b64encode(piece)[:40] not in everything
    # nor is anything close to it: a masked value is close to the one under it as often as to any other
    masked = {reply[0]: reply[1] for reply in masked_answers(between, plain)}
    assert len(masked) >= THRESHOLD
    real = FixedPoint(1.0, total)
    for size in (1, 2):
        for some in itertools.combinations(masked, size):
            came = real.mean(sum((masked[c] for c in some), np.zeros_like(next(iter(masked.values())))), 1)
            truth = sum(ROWS[NAMES.index(c)] * plain[c] for c in some)
            assert np.mean(np.abs(came - truth) < 0.01 * total) < 0.05


def masked_answers(between: Leaky, plain: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The vectors that came, in the order of the tasks: by their size, which no other message has."""
    size = len(next(iter(plain.values())))
    found = [seen for seen in between.seen if len(seen) == 32 + 8 * (size + 8)]
    names = [
        name for name in NAMES if name not in {c for s in ("keys", "shares", "masked") for c in between.lost.get(s, ())}
    ]
    return [(name, np.frombuffer(seen, "<u8", count=size, offset=32)) for name, seen in zip(names, found, strict=True)]


def flat(delta: Mapping[str, torch.Tensor]) -> Any:
    return np.concatenate([tensor.double().reshape(-1).numpy() for _, tensor in sorted(delta.items())])


def test_clients_that_would_train_different_adapters_have_no_sum(tmp_path: Path) -> None:
    pool, _ = opened(tmp_path)
    one, *others = tasks_of(pool)
    base = pool.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 2, seed=0))
    odd = TrainTask(1, one.client, TrainPlan(2), payload, digest(payload), 0)
    with pytest.raises(ConfigError, match="c0 and c1 train different adapters, and their changes have no sum"):
        pool.train([odd, *others])


def test_at_the_deadline_the_sum_is_closed_without_those_who_hang_and_they_have_nothing_out(tmp_path: Path) -> None:
    class Hanging(Summing):
        def train(self, task: TrainTask) -> bytes:
            while task.client == "c7" and task.round == 1:
                pass
            return super().train(task)

    config = toy_config(tmp_path, **EIGHT)
    pool = SecurePool(LocalPool(config, Hanging), config)
    tasks = tasks_of(pool)
    replies = {reply.client: reply for reply in pool.train(tasks, timeout_s=2.0)}
    assert "deadline" in (replies.pop("c7").error or "")
    assert_mean(list(replies.values()), tasks[:7])
    again = tasks_of(pool, 2)
    assert_mean(list(pool.train(again, timeout_s=20.0)), again)


def test_the_pool_is_the_one_a_configuration_asks_for(tmp_path: Path) -> None:
    from orchestrator.pools import open_pool

    def kind(config: RunConfig) -> str:
        pool = open_pool(config)
        pool.close()
        return type(pool).__name__

    assert kind(toy_config(tmp_path, **EIGHT)) == "SecurePool"
    assert kind(toy_config(tmp_path, **{**EIGHT, "privacy__secure_sum": None})) == "LocalPool"


# On Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_any_worker_may_carry_any_stage_and_one_that_dies_costs_nobody_else(tmp_path: Path) -> None:
    from orchestrator.pools.ray import RayPool

    config = toy_config(tmp_path, pool="ray", ray__workers=2, **EIGHT)
    inner = RayPool(config, Deadly)
    pool = SecurePool(inner, config)
    try:
        tasks = tasks_of(pool)
        assert_mean(list(pool.train(tasks)), tasks)
        assert (tmp_path / "died").exists()
        again = tasks_of(pool, 2)
        replies = {reply.client: reply for reply in pool.train(again)}
        assert "its worker died over a message" in (replies.pop("c3").error or "")
        assert_mean(list(replies.values()), [task for task in again if task.client != "c3"])
    finally:
        pool.close()
