"""Carrying out a request, phase by phase. Each is noted once it is done: whoever is killed goes on from there."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.aggregation import compose
from fedlora.errors import ConfigError, RoundError, UnlearningError
from fedlora.unlearning.standing import Standing
from orchestrator import launch
from orchestrator.checkpoint import checkpoints, load, load_latest
from orchestrator.failpoints import reach
from orchestrator.lease import Lease
from orchestrator.results import export_adapter
from orchestrator.state import RunState
from orchestrator.stores.files import JsonLines, file_sha256, read_config, read_json, read_lines, write_json
from orchestrator.unlearning.artefacts import snapshot
from orchestrator.unlearning.certificate import Outcome, write_certificate
from orchestrator.unlearning.publish import publish
from orchestrator.unlearning.requests import FOLDER, advance, find_request, pending, refuse
from orchestrator.unlearning.rollback import (
    COMPARED,
    Rollback,
    knows,
    plan_rollback,
    prepare,
    replay,
    rounds_played,
    sessions,
    threads,
)

Listener = Callable[[str, Mapping[str, Any]], None]
WEIGHTS = "adapter_model.safetensors"
_KEYS = {"client": "clients", "records": "records"}  # of a plan


@dataclass(frozen=True)
class Job:
    """One request being carried out by whoever holds the lease of its run."""

    folder: Path
    request: str
    lease: Lease
    listen: Listener

    @property
    def space(self) -> Path:
        """What the request needs on the disk until it is certified."""
        return self.folder / FOLDER / self.request

    @property
    def work(self) -> Path:
        """Where the run without the target is made."""
        return self.space / "replay"

    def note(self, phase: str, facts: Mapping[str, Any]) -> Standing:
        """The request has reached its next phase."""
        self.lease.check()
        return advance(self.folder, self.request, phase, facts)

    def plan(self) -> Rollback:
        """What was planned."""
        noted = find_request(self.folder, self.request).facts["planned"]
        lists = {key: tuple(noted["plan"][key]) for key in ("clients", "records", "owners", "doubts")}
        return Rollback(**{**noted["plan"], **lists})


def carry_out(folder: Path, request: str, lease: Lease, key: Ed25519PrivateKey, listen: Listener) -> Standing:
    """Do what is left to do of a request, to its certificate.

    Args:
        lease: of the run.
        key: signs the certificate.

    Raises:
        UnlearningError: if it cannot be done; it is noted as refused where it never can.
        FedLoRAError: what a run may raise; the request stays where it is, and the same command goes on.
    """
    job = Job(folder, request, lease, listen)
    steps = {"received": _plan, "planned": _contain, "contained": _execute, "executed": _verify, "verified": _purge}
    standing = find_request(folder, request)
    if before := [other for other in pending(folder) if other.number < standing.number]:
        raise UnlearningError(
            f"{request} waits for {before[0].id}, which asks to take out {before[0].request} and is {before[0].phase};"
            " run that one again first"
        )
    while step := steps.get(standing.phase):
        standing = step(job)
        reach(f"unlearn.{standing.phase}", standing.number)
        listen("unlearning", {"request": request, "phase": standing.phase, **standing.facts[standing.phase]})
    if standing.phase == "purged":
        _certify(job, standing, key)
    return find_request(folder, request)


def _plan(job: Job) -> Standing:
    asked = find_request(job.folder, job.request).request
    if asked.kind not in _KEYS or asked.action not in ("", "rollback"):
        what = f"action {asked.action}" if asked.kind in _KEYS else f"a {asked.kind}"
        reason = f"{what} cannot be carried out; clients and records can be rolled back"
        refuse(job.folder, job.request, reason)
        raise UnlearningError(f"{job.request}: {reason}")
    try:
        plan = plan_rollback(job.folder, **{_KEYS[asked.kind]: asked.target})
        config = read_config(job.folder)
        if needed := sorted(set(compose(config.strategy).required) & set(plan.clients)):
            raise UnlearningError(f"{config.strategy_name} cannot do without {needed[0]}, which it trusts")
    except UnlearningError as error:
        refuse(job.folder, job.request, str(error))
        raise
    write_json(job.space / "before.json", snapshot(job.folder))
    return job.note("planned", {"action": "rollback", "plan": asdict(plan)})


def _contain(job: Job) -> Standing:
    """With ``now``, the adapter in use gives way to the last one without the target before anything is played."""
    if not find_request(job.folder, job.request).request.now:
        return job.note("contained", {"adapter": "as it was; containment was not asked for"})
    plan, adapter = job.plan(), job.folder / "adapter"
    if plan.first is None or not adapter.exists():
        return job.note("contained", {"adapter": "holds nothing of the target"})
    shutil.rmtree(adapter)  # with the adapters of isolated tasks
    if plan.start is None:
        return job.note("contained", {"adapter": "removed: there is none from before the target took part"})
    state = next(load(path) for path in checkpoints(job.folder) if path.name == f"round-{plan.start:04d}")
    weights = _export(job.folder, state)
    return job.note("contained", {"adapter": f"as after round {plan.start}", "sha256": file_sha256(weights)})


def _execute(job: Job) -> Standing:
    plan = job.plan()
    facts: dict[str, Any] = {"level": plan.level, "rounds_played": 0}
    if is_finished(job.folder) or (job.work / "summary.json").exists():
        try:
            # where nothing is to be replayed the configuration has to say all the same that nobody comes back
            summary = replay(job.folder, plan, job.work, job.listen)
        except (ConfigError, RoundError) as error:
            withdraw(job.folder, job.request, f"the run cannot be played without: {error}")
            raise UnlearningError(f"{job.request} is refused: the run cannot be played without: {error}") from error
        doubts = _doubts_of(job)
        facts |= {"rounds_played": plan.replayed, "adapter_sha256": summary["adapter_sha256"], "doubts": doubts}
        facts["level"] = "E2" if doubts else plan.level
    else:
        prepare(job.folder, plan, job.work)  # the run goes on from there by itself
        facts["goes_on_from"] = plan.start or 0
    return job.note("executed", facts)


def _doubts_of(job: Job) -> list[str]:
    """Why a replay that has been played may differ in bytes from a run that never had the target."""
    doubts = []
    before, after = sessions(job.folder)[-1:], sessions(job.work)
    if any(line[key] != before[0][key] for line in after for key in COMPARED):
        doubts.append("the replay was played with other versions, or on another machine")
    if threads(job.work) - threads(job.folder):
        doubts.append("workers of the replay had another number of threads")
    lost = [row["round"] for row in read_lines(job.work / "metrics.jsonl") if row["failed"] or row["late"]]
    if lost and read_config(job.folder).fleet is None:
        doubts.append(f"clients failed or were late in round {lost[0]} of the replay")
    return doubts


def withdraw(folder: Path, request: str, reason: str) -> Standing:
    """End a request that has not been published yet; a run whose adapter was contained gets its own back.

    Raises:
        UnlearningError: if it has come too far, or ended before.
    """
    standing = find_request(folder, request)
    if standing.phase in ("verified", "purged") or not standing.is_open:
        raise UnlearningError(f"{request} is {standing.phase}, which cannot be taken back")
    state, _ = load_latest(folder)
    if "contained" in standing.facts and standing.request.now and state is not None and is_finished(folder):
        _export(folder, state)
    shutil.rmtree(folder / FOLDER / request, ignore_errors=True)
    return refuse(folder, request, reason)


def _export(folder: Path, state: RunState) -> Path:
    """Put the adapter of a state in use."""
    task = "sequence-classification" if read_json(folder / "labels.json") else "causal-lm"
    return export_adapter(state, read_config(folder), task, folder / "adapter")


def _verify(job: Job) -> Standing:
    """That what was made holds no round with the target, and is what was noted."""
    plan, executed = job.plan(), find_request(job.folder, job.request).facts["executed"]
    state, _ = load_latest(job.work)
    rows = rounds_played(job.work, state) if state else []
    config = read_config(job.work)
    asked = [row["round"] for row in rows if set(row["selected"]) & set(plan.clients)]
    excluded = set(plan.clients) <= set(config.clients.exclude) and set(plan.records) <= set(config.data.forget)
    weights = job.work / "adapter" / WEIGHTS
    sha256 = file_sha256(weights) if weights.exists() else None
    if asked or (state and knows(state, plan.clients)) or not excluded or sha256 != executed.get("adapter_sha256"):
        raise UnlearningError(
            f"{job.request}: {job.work} is not the replay that was noted (its target is asked in rounds {asked},"
            f" adapter {sha256}); delete it and run the request again"
        )
    verdict = {"by": "replay", "rounds": len(rows), "rounds_with_target": 0, "adapter_sha256": sha256}
    if plan.records:
        verdict["records_left_out"] = len(plan.records)
    return job.note("verified", verdict)


def _purge(job: Job) -> Standing:
    plan = job.plan()
    publish(job.folder, job.work)
    after = set(snapshot(job.folder).values())
    before: dict[str, str] = read_json(job.space / "before.json")
    first = plan.first or math.inf
    purged = {path: digest for path, digest in before.items() if digest not in after and not _round_of(path) < first}
    with closing(JsonLines(job.folder / "journal.jsonl")) as journal:
        told = {
            "request": job.request,
            "clients": list(plan.clients),
            "records": len(plan.records),
            "level": plan.level,
        }
        journal.append(launch.stamped("unlearned", told))
    return job.note("purged", {"files": purged})


def _round_of(path: str) -> float:
    """The round a file of a checkpoint or of private state belongs to; infinity for others.

    What is older than the target's first round holds nothing of it, whether it is still there or not.
    """
    found = re.search(r"^(?:checkpoints|private/[^/]+)/round-(\d+)", path)
    return int(found[1]) if found else math.inf


def _certify(job: Job, standing: Standing, key: Ed25519PrivateKey) -> None:
    residual = [*standing.facts["planned"]["plan"]["doubts"], *standing.facts["executed"].get("doubts", [])]
    if read_config(job.folder).store.redis:
        residual.append("Events of the run on its Redis server name the client until they expire, after seven days.")
    residual.append("The journal goes on saying who took part in which round, and with which numbers.")
    if standing.facts["planned"]["plan"]["records"]:
        residual.append("The rows stay where their client keeps them; this configuration leaves them out.")
    outcome = Outcome(
        standing.facts["planned"]["action"],
        read_json(job.space / "before.json"),
        standing.facts["purged"]["files"],
        standing.facts["verified"],
        residual,
    )
    write_certificate(job.folder, job.request, outcome, key)
    shutil.rmtree(job.space)


def is_finished(folder: Path) -> bool:
    """Whether a run has played all its rounds."""
    state, _ = load_latest(folder)
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    return state is not None and summary.get("status") == "finished"
