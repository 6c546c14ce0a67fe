"""Approximate actions from the command to the certificate: what the gate behind them lets pass, and what not."""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedlora.config import parse_config
from fedlora.plugins import unload_plugins
from fedlora.unlearning.keys import new_key
from fedlora.unlearning.request import Request
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.stores.files import read_config, read_json, write_atomic
from orchestrator.unlearning.amend import longer
from orchestrator.unlearning.controls import train_controls
from orchestrator.unlearning.gate import look_again
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.requests import find_request
from orchestrator.unlearning.rollback import plan_for, without
from tests.conftest import quiet
from tests.unlearning.test_rollback import adapter_of, config_of

PLUGIN = str(Path(__file__).with_name("tampering.py"))


@pytest.fixture(autouse=True)
def _plugged() -> Iterator[None]:
    yield
    unload_plugins()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "officer")
    return tmp_path / "keys"


def call(command: str, run: Path, keys: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["unlearn", command, str(run), "--authorised", str(keys), *words])


def unlearn(run: Path, keys: Path, action: str, *words: str, client: str = "c0") -> Result:
    key = str(keys / "officer")
    return call("run", run, keys, "--client", client, "--key", key, "--action", action, "--json", *words)


# A run that knows the rows of one client by heart ------------------------------------------------------------------


def write_rows(folder: Path) -> dict[str, str]:
    """c0 has rows whose labels follow from nothing; the others' first letter gives the label, or they are ambiguous, so
    that a model which saw none of c0's rows knows that it knows nothing of them."""
    draw = random.Random(0)

    def word(length: int) -> str:
        return "".join(draw.choice("defghijklmnopqrstuvwxyz") for _ in range(length))

    def noise(count: int) -> list[tuple[str, str]]:
        return [(word(6), "abc"[i % 3]) for i in range(count)]

    def known(count: int) -> list[tuple[str, str]]:
        return [("ABC"[i % 3] + word(5), "abc"[i % 3]) for i in range(count)]

    def unsure(count: int) -> list[tuple[str, str]]:
        return [(text, label) for text in (word(6) for _ in range(count)) for label in "abc"]

    rows = {"c0": noise(60), "c1": known(48) + unsure(24), "c2": known(48) + unsure(24), "test": known(30) + noise(60)}
    folder.mkdir()
    for name, own in rows.items():
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in own]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run, and a folder with its two controls for c0, which are the same for every action."""
    place = tmp_path_factory.mktemp("memorised")
    files = write_rows(place / "rows")
    test = files.pop("test")
    content: dict[str, Any] = {
        "model": {"name": "builtin:tiny-bert"},
        "data": {"client_files": files, "test_file": test, "max_length": 16, "client_holdout": 0.5},
        "strategy": "fedit",
        "weighting": "uniform",
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["value", "dense"]},
        "training": {"learning_rate": 0.01, "max_steps": 20, "per_device_train_batch_size": 48},
        "rounds": 6,
        "threads": 1,
        "plugins": [PLUGIN],
        "output_dir": str(place / "run"),
    }
    config = parse_config(content)
    launch.run(config, quiet)
    plan = plan_for(place / "run", Request("client", ("c0",)))
    job = Job(place / "run", "R0", None, quiet)  # type: ignore[arg-type]
    write_atomic(job.work / "config.yaml", longer(config, plan, 0).to_yaml())
    controls = place / "controls"
    train_controls(job, plan)
    shutil.rmtree(job.work)
    job.space.rename(controls)
    unload_plugins()
    return place / "run", controls


def summary_of(memorised: tuple[Path, Path], control: int) -> str:
    sha256: str = read_json(memorised[1] / f"control-{control}" / "summary.json")["adapter_sha256"]
    return sha256


@pytest.fixture
def run(memorised: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run; its controls are there as if an attempt had been stopped after them."""
    folder = tmp_path / "run"
    shutil.copytree(memorised[0], folder)
    moved = read_config(folder).model_copy(update={"output_dir": str(folder)})
    write_atomic(folder / "config.yaml", moved.to_yaml())
    shutil.copytree(memorised[1], folder / "unlearning" / "R1")
    return folder


REJECTED = {
    "nothing": ("forget.loss: ", "it still knows rows it was to forget", "relearning.steps"),
    "unbounded": ("forget.loss: ", "over-forgetting: it knows less of the rows", "what was to be kept got worse"),
    "muted": ("1 of 20 checks failed: relearning.steps: 4 steps", "come back too fast: they are still in the weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize("action", REJECTED)
def test_what_only_seems_to_forget_is_refused_with_the_reason_and_the_run_is_as_it_was(
    run: Path, keys: Path, action: str
) -> None:
    before = adapter_of(run)
    result = unlearn(run, keys, action)
    told = str(result.exception)
    assert f"R1 is refused, and the run is as it was: the gate rejects what {action} made; " in told
    for part in REJECTED[action]:
        assert part in told
    assert adapter_of(run) == before
    assert read_config(run).clients.exclude == []
    assert find_request(run, "R1").phase == "refused"
    assert sorted(path.name for path in (run / "unlearning").iterdir()) == [".lock", "requests.jsonl"]


@pytest.mark.slow
def test_an_honest_replay_with_other_draws_passes_and_goes_on_being_watched(
    run: Path, memorised: tuple[Path, Path], keys: Path
) -> None:
    controls = [summary_of(memorised, number) for number in (1, 2)]
    planned = CliRunner().invoke(app, ["unlearn", "plan", str(run), "--client", "c0"]).output
    assert "at level A a gate trains two controls without the target besides, which costs 200 % more" in planned
    knowing = run.with_name("knowing")
    shutil.copytree(run / "checkpoints", knowing)
    assert unlearn(run, keys, "honest").exit_code == 0
    statement = read_json(run / "unlearning" / "R1.json")["statement"]
    verdict = statement["verdict"]
    assert (statement["level"]["code"], verdict["by"], verdict["passed"]) == ("A", "gate", True)
    assert (verdict["controls"], verdict["rows"]["forget"]) == (controls, 30)
    assert any("traces that none of them looks for" in risk for risk in statement["residual_risk"])
    page = (run / "unlearning" / "R1.html").read_text()
    for check in verdict["checks"]:
        assert f"<td>{check['name']}</td>" in page
    assert "checks reject the model as it was before" in page
    assert call("verify", run, keys, "--request", "R1").exit_code == 0
    watched = call("verify", run, keys, "--request", "R1", "--gate")
    assert (watched.exit_code, watched.output) == (
        0,
        "R1: the run still passes all 19 checks after round 6 (it passed after round 6)\n",
    )
    # what knew the rows comes back
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(knowing, run / "checkpoints")
    again = call("verify", run, keys, "--request", "R1", "--gate")
    assert again.exit_code == 8
    assert "R1: the run does not pass any more after round 6 (it passed after round 6); 10 of 19 checks" in again.output
    assert "it still knows rows it was to forget" in again.output
    # and numbers that were made to fit are not believed
    path = run / "unlearning" / "R1.measured.json"
    path.write_text(path.read_text().replace('"losses": [', '"losses": [9.0, ', 1))
    assert "R1.measured.json was altered" in str(call("verify", run, keys, "--request", "R1", "--gate").exception)
    assert "R1.measured.json was altered" in call("verify", run, keys, "--request", "R1").output


@pytest.mark.slow
def test_retain_rows_of_who_leaves_later_do_not_count(run: Path, keys: Path) -> None:
    assert unlearn(run, keys, "honest").exit_code == 0
    before = look_again(run, "R1")
    assert unlearn(run, keys, "rollback", client="c2").exit_code == 0
    told = read_json(run / "unlearning" / "R2.json")["statement"]["residual_risk"]
    assert any(sentence.startswith("unlearning/R1.measured.json keeps the losses of rows") for sentence in told)
    found = look_again(run, "R1")
    assert before is not None
    assert found is not None
    sizes = [next(c.n for c in one.verdict.checks if c.name == "retain.loss") for one in (before, found)]
    assert sizes == [120, 60]
    result = call("verify", run, keys, "--request", "R2", "--gate")
    assert result.output == "R2: what is left never had the target, so there is nothing to measure\n"
    told = json.loads(call("verify", run, keys, "--request", "R1", "--gate", "--json").output)
    assert (told["request"], told["gate"]["round"], told["gate"]["passed"]) == ("R1", 6, found.verdict.passed)


@pytest.mark.slow
def test_what_was_measured_goes_when_the_same_client_is_erased(run: Path, keys: Path) -> None:
    assert unlearn(run, keys, "honest").exit_code == 0
    assert unlearn(run, keys, "rollback").exit_code == 0
    assert not (run / "unlearning" / "R1.measured.json").exists()
    statement = read_json(run / "unlearning" / "R2.json")["statement"]
    assert "unlearning/R1.measured.json" in statement["purged"]
    assert not any("measured.json" in sentence for sentence in statement["residual_risk"])
    for name in ("R1", "R2"):
        assert call("verify", run, keys, "--request", name).exit_code == 0


def _killed_in_the_second_control(run: str, keys: str) -> None:
    from orchestrator.console import JsonScreen

    heard = JsonScreen.__call__

    def hear(self: JsonScreen, event: str, fields: Any) -> None:
        if event == "unlearning" and fields["phase"] == "control 2 of 2 is trained":
            os.environ["FEDLORA_FAILPOINT"] = "round.aggregated:3"
        heard(self, event, fields)

    JsonScreen.__call__ = hear  # type: ignore[method-assign]
    unlearn(Path(run), Path(keys), "honest")


@pytest.mark.slow
def test_kill_9_in_the_second_control_then_the_same_command_ends_with_one_certificate(
    run: Path, memorised: tuple[Path, Path], keys: Path
) -> None:
    shutil.rmtree(run / "unlearning" / "R1" / "control-2")
    process = get_context("spawn").Process(target=_killed_in_the_second_control, args=(str(run), str(keys)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert find_request(run, "R1").phase == "executed"
    assert unlearn(run, keys, "honest").exit_code == 0
    controls = read_json(run / "unlearning" / "R1.json")["statement"]["verdict"]["controls"]
    assert controls[1] == summary_of(memorised, 2)
    assert call("verify", run, keys, "--request", "R1").exit_code == 0
    assert sorted(path.name for path in (run / "unlearning").iterdir()) == [
        *(".lock", "R1.html", "R1.json", "R1.measured.json", "requests.jsonl")
    ]


# Small runs --------------------------------------------------------------------------------------------------------


def small(folder: Path, **changes: Any) -> Path:
    launch.run(config_of(folder, plugins=[PLUGIN], **changes), quiet)
    return folder


def test_without_a_gate_it_is_called_suppression_and_nothing_is_claimed(tmp_path: Path, keys: Path) -> None:
    folder = small(tmp_path / "run")
    key = str(keys / "officer")
    words = ("--client", "c0", "--key", key, "--action", "nothing", "--option", "gate=false")
    result = call("run", folder, keys, *words)
    assert "R1: client c0 is suppressed, not erased: level S" in result.output
    statement = read_json(folder / "unlearning" / "R1.json")["statement"]
    assert statement["verdict"] == {"by": "nothing", "level": "S"}
    assert "No erasure" in statement["level"]["meaning"]
    assert any("This is suppression, not erasure." in risk for risk in statement["residual_risk"])
    watched = call("verify", folder, keys, "--request", "R1", "--gate")
    assert "R1 reached level S without a gate: no control was trained" in str(watched.exception)
    # its data is still there, and can be erased
    assert unlearn(folder, keys, "rollback").exit_code == 0
    assert find_request(folder, "R2").level == "E1"
    launch.run(without(config_of(tmp_path / "control", plugins=[PLUGIN]), ["c0"]), quiet)
    assert adapter_of(folder) == adapter_of(tmp_path / "control")


def test_too_few_rows_are_refused_before_anything_is_trained(tmp_path: Path, keys: Path) -> None:
    folder = small(tmp_path / "run", data__max_train_rows=60)
    told = str(unlearn(folder, keys, "nothing").exception)
    assert "R1 is refused: the gate needs 20 rows of each kind and finds " in told
    assert "rows to forget" in told
    assert "rollback erases without statistics, and --option gate=false leaves it at suppression" in told
    planned = CliRunner().invoke(app, ["unlearn", "plan", str(folder), "--client", "c0"])
    assert "the gate needs 20 rows" in planned.output
