"""Clients that share a pass send what each of them sends alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from clients.attempt import attempt_together
from clients.runtime import ClientRuntime
from fedlora.adapter.wire import decode_update
from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError
from fedlora.protocol import Reply, TrainTask
from orchestrator import launch
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.cohorts import Division
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from orchestrator.stores.files import read_lines
from orchestrator.unlearning.doubts import doubts_about
from tests.conftest import quiet, toy_config

STILL = {"training__base_dropout": False}
STREAM = {"continual": {"split": 2, "rounds": 1, "replay": {"rows": 4}, "loss_labels": "met"}}
RULES: Mapping[str, Any] = {
    "flexlora": "flexlora",
    "fedex_het": "fedex_het",  # beside a client's pair stands what did not fit its rank
    "fedsb": "fedsb",
    "ffa": "ffa",
    "fedprox": [{"fedprox": {"mu": 0.1}}, "flexlora"],
    "scaffold": ["scaffold", "fedit"],
    "hetlora": {"hetlora": {"penalty": 0.1}},
    "personal_head": ["personal_head", "flexlora"],
}
PROTECTIONS = (
    *("ewc", "o_lora", "prototypes", "inflora"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mas", "online_lora")),  # as ewc, with other numbers
)


class Recorder(LocalPool):
    """Keeps the tasks of every call."""

    def __init__(self, config: RunConfig):
        self.runtime = ClientRuntime(config, 1)
        super().__init__(config, lambda *_: self.runtime)
        self.calls: list[list[TrainTask]] = []

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Any:
        self.calls.append(list(tasks))
        return super().train(tasks, timeout_s)


def played(config: RunConfig, rounds: int) -> Recorder:
    """A pool after some rounds."""
    pool = Recorder(config)
    federation, base = open_federation(config, pool, quiet)
    state = first_state(config, federation, base)
    for _ in range(rounds):
        state = play_round(federation, state)
    return pool


def check_alike(one: Sequence[Reply], other: Sequence[Reply]) -> None:
    """Two answers of every client, in any order, equal up to rounding."""
    pairs = {reply.client: reply for reply in other}
    assert {reply.client for reply in one} == pairs.keys()
    for reply in one:
        mine, theirs = (decode_update(r.payload) for r in (reply, pairs[reply.client]) if r.payload)
        assert mine.num_examples == theirs.num_examples
        for name in ("steps", "tokens", "rows"):
            assert mine.metrics[name] == theirs.metrics[name]
        assert mine.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-4)
        check_close(mine.delta, theirs.delta)
        check_close(mine.extras, theirs.extras)


def check_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        largest = float(theirs[name].abs().max())
        assert float((tensor - theirs[name]).abs().max()) <= 2e-3 * largest + 1e-7, name


@pytest.mark.parametrize("rule", RULES)
def test_a_cohort_sends_what_its_clients_send_alone(tmp_path: Path, rule: str) -> None:
    check_equal(toy_config(tmp_path, strategy=RULES[rule], rounds=3, training__max_steps=3, **STILL))


@pytest.mark.parametrize("method", PROTECTIONS)
def test_so_does_one_inside_a_stream(tmp_path: Path, method: str) -> None:
    rule = "ffa" if method == "inflora" else "flexlora"
    check_equal(toy_config(tmp_path, strategy=[method, rule], rounds=2, **STREAM, **STILL))


def check_equal(config: RunConfig) -> None:
    """The clients of a run's second round, in one pass and alone."""
    pool = played(config, 2)
    tasks = pool.calls[-1]
    payloads = pool.runtime.train_together(tasks)
    assert len(tasks) > 2
    assert all(payloads)
    together = [Reply(task.client, found[0]) for task, found in zip(tasks, payloads, strict=True) if found]
    check_alike(together, [Reply(task.client, pool.runtime.train(task)) for task in tasks])


def test_a_method_that_runs_the_model_meanwhile_trains_alone(tmp_path: Path) -> None:
    config = toy_config(tmp_path, strategy=[{"lwf": {"weight": 1.0}}, "flexlora"], rounds=2, **STREAM, **STILL)
    pool = played(config, 2)
    tasks = pool.calls[-1]
    assert pool.runtime.train_together(tasks) == [None] * len(tasks)
    assert all(reply.payload for reply in attempt_together(pool.runtime, tasks))


def test_a_client_that_fails_costs_itself_only(tmp_path: Path) -> None:
    pool = played(toy_config(tmp_path, **STILL), 1)
    first, second, *rest = pool.calls[-1]
    broken = replace(second, adapter=b"nothing", received="0")
    replies = attempt_together(pool.runtime, [first, broken, *rest])
    assert [reply.client for reply in replies if reply.error] == [second.client]
    fewer = attempt_together(pool.runtime, [first, *rest])
    assert [r.payload for r in replies if r.payload] == [r.payload for r in fewer]
    assert not any(reply.alone for reply in replies)


def test_a_client_that_cannot_keep_its_own_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = played(toy_config(tmp_path, strategy=RULES["scaffold"], **STILL), 1)
    tasks, whole = pool.calls[-1], attempt_together(pool.runtime, pool.calls[-1])
    save = pool.runtime._private.save

    def full(client: str, *args: Any) -> None:
        if client == tasks[1].client:
            raise FedLoRAError("no space left")
        save(client, *args)

    monkeypatch.setattr(pool.runtime._private, "save", full)
    replies = attempt_together(pool.runtime, tasks)
    assert [reply.error for reply in replies if reply.error] == ["no space left"]
    assert [r.payload for r in replies if r.payload] == [r.payload for r in whole if r.client != tasks[1].client]


def test_a_cohort_that_fails_is_taken_apart_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path / "run", rounds=1, **STILL)

    def too_large(*args: Any) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr("clients.runtime.train_cohort", too_large)
    summary = launch.run(config, quiet)
    assert summary["status"] == "finished"
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert set(row["alone"].values()) == {"MemoryError: no memory left"}
    assert any("taken apart in round 1" in doubt for doubt in doubts_about(tmp_path / "run", config, [row], 0))


def test_equal_cohorts_give_equal_bytes(tmp_path: Path) -> None:
    pool = played(toy_config(tmp_path), 1)  # with the base's dropout
    tasks = pool.calls[-1]
    assert pool.runtime.train_together(tasks) == pool.runtime.train_together(tasks)


def test_dora_trains_alone_and_says_why(tmp_path: Path) -> None:
    config = toy_config(tmp_path, lora__use_dora=True, clients__ranks=[4], lora__r=4, strategy="fedit")
    base = ClientRuntime(config, 1).base()
    assert "another kind" in base.alone
    assert Division(config, [], base).size == 1


def test_cohorts_are_as_equal_as_can_be_and_of_one_kind(tmp_path: Path) -> None:
    config = toy_config(tmp_path, clients__count=7, training__cohort_size=3, **STILL)
    pool = played(config, 1)
    shared = config.model_copy(update={"training": config.training.model_copy(update={"cohort_size": None})})
    for workers, sizes in ((None, [3, 4]), (5, [1, 1, 2, 1, 2])):
        spread = shared.model_copy(update={"ray": shared.ray.model_copy(update={"workers": workers})})
        cohorts = Division(spread, pool.members(), pool.base()).cohorts(pool.calls[-1])
        assert [len(cohort) for cohort in cohorts] == sizes
    tasks = pool.calls[-1]
    division = Division(config, pool.members(), pool.base())
    assert [len(cohort) for cohort in division.cohorts(tasks)] == [2, 2, 3]
    assert [task.client for cohort in division.cohorts(tasks) for task in cohort] == [task.client for task in tasks]
    other = [replace(task, plan=replace(task.plan, train=frozenset({"B"}))) for task in tasks[:2]]
    found = division.cohorts([*other, *tasks[2:]])
    assert sorted(len(cohort) for cohort in found) == [2, 2, 3]
    assert all(len({task.plan.train for task in cohort}) == 1 for cohort in found)


@pytest.mark.parametrize("schedule", [{"deadline_s": 9.0}, {"over_selection": 1.5}, {"mode": "async"}])
def test_whoever_may_be_given_up_trains_alone(tmp_path: Path, schedule: dict[str, Any]) -> None:
    config = toy_config(tmp_path, schedule=schedule, clients__per_round=2)
    pool = Recorder(config)
    assert pool.base().cohort > 1
    assert Division(config, pool.members(), pool.base()).size == 1
