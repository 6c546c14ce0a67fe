"""A log whose every record holds the SHA-256 of the one before, and its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.unlearning.canonical import canonical, digest


@dataclass(frozen=True)
class Chain:
    """A log as it was read.

    Attributes:
        records: those that can be read, in order.
        problems: a sentence per line that is not what was written, with its number.
        whole: bytes that count; what follows was torn by a crash and never written.
    """

    records: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    whole: int

    @property
    def head(self) -> str:
        """SHA-256 of the last record; ``""`` for an empty log."""
        return self.records[-1]["sha256"] if self.records else ""


def link(previous: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The record with this content that follows the one of that SHA-256."""
    record = {**content, "previous": previous}
    return {**record, "sha256": digest(record)}


def read_chain(data: bytes, start: str) -> Chain:
    """Read and check a log.

    A crash while the last line was written leaves the beginning of one: it does not count. A last line that only lacks
    its end counts. Anything else that is not as it was written is a problem.

    Args:
        data: the whole file, one canonical record a line.
        start: what the first record must give as the one before.
    """
    *lines, tail = data.split(b"\n")
    whole = len(data) - len(tail)
    problems = []
    if tail and _begins_whole(tail):  # the crash took the line's end only, or somebody wrote behind it
        lines.append(tail)
        whole = len(data)
    records: list[Mapping[str, Any]] = []
    previous: str | None = start
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            problems.append(f"line {number} is altered: it is not a record whose SHA-256 it holds")
            previous = None  # whether the next one follows cannot be told
            continue
        if previous is not None and record["previous"] != previous:
            before = f"line {number - 1}" if number > 1 else "this run"
            problems.append(f"line {number} does not follow {before}: a line was removed, added, moved or replaced")
        records.append(record)
        previous = record["sha256"]
    return Chain(tuple(records), tuple(problems), whole)


def _begins_whole(tail: bytes) -> bool:
    try:
        json.JSONDecoder().raw_decode(tail.decode("ascii", "replace"))
    except ValueError:
        return False
    return True


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        content = {key: value for key, value in record.items() if key != "sha256"}
        sound = canonical(record) == line and record["sha256"] == digest(content) and "previous" in content
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None
    return record if sound else None
