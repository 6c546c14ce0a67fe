"""What a run's journal hears of a request."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from orchestrator.stores.files import read_lines
from orchestrator.unlearning.journal import note_unlearned, take_over

REPLAYED = [
    {"event": "run_opened", "cpu": "other"},
    {"event": "worker_ready"},
    {"event": "round_committed", "round": 1},
]


def _hear(run: Path, replay: Path, place: str = "") -> None:
    if place:
        os.environ["FEDLORA_FAILPOINT"] = place
    take_over(run, replay, "R1")
    note_unlearned(run, "R1", {"level": "E1"})


@pytest.mark.parametrize("place", ["journal.taken:1", "journal.taken:3", "journal.told:0"])
def test_every_line_of_a_replay_is_there_once_wherever_a_kill_9_falls(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in REPLAYED))
    before = read_lines(run / "journal.jsonl")
    process = multiprocessing.get_context("fork").Process(target=_hear, args=(run, tmp_path / "replay", place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _hear(run, tmp_path / "replay")
    _hear(run, tmp_path / "gone")  # published by then
    *lines, last = read_lines(run / "journal.jsonl")
    assert lines == [*before, *(line | {"request": "R1"} for line in REPLAYED)]
    assert (last["event"], last["request"], last["level"]) == ("unlearned", "R1", "E1")
