"""Simulated devices: distributions, availability, and the same device wherever it is looked at."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import FleetConfig, TrainingConfig
from fedlora.protocol import ClientInfo
from fedlora.training.batches import batch_indices, steps_of
from orchestrator.fleet import Fleet, examples_of

CLIENTS = [f"c{i}" for i in range(2000)]


def fleet(clients=CLIENTS, seed=0, **settings) -> Fleet:
    members = [ClientInfo(client, rank=4, num_examples=10) for client in clients]
    return Fleet.of(FleetConfig(**settings), members, seed)


def test_speeds_are_lognormal_around_their_median() -> None:
    """The median of n has a standard error of 1.25 sigma / sqrt(n) in the logarithm."""
    devices = fleet(examples_per_s={"lognormal": {"median": 50, "sigma": 0.8}})
    logs = [math.log(devices.examples_per_s(client)) for client in CLIENTS]
    assert statistics.median(logs) == pytest.approx(math.log(50), abs=4 * 1.25 * 0.8 / math.sqrt(len(CLIENTS)))
    assert statistics.stdev(logs) == pytest.approx(0.8, abs=4 * 0.8 / math.sqrt(2 * len(CLIENTS)))


def test_uniform_numbers_fill_their_range() -> None:
    devices = fleet(mbit_per_s={"uniform": {"low": 10, "high": 30}})
    numbers = [devices.mbit_per_s(client) for client in CLIENTS]
    assert 10 < min(numbers) < 10.2
    assert 29.8 < max(numbers) < 30
    assert statistics.mean(numbers) == pytest.approx(20, abs=4 * 20 / math.sqrt(12 * len(CLIENTS)))


def test_a_list_is_dealt_in_turn_and_a_number_is_everybody_s() -> None:
    devices = fleet(CLIENTS[:4], examples_per_s=[10, 100, 1000], mbit_per_s=8)
    assert [devices.examples_per_s(client) for client in CLIENTS[:4]] == [10, 100, 1000, 10]
    assert [devices.mbit_per_s(client) for client in CLIENTS[:4]] == [8, 8, 8, 8]


def test_speed_and_bandwidth_of_a_client_are_drawn_apart() -> None:
    devices = fleet()
    speeds, bandwidths = map(
        list, zip(*((devices.examples_per_s(c), devices.mbit_per_s(c)) for c in CLIENTS), strict=True)
    )
    logs = [list(map(math.log, numbers)) for numbers in (speeds, bandwidths)]
    assert abs(statistics.correlation(*logs)) < 4 / math.sqrt(len(CLIENTS))


def test_a_client_has_the_same_device_whoever_else_is_registered() -> None:
    alone, everyone, other = fleet(["c7"], jitter=0.5), fleet(CLIENTS[::-1], jitter=0.5), fleet(seed=1, jitter=0.5)
    for number in (1, 2):
        assert alone.seconds("c7", number, 100, 10**6, 10**6) == everyone.seconds("c7", number, 100, 10**6, 10**6)
    assert alone.is_online("c7", 123.0) == everyone.is_online("c7", 123.0)
    assert alone.examples_per_s("c7") != other.examples_per_s("c7")


def test_a_task_takes_training_and_both_ways_of_transfer() -> None:
    """100 rows at 50/s are 2 s; 3 MB at 8 Mbit/s are 3 s."""
    devices = fleet(["c0"], examples_per_s=50, mbit_per_s=8)
    assert devices.seconds("c0", 1, 100, 10**6, 2 * 10**6) == pytest.approx(5)


def test_jitter_differs_by_round_and_leaves_the_median() -> None:
    devices = fleet(["c0"], examples_per_s=50, mbit_per_s=8, jitter=0.3)
    logs = [math.log(devices.seconds("c0", number, 100, 0, 0) / 2) for number in range(1, 2001)]
    assert statistics.median(logs) == pytest.approx(0, abs=4 * 1.25 * 0.3 / math.sqrt(2000))
    assert statistics.stdev(logs) == pytest.approx(0.3, abs=4 * 0.3 / math.sqrt(4000))


def test_dropping_out_is_as_frequent_as_was_said() -> None:
    devices, steady = fleet(dropout=0.3), fleet()
    lost = sum(devices.drops_out(client, 5) for client in CLIENTS)
    assert abs(lost - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)
    assert not any(steady.drops_out(client, 5) for client in CLIENTS)


def test_whether_a_client_drops_out_is_settled_by_seed_client_and_round() -> None:
    everyone, alone = fleet(dropout=0.3), fleet(["c0"], dropout=0.3)
    told = [everyone.drops_out("c0", number) for number in range(50)]
    assert told == [alone.drops_out("c0", number) for number in range(50)]
    assert 0 < sum(told) < 50


def test_a_client_is_there_for_its_share_of_each_period() -> None:
    devices = fleet(online=0.25, period_s=1000)
    for client in CLIENTS[:5]:
        assert sum(devices.is_online(client, now) for now in range(4000)) == 1000
        assert devices.is_online(client, 77.0) == devices.is_online(client, 1077.0)


def test_at_any_time_the_share_of_clients_is_there() -> None:
    devices = fleet(online=0.25, period_s=1000)
    for now in (0.0, 333.0, 12345.6):
        there = sum(devices.is_online(client, now) for client in CLIENTS)
        assert abs(there - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)


@given(st.floats(0, 1e7), st.integers(1, 4), st.floats(0.01, 1.0), st.floats(1.0, 1e5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_next_time_somebody_is_there_is_the_earliest(now: float, count: int, online: float, period: float) -> None:
    devices, clients = fleet(CLIENTS[:count], online=online, period_s=period), CLIENTS[:count]
    then = devices.next_online_s(now)
    assert now <= then <= now + period * (1 + 1e-9)
    assert any(devices.is_online(client, then) for client in clients)
    for part in range(20):
        before = now + (then - now) * part / 20
        assert before >= then * (1 - 1e-9) or not any(devices.is_online(client, before) for client in clients)


def test_where_everybody_is_always_there_nobody_waits() -> None:
    assert fleet().next_online_s(17.5) == 17.5


def test_the_fleet_tells_its_slowest_median_and_fastest_device() -> None:
    told = fleet(CLIENTS[:3], examples_per_s=[30, 10, 20], mbit_per_s=8, dropout=0.1, online=0.5).describe()
    assert told["clients"] == 3
    assert told["examples_per_s"] == {"slowest": 10, "median": 20, "fastest": 30}
    assert told["mbit_per_s"] == {"slowest": 8, "median": 8, "fastest": 8}
    assert (told["jitter"], told["dropout"], told["online"]) == (0.0, 0.1, 0.5)


@pytest.mark.parametrize("rows", [3, 16, 50])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_epochs": 2.5},
        {"num_train_epochs": 0.1},
        {"gradient_accumulation_steps": 3},
        {"max_steps": 2},
        {"max_steps": 9, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_examples_of_a_task_are_those_the_loop_deals(rows: int, options: dict[str, float]) -> None:
    training = TrainingConfig(per_device_train_batch_size=16, **options)
    assert examples_of(rows, training) == dealt(rows, training)


def dealt(rows: int, training: TrainingConfig) -> int:
    """Rows of the batches that a task takes from one epoch after another."""
    accumulation = training.gradient_accumulation_steps
    batches = accumulation * steps_of(rows, 16, accumulation, training.max_steps, training.num_train_epochs)
    epoch = [len(batch) for batch in batch_indices([8] * rows, 16, 0, group_by_length=False)]
    return sum(epoch[i % len(epoch)] for i in range(batches))
