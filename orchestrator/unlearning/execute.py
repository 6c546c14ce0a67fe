"""Carrying out a request, phase by phase. Each is noted once it is done: whoever is killed goes on from there."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.aggregation import compose
from fedlora.errors import ConfigError, RoundError, UnlearningError, VerificationError
from fedlora.plugins import load_plugins
from fedlora.unlearning.levels import ERASES, LEVELS, UNPROVED
from fedlora.unlearning.request import Request
from fedlora.unlearning.standing import Standing
from orchestrator.checkpoint import checkpoints, load
from orchestrator.failpoints import reach
from orchestrator.lease import Lease
from orchestrator.stores.files import file_sha256, read_config, read_json, write_json
from orchestrator.unlearning import drop, exact, forget_rounds, shards, subtraction  # noqa: F401 - they register actions
from orchestrator.unlearning.actions import ACTIONS, action_of, check_action
from orchestrator.unlearning.artefacts import snapshot
from orchestrator.unlearning.certificate import Outcome, write_certificate
from orchestrator.unlearning.gate import kept_measurements, measurements, stale
from orchestrator.unlearning.job import ASIDE, Job, Listener, put_in_use
from orchestrator.unlearning.journal import note_unlearned, take_over
from orchestrator.unlearning.publish import publish
from orchestrator.unlearning.requests import FOLDER, find_request, pending, refuse
from orchestrator.unlearning.rollback import Rollback, plan_for


@dataclass(frozen=True)
class Estimate:
    """What an action would reach and cost; ``reason`` says why it cannot be done, and is empty where it can."""

    action: str
    level: str
    cost: float | None
    reason: str = ""


def estimates(folder: Path, request: Request, plan: Rollback) -> list[Estimate]:
    """Every action that takes out such a target, the strongest level first. Changes nothing."""
    found = []
    for name in ACTIONS:
        if request.kind not in getattr(ACTIONS[name], "kinds", ()):
            continue
        try:
            action = ACTIONS.create(name)
            check_action(action, folder, plan)
            level = plan.level if action.planned_level == "E1" else action.planned_level
            found.append(Estimate(name, level, action.cost(folder, plan)))
        except (ConfigError, UnlearningError) as error:
            found.append(Estimate(name, "", None, str(error)))
    levels = list(LEVELS)
    return sorted(found, key=lambda one: (bool(one.reason), levels.index(one.level or "S"), one.cost or 0.0))


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
    load_plugins(read_config(folder).plugins)  # the action may come from one, in whatever phase a killed command left
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
    asked = job.standing.request
    config = read_config(job.folder)
    try:
        action = action_of(asked)
        plan = plan_for(job.folder, asked)
        if needed := sorted(set(compose(config.strategy).required) & set(plan.clients)):
            raise UnlearningError(f"{config.strategy_name} cannot do without {needed[0]}, which it trusts")
        check_action(action, job.folder, plan)
    except (ConfigError, UnlearningError) as error:
        refuse(job.folder, job.request, str(error))
        raise UnlearningError(f"{job.request} is refused: {error}") from error
    write_json(job.space / "before.json", snapshot(job.folder))
    return job.note("planned", {"action": action.name, "plan": asdict(plan)})


def _contain(job: Job) -> Standing:
    """With ``now``, the adapter in use gives way to the last one without the target before anything is played."""
    if not job.standing.request.now:
        return job.note("contained", {"adapter": "as it was; containment was not asked for"})
    plan, adapter = job.plan(), job.folder / "adapter"
    if plan.first is None or not (adapter.exists() or job.aside.exists()):
        return job.note("contained", {"adapter": "holds nothing of the target"})
    if job.aside.exists():
        shutil.rmtree(adapter, ignore_errors=True)  # half written before a crash
    else:
        adapter.rename(job.aside)  # with the adapters of isolated tasks
    if plan.start is None and (others := shards.untouched(job.folder, plan)):
        sha256 = file_sha256(put_in_use(job.folder, others))
        return job.note("contained", {"adapter": "of the shards that never saw the target", "sha256": sha256})
    if plan.start is None:
        return job.note("contained", {"adapter": "removed: there is none from before the target took part"})
    state = next(load(path) for path in checkpoints(job.folder) if path.name == f"round-{plan.start:04d}")
    weights = put_in_use(job.folder, state)
    return job.note("contained", {"adapter": f"as after round {plan.start}", "sha256": file_sha256(weights)})


def _execute(job: Job) -> Standing:
    try:
        facts = action_of(job.standing.request).make(job, job.plan())
    except (ConfigError, RoundError) as error:
        withdraw(job.folder, job.request, f"the run cannot be played without: {error}")
        raise UnlearningError(f"{job.request} is refused: the run cannot be played without: {error}") from error
    return job.note("executed", facts)


def withdraw(folder: Path, request: str, reason: str) -> Standing:
    """End a request that has not been published yet; a run whose adapter was contained gets its own back.

    Raises:
        UnlearningError: if it has come too far, or ended before.
    """
    standing = find_request(folder, request)
    if standing.phase in ("verified", "purged") or not standing.is_open:
        raise UnlearningError(f"{request} is {standing.phase}, which cannot be taken back")
    aside = folder / FOLDER / request / ASIDE
    if aside.exists():
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        aside.rename(folder / "adapter")
    shutil.rmtree(folder / FOLDER / request, ignore_errors=True)
    measurements(folder, request).unlink(missing_ok=True)
    return refuse(folder, request, reason)


def _verify(job: Job) -> Standing:
    try:
        verdict = action_of(job.standing.request).verify(job, job.plan())
    except VerificationError as error:
        withdraw(job.folder, job.request, f"verification: {error}")
        raise UnlearningError(f"{job.request} is refused, and the run is as it was: {error}") from error
    return job.note("verified", verdict)


def _purge(job: Job) -> Standing:
    plan = job.plan()
    shards.publish_shards(job)
    take_over(job.folder, job.work, job.request)
    publish(job.folder, job.work)
    shutil.rmtree(job.aside, ignore_errors=True)
    after = set(snapshot(job.folder).values())
    before: dict[str, str] = read_json(job.space / "before.json")
    first = plan.first or math.inf
    purged = {path: digest for path, digest in before.items() if digest not in after and not _round_of(path) < first}
    if job.standing.level in ERASES:
        measured = stale(job.folder, plan)
        for path in measured:
            (job.folder / path).unlink(missing_ok=True)
        purged |= measured
    told = {"clients": list(plan.clients), "records": len(plan.records), "tasks": list(plan.tasks)}
    note_unlearned(job.folder, job.request, told | {"level": job.standing.level})
    return job.note("purged", {"files": purged})


def _round_of(path: str) -> float:
    """The round a file of a checkpoint, of private state or of the contribution log belongs to; infinity for others.

    What is older than the target's first round holds nothing of it, whether it is still there or not.
    """
    found = re.search(r"^(?:shards/\d+/)?(?:checkpoints|contributions|private/[^/]+)/round-(\d+)", path)
    return int(found[1]) if found else math.inf


def _certify(job: Job, standing: Standing, key: Ed25519PrivateKey) -> None:
    residual = [*standing.facts["planned"]["plan"]["doubts"], *standing.facts["executed"].get("doubts", [])]
    residual += UNPROVED.get(standing.level or "", ())
    if read_config(job.folder).store.redis:
        residual.append("Events of the run on its Redis server name the client until they expire, after seven days.")
    residual.append("The journal goes on saying who took part in which round, and with which numbers.")
    if standing.facts["planned"]["plan"]["records"]:
        residual.append("The rows stay where their client keeps them; this configuration leaves them out.")
    if standing.level in ERASES:
        residual += kept_measurements(job.folder)
    if standing.request.kind == "class":
        residual.append("The labels stay in the model's label set, so that nothing changes its shape.")
    if standing.request.kind == "task":
        residual.append("The rows stay where clients keep them; this configuration leaves out the rounds they had.")
        residual.append("The score before training is over the test rows of every task, as it was measured.")
    outcome = Outcome(
        standing.facts["planned"]["action"],
        read_json(job.space / "before.json"),
        standing.facts["purged"]["files"],
        standing.facts["verified"],
        residual,
    )
    write_certificate(job.folder, job.request, outcome, key)
    shutil.rmtree(job.space)
