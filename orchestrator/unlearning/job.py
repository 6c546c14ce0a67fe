"""One request while it is carried out: where it works, what was planned, and what it may do to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import UnlearningError
from fedlora.unlearning.standing import Standing
from orchestrator.checkpoint import load_latest
from orchestrator.lease import Lease
from orchestrator.results import WEIGHTS, export_adapter
from orchestrator.state import RunState
from orchestrator.stores.files import file_sha256, read_config, read_json
from orchestrator.unlearning.requests import FOLDER, advance, find_request
from orchestrator.unlearning.rollback import Rollback

Listener = Callable[[str, Mapping[str, Any]], None]
ASIDE = "adapter"  # in the space of a request: what was in use until it was contained


@dataclass(frozen=True)
class Job:
    """One request being carried out by whoever holds the lease of its run."""

    folder: Path
    request: str
    lease: Lease
    listen: Listener

    @property
    def standing(self) -> Standing:
        """How far it has come."""
        return find_request(self.folder, self.request)

    @property
    def space(self) -> Path:
        """What the request needs on the disk until it is certified."""
        return self.folder / FOLDER / self.request

    @property
    def work(self) -> Path:
        """Where the run without the target is made."""
        return self.space / "replay"

    @property
    def aside(self) -> Path:
        """Where the adapters are that were in use before containment; a request that is taken back returns them."""
        return self.space / ASIDE

    def note(self, phase: str, facts: Mapping[str, Any]) -> Standing:
        """The request has reached its next phase."""
        self.lease.check()
        return advance(self.folder, self.request, phase, facts)

    def plan(self) -> Rollback:
        """What was planned."""
        noted = self.standing.facts["planned"]
        lists = {key: tuple(value) for key, value in noted["plan"].items() if isinstance(value, list)}
        return Rollback(**{**noted["plan"], **lists})

    def made(self) -> str | None:
        """SHA-256 of the adapter that was made; None where the run has none yet."""
        weights = self.work / "adapter" / WEIGHTS
        return file_sha256(weights) if weights.exists() else None


def is_finished(folder: Path) -> bool:
    """Whether a run has played all its rounds."""
    return _says_so(folder) and load_latest(folder)[0] is not None


def finished_state(folder: Path) -> RunState:
    """The state of a run that has played all its rounds.

    Raises:
        UnlearningError: if it has not.
    """
    state, _ = load_latest(folder)
    if state is None or not _says_so(folder):
        raise UnlearningError(f"{folder} is not finished; let it end, or use rollback, which need not wait for it")
    return state


def _says_so(folder: Path) -> bool:
    """Whether the summary of a run says that it has finished."""
    path = folder / "summary.json"
    return path.exists() and read_json(path).get("status") == "finished"


def put_in_use(folder: Path, state: RunState) -> Path:
    """Export the adapter of a state as that of the run; returns the file of its weights."""
    task = "sequence-classification" if read_json(folder / "labels.json") else "causal-lm"
    return export_adapter(state, read_config(folder), task, folder / "adapter")
