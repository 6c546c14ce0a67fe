"""When a round is over: deadlines, over-selection, quorum, late updates, and buffered asynchronous rounds."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.aggregation import compose
from fedlora.config import FleetConfig, ScheduleConfig, TrainingConfig
from fedlora.errors import ConfigError, RoundError
from fedlora.protocol import ClientInfo, Reply, TrainTask
from orchestrator.federation import Federation
from orchestrator.fleet import Fleet
from orchestrator.rounds import play_round
from orchestrator.selection import build_selector
from orchestrator.soundness import check_strategy
from orchestrator.state import RunState, pack, unpack
from tests.conftest import toy_config
from tests.scripted import ScriptedPool, federation, first_state

TEN = [ClientInfo(f"c{i}", 4, 100) for i in range(10)]
TRAINING = TrainingConfig(max_steps=1, per_device_train_batch_size=10)  # ten examples a task
SLOW = {"c7", "c8", "c9"}
SPEEDS = (10,) * 7 + (10 / 4.5,) * 3  # the last three take 4.5 seconds


def virtual(schedule: dict[str, Any], speeds: Sequence[float] = (10,) * 7 + (1,) * 3, **fields: Any) -> Federation:
    """Ten clients; a task takes the fast ones one second and the last three ten, transfer aside."""
    settings = {name: fields.pop(name) for name in ("dropout", "online", "period_s") if name in fields}
    config = FleetConfig(examples_per_s=list(speeds), mbit_per_s=1e6, **settings)
    fleet = Fleet.of(config, TEN, seed=0)
    strategy = fields.pop("strategy", ["staleness", "flexlora"])
    pool = fields.pop("pool", None) or ScriptedPool(members=TEN)
    parts = {"schedule": ScheduleConfig(**schedule), "training": TRAINING, "fleet": fleet, **fields}
    return federation(pool, TEN, strategy=strategy, **parts)


def play(fed: Federation, rounds: int) -> tuple[RunState, list[dict[str, Any]]]:
    state, rows = first_state(fed), []
    for _ in range(rounds):
        state = play_round(fed, state)
        assert state.row is not None
        rows.append(dict(state.row))
    return state, rows


def test_without_a_deadline_a_round_lasts_as_long_as_its_slowest_client() -> None:
    _, (row,) = play(virtual({}), 1)
    assert len(row["admitted"]) == 10
    assert row["clock_s"] == pytest.approx(10, rel=1e-3)


def test_at_a_deadline_the_round_closes_with_what_it_has_and_late_clients_are_named() -> None:
    _, rows = play(virtual({"deadline_s": 3}), 2)
    for number, row in enumerate(rows, start=1):
        assert set(row["late"]) == SLOW
        assert row["late"]["c7"] == "due after 10.0 s; the round closed at 3.0 s"
        assert set(row["admitted"]) == {f"c{i}" for i in range(7)}
        assert row["clock_s"] == 3 * number
        assert row["in_flight"] == 0


def test_clients_that_are_late_are_not_trained_at_all_where_they_are_dropped() -> None:
    pool = ScriptedPool(members=TEN)
    play(virtual({"deadline_s": 3}, pool=pool), 2)
    assert SLOW.isdisjoint(pool.asked)


def test_over_selection_closes_with_the_first_ones() -> None:
    _, (row,) = play(virtual({"over_selection": 2}, per_round=5), 1)
    assert (len(row["selected"]), len(row["admitted"])) == (10, 5)
    assert row["clock_s"] == pytest.approx(1, rel=1e-3)


def test_a_late_update_that_is_kept_counts_when_it_is_due_with_its_staleness() -> None:
    _, rows = play(virtual({"deadline_s": 3, "late": "keep"}, SPEEDS), 4)
    assert [round(row["clock_s"]) for row in rows[:3]] == [3, 4, 5]
    assert [row["in_flight"] for row in rows] == [3, 3, 0, 3]
    assert [set(row["admitted"]) & SLOW for row in rows] == [set(), set(), SLOW, set()]
    assert rows[2]["staleness"] == {"0": 7, "2": 3}
    # whoever has something out is not asked again
    assert [set(row["selected"]) & SLOW for row in rows] == [SLOW, set(), set(), SLOW]


def test_a_late_update_moves_the_model_from_where_its_client_started() -> None:
    """Under ``staleness`` by hand: x + weighted mean of the changes, late ones for less."""
    strategy = [{"staleness": {"exponent": 1}}, "zero_pad"]
    fed = virtual({"deadline_s": 3, "late": "keep"}, SPEEDS, strategy=strategy)
    state, _ = play(fed, 2)
    after = play_round(fed, state)
    moved = {n: t - state.adapter.tensors()[n] for n, t in after.adapter.tensors().items()}
    weights = {client.id: (1 / 3 if client.id in SLOW else 1.0) for client in TEN}
    name = ":head"
    changes = {}
    for client in TEN:
        started = 1 if client.id in SLOW else 3
        changes[client.id] = fed.pool.sent[started, client.id][name]  # type: ignore[attr-defined]
    expected = sum(weights[c] * changes[c] for c in changes) / sum(weights.values())
    torch.testing.assert_close(moved[name], expected, rtol=1e-4, atol=1e-5)


def test_a_round_below_its_quorum_changes_nothing_and_three_end_the_run() -> None:
    fed = virtual({"deadline_s": 3, "quorum": 0.8})
    state, rows = play(fed, 2)
    assert rows[0]["problem"] == "7 updates came, and schedule.quorum asks for 8"
    assert all(torch.equal(t, fed.fresh.tensors()[n]) for n, t in state.adapter.tensors().items())
    with pytest.raises(RoundError, match="quorum asks for 8"):
        play_round(fed, state)


def test_clients_that_drop_out_are_failures_of_their_own() -> None:
    _, rows = play(virtual({"deadline_s": 30}, dropout=0.5), 3)
    lost = [client for row in rows for client in row["failed"]]
    assert 5 <= len(lost) <= 25
    assert set(rows[0]["failed"].values()) == {"dropped out (simulated)"}
    assert all(len(row["failed"]) + len(row["admitted"]) == 10 for row in rows)


def test_only_clients_that_are_there_are_asked_and_an_empty_hour_is_skipped() -> None:
    fed = virtual({}, [0.5] * 10, online=0.05, period_s=1000.0)  # a task takes 20 of the 50 seconds they are there
    _, rows = play(replace(fed, rounds=30), 30)
    assert all(row["admitted"] for row in rows)
    assert all(len(row["selected"]) < 10 for row in rows)
    assert rows[-1]["clock_s"] > 30 * 20 + 100


def test_an_empty_poisson_draw_changes_nothing_and_is_no_failure() -> None:
    fed = virtual({}, per_round=1, selector=build_selector("poisson"))
    state, rows = play(fed, 9)
    assert min(len(row["selected"]) for row in rows) == 0
    assert state.round == 9


# Asynchronous ----------------------------------------------------------------------------------------------------


def test_a_buffer_is_aggregated_when_it_is_full_and_slow_clients_hold_up_nobody() -> None:
    _, rows = play(virtual({"mode": "async", "buffer": 4}, per_round=6), 8)
    assert all(len(row["admitted"]) == 4 for row in rows)
    assert rows[-1]["clock_s"] < 20  # eight synchronous rounds would meet a slow client in nearly every one
    assert any(set(row["staleness"]) != {"0"} for row in rows)


def test_as_many_clients_as_asked_for_are_busy_between_rounds() -> None:
    _, rows = play(virtual({"mode": "async", "buffer": 3}, per_round=6), 8)
    assert all(3 <= row["in_flight"] <= 6 for row in rows)


def test_a_client_is_out_once_at_a_time() -> None:
    pool = ScriptedPool(members=TEN)
    state, rows = play(virtual({"mode": "async", "buffer": 2}, per_round=9, pool=pool), 8)
    assert len({(flight.round, flight.client) for flight in state.flights}) == len(state.flights)
    assert len({flight.client for flight in state.flights}) == len(state.flights)
    assert (
        sum(len(row["selected"]) for row in rows) == sum(len(row["admitted"]) for row in rows) + rows[-1]["in_flight"]
    )


@pytest.mark.parametrize(
    "schedule",
    [{"mode": "async", "buffer": 3}, {"deadline_s": 3, "late": "keep"}, {"over_selection": 1.3, "deadline_s": 3}],
    ids=["async", "late kept", "over-selected"],
)
def test_a_run_that_goes_on_from_its_packed_state_ends_in_the_same_bytes(schedule: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"per_round": 6, "dropout": 0.1, "selector": build_selector("oort")}
    whole, _ = play(virtual(schedule, **fields), 6)
    half, _ = play(virtual(schedule, **fields), 3)
    state = unpack(*pack(half), {})
    fed = virtual(schedule, **fields)
    for _ in range(3):
        state = play_round(fed, state)
    (note, tensors), (expected_note, expected_tensors) = pack(state), pack(whole)
    for seconds in (note, expected_note):
        seconds["totals"].pop("seconds")
        seconds["row"].pop("seconds")
    assert note == expected_note
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())


def test_when_nobody_answers_the_run_ends_instead_of_waiting_for_ever() -> None:
    fed = virtual({"mode": "async", "buffer": 3}, per_round=6, dropout=0.999)
    with pytest.raises(RoundError, match="dropped out"):
        play(fed, 5)


def test_a_client_that_never_answers_is_given_up_after_so_many_rounds() -> None:
    speeds = (10,) * 9 + (0.001,)
    _, rows = play(virtual({"deadline_s": 3, "late": "keep", "max_staleness": 2}, speeds), 4)
    assert [set(row["failed"]) for row in rows] == [set(), set(), set(), {"c9"}]
    assert rows[3]["failed"]["c9"] == "has not answered since round 1; given up by schedule.max_staleness"
    assert [row["in_flight"] for row in rows] == [1, 1, 1, 1]  # asked again at once


def test_an_asynchronous_client_has_its_deadline_too() -> None:
    speeds = (10,) * 9 + (0.001,)
    schedule = {"mode": "async", "buffer": 5, "deadline_s": 2.5}
    _, rows = play(virtual(schedule, speeds, per_round=10), 6)
    assert {client for row in rows for client in row["failed"]} == {"c9"}
    hung = Reluctant(calls=99)
    _, rows = play(real(hung, {"mode": "async", "buffer": 8, "deadline_s": 0.5}, per_round=10), 1)
    assert hung.given_up == SLOW


# A real clock ----------------------------------------------------------------------------------------------------


class Reluctant(ScriptedPool):
    """Slow clients answer no earlier than in the call of this number."""

    def __init__(self, calls: int) -> None:
        super().__init__(members=TEN)
        self.waiting: list[TrainTask] = []
        self.calls, self.given_up = calls, set[str]()

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        self.waiting += [task for task in tasks if task.client in SLOW]
        self.calls -= bool(tasks)
        yield from super().train([task for task in tasks if task.client not in SLOW])
        while self.calls <= 0 and self.waiting:
            yield from super().train([self.waiting.pop()])

    def abandon(self, clients: Collection[str]) -> None:
        self.given_up |= set(clients)
        self.waiting = [task for task in self.waiting if task.client not in clients]


def real(pool: Any, schedule: dict[str, Any], **fields: Any) -> Federation:
    return federation(pool, TEN, strategy=["staleness", "flexlora"], schedule=ScheduleConfig(**schedule), **fields)


def test_what_is_still_out_at_a_real_deadline_is_given_up_or_kept() -> None:
    dropping, keeping = Reluctant(calls=3), Reluctant(calls=3)
    _, rows = play(real(dropping, {"deadline_s": 5}), 2)
    assert dropping.given_up == SLOW
    assert all(set(row["late"]) == SLOW for row in rows)
    _, rows = play(real(keeping, {"deadline_s": 5, "late": "keep"}), 3)
    assert keeping.given_up == set()
    assert [row["in_flight"] for row in rows] == [3, 3, 0]
    assert rows[2]["staleness"] == {"0": 7, "2": 3}


def test_after_a_crash_what_was_out_is_given_out_again() -> None:
    fed = real(Reluctant(calls=9), {"deadline_s": 5, "late": "keep"})
    state, _ = play(fed, 1)
    restarted = real(Reluctant(calls=1), {"deadline_s": 5, "late": "keep"})
    after = play_round(restarted, unpack(*pack(state), {}))
    assert after.row is not None
    assert after.row["staleness"] == {"0": 7, "1": 3}
    assert after.flights == ()
    assert after.payloads == {}


def test_the_last_round_leaves_nothing_out() -> None:
    pool = Reluctant(calls=9)
    state, _ = play(real(pool, {"deadline_s": 5, "late": "keep"}, rounds=2), 2)
    assert pool.given_up == SLOW
    assert state.flights == ()


def test_asynchronous_rounds_on_a_real_pool_keep_their_clients_busy() -> None:
    fed = real(ScriptedPool(members=TEN), {"mode": "async", "buffer": 3}, per_round=5)
    state, rows = play(replace(fed, rounds=4), 4)
    assert all(len(row["admitted"]) == 3 for row in rows)
    assert state.flights == ()


# What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schedule__mode": "async"}, r"put staleness over the rule: strategy: \[staleness, flexlora\]"),
        ({"schedule__deadline_s": 1, "schedule__late": "keep"}, "schedule.late: keep brings updates of older models"),
        (
            {"schedule__mode": "async", "schedule__buffer": 2, "strategy": ["staleness", "fedex_het"]},
            "needs everyone at the same one",
        ),
        (
            {"schedule__over_selection": 1.5, "strategy": [{"fltrust": {"root": "c0"}}, "flexlora"]},
            "fltrust.* needs c0 in every round, and schedule.over_selection may close one without",
        ),
        ({"schedule__mode": "async", "strategy": ["staleness", "flexlora"]}, "schedule.buffer is 10, but .* 6 clients"),
        ({"schedule__late": "keep", "strategy": ["staleness", "flexlora"]}, "has no effect without deadline_s"),
        (
            {"schedule__mode": "async", "schedule__over_selection": 1.5, "strategy": ["staleness", "flexlora"]},
            "schedule.over_selection is for synchronous rounds",
        ),
        (
            {
                "schedule__mode": "async",
                "schedule__buffer": 2,
                "clients__selection": "poisson",
                "strategy": ["staleness", "flexlora"],
            },
            "poisson draws whole rounds",
        ),
    ],
)
def test_schedules_and_strategies_that_do_not_fit_are_refused_before_anything_runs(
    changes: dict[str, Any], reason: str
) -> None:
    config = toy_config("unused", **changes)
    with pytest.raises(ConfigError, match=reason):
        check_strategy(compose(config.strategy), config, [f"c{i}" for i in range(6)], merges=True)
