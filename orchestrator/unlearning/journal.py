"""What the journal of a run hears of a request: how the replay was played, line by line, and that it took its place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator import launch
from orchestrator.failpoints import reach
from orchestrator.stores.files import JsonLines, read_lines

UNLEARNED = "unlearned"


def take_over(folder: Path, work: Path, request: str) -> None:
    """Append the journal of ``work``, which is about to take the place of the run, to that of the run.

    Which machine played the rounds that are kept, and which updates were late, is known from there only. Every line
    gets the ``request`` and keeps its time. Stopped anywhere and called again, each is there once.
    """
    lines = read_lines(work / "journal.jsonl")
    with closing(JsonLines(folder / "journal.jsonl")) as journal:  # which cuts off a torn line
        done = sum(_is_of(line, request) and line["event"] != UNLEARNED for line in read_lines(journal.path))
        for number, line in enumerate(lines[done:], done + 1):
            journal.append(line | {"request": request})
            reach("journal.taken", number)


def note_unlearned(folder: Path, request: str, told: Mapping[str, Any]) -> None:
    """Say that a request has changed the run, once however often it is called."""
    with closing(JsonLines(folder / "journal.jsonl")) as journal:
        if not any(_is_of(line, request) and line["event"] == UNLEARNED for line in read_lines(journal.path)):
            journal.append(launch.stamped(UNLEARNED, {"request": request, **told}))
    reach("journal.told", 0)


def _is_of(line: Mapping[str, Any], request: str) -> bool:
    return line.get("request") == request
