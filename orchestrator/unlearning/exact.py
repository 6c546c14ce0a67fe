"""Exact actions: the run once more, as if the target had never been there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.errors import UnlearningError
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_config, read_lines
from orchestrator.unlearning.actions import ACTIONS, Facts, UnlearningAction
from orchestrator.unlearning.doubts import COMPARED, sessions, threads
from orchestrator.unlearning.job import Job, is_finished
from orchestrator.unlearning.rollback import Rollback, knows, prepare, replay, rounds_played


@ACTIONS.register("rollback")
class RollBack(UnlearningAction):
    """From the newest checkpoint without the target, every round after it once more."""

    kinds = frozenset({"client", "task", "records", "class", "data"})
    planned_level = "E1"
    by = "replay"  # what a certificate says that its verdict is from

    def cost(self, folder: Path, plan: Rollback) -> float:
        return plan.cost

    def make(self, job: Job, plan: Rollback) -> Facts:
        facts: dict[str, Any] = {"level": plan.level, "rounds_played": 0}
        if not is_finished(job.folder) and not (job.work / "summary.json").exists():
            prepare(job.folder, plan, job.work)  # the run goes on from there by itself
            return facts | {"goes_on_from": plan.start or 0}
        # where nothing is to be replayed the configuration has to say all the same that nobody comes back
        summary = replay(job.folder, plan, job.work, job.listen)
        doubts = doubts_of(job.folder, job.work)
        level = "E2" if doubts else plan.level
        told = {"rounds_played": plan.replayed, "adapter_sha256": summary["adapter_sha256"], "doubts": doubts}
        return facts | told | {"level": level}

    def verify(self, job: Job, plan: Rollback) -> Facts:
        """That what was made holds no round with the target, and is what was noted."""
        state, _ = load_latest(job.work)
        rows = rounds_played(job.work, state) if state else []
        config, sha256 = read_config(job.work), job.made()
        asked = [row["round"] for row in rows if set(row["selected"]) & set(plan.clients)]
        asked += [row["round"] for row in rows if (row.get("stream") or {}).get("task") in plan.tasks]
        excluded = set(plan.clients) <= set(config.clients.exclude) and set(plan.records) <= set(config.data.forget)
        excluded &= set(plan.tasks) <= set(config.continual.without if config.continual else ())
        noted = job.standing.facts["executed"].get("adapter_sha256")
        if asked or (state and knows(state, plan.clients)) or not excluded or sha256 != noted:
            raise UnlearningError(
                f"{job.request}: {job.work} is not the replay that was noted (its target is asked in rounds {asked},"
                f" adapter {sha256}); delete it and run the request again"
            )
        verdict = {"by": self.by, "rounds": len(rows), "rounds_with_target": 0, "adapter_sha256": sha256}
        left_out = {"records_left_out": len(plan.records), "tasks_left_out": list(plan.tasks)}
        return verdict | {key: value for key, value in left_out.items() if value}


@ACTIONS.register("replay")
class Replay(RollBack):
    """Every round once more from the first, whatever checkpoints there are: what a rollback is measured against."""

    def cost(self, folder: Path, plan: Rollback) -> float:
        return 1.0

    def make(self, job: Job, plan: Rollback) -> Facts:
        return super().make(job, replace(plan, start=None, first=1))


def doubts_of(folder: Path, work: Path) -> list[str]:
    """Why a replay in ``work`` that has been played may differ in bytes from a run that never had the target."""
    doubts = []
    before, after = sessions(folder)[-1:], sessions(work)
    if any(line[key] != before[0][key] for line in after for key in COMPARED):
        doubts.append("the replay was played with other versions, or on another machine")
    if threads(work) - threads(folder):
        doubts.append("workers of the replay had another number of threads")
    lost = [row["round"] for row in read_lines(work / "metrics.jsonl") if row["failed"] or row["late"]]
    if lost and read_config(folder).fleet is None:
        doubts.append(f"clients failed or were late in round {lost[0]} of the replay")
    return doubts
