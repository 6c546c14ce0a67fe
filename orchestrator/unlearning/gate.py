"""The gate behind the commands: what an approximate action made, beside two controls that never saw the target.

What was measured on the controls and on the model that passed stays beside the certificate, in
``unlearning/R1.measured.json``, so that the run can be looked at again after later rounds. It holds numbers and the
places of rows, not what they say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.errors import UnlearningError, VerificationError
from fedlora.unlearning.gate import Verdict, judge
from fedlora.unlearning.levels import ERASES
from fedlora.unlearning.measures import Measured, RowScores, score_rows
from fedlora.unlearning.standing import Standing
from orchestrator.stores.files import file_sha256, read_config, read_json, write_atomic
from orchestrator.unlearning.controls import train_controls
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.measuring import lesson_for, serve
from orchestrator.unlearning.requests import FOLDER, find_request, read_requests
from orchestrator.unlearning.rollback import Rollback
from orchestrator.unlearning.samples import Rows, choose_rows, encoded, rows_of, trained_on
from orchestrator.unlearning.targets import as_learned

FORMAT = "fedlora measurements, version 1"
_TOLD = 3  # reasons that a rejection spells out


def pass_gate(job: Job, plan: Rollback) -> dict[str, Any]:
    """Train two controls and hold ``job.work`` against them.

    Returns:
        The verdict as it goes into the certificate; what was measured is written beside it.

    Raises:
        VerificationError: the gate rejects it, or nothing can be told; names the checks and why.
        FedLoRAError: what training a control may raise; the same command goes on with what is there.
    """
    config = as_learned(job.folder, plan.records)
    chosen = choose_rows(config, plan)
    folders = train_controls(job, plan)
    job.listen("unlearning", {"request": job.request, "phase": "all models are measured"})
    before, control = serve(job.folder), serve(folders[0])
    rows, sets = encoded(config, chosen, before.base.tokenizer)
    lesson = lesson_for(control, sets, score_rows(before.model, sets.forget, before.scoring).loss)
    known, first = before.look(sets, lesson), replace(control.look(sets), relearned=lesson)
    del before, control  # a large base fits into memory twice at most
    second = serve(folders[1]).look(sets, lesson)
    made = serve(job.work)
    candidate = made.look(sets, lesson)
    verdict = judge(candidate, first, second, before=known)
    if not verdict.passed:
        action = job.standing.facts["planned"]["action"]
        raise VerificationError(f"the gate rejects what {action} made; {_why(verdict)}")
    path = measurements(job.folder, job.request)
    content = {
        "format": FORMAT,
        "request": job.request,
        "round": made.round,
        "rows": rows.to_json(),
        "controls": [first.to_json(), second.to_json()],
        "accepted": candidate.to_json(),
    }
    write_atomic(path, json.dumps(content, allow_nan=False))
    counts = {name: len(places) for name, places in rows.to_json().items() if name != "heldout_from"}
    return {
        "by": "gate",
        "level": "A",
        **verdict.to_json(),
        "rows": counts | {"heldout_from": rows.heldout_from},
        "controls": [read_json(folder / "summary.json")["adapter_sha256"] for folder in folders],
        "measurements_sha256": file_sha256(path),
    }


def measurements(folder: Path, request: str) -> Path:
    """Where the measurements of a request are."""
    return folder / FOLDER / f"{request}.measured.json"


def stale(folder: Path, plan: Rollback) -> dict[str, str]:
    """SHA-256, by path in the run folder, of what earlier requests measured on rows that a plan takes out."""
    return {
        _name(known): noted
        for known in _measured(folder)
        if (noted := _noted(known)) and _overlaps(known.facts["planned"]["plan"], plan)
    }


def kept_measurements(folder: Path) -> list[str]:
    """What measurements still tell once a target is erased, a sentence each."""
    return [
        f"{_name(known)} keeps the losses of rows by their places, as they were when {known.id} was judged; rows of the"
        " target may be among those that were to be kept then."
        for known in _measured(folder)
    ]


def _measured(folder: Path) -> list[Standing]:
    """Certified requests whose measurements no later one has purged."""
    known = [standing for standing in read_requests(folder).values() if standing.phase == "certified"]
    return [standing for standing in known if _noted(standing) and not _purged_by(folder, standing)]


def _overlaps(earlier: Mapping[str, Any], plan: Rollback) -> bool:
    """Whether rows that an earlier plan was to forget are among those that this one takes out."""
    clients, records = set(plan.clients), set(plan.records)
    whole = {*earlier["clients"], *earlier["owners"]} & clients
    return bool(whole or set(earlier["records"]) & records or set(earlier["clients"]) & set(plan.owners))


def _name(standing: Standing) -> str:
    return f"{FOLDER}/{standing.id}.measured.json"


def _purged_by(folder: Path, standing: Standing) -> str | None:
    """The request whose purge took these measurements along."""
    later = read_requests(folder).values()
    return next((one.id for one in later if _name(standing) in one.facts.get("purged", {}).get("files", {})), None)


@dataclass(frozen=True)
class Present:
    """What the gate says of the run as it is now.

    Attributes:
        round: committed rounds now.
        accepted: committed rounds when it passed.
    """

    round: int
    accepted: int
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """It as a line to print."""
        since = f"after round {self.round} (it passed after round {self.accepted})"
        if self.verdict.passed:
            return f"the run still passes all {len(self.verdict.checks)} checks {since}"
        return f"the run does not pass any more {since}; {_why(self.verdict)}"


def look_again(folder: Path, request: str) -> Present | None:
    """Hold the run as it is now against the controls of a certified request; None where nothing is to be measured,
    since what is left never had the target.

    Retain rows of clients that were taken out since then do not count.

    Args:
        request: whose certificate and measurements are genuine.

    Raises:
        UnlearningError: if it has no controls.
        VerificationError: if the rows are not those of then, or too few are left.
    """
    standing = find_request(folder, request)
    if standing.level in ERASES:
        return None
    if not _noted(standing):
        raise UnlearningError(
            f"{request} reached level {standing.level} without a gate: no control was trained, so whether the target is"
            " still in the weights cannot be told"
        )
    if by := _purged_by(folder, standing):
        raise UnlearningError(f"{by} erased what {request} was about, and what was measured on it; verify {by} instead")
    content, config = read_json(measurements(folder, request)), read_config(folder)
    rows = Rows.from_json(content["rows"])
    controls = [Measured.from_json(one) for one in content["controls"]]
    served = serve(folder)
    lesson = controls[0].relearned
    assert lesson is not None
    _, sets = encoded(config, rows, served.base.tokenizer)
    present = served.look(sets, lesson)
    left = trained_on(config, rows_of(config))
    kept = [place for place, row in enumerate(rows.retain) if row in left]
    candidate, first, second = (_retaining(one, kept) for one in (present, *controls))
    return Present(served.round, content["round"], judge(candidate, first, second))


def altered(folder: Path, standing: Standing) -> list[str]:
    """A sentence if the measurements of a request are not those that its verdict speaks of; empty where it has none, or
    where they went with what a later request erased."""
    path, noted = measurements(folder, standing.id), _noted(standing)
    if noted is None:
        return []
    if by := _purged_by(folder, standing):
        return [f"{path} was purged by {by}, and is there again"] if path.exists() else []
    if not path.is_file():
        return [f"{path} is missing"]
    return [] if file_sha256(path) == noted else [f"{path} was altered: it is not what the verdict was made from"]


def _noted(standing: Standing) -> str | None:
    """SHA-256 of the measurements, as its verdict names it."""
    return standing.facts.get("verified", {}).get("measurements_sha256")


def _why(verdict: Verdict) -> str:
    failures = verdict.failures
    told = "; ".join(f"{check.name}: {check.reason}" for check in failures[:_TOLD])
    also = f"; and {', '.join(check.name for check in failures[_TOLD:])}" if failures[_TOLD:] else ""
    return f"{len(failures)} of {len(verdict.checks)} checks failed: {told}{also}"


def _retaining(measured: Measured, kept: Sequence[int]) -> Measured:
    """The same measurement with some of its retain rows only."""
    rows = measured.retain
    losses, low = (tuple(column[place] for place in kept) for column in (rows.losses, rows.min_k))
    fewer = RowScores(losses, low, tuple(rows.correct[place] for place in kept))
    rounded: Mapping[str, Measured] = {name: _retaining(one, kept) for name, one in measured.quantised.items()}
    return replace(measured, retain=fewer, quantised=rounded)
