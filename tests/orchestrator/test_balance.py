"""How work is divided: estimates, calls and places, by numbers that can be checked by hand."""

from dataclasses import replace

import pytest

from fedlora.config import TrainingConfig
from fedlora.protocol import BaseInfo, ClientInfo, TrainPlan
from orchestrator.pools.balance import CALL_BYTES, Pace, call_size, fits, training_flops

BASE = BaseInfo("causal-lm", (), "", {"q": (10, 20)}, {}, num_parameters=1000)
CLIENT = ClientInfo("c", rank=4, num_examples=100)
EPOCH = TrainingConfig(per_device_train_batch_size=10)
THREE_STEPS = EPOCH.model_copy(update={"max_steps": 3})


def test_a_clients_cost_is_tokens_times_what_a_token_costs_the_base_and_the_adapter() -> None:
    # 100 rows of 8 tokens; 4 x 1000 for the base and 6 x 4 x (10 + 20) for the adapter
    assert training_flops(CLIENT, TrainPlan(4), EPOCH, BASE, 8) == 800 * (4000 + 720)


@pytest.mark.parametrize(
    ("client", "training", "rows"),
    [
        (CLIENT, THREE_STEPS, 30),
        (replace(CLIENT, num_examples=4), THREE_STEPS, 12),  # a batch has no more rows than its client
        (CLIENT, EPOCH.model_copy(update={"num_train_epochs": 0.5}), 50),
    ],
)
def test_rows_that_are_seen_count_not_rows_that_are_held(
    client: ClientInfo, training: TrainingConfig, rows: int
) -> None:
    assert training_flops(client, TrainPlan(4), training, BASE, 1) == rows * 4720


def learned(rate: float) -> Pace:
    pace = Pace()
    pace.learn(1.0, rate)
    return pace


def test_calls_carry_one_task_until_the_pace_is_known() -> None:
    assert call_size([1.0] * 100, 0, Pace(), workers=2) == 1


@pytest.mark.parametrize(
    ("seconds_each", "waiting", "expected"),
    [
        (1 / 64, 1000, 12),  # 0.2 s of work
        (0.5, 1000, 1),  # one task is longer than that
        (1 / 64, 24, 6),  # half of a worker's share of what is left
        (0.001, 4, 4),  # all are done before another call would have arrived
        (0.2, 2, 1),  # a task for each worker
    ],
)
def test_a_call_is_worth_its_cost_and_small_at_the_end(seconds_each: float, waiting: int, expected: int) -> None:
    assert call_size([1.0] * waiting, 0, learned(seconds_each), workers=2) == expected


def test_answers_of_one_call_are_bounded_in_bytes() -> None:
    assert call_size([1.0] * 1000, CALL_BYTES // 3, learned(1e-6), workers=2) == 3


def test_a_worker_needs_all_its_resources_on_one_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.5}, {"CPU": 8.0, "GPU": 0.5, "disk": 1.0}]
    assert fits(nodes, {"CPU": 1, "GPU": 0}) == 3 + 1 + 8
    assert fits(nodes, {"CPU": 2, "GPU": 0}) == 1 + 0 + 4  # never a worker on the halves of two nodes
    assert fits(nodes, {"CPU": 1, "GPU": 0.25}) == 3 + 0 + 2
    assert fits(nodes, {"CPU": 1, "GPU": 0, "disk": 1}) == 1
    assert fits([], {"CPU": 1}) == 0
