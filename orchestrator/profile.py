"""Where the time of a run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError
from orchestrator.stores.files import read_json, read_lines

_WORK = ("load", "tokenise", "train", "evaluate", "adapters")  # of workers, see ``WorkerStats``
_ORDER = ("start", *_WORK[:3], "adapters", "aggregate", "transport and waiting", "evaluate", "commit", "finish")


@dataclass(frozen=True)
class Profile:
    """Wall time of a run's last session.

    Attributes:
        wall_s: from opening the run to its summary.
        phases: seconds of each; they sum to ``wall_s``. What workers do side by side is divided by their number.
        workers, rounds: in that session.
    """

    wall_s: float
    phases: Mapping[str, float]
    workers: int
    rounds: int

    @property
    def overhead(self) -> float:
        """Share of the workers' time in which they neither trained nor scored."""
        return 1 - (self.phases["train"] + self.phases["evaluate"]) / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        phases = {name: round(value, 3) for name, value in self.phases.items()}
        told = {"wall_s": round(self.wall_s, 3), "workers": self.workers, "rounds": self.rounds}
        return {**told, "phases": phases, "overhead": round(self.overhead, 4)}

    def to_text(self) -> str:
        """A table, a line per phase."""
        lines = [f"{'phase':<22}{'seconds':>9}{'share':>8}"]
        for name in _ORDER:
            seconds = self.phases[name]
            lines.append(f"{name:<22}{seconds:>9.1f}{seconds / self.wall_s if self.wall_s else 0:>8.1%}")
        lines.append(f"{'wall time':<22}{self.wall_s:>9.1f}")
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        lines.append(
            f"{self.rounds} rounds on {workers}; {self.overhead:.1%} of the time went neither into training nor scoring"
        )
        return "\n".join(lines)


def profile(folder: Path) -> Profile:
    """Where the time of a finished run went; of its last session, where it was resumed.

    Raises:
        RunFolderError: not a run folder, or not finished.
    """
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    if summary.get("status") != "finished":
        raise RunFolderError(f"{folder} is not a finished run; its time is known once it has ended")
    if summary.get("shards"):
        raise RunFolderError(f"{folder} is made of shards; look at one of them: {folder}/shards/1")
    journal = read_lines(folder / "journal.jsonl")
    ends = [line for line in journal if line["event"] == "run_finished"]
    if not ends or ends[-1]["adapter_sha256"] != summary["adapter_sha256"]:
        raise RunFolderError(
            f"the journal of {folder} does not tell how its summary came about: a session was cut off,"
            " or a request to unlearn has put another run in its place"
        )
    first = max(i for i, line in enumerate(journal) if line["event"] in ("run_opened", "run_resumed"))
    session = journal[first:]
    ready = [i for i, line in enumerate(session) if line["event"] == "worker_ready"]
    done = [line for line in session if line["event"] == "round_committed"]
    workers = summary["workers"]
    if not ready or not all("seconds" in worker for worker in workers):
        raise RunFolderError(f"{folder} was played by an older version, which did not take the time of its workers")
    ended = ends[-1]
    wall, opening = _between(session[0], ended), _between(session[0], session[ready[-1]])
    phases = {work: sum(worker["seconds"].get(work, 0.0) for worker in workers) / len(workers) for work in _WORK}
    phases |= {
        "start": max(0.0, opening - phases["load"]),
        "aggregate": _sum(done, "aggregate"),
        "commit": sum(line["commit_s"] for line in done),
        "finish": _between(done[-1], ended) if done else 0.0,
    }
    phases["transport and waiting"] = max(0.0, wall - sum(phases.values()))
    return Profile(max(wall, sum(phases.values())), phases, len(workers), len(done))


def _sum(lines: Sequence[Mapping[str, Any]], phase: str) -> float:
    return sum(line["seconds"].get(phase, 0.0) for line in lines)


def _between(first: Mapping[str, Any], last: Mapping[str, Any]) -> float:
    one, other = (datetime.fromisoformat(line["time"]) for line in (first, last))
    return (other - one).total_seconds()
