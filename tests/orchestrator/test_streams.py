"""Runs over a stream of tasks: what is scored, when the adapter is frozen, and that nothing changes by it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.adapter.wire import encode_adapter
from fedlora.config import RunConfig
from fedlora.continual.orthogonal import row_space
from fedlora.errors import ConfigError
from fedlora.protocol import EvalTask, TrainPlan, TrainTask
from fedlora.training.evaluate import evaluate
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.opening import first_state, open_federation
from orchestrator.patches import freeze
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from orchestrator.state import RunState
from orchestrator.stores.files import read_lines
from tests.conftest import quiet

Toy = Callable[..., RunConfig]
TWO_TASKS: dict[str, Any] = {"split": 2, "rounds": 2}


def stream_of(toy: Toy, **changes: Any) -> RunConfig:
    continual = {**TWO_TASKS, **changes.pop("continual", {})}
    return toy(continual=continual, rounds=continual["split"] * continual["rounds"], **changes)


def test_a_stream_is_scored_task_by_task_and_frozen_where_one_ends(toy: Toy) -> None:
    config = stream_of(toy)
    summary = launch.run(config, quiet)
    stream = summary["stream"]
    assert stream["tasks"] == ["task1", "task2"]
    assert len(stream["rows"]) == 2
    assert all(score is not None for row in (stream["initial"], *stream["rows"]) for score in row)
    assert stream["freezes"] == [2]
    assert stream["metrics"]["ACC"] == pytest.approx(sum(stream["rows"][-1]) / 2)
    assert set(stream["clients"]) <= {f"c{i}" for i in range(6)}
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert [row["stream"]["task"] for row in rows] == ["task1", "task1", "task2", "task2"]
    assert [sum(score is not None for score in row["stream"]["accuracy"].values()) for row in rows] == [1, 2, 2, 2]
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert [entry.kind for entry in state.ledger.entries] == ["merge"]
    report = (Path(config.output_dir) / "report.html").read_text()
    assert "R[t, i]" in report
    assert "When the adapter was frozen" in report


def test_clients_train_on_the_rows_of_the_present_task_only(toy: Toy) -> None:
    config = stream_of(toy)
    runtime = ClientRuntime(config)
    for client in runtime.members():
        assert sum(train for train, _ in client.stages) == client.num_examples
        for stage, (count, _) in enumerate(client.stages):
            assert len(runtime.rows.examples("train", client.id, stage).examples) == count
            found = {example.labels for example in runtime.rows.examples("train", client.id, stage).examples}
            assert found <= set(runtime.rows.stream.tasks[stage].labels)


def test_who_has_no_rows_of_a_task_is_not_asked_in_its_rounds(toy: Toy) -> None:
    data = {"name": "builtin:toy", "max_length": 32, "partition": {"method": "pathological", "classes_per_client": 1}}
    config = stream_of(toy, data=data, clients={"count": 4}, evaluation={"per_client": False})
    members = {client.id: client for client in ClientRuntime(config).members()}
    launch.run(config, quiet)
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    for row, stage in zip(rows, (0, 0, 1, 1), strict=True):
        assert row["selected"]
        assert not row["failed"]
        assert all(members[client].stages[stage][0] for client in row["selected"])


STACKS = ["fedit", "flexlora", "fedex_het", "zero_pad", "fedsb", [{"server_momentum": {}}, "fedit"]]


@pytest.mark.parametrize("strategy", STACKS, ids=str)
def test_a_freeze_changes_no_score_and_leaves_a_pair_that_learns(toy: Toy, strategy: Any) -> None:
    config = stream_of(toy, strategy=strategy, continual={"freeze": "never"}, training__max_steps=6)
    pool = LocalPool(config)
    fed, base = open_federation(config, pool, quiet)
    state = first_state(config, fed, base)
    for _ in range(2):
        state = play_round(fed, state)
    before = losses(pool, state)
    for _ in range(3):
        state = freeze(fed, state, {"policy": "test"})
        assert losses(pool, state) == pytest.approx(before, abs=1e-5)
    assert state.freezes == 3
    assert all(torch.count_nonzero(pair.A) for pair in state.adapter.modules.values())
    moved = play_round(fed, state)
    assert losses(pool, moved) != pytest.approx(before, abs=1e-5)


def losses(pool: LocalPool, state: RunState) -> list[float]:
    """Of both tasks: they have more digits than an accuracy."""
    payload, patches = encode_adapter(state.adapter), state.ledger.patches()
    return [result.loss for result in pool.evaluate([EvalTask("", payload, ledger=patches, stage=s) for s in (0, 1)])]


def test_each_fresh_pair_is_another_one_and_the_head_stays(toy: Toy) -> None:
    config = stream_of(toy)
    launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    fed, _ = open_federation(config, LocalPool(config), quiet)
    first, second = fed.fresh_pair(0, 0), fed.fresh_pair(1, 0)
    for path, pair in first.modules.items():
        assert not torch.equal(pair.A, second.modules[path].A)
        assert torch.equal(second.modules[path].A, fed.fresh_pair(1, 0).modules[path].A)


def test_joint_training_sees_every_row_from_the_start(toy: Toy) -> None:
    config = stream_of(toy, continual={"joint": True, "freeze": "never"})
    summary = launch.run(config, quiet)
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert all(score is not None for row in rows for score in row["stream"]["accuracy"].values())
    assert summary["stream"]["freezes"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continual": {"freeze": "plato"}}, "plato"),
        ({"continual": {"freeze": {"plateau": {"windw": 3}}}}, "windw"),
        ({"strategy": "fedsa"}, "keeps parts on the clients"),
    ],
)
def test_a_stream_that_cannot_be_played_is_refused_before_it_begins(
    toy: Toy, changes: dict[str, Any], message: str
) -> None:
    config = stream_of(toy, **changes)
    with pytest.raises(ConfigError, match=message):
        launch.run(config, quiet)
    assert not (Path(config.output_dir) / "adapter").exists()


@pytest.mark.slow
def test_o_lora_keeps_a_later_task_out_of_the_directions_of_an_earlier_one(toy: Toy) -> None:
    overlaps = {}
    for weight in (0.0, 5.0):
        config = stream_of(
            toy, strategy=[{"o_lora": {"weight": weight}}, "fedit"], training__max_steps=8, continual={"rounds": 3}
        )
        launch.run(config, quiet, overwrite=True)
        state, _ = load_latest(Path(config.output_dir))
        assert state is not None
        frozen = state.ledger.total()
        overlaps[weight] = sum(
            float((pair.A.double() @ row_space(frozen[path])).square().sum())
            for path, pair in state.adapter.modules.items()
        )
    assert overlaps[5.0] < 0.5 * overlaps[0.0]


def test_a_buffer_brings_the_rows_of_earlier_tasks_into_later_rounds(toy: Toy) -> None:
    config = stream_of(toy, continual={"replay": {"rows": 6}, "loss_labels": "met"})
    runtime = ClientRuntime(config)
    client = runtime.members()[0].id
    task = TrainTask(1, client, TrainPlan(2), b"", "", 0, stage=0)
    assert runtime._replayed(task) == []
    later = runtime._replayed(replace(task, round=3, stage=1))
    assert len(later) == 6
    assert {example.labels for example in later} <= set(runtime.rows.stream.tasks[0].labels)
    assert launch.run(config, quiet)["status"] == "finished"


def test_hard_rows_are_those_of_four_times_as_many_that_the_received_model_gets_wrong_most(toy: Toy) -> None:
    config = stream_of(toy, continual={"replay": {"rows": 4, "hard": True}, "loss_labels": "met"})
    runtime = ClientRuntime(config)
    client = max(runtime.members(), key=lambda member: member.stages[0][0]).id
    task = TrainTask(3, client, TrainPlan(2), b"", "", 0, stage=1)
    model = runtime._model().at_rank(2)
    with torch.no_grad():
        model.get_submodule("base_model.model.classifier").modules_to_save["r2"].bias[0] += 5.0  # all is label 0 now
    sixteen = stream_of(toy, continual={"replay": {"rows": 16}, "loss_labels": "met"})
    pool, chosen = ClientRuntime(sixteen)._replayed(task), runtime._replayed(task, model)
    device, labels = runtime._model().base.device, runtime.rows.competing(task, [])
    losses = [evaluate(model, [row], 1, 0, device, labels=labels).loss for row in pool]
    hard = [row in chosen for row in pool]
    assert (len(pool), sum(hard)) == (16, 4)
    assert min(loss for loss, is_hard in zip(losses, hard, strict=True) if is_hard) >= max(
        loss for loss, is_hard in zip(losses, hard, strict=True) if not is_hard
    )
    assert launch.run(config, quiet)["status"] == "finished"


def test_replay_without_labels_that_compete_is_refused(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="use loss_labels: met"):
        stream_of(toy, continual={"replay": {}})


def test_rows_of_a_neighbouring_task_can_be_learned_from(toy: Toy) -> None:
    config = stream_of(toy, continual={"blur": 0.4})
    launch.run(config, quiet)
    assert not any(row["failed"] for row in read_lines(Path(config.output_dir) / "metrics.jsonl"))


def test_a_flipped_label_competes_too_and_attackers_train_on_their_buffer(toy: Toy) -> None:
    attack = {"name": "label_flip", "clients": ["c0"]}
    config = stream_of(toy, attack=attack, continual={"replay": {"rows": 6}, "loss_labels": "met"})
    launch.run(config, quiet)
    assert not any(row["failed"] for row in read_lines(Path(config.output_dir) / "metrics.jsonl"))


@pytest.mark.parametrize("rule", ["head_only", "flexlora"])
def test_a_head_of_class_means_grows_with_the_labels_of_a_stream(toy: Toy, rule: str) -> None:
    config = stream_of(toy, strategy=["prototypes", rule], continual={"loss_labels": "met"})
    summary = launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    runtime = ClientRuntime(config)
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    first, second = (len(task.labels) for task in runtime.rows.stream.tasks)
    # the freeze after the second round keeps every mean
    assert [row["strategy"]["labels_with_a_mean"] for row in rows] == [first, first, first + second, first + second]
    assert summary["stream"]["freezes"] == [2]
    assert not any(row["failed"] or row["refused"] for row in rows)
    means = state.strategy["means"]
    assert torch.allclose(state.adapter.dense["classifier.weight"], torch.nn.functional.normalize(means, dim=1))
    assert bool(state.ledger.entries) == (rule == "flexlora")  # a pair that never moved is nothing to freeze
    assert summary["stream"]["metrics"]["ACC"] > 1 / (first + second)


ALONE = {"name": "builtin:toy", "max_length": 32, "partition": {"method": "pathological", "classes_per_client": 1}}


def test_absent_clients_are_waited_for_and_a_quorum_is_of_those_who_have_rows(toy: Toy) -> None:
    config = stream_of(
        toy,
        data=ALONE,
        clients={"count": 4},
        evaluation={"per_client": False},
        fleet={"online": 0.3},
        schedule={"quorum": 0.5},
    )
    launch.run(config, quiet)
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert all(row["selected"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": [{"fltrust": {"root": "c0"}}, "fedit"]}, "c0 in every round, and it has no rows of some task"),
        ({"strategy": ["o_lora", "flora"]}, "flora patches the base in every round"),
    ],
)
def test_what_a_stream_cannot_give_a_strategy_is_said_before_it_begins(
    toy: Toy, changes: dict[str, Any], message: str
) -> None:
    config = stream_of(toy, data=ALONE, clients={"count": 4}, evaluation={"per_client": False}, **changes)
    with pytest.raises(ConfigError, match=message):
        launch.run(config, quiet)
