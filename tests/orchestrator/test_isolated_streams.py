"""Streams whose tasks are kept apart: each has an adapter and a head of its own, and is scored with them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.adapter.directory import load_directory
from fedlora.adapter.wire import encode_adapter
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.protocol import EvalTask
from orchestrator import launch
from orchestrator.artifacts import export, open_run
from orchestrator.checkpoint import load_latest
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from orchestrator.scoring import evaluate_global
from orchestrator.state import RunState
from orchestrator.validate import validate
from tests.conftest import quiet

Toy = Callable[..., RunConfig]


def isolated(toy: Toy, **changes: Any) -> RunConfig:
    continual = {"split": 2, "rounds": 2, "isolated": True, **changes.pop("continual", {})}
    return toy(continual=continual, rounds=continual["split"] * continual["rounds"], **changes)


def played(config: RunConfig) -> tuple[dict[str, Any], RunState]:
    summary = launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    return summary, state


@pytest.mark.parametrize("strategy", ["flexlora", "fedsb", [{"server_momentum": {}}, "zero_pad"]], ids=str)
def test_every_task_begins_on_the_bare_base_with_a_fresh_pair_and_head(toy: Toy, strategy: Any) -> None:
    config = isolated(toy, strategy=strategy)
    pool = LocalPool(config)
    fed, base = open_federation(config, pool, quiet)
    first = first_state(config, fed, base)
    state = play_round(fed, play_round(fed, first))
    assert [entry.kind for entry in state.ledger.entries] == ["task"]
    assert state.ledger.patches() == ()
    assert all(torch.equal(tensor, fed.fresh.dense[name]) for name, tensor in state.adapter.dense.items())
    # whatever was learned: the model is the one the run began with
    looks = [replace(look, adapter=encode_adapter(one.adapter)) for one in (first, state) for look in everything()]
    found = [result.loss for result in pool.evaluate(looks)]
    assert found[:2] == pytest.approx(found[2:], abs=1e-6)
    assert play_round(fed, state).adapter.dense.keys() == state.adapter.dense.keys()


BOTH = frozenset({0, 1})


def everything() -> list[EvalTask]:
    return [EvalTask("", b"", stage=task, met=BOTH) for task in (0, 1)]


def test_a_finished_task_is_scored_with_the_adapter_it_ended_with(toy: Toy) -> None:
    config = isolated(toy, continual={"split": 3, "scenario": "task"})
    summary, state = played(config)
    rows = summary["stream"]["rows"]
    for task in (0, 1):
        assert {row[task] for row in rows[task:]} == {rows[task][task]}
    assert summary["stream"]["metrics"]["BWT"] == 0
    entries = state.ledger.of_kind("task")
    assert [entry.provenance["task"] for entry in entries] == [0, 1]
    payloads = [*(entry.payload for entry in entries), encode_adapter(state.adapter)]
    looks = [EvalTask("", payload, stage=task, met=frozenset({0, 1, 2})) for task, payload in enumerate(payloads)]
    found = LocalPool(config).evaluate(looks)
    assert [result.accuracy for result in found] == rows[-1]
    total = found[0] + found[1] + found[2]
    assert total.loss == summary["final"]["loss"]


def test_clients_score_their_rows_of_a_task_with_its_adapter_too(toy: Toy) -> None:
    config = isolated(toy, continual={"scenario": "task"})
    pool = LocalPool(config)
    fed, base = open_federation(config, pool, quiet)
    state = first_state(config, fed, base)
    for _ in range(2):
        state = play_round(fed, state)
    looks = [evaluate_global(fed, state).tasks, evaluate_global(fed, play_round(fed, state)).tasks]
    assert looks[0] is not None
    assert looks[1] is not None
    clients = [{client: own[0] for client, own in look.clients.items() if 0 in own} for look in looks]
    assert clients[0] == clients[1]
    assert clients[0]


def test_every_task_leaves_a_peft_folder_and_the_adapter_itself_is_the_last_one(toy: Toy, tmp_path: Path) -> None:
    config = isolated(toy)
    _, state = played(config)
    folder = Path(config.output_dir) / "adapter"
    (entry,) = state.ledger.of_kind("task")
    for name, expected in {"task1": entry.adapter(), "task2": state.adapter, ".": state.adapter}.items():
        written = load_directory(folder / name)
        for path, update in expected.whole().modules.items():
            assert torch.allclose(written.modules[path].B @ written.modules[path].A, update.B @ update.A, atol=1e-6)
        assert all(torch.equal(written.dense[head], tensor) for head, tensor in expected.dense.items())
    assert export(open_run(Path(config.output_dir)), tmp_path / "peft", merge=False) < 1e-4


def test_a_row_can_find_its_adapter_by_the_nearest_prototype(toy: Toy) -> None:
    config = isolated(toy, continual={"routing": "prototype", "loss_labels": "met"})
    summary, state = played(config)
    assert state.stream is not None
    runtime = ClientRuntime(config)
    bare = encode_adapter(state.adapter)  # features do not depend on it
    sums, counts = {0: torch.tensor(0.0), 1: torch.tensor(0.0)}, {0: 0, 1: 0}
    for client in runtime.members():
        for task in (0, 1):
            if client.stages[task][0]:
                found = runtime.evaluate(EvalTask(client.id, bare, stage=task, features=True))
                sums[task] = sums[task] + torch.tensor(found.features, dtype=torch.float64)
                counts[task] += found.num_examples
                assert found.num_examples == client.stages[task][0]
    prototypes = tuple(tuple((sums[task] / counts[task]).tolist()) for task in (0, 1))
    for task, prototype in enumerate(prototypes):
        assert state.stream.prototypes[task] == pytest.approx(prototype, rel=1e-9, abs=1e-12)

    payloads = [state.ledger.of_kind("task")[0].payload, encode_adapter(state.adapter)]
    totals = []
    for task in (0, 1):
        parts = [
            runtime.evaluate(EvalTask("", payload, 0, 1, (), stage=task, met=BOTH, prototypes=prototypes, route=route))
            for route, payload in enumerate(payloads)
        ]
        total = parts[0] + parts[1]
        assert total.num_examples == len(runtime.rows.stream.tasks[task].test)  # every row once
        totals.append(total)
    assert [total.accuracy for total in totals] == summary["stream"]["rows"][-1]
    assert (totals[0] + totals[1]).loss == pytest.approx(summary["final"]["loss"], abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continual": {"isolated": False, "routing": "prototype"}}, "set isolated: true"),
        ({"continual": {"replay": {}, "loss_labels": "met"}}, "leave replay out"),
        ({"continual": {"order": "shuffled", "stagger": 1}}, "leave order, stagger out"),
        ({"continual": {"blur": 0.2}}, "leave blur out"),
        ({"continual": {"merge": "mean"}}, "nothing to merge"),
        ({"continual": {"freeze": "plateau"}}, "use freeze: boundaries"),
        ({"continual": {"joint": True, "freeze": "never"}}, "leave isolated out"),
    ],
)
def test_tasks_that_would_mix_are_refused(toy: Toy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        isolated(toy, **changes)


def test_a_task_that_is_no_name_of_a_folder_is_refused(toy: Toy) -> None:
    tasks = [{"name": "north", "labels": ["sport"]}, {"name": "../south", "labels": ["food"]}]
    with pytest.raises(ConfigError, match="'../south' is no name of a folder"):
        toy(continual={"tasks": tasks, "isolated": True, "rounds": 1}, rounds=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "flora"}, "continual.isolated starts every task from the bare base, and flora"),
        ({"strategy": ["o_lora", "fedit"]}, "protects earlier tasks"),
        ({"strategy": ["clip", "o_lora", "fedit"]}, "protects earlier tasks"),
        ({"strategy": ["inflora", "ffa"]}, "protects earlier tasks"),
        ({"strategy": ["prototypes", "flexlora"]}, "leave prototypes out"),
        ({"ledger__max_rank": 4}, "ledger.max_rank has no effect"),
        ({"strategy": "fedsa"}, "keeps parts on the clients"),
    ],
)
def test_strategies_that_make_no_sense_apart_are_refused(toy: Toy, changes: dict[str, Any], message: str) -> None:
    config = isolated(toy, **changes)
    _, problems = validate(config)
    assert [problem for problem in problems if message in str(problem)]
    with pytest.raises(ConfigError, match=message):
        launch.run(config, quiet)


def test_the_options_of_boundaries_may_be_written_out(toy: Toy) -> None:
    assert isolated(toy, continual={"freeze": {"boundaries": None}}).continual
