"""What can be wrong with a stream: each is one sentence, and nothing of a run is lost by it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import CheckpointError, ConfigError, DataError, RunInterrupted
from orchestrator import cli, launch
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

Fedlora = Callable[..., tuple[int, str]]
STREAM: dict[str, Any] = {"split": 2, "rounds": 3, "freeze": {"period": {"rounds": 1}}}


def stream_of(folder: Path, **changes: Any) -> Any:
    continual = {**STREAM, **changes.pop("continual", {})}
    rounds = continual["rounds"] * continual.get("split", 2)
    return toy_config(folder, continual=continual, rounds=rounds, training__max_steps=1, **changes)


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedlora:
    """Exit code and error text of a command."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return int(stopped.value.code or 0), " ".join(errors.split())

    return call


# A run that was stopped after four rounds, each of which was frozen --------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def stop(event: str, fields: Any) -> None:
        if event == "round_committed" and fields["round"] == 4:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(RunInterrupted, match="4 of 6 rounds are committed"):
        launch.run(stream_of(folder), stop)
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run that nobody stopped."""
    return launch.run(stream_of(tmp_path_factory.mktemp("undisturbed") / "run"), quiet)


def contents(folder: Path) -> dict[str, bytes]:
    """Of everything that a run is made of."""
    parts = ("checkpoints", "ledger", "private", "config.yaml", "metrics.jsonl")
    files = [file for part in parts for file in (folder / part, *(folder / part).rglob("*")) if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


def removed(path: Path) -> None:
    path.unlink()


def altered(path: Path) -> None:
    """One bit, in the middle of the numbers: the length stays."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def swapped(path: Path) -> None:
    """Another merge of the same run under this one's name."""
    other = next(file for file in sorted(path.parent.iterdir()) if file != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [removed, altered, emptied, swapped])
def test_a_merge_that_is_not_there_as_it_was_is_named_and_the_refusal_touches_nothing(
    stopped: Path, fedlora: Fedlora, damage: Callable[[Path], None]
) -> None:
    state, _ = load_latest(stopped)
    assert state is not None
    assert [entry.kind for entry in state.ledger.entries] == ["merge"] * 4
    first = stopped / "ledger" / f"{state.ledger.entries[0].payload_sha256}.safetensors"
    damage(first)
    damaged = contents(stopped)
    code, message = fedlora("resume", stopped)
    assert code == CheckpointError.exit_code
    assert first.name in message
    assert ("cannot be read" if damage is removed else "is truncated or altered") in message
    assert contents(stopped) == damaged


@pytest.mark.slow
def test_once_the_file_is_back_the_run_ends_as_if_nothing_had_been(
    stopped: Path, undisturbed: dict[str, Any], fedlora: Fedlora
) -> None:
    ledger = stopped / "ledger"
    ledger.rename(stopped / "elsewhere")
    assert fedlora("resume", stopped)[0] == CheckpointError.exit_code
    (stopped / "elsewhere").rename(ledger)
    summary = launch.resume(stopped, quiet)
    assert summary["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert summary["stream"] == undisturbed["stream"]


def test_only_the_last_merge_damaged_costs_the_round_that_made_it(stopped: Path, undisturbed: dict[str, Any]) -> None:
    state, _ = load_latest(stopped)
    assert state is not None
    last = state.ledger.entries[-1].payload_sha256
    altered(stopped / "ledger" / f"{last}.safetensors")
    heard: list[tuple[str, Any]] = []
    summary = launch.resume(stopped, lambda event, fields: heard.append((event, fields)))
    (said,) = [fields for event, fields in heard if event == "checkpoint_damaged"]
    assert said["round"] == 3
    assert last in said["reason"]
    assert summary["adapter_sha256"] == undisturbed["adapter_sha256"]


def test_a_merge_whose_note_was_edited_is_not_believed(stopped: Path, fedlora: Fedlora) -> None:
    for state in (stopped / "checkpoints").glob("round-*/state.json"):
        note = json.loads(state.read_text())
        note["ledger"][0]["provenance"]["task"] = 1
        state.write_text(json.dumps(note))
    code, message = fedlora("resume", stopped)
    assert code == CheckpointError.exit_code
    assert "state.json is truncated or altered" in message


# Names and numbers that cannot be meant -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continual": {"freeze": "boundary"}}, "continual policy: boundary is not known; did you mean boundaries"),
        ({"continual": {"freeze": {"plateu": {}}}}, "plateu is not known; did you mean plateau"),
        ({"continual": {"freeze": {"period": {}}}}, "period"),
        ({"continual": {"freeze": {"period": None, "plateau": None}}}, "freeze"),
        ({"strategy": ["olora", "flexlora"]}, "wrapper: olora is not known; did you mean o_lora"),
        ({"strategy": [{"o_lora": {"wieght": 1}}, "flexlora"]}, "wieght"),
        ({"strategy": [{"o_lora": {"weight": -1}}, "flexlora"]}, "o_lora.weight must be at least 0, not -1"),
    ],
)
def test_a_name_nobody_knows_is_refused_before_a_folder_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        launch.run(stream_of(tmp_path / "run", **changes), quiet)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("continual", "message"),
    [
        ({"scenario": "clas"}, "continual.scenario"),
        ({"order": "random"}, "continual.order"),
        ({"loss_labels": "seen"}, "continual.loss_labels"),
        ({"blur": 0.9}, "continual.blur"),
        ({"stagger": -1}, "continual.stagger"),
        ({"replay": {"size": 5}, "loss_labels": "met"}, "continual.replay.size is not a key"),
    ],
)
def test_a_value_that_is_not_one_of_the_choices_names_its_key(
    tmp_path: Path, continual: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stream_of(tmp_path / "run", continual=continual)


@pytest.mark.parametrize(
    ("continual", "message"),
    [
        ({"split": 9}, "4 labels cannot make 9 tasks"),
        (
            {"split": None, "tasks": [{"name": "a", "labels": ["colours"]}, {"name": "b"}]},
            "the label 'colours' is in a and in b",
        ),
        (
            {"split": None, "tasks": [{"name": "a"}, {"name": "b", "where": {"label": ["none of these"]}}]},
            "no client has rows of task b",
        ),
    ],
)
def test_tasks_that_cannot_be_cut_from_the_data_are_one_sentence_at_the_command_line(
    tmp_path: Path, fedlora: Fedlora, continual: dict[str, Any], message: str
) -> None:
    path = tmp_path / "c.yaml"
    changed = {key: value for key, value in {**STREAM, **continual}.items() if value is not None}
    rounds = STREAM["rounds"] * len(changed.get("tasks", range(changed.get("split", 0))))
    path.write_text(toy_config(tmp_path / "run", continual=changed, rounds=rounds).to_yaml())
    code, said = fedlora("run", path)
    assert code == DataError.exit_code
    assert message in said
    assert not (tmp_path / "run" / "checkpoints").exists()


# A plateau that never comes ------------------------------------------------------------------------------------------


def test_a_plateau_that_never_comes_is_bounded_and_every_record_says_by_what(tmp_path: Path) -> None:
    # six rounds of a loss that is still falling: fewer than the eight that a plateau takes at least
    config = stream_of(tmp_path / "run", continual={"freeze": {"plateau": {"max_rounds": 4}}})
    summary = launch.run(config, quiet)
    assert summary["stream"]["freezes"] == [4]
    folder = Path(config.output_dir)
    (event,) = [line for line in read_lines(folder / "journal.jsonl") if line["event"] == "frozen"]
    assert event["evidence"]["reason"] == "bounded by max_rounds"
    reasons = [row["stream"]["evidence"].get("reason") for row in read_lines(folder / "metrics.jsonl")]
    assert reasons == [None, None, None, "bounded by max_rounds", None, None]
    state, _ = load_latest(folder)
    assert state is not None
    assert state.ledger.entries[0].provenance["why"]["reason"] == "bounded by max_rounds"
    assert read_json(folder / "summary.json")["status"] == "finished"


def test_without_a_bound_a_plateau_that_never_comes_leaves_one_adapter_for_the_whole_stream(tmp_path: Path) -> None:
    config = stream_of(tmp_path / "run", continual={"freeze": {"plateau": {"max_rounds": None}}})
    summary = launch.run(config, quiet)
    assert summary["stream"]["freezes"] == []
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert state.ledger.entries == ()
