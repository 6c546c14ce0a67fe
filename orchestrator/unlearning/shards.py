"""Unlearning in a run of shards: the shards that a target is in are played again without it, and all combined anew.

In a shard a rollback is what it is in any run. The other shards never saw the target, and none of their files changes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.errors import UnlearningError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.failpoints import reach
from orchestrator.shards import mean_adapter, shard_configs
from orchestrator.state import RunState
from orchestrator.stores.files import SHARDS, UNFINISHED, read_config, read_json, shard_folders, write_atomic, writing
from orchestrator.unlearning.actions import ACTIONS, Facts
from orchestrator.unlearning.exact import RollBack, doubts_of
from orchestrator.unlearning.job import Job, is_finished
from orchestrator.unlearning.journal import take_over
from orchestrator.unlearning.publish import publish
from orchestrator.unlearning.rollback import Rollback, build, clean_states, plan_rollback, without


@ACTIONS.register("shard_retrain")
class ShardRetrain(RollBack):
    """The target's shards from before its first round, once more without it; then all shards are combined anew."""

    kinds = frozenset({"client", "records", "class", "data"})
    of_shards = True
    by = "replay of shards"

    def check(self, folder: Path, plan: Rollback) -> None:
        if not is_finished(folder):
            raise UnlearningError(UNFINISHED.format(folder))

    def cost(self, folder: Path, plan: Rollback) -> float:
        """Rounds of the shards that are played again, as a share of the rounds of all shards."""
        left = shard_configs(without(read_config(folder), plan.clients, plan.records))
        played = sum(own.replayed for number, own in concerned(folder, plan).items() if number in left)
        return played / max(len(left) * plan.rounds, 1)

    def make(self, job: Job, plan: Rollback) -> Facts:
        found = concerned(job.folder, plan)
        _prepare(job, plan, found)
        summary = launch.resume(job.work, job.listen)  # what has finished is not played again
        parts = shard_folders(job.work)
        doubts = doubts_of(job.folder, job.work)
        for number in found.keys() & parts.keys():
            doubts += [*found[number].doubts, *doubts_of(job.folder / SHARDS / str(number), parts[number])]
        doubts = [doubt for doubt in dict.fromkeys(doubts) if doubt not in plan.doubts]
        return {
            "level": "E2" if doubts else plan.level,
            "adapter_sha256": summary["adapter_sha256"],
            "rounds_played": sum(own.replayed for number, own in found.items() if number in parts),
            "shards": sorted(found.keys() & parts.keys()),
            "emptied": sorted(found.keys() - parts.keys()),
            "doubts": doubts,
        }

    def verify(self, job: Job, plan: Rollback) -> Facts:
        noted = job.standing.facts["executed"]
        told = {"shards_played_again": noted["shards"], "shards_without_clients": noted["emptied"]}
        return {**super().verify(job, plan), **{key: value for key, value in told.items() if value}}


def concerned(folder: Path, plan: Rollback) -> dict[int, Rollback]:
    """What it takes in every shard that is another one without the target, by number. Changes nothing.

    These are the shards of its clients, and those whose draws go by what is taken out.
    """
    found = {}
    for number, part in shard_folders(folder).items():
        own = plan_rollback(part, plan.clients, plan.records)
        members = {row["client"] for row in read_json(part / "partition.json")}
        if own.first is not None or members & {*plan.clients, *plan.owners}:
            found[number] = own
    return found


def untouched(folder: Path, plan: Rollback) -> RunState | None:
    """The state of a run with the combination of the shards that never saw the target; None where there are none."""
    state, _ = load_latest(folder)
    gone = concerned(folder, plan)
    parts = [part for number, part in shard_folders(folder).items() if number not in gone]
    return replace(state, adapter=mean_adapter(read_config(folder), parts)) if state and parts else None


def publish_shards(job: Job) -> None:
    """Put the shards that were played again in the place of those they were made from; the others are not touched.

    Stopped anywhere and called again it ends the same. A shard without a client goes altogether.
    """
    noted: dict[str, Any] = dict(job.standing.facts["executed"])
    for number in map(str, noted.get("shards", ())):
        part, made = job.folder / SHARDS / number, job.work / SHARDS / number
        take_over(part, made, job.request)
        publish(part, made)
        reach("publish.shard", int(number))
    for number in map(str, noted.get("emptied", ())):
        part = job.folder / SHARDS / number
        with writing(part):
            if part.exists():
                shutil.rmtree(part)


def _prepare(job: Job, plan: Rollback, found: dict[int, Rollback]) -> None:
    """The folder of the run without the target, with its shards as they stood before it; whole, or not at all."""
    if job.work.exists():
        return
    scratch = job.work.with_name(f".{job.work.name}")
    if scratch.exists():
        shutil.rmtree(scratch)
    config = without(read_config(job.folder), plan.clients, plan.records)
    configs = shard_configs(config)
    for number, part in shard_folders(job.folder).items():
        target = scratch / SHARDS / str(number)
        if number not in found:
            with writing(target):  # copies: nothing that is played here may write into the run
                shutil.copytree(part, target, ignore=shutil.ignore_patterns("lease.*"))
        elif number in configs:
            states = clean_states(part, found[number].start)
            build(part, found[number], target, configs[number], states)
    write_atomic(scratch / "config.yaml", config.model_copy(update={"output_dir": str(job.work)}).to_yaml())
    scratch.rename(job.work)
