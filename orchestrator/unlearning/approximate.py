"""Approximate actions: the finished run goes on from a changed state; a gate looks for what is left of the target."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from fedlora.aggregation import compose
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, UnlearningError, VerificationError
from orchestrator.checkpoint import load_latest
from orchestrator.state import RunState
from orchestrator.stores.files import read_config
from orchestrator.unlearning.actions import Facts, UnlearningAction
from orchestrator.unlearning.amend import longer, play_on
from orchestrator.unlearning.gate import pass_gate
from orchestrator.unlearning.job import Job, finished_state
from orchestrator.unlearning.rollback import Rollback, rounds_played
from orchestrator.unlearning.samples import choose_rows
from orchestrator.unlearning.targets import as_learned


class Approximate(UnlearningAction):
    """A changed state, rounds without the target that mend what the change broke, and the gate.

    Args:
        repair_rounds: ordinary rounds of the run without the target, at least 1.
        gate: whether two controls are trained and the gate decides. Without it the level is S: nothing is known of
            what is left.
    """

    kinds = frozenset({"client"})

    def __init__(self, repair_rounds: int = 2, gate: bool = True):
        if isinstance(repair_rounds, int) and repair_rounds < 1:
            raise ConfigError(f"unlearning action: repair_rounds must be at least 1, not {repair_rounds}")
        self.repair_rounds, self.gate = repair_rounds, gate

    @property
    def planned_level(self) -> str:  # type: ignore[override]
        """What it reaches if the gate lets it pass."""
        return "A" if self.gate else "S"

    def check(self, folder: Path, plan: Rollback) -> None:
        config = read_config(folder)
        if config.continual:
            raise UnlearningError(f"{self.name} does not know streams of tasks; use rollback")
        if self.gate and compose(config.strategy).traits.personal:
            raise UnlearningError(
                f"{self.name}: under {config.strategy_name} there is no one global model that a gate could look at; use"
                " rollback"
            )
        if self.gate and plan.first is None:
            raise UnlearningError(f"{self.name}: no round used the target, so a gate has nothing to see; use rollback")
        self._check_clients(folder, plan, finished_state(folder))
        if self.gate:
            choose_rows(as_learned(folder, plan.records), plan)

    def _check_clients(self, folder: Path, plan: Rollback, state: RunState) -> None:
        """Raise ``UnlearningError`` where a client is among the target that is no part of the run any more."""
        met = {client for row in rounds_played(folder, state) for client in row["selected"]}
        gone = set(plan.clients) & set(read_config(folder).clients.exclude) - met
        if gone and met & set(plan.clients) and not plan.records:
            raise UnlearningError(
                f"{self.name}: {min(gone)} is excluded already and no round asked it; name only the others"
            )

    @property
    def rounds(self) -> int:
        """Rounds that follow the changed state."""
        return self.repair_rounds

    def cost(self, folder: Path, plan: Rollback) -> float:
        """Of the action itself; the gate trains two controls beside it."""
        return self.rounds / max(plan.rounds, 1)

    def make(self, job: Job, plan: Rollback) -> Facts:
        config, state = self.change(job, plan, finished_state(job.folder))
        summary = play_on(job, plan, config, state)
        told = {"level": self.planned_level, "rounds_played": self.rounds}
        return told | {"adapter_sha256": summary["adapter_sha256"]}

    @abstractmethod
    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        """The configuration that the run goes on with, see ``longer``, and the state it goes on from. Deterministic:
        asked again after a crash it gives the same."""

    def config(self, job: Job, plan: Rollback, **changes: Any) -> RunConfig:
        """Of the run without the target, ``rounds`` longer. What it was asked to forget before is in the state that it
        goes on from, so that these forget rounds stay."""
        config = read_config(job.folder)
        return longer(config, plan, self.rounds, forgetting=config.resolved()["forgetting"], **changes)

    def verify(self, job: Job, plan: Rollback) -> Facts:
        """What the gate says of it; without one, that nothing was looked at.

        Raises:
            VerificationError: the gate rejects it, and names the checks; or it asked somebody who had been excluded, or
                would ask the target again.
            UnlearningError: what was made is not there any more.
        """
        if job.made() != job.standing.facts["executed"]["adapter_sha256"]:
            raise UnlearningError(
                f"{job.request}: {job.work} is not what was noted; delete it and run the request again"
            )
        if not set(plan.clients) <= set(read_config(job.work).clients.exclude):
            raise VerificationError(f"{self.name} made a run that would ask {', '.join(plan.clients)} again")
        barred = set(read_config(job.folder).clients.exclude)
        barred -= set(plan.askable(barred))
        state, _ = load_latest(job.work)
        later = [row for row in rounds_played(job.work, state) if row["round"] > plan.rounds] if state else []
        if back := sorted({client for row in later for client in row["selected"]} & barred):
            raise VerificationError(f"{self.name} made a run that asked {', '.join(back)} again, which was excluded")
        return pass_gate(job, plan) if self.gate else {"by": "nothing", "level": "S"}
