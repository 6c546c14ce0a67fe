"""Checkpoints: what is written comes back; what is damaged is never believed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.adapter.initial import initial_adapter
from fedlora.errors import CheckpointError
from orchestrator.checkpoint import commit, load, load_latest
from orchestrator.state import RunState, Totals


def state(round: int = 1) -> RunState:
    adapter = initial_adapter({"a.b": (6, 5)}, {"head": torch.ones(2)}, 2, round)
    memory = {"momentum": {"a.b": torch.arange(3.0)}, "step": 7, "beta": 0.9, "name": "x"}
    row = {"round": round, "eval": {"loss": 1.0}}
    return RunState(round, adapter, memory, "c", "b", Totals(1, 2, 3, 4.5, {"train": 1.0}), row=row)


def same(left: RunState, right: RunState) -> bool:
    tensors = (left.adapter.tensors(), right.adapter.tensors())
    return (
        all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
        and torch.equal(left.strategy["momentum"]["a.b"], right.strategy["momentum"]["a.b"])  # type: ignore[index]
        and {k: v for k, v in left.strategy.items() if k != "momentum"}
        == {k: v for k, v in right.strategy.items() if k != "momentum"}
        and (left.totals, left.row, left.round) == (right.totals, right.row, right.round)
    )


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    commit(tmp_path, state(), keep=2)
    loaded, problems = load_latest(tmp_path)
    assert loaded is not None
    assert same(loaded, state())
    assert problems == []


def test_a_strategy_may_keep_tensors_of_the_adapter_under_any_key(tmp_path: Path) -> None:
    start = state()
    shared = next(iter(start.adapter.tensors().values()))
    memory = {"a/b": shared, "a": {"b": torch.ones(1)}}
    commit(tmp_path, replace(start, strategy=memory), keep=1)
    loaded, _ = load_latest(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.strategy["a/b"], shared)  # type: ignore[arg-type]
    assert torch.equal(loaded.strategy["a"]["b"], torch.ones(1))  # type: ignore[index]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for number in range(1, 6):
        commit(tmp_path, state(number), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["round-0004", "round-0005"]


def test_rounds_beyond_9999_stay_in_order(tmp_path: Path) -> None:
    for number in (9999, 10000):
        commit(tmp_path, state(number), keep=2)
    loaded, _ = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.round == 10000


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "bit flipped", "missing"])
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for number in (1, 2):
        commit(tmp_path, state(number), keep=2)
    damage(tmp_path / "checkpoints" / "round-0002" / name)
    loaded, problems = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.round == 1
    assert len(problems) == 1
    assert "round-0002" in problems[0]


def test_a_swapped_checkpoint_is_noticed(tmp_path: Path) -> None:
    commit(tmp_path, state(1), keep=2)
    folder = tmp_path / "checkpoints"
    (folder / "round-0001").rename(folder / "round-0008")
    with pytest.raises(CheckpointError, match="holds round 1; it was renamed or swapped"):
        load(folder / "round-0008")


def test_no_usable_checkpoint_is_an_error_and_never_a_silent_new_start(tmp_path: Path) -> None:
    commit(tmp_path, state(1), keep=2)
    truncate(tmp_path / "checkpoints" / "round-0001" / "state.json")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load_latest(tmp_path)


def test_a_checkpoint_from_a_newer_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.state.SCHEMA", 99)
    commit(tmp_path, state(1), keep=2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"schema 99, this version of fedlora reads 6"):
        load(tmp_path / "checkpoints" / "round-0001")


def test_leftovers_of_a_crash_are_swept_and_a_damaged_round_can_be_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".round-0001.123").mkdir(parents=True)
    (folder / "round-0001").mkdir()
    commit(tmp_path, state(1), keep=2)
    assert [p.name for p in folder.iterdir()] == ["round-0001"]
    assert same(load(folder / "round-0001"), state(1))


def test_the_note_is_plain_json_and_the_tensors_are_safetensors(tmp_path: Path) -> None:
    commit(tmp_path, replace(state(1), strategy={}), keep=1)
    folder = tmp_path / "checkpoints" / "round-0001"
    assert json.loads((folder / "state.json").read_text())["schema"] == 6
    assert {p.name for p in folder.iterdir()} == {"state.json", "tensors.safetensors", "manifest.json"}
