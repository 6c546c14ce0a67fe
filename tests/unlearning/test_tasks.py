"""Tasks taken out of a stream: the bytes of a run that never had them, played again or dropped."""

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunInterrupted, UnlearningError
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, sign_request
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.cli import app
from orchestrator.stores.files import read_config, read_json, read_lines
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.execute import carry_out, estimates
from orchestrator.unlearning.provenance import read_provenance
from orchestrator.unlearning.requests import find_request, identity, receive
from orchestrator.unlearning.rollback import plan_rollback, replay, without
from tests.conftest import quiet, toy_config

ISOLATED = {"isolated": True}


def stream_of(folder: Path, rule: str = "flexlora", rounds: int = 1, **continual: Any) -> RunConfig:
    """Three tasks for six clients, three of them in a round."""
    clients = {"count": 6, "per_round": 3, "ranks": [4] if rule == "fedit" else [2, 4, 8]}
    settings = {"split": 3, "rounds": rounds, "loss_labels": "all", **continual}
    everything: dict[str, Any] = {"strategy": rule, "clients": clients, "continual": settings, "keep_checkpoints": 9}
    return toy_config(folder, rounds=3 * rounds, **everything)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Finished runs, each played once; never written to."""
    root, known = tmp_path_factory.mktemp("runs"), {}

    def run(without_tasks: tuple[str, ...] = (), **changes: Any) -> Path:
        key = repr((without_tasks, changes))
        if key not in known:
            folder = root / str(len(known))
            launch.run(without(stream_of(folder, **changes), tasks=without_tasks), quiet)
            known[key] = folder
        return known[key]

    return run


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "officer")
    return tmp_path / "keys"


def adapters(folder: Path) -> dict[str, bytes]:
    """The weights of every adapter of a run; isolated tasks have one each."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("adapter/**/*.safetensors")}


def ask(folder: Path, keys: Path, action: str, *tasks: str, now: bool = False) -> str:
    signed = sign_request(Request("task", tasks, action, now), identity(folder), load_key(keys / "officer"))
    return receive(folder, signed, authorised([keys])).id


def finish(folder: Path, keys: Path, name: str, listen: Any = quiet) -> None:
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, load_key(keys / "officer"), listen)


def taken_out(kept: Any, keys: Path, folder: Path, action: str, tasks: tuple[str, ...], **changes: Any) -> str:
    """A copy of a run from which tasks are taken out, checked against the run that never had them."""
    shutil.copytree(kept(**changes), folder)
    name = ask(folder, keys, action, *tasks)
    finish(folder, keys, name)
    control = kept(tasks, **changes)
    assert adapters(folder) == adapters(control) != adapters(kept(**changes))
    states = [load_latest(one)[0] for one in (folder, control)]
    assert states[0]
    assert states[1]
    assert states[0].round == states[1].round
    assert states[0].ledger.head == states[1].ledger.head
    assert states[0].participation == states[1].participation
    assert states[0].last == states[1].last
    assert states[0].stream
    assert states[1].stream
    assert states[0].stream.freezes == states[1].stream.freezes
    assert states[0].stream.scores.rows[-1] == states[1].stream.scores.rows[-1]
    assert [row["round"] for row in read_lines(folder / "metrics.jsonl")] == [
        row["round"] for row in read_lines(control / "metrics.jsonl")
    ]
    assert not any(task in (folder / "metrics.jsonl").read_text() for task in tasks)
    assert verify_certificate(folder, name, authorised([keys])) == []
    assert not any("has no row" in gap for gap in read_provenance(folder).gaps)
    launch.resume(folder, quiet)  # it is a finished run, and stays one
    return str(find_request(folder, name).level)


@pytest.mark.parametrize(
    ("action", "tasks", "changes"),
    [
        ("rollback", ("task2",), {}),
        pytest.param("replay", ("task2",), {}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task3",), {"rounds": 2}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task1",), {"rule": "fedit"}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task2",), {"rule": "fedit", "rounds": 2}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task1", "task3"), {}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task2",), {"merge": "mean"}, marks=pytest.mark.slow),
        pytest.param("rollback", ("task2",), ISOLATED, marks=pytest.mark.slow),
        pytest.param("rollback", ("task2",), {"replay": {"rows": 8}}, marks=pytest.mark.slow),
        ("drop", ("task3",), {}),
        pytest.param("drop", ("task2", "task3"), {"rule": "fedit"}, marks=pytest.mark.slow),
        pytest.param("drop", ("task3",), {"merge": "mean"}, marks=pytest.mark.slow),
        pytest.param("drop", ("task3",), {"freeze": "never"}, marks=pytest.mark.slow),
        ("drop", ("task2",), ISOLATED),
        pytest.param("drop", ("task1",), {**ISOLATED, "rule": "fedsb"}, marks=pytest.mark.slow),
        pytest.param("drop", ("task1", "task3"), {**ISOLATED, "rule": "fedit", "rounds": 2}, marks=pytest.mark.slow),
        pytest.param("drop", ("task2",), {**ISOLATED, "routing": "prototype"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_left_is_the_run_that_never_had_the_task(
    kept: Any, keys: Path, tmp_path: Path, action: str, tasks: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert taken_out(kept, keys, tmp_path / "run", action, tasks, **changes) == "E1"


def test_dropping_isolated_tasks_leaves_the_others_as_they_were(kept: Any) -> None:
    # they share the bare base alone: neither a seed nor the learning rate of a later one depends on the task
    before, control = adapters(kept(**ISOLATED)), adapters(kept(("task2",), **ISOLATED))
    gone = {"adapter/task2/adapter_model.safetensors"}
    assert before.keys() - control.keys() == gone
    assert {path: before[path] for path in control} == control


@pytest.mark.slow
def test_a_client_can_go_after_a_task_has_gone(kept: Any, keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(kept(("task2",)), folder)
    target = read_lines(folder / "metrics.jsonl")[-1]["selected"][0]
    plan = plan_rollback(folder, [target])
    assert plan.unplayed == (2,)
    assert (
        plan.cost == len([row for row in read_lines(folder / "metrics.jsonl") if row["round"] > (plan.start or 0)]) / 2
    )
    replay(folder, plan, tmp_path / "replay", quiet)
    control = without(stream_of(tmp_path / "control"), [target], tasks=("task2",))
    launch.run(control, quiet)
    assert adapters(tmp_path / "replay") == adapters(tmp_path / "control")


def test_a_task_that_others_build_on_is_not_dropped(kept: Any, keys: Path, tmp_path: Path) -> None:
    shutil.copytree(kept(), tmp_path / "run")
    name = ask(tmp_path / "run", keys, "drop", "task1")
    with pytest.raises(UnlearningError, match="task2, task3 build on task1; use rollback, which replays what comes"):
        finish(tmp_path / "run", keys, name)
    assert adapters(tmp_path / "run") == adapters(kept())
    told = estimates(kept(), Request("task", ("task3",)), plan_rollback(kept(), tasks=("task3",)))
    assert [(one.action, one.level, round(one.cost or 0, 2)) for one in told] == [
        *(("drop", "E1", 0.0), ("rollback", "E1", 0.5), ("replay", "E1", 1.0))
    ]


def test_selection_with_a_memory_ties_isolated_tasks_together(tmp_path: Path) -> None:
    config = stream_of(tmp_path / "run", **ISOLATED)
    clients = config.clients.model_copy(update={"selection": "round_robin"})
    launch.run(config.model_copy(update={"clients": clients}), quiet)
    plan = plan_rollback(tmp_path / "run", tasks=("task2",))
    told = {one.action: one for one in estimates(tmp_path / "run", Request("task", ("task2",)), plan)}
    assert told["drop"].reason.startswith("task3 builds on task2")
    assert told["rollback"].level == "E1"


def test_what_no_run_can_do_without_or_does_not_have_is_refused(kept: Any, keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(kept(("task2",)), folder)

    def refused(*words: str) -> str:
        common = ["--key", str(keys / "officer"), "--authorised", str(keys)]
        return str(CliRunner().invoke(app, ["unlearn", "run", str(folder), *words, *common]).exception)

    assert "unknown task tesk1; did you mean task1" in refused("--task", "tesk1")
    assert "task task2 is left out of the run already" in refused("--task", "task2")
    assert "it would leave no tasks" in refused("--task", "task1", "--task", "task3")
    assert "one kind of --client c7" in refused("--task", "task1", "--client", "c0")
    finish(folder, keys, ask(folder, keys, "drop", "task3"))
    assert "task task3 was already erased by R4 (level E1)" in refused("--task", "task3", "--now")
    assert "it would leave no tasks" in refused("--task", "task1")
    assert list(adapters(folder)) == ["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order": "shuffled"}, "with order its rows are trained on in rounds of other tasks too"),
        ({"stagger": 1}, "with stagger its rows"),
        ({"blur": 0.2}, "with blur its rows"),
        ({"joint": True, "freeze": "never"}, "with joint its rows"),
    ],
    ids=str,
)
def test_where_the_rows_of_tasks_are_mixed_a_task_has_no_rounds_to_leave_out(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        without(stream_of(Path("run"), **changes), tasks=("task2",))


def test_a_stream_that_is_not_finished_goes_on_without_the_task(kept: Any, keys: Path, tmp_path: Path) -> None:
    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed" and fields["round"] == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        launch.run(stream_of(folder), stop)
    with pytest.raises(UnlearningError, match="is not finished; let it end, or use rollback"):
        finish(folder, keys, ask(folder, keys, "drop", "task2"))
    finish(folder, keys, ask(folder, keys, "rollback", "task2"))
    assert find_request(folder, "R2").facts["executed"]["goes_on_from"] == 1
    launch.resume(folder, quiet)
    assert adapters(folder) == adapters(kept(("task2",)))


@pytest.mark.slow
def test_a_task_that_ended_early_leaves_a_doubt_where_later_ones_stay_as_they_were(
    kept: Any, keys: Path, tmp_path: Path
) -> None:
    stop = {"published": {"mean_threshold": 99.0, "variance_threshold": 99.0, "window": 2}}
    changes: dict[str, Any] = {**ISOLATED, "rounds": 4, "until": stop}
    assert read_json(kept(**changes) / "summary.json")["rounds"] < 12
    assert taken_out(kept, keys, tmp_path / "replayed", "rollback", ("task2",), **changes) == "E1"
    shutil.copytree(kept(**changes), tmp_path / "run")
    name = ask(tmp_path / "run", keys, "drop", "task2")
    finish(tmp_path / "run", keys, name)
    assert find_request(tmp_path / "run", name).level == "E2"
    told = read_json(tmp_path / "run" / "unlearning" / f"{name}.json")["statement"]["residual_risk"]
    assert "task2 ended early, and a run without it leaves out all the rounds that it may take" in told


def _killed(folder: str, keys: str, name: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    finish(Path(folder), Path(keys), name)


@pytest.mark.parametrize(
    "place",
    [
        "finish.exported:2",
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in ("commit.renamed:2", "request.executed:1", "publish.moved.checkpoints:0")
        ),
    ],
)
def test_kill_9_in_the_middle_of_a_drop_then_the_same_command_ends_the_same(
    kept: Any, keys: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(kept(), folder)
    name = ask(folder, keys, "drop", "task3", now=True)
    process = get_context("spawn").Process(target=_killed, args=(str(folder), str(keys), name, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert ask(folder, keys, "drop", "task3", now=True) == name
    finish(folder, keys, name)
    assert adapters(folder) == adapters(kept(("task3",)))
    assert verify_certificate(folder, name, authorised([keys])) == []
    assert not (folder / "unlearning" / name).exists()
