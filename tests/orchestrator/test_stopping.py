"""Tasks of a stream that end once their loss has settled."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

Toy = Callable[..., RunConfig]
# as soon as there are two rounds to look at
SOON: dict[str, Any] = {"published": {"mean_threshold": 100.0, "variance_threshold": 100.0, "window": 2}}
NEVER: dict[str, Any] = {"published": {"mean_threshold": 0.0, "variance_threshold": 0.0}}


def stream_of(toy: Toy, until: Any = SOON, **changes: Any) -> RunConfig:
    continual = {"split": 3, "rounds": 4, "until": until, **changes.pop("continual", {})}
    return toy(continual=continual, rounds=3 * continual["rounds"], **changes)


def test_a_task_ends_when_its_rule_says_so_and_the_run_with_the_last_one(toy: Toy) -> None:
    config = stream_of(toy)
    summary = launch.run(config, quiet)
    assert summary["rounds"] == 6
    assert len(summary["stream"]["rows"]) == 3
    assert summary["stream"]["freezes"] == [2, 4]
    folder = Path(config.output_dir)
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["stream"]["task"] for row in rows] == ["task1", "task1", "task2", "task2", "task3", "task3"]
    assert all(len(row["stream"]["until"]["statistic"]) == 2 for row in rows)
    ended = [line for line in read_lines(folder / "journal.jsonl") if line["event"] == "task_ended"]
    assert [(line["round"], line["task"]) for line in ended] == [(2, "task1"), (4, "task2"), (6, "task3")]
    again: list[str] = []
    launch.resume(folder, lambda event, fields: again.append(event))
    assert again == ["already_finished"]


@pytest.mark.slow
def test_one_whose_loss_never_settles_is_bounded_by_its_rounds_and_the_journal_says_so(toy: Toy) -> None:
    config = stream_of(toy, NEVER, continual={"rounds": 2})
    assert launch.run(config, quiet)["rounds"] == 6
    ended = [line for line in read_lines(Path(config.output_dir) / "journal.jsonl") if line["event"] == "task_ended"]
    assert [line["evidence"]["reason"] for line in ended] == ["bounded by rounds"] * 3


def test_each_task_may_have_a_rule_of_its_own(toy: Toy) -> None:
    labels = [["animals", "colours"], ["food", "weather"]]
    tasks = [{"name": "a", "labels": labels[0], "until": SOON}, {"name": "b", "labels": labels[1], "rounds": 3}]
    config = toy(continual={"tasks": tasks, "rounds": 5}, rounds=8)
    assert launch.run(config, quiet)["rounds"] == 5
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert state.stream is not None
    assert state.stream.ended == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_was_stopped_anywhere_ends_its_tasks_where_an_undisturbed_one_does(
    tmp_path: Path, stop: int
) -> None:
    def toy(**changes: Any) -> RunConfig:
        return toy_config(tmp_path / changes.pop("to"), **changes)

    changes = {"continual": {"order": "shuffled", "stagger": 1, "replay": {"rows": 4}, "loss_labels": "met"}}
    whole = launch.run(stream_of(toy, **changes, to="whole"), quiet)

    def interrupt(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed" and fields["round"] == stop:
            raise KeyboardInterrupt

    config = stream_of(toy, **changes, to="stopped")
    with pytest.raises(Exception, match="stopped"):
        launch.run(config, interrupt)
    resumed = launch.resume(tmp_path / "stopped", quiet)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["rounds"] == whole["rounds"] == 6
    assert read_json(tmp_path / "stopped" / "summary.json")["stream"] == whole["stream"]


def test_late_answers_are_given_up_with_the_last_task(toy: Toy) -> None:
    schedule = {"mode": "async", "buffer": 2, "max_staleness": 3}
    config = stream_of(
        toy, strategy=["staleness", "flexlora"], schedule=schedule, fleet={"examples_per_s": [50.0, 5.0]}
    )
    summary = launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert summary["rounds"] < 12
    assert (state.flights, dict(state.payloads)) == ((), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": "boundaries"}, "continual.until: boundaries does not look at the loss; use plateau or published"),
        ({"until": {"period": {"rounds": 2}}}, "continual.until: period does not look at the loss"),
        ({"until": "platau"}, "platau.* did you mean plateau"),
        ({"joint": True, "freeze": "never"}, "joint trains on the rows of all tasks all the time; leave until out"),
    ],
)
def test_a_rule_that_cannot_end_a_task_is_refused(toy: Toy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch.run(stream_of(toy, continual=changes), quiet)
