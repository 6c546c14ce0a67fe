"""What a run folder tells of who took part and what was kept, and what it does not tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.errors import CheckpointError
from orchestrator.checkpoint import checkpoints, read_note
from orchestrator.stores.files import read_config, read_json, read_lines


@dataclass(frozen=True)
class Traces:
    """What a folder tells.

    Attributes:
        rows: of metrics.jsonl by round, every round from the first; without a row, everybody is taken to have been in.
        missing: rounds that have no row.
        staleness: of updates that were not of their round, by round and client.
        notes: of every sound checkpoint by round.
        ledger: notes of the entries, in order.
        freezes: rounds after which the adapter went into the base.
    """

    folder: Path
    config: RunConfig
    clients: Sequence[str]
    course: Course | None
    rows: Mapping[int, Mapping[str, Any]]
    missing: Sequence[int]
    staleness: Mapping[tuple[int, str], int]
    notes: Mapping[int, Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]
    freezes: frozenset[int]

    @property
    def last(self) -> int:
        """The last committed round."""
        return max(self.rows, default=0)

    @property
    def isolated(self) -> bool:
        """Whether every task has an adapter of its own."""
        return bool(self.config.continual and self.config.continual.isolated)

    def entries(self, up_to: int) -> list[int]:
        """Places of the ledger entries that the model after a round is made of."""
        known = [place for place, entry in enumerate(self.ledger) if entry["provenance"]["round"] <= up_to]
        first = max((place for place in known if self.ledger[place]["replaces"]), default=0)
        return [place for place in known if place >= first and self.ledger[place]["kind"] != "task"]


def read_traces(folder: Path) -> tuple[Traces, list[str]]:
    """What a folder tells, and a sentence for every checkpoint that is damaged."""
    config = read_config(folder)
    journal = read_lines(folder / "journal.jsonl")
    notes: dict[int, dict[str, Any]] = {}
    damage = []
    for path in checkpoints(folder):
        try:
            notes[int(path.name.removeprefix("round-"))] = read_note(path)
        except CheckpointError as error:
            damage.append(f"{error}; what is in it is not known, and it has to be removed with the rest")
    newest = notes[max(notes)] if notes else {}
    rows = {row["round"]: row for row in read_lines(folder / "metrics.jsonl")}
    if newest.get("row"):
        rows.setdefault(newest["round"], newest["row"])  # a crash fell between the commit and the log
    members = folder / "partition.json"
    clients = [member["client"] for member in read_json(members)] if members.exists() else []
    clients = list(dict.fromkeys([*clients, *(name for row in rows.values() for name in row["selected"])]))
    stream = newest.get("stream") or {}
    course = (
        Course.of(config.continual, config.seed).after(tuple(stream.get("ended", ()))) if config.continual else None
    )
    skipped = course.skipped if course else frozenset()
    numbers = [number for number in range(1, max([*rows, *notes], default=0) + 1) if number not in skipped]
    everybody = {"selected": clients, "admitted": clients}
    admitted = [line for line in journal if line["event"] == "update_admitted"]
    ages = {
        (line["round"], line["client"]): line.get("staleness", 0) for line in admitted
    }  # of a repeated round, the last
    told = [line["round"] for line in journal if line["event"] == "frozen"]
    traces = Traces(
        folder=folder,
        config=config,
        clients=clients,
        course=course,
        rows={number: rows.get(number, everybody) for number in numbers},
        missing=[number for number in numbers if number not in rows],
        staleness={key: age for key, age in ages.items() if age},
        notes=notes,
        ledger=newest.get("ledger", []),
        freezes=frozenset(stream.get("freezes", told)),
    )
    return traces, damage


def gaps(traces: Traces) -> Iterator[str]:
    """What somebody who wants to take something out would like to know and cannot."""
    if traces.missing:
        yield f"metrics.jsonl has no row for {rounds_in_words(traces.missing)}: everybody is taken to have been in"
    if pruned := [number for number in (0, *traces.rows) if number not in traces.notes]:
        yield (
            f"no checkpoint is left of {rounds_in_words(pruned)} (keep_checkpoints: {traces.config.keep_checkpoints}):"
            " a replay cannot begin there"
        )
    if not traces.notes and traces.rows:
        yield "no checkpoint can be read: what the strategy keeps and what each ledger entry came from is not known"
    for number, row in traces.rows.items():
        late = sum(count for age, count in (row.get("staleness") or {}).items() if age != "0")
        if late > sum(1 for round, _ in traces.staleness if round == number):
            yield f"journal.jsonl does not say which updates of round {number} were late: all are taken for timely"
    named = {f"{entry['payload']}.safetensors" for entry in traces.ledger}
    strange = [path.name for path in (traces.folder / "ledger").glob("*") if path.name not in named]
    if strange:
        yield f"ledger/ holds {len(strange)} files that no checkpoint names, such as {strange[0]}: whose is not known"


def rounds_in_words(numbers: Sequence[int]) -> str:
    """Rounds in words: ``rounds 0 to 3, 7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    shown = [str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
    return f"round{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"
