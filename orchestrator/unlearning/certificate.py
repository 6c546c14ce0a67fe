"""The certificate of a request: what was done, what it is worth, and a signature over all of it.

``unlearning/R1.json`` holds a statement, the SHA-256 of the page ``unlearning/R1.html`` that shows it, and an Ed25519
signature over both. The statement holds how far the journal and the request log had come, and every artefact by its
SHA-256; the log's next line holds the SHA-256 of the certificate. So each of them shows an edit of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedlora
from fedlora.errors import FedLoRAError, RunFolderError, UnlearningError
from fedlora.unlearning.canonical import canonical
from fedlora.unlearning.keys import Keys, fingerprint, is_signed, sign
from fedlora.unlearning.levels import LEVELS
from fedlora.unlearning.standing import Standing
from orchestrator.exports import read_exports
from orchestrator.failpoints import reach
from orchestrator.stores.files import file_sha256, read_json, shard_folders, write_atomic
from orchestrator.unlearning.artefacts import snapshot, still_there
from orchestrator.unlearning.certificate_page import certificate_page
from orchestrator.unlearning.gate import altered
from orchestrator.unlearning.requests import FOLDER, Log, check_log, named, open_log, read_log, read_requests

FORMAT = "fedlora unlearning certificate, version 1"
NOT_PROMISED = (
    "Checkpoints, adapters and models that others hold are not reached by this, nor are backups of the run folder.",
    "What the base model knew before this run is as it was.",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a request, beside what the request log knows.

    Attributes:
        action: that was carried out.
        before: every artefact before it, by path and SHA-256, see ``artefacts.snapshot``.
        purged: what was removed, by path or name, with its SHA-256; ``""`` for what is no file, such as keys in Redis.
        verdict: of the verification, plain JSON data; every metric with its n.
        residual: what is not promised in this case, a sentence each.
    """

    action: str
    before: Mapping[str, str]
    purged: Mapping[str, str]
    verdict: Mapping[str, Any]
    residual: Sequence[str] = ()


def write_certificate(folder: Path, request: str, outcome: Outcome, key: Ed25519PrivateKey) -> Path:
    """Certify a request whose purge is done; one that has a certificate keeps it.

    The artefacts after it are those in the folder now: nothing else may write there meanwhile, so hold the run's lease.

    Returns:
        Path of the certificate; its page is beside it.

    Raises:
        UnlearningError: if the request has not come that far, or what was purged is still in the folder.
        RunFolderError: if the log is damaged, or a file cannot be read or written.
    """
    path = _path(folder, request)
    with open_log(folder) as log:
        standing = named(log.requests, request)
        if standing.phase == "certified":
            return path
        if standing.phase != "purged":
            raise UnlearningError(f"{request} is {standing.phase}; only a request that is purged can be certified")
        statement = _statement(folder, log, standing, outcome, key)
        page = certificate_page(statement).encode("utf-8", "xmlcharrefreplace")
        signed = {"statement": statement, "page_sha256": hashlib.sha256(page).hexdigest()}
        content = _text(
            signed | {"public_key": key.public_key().public_bytes_raw().hex(), "signature": sign(key, signed)}
        )
        write_atomic(path, content)
        reach("certificate.written", standing.number)
        write_atomic(path.with_suffix(".html"), page)
        reach("certificate.shown", standing.number)
        digest = hashlib.sha256(content).hexdigest()
        log.add(request, "certified", {"certificate_sha256": digest, "page_sha256": signed["page_sha256"]})
    return path


def verify_certificate(folder: Path, request: str, keys: Keys) -> list[str]:
    """Every way in which a certificate, or what it speaks of, is not as it was certified; empty if there is none.

    What a later certified request has changed in turn is compared with that one's certificate.

    Args:
        keys: public keys of those who may ask and certify. They must come from elsewhere than the run folder: whoever
            can edit that could put a key there.
    """
    try:
        statement, problems = _genuine(folder, request, keys)
        if statement is None:
            return problems
        standing = named(read_requests(folder), request)
        return [*problems, *_about_artefacts(folder, standing, statement, keys)]
    except FedLoRAError as error:
        return [str(error)]


def check_genuine(folder: Path, request: str, keys: Keys) -> None:
    """Check a certificate, the logs and the measurements behind its verdict, whatever the run has become since.

    Raises:
        UnlearningError: if one of them is not as it was certified.
        RunFolderError: if one cannot be read.
    """
    if problems := _genuine(folder, request, keys)[1]:
        raise UnlearningError(problems[0])


def _genuine(folder: Path, request: str, keys: Keys) -> tuple[dict[str, Any] | None, list[str]]:
    """The statement of a certificate, None where it cannot be used, and what is wrong with it or with the logs."""
    if problems := check_log(folder):
        return None, problems
    standing = named(read_requests(folder), request)
    certificate, problems = _read(folder, standing, keys)
    if certificate is None:
        return None, problems
    statement: dict[str, Any] = certificate["statement"]
    found = [*problems, *_about_request(statement, standing, keys), *_about_logs(folder, statement)]
    return statement, [*found, *altered(folder, standing)]


def _path(folder: Path, request: str) -> Path:
    return folder / FOLDER / f"{request}.json"


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# Writing -----------------------------------------------------------------------------------------------------------


def _statement(folder: Path, log: Log, standing: Standing, outcome: Outcome, key: Ed25519PrivateKey) -> dict[str, Any]:
    after, level = snapshot(folder), standing.level or ""
    if left := still_there(outcome.purged, after):
        raise UnlearningError(f"{standing.id}: the purge is not complete: {'; '.join(left[:3])}")
    statement = {
        "format": FORMAT,
        "fedlora": fedlora.__version__,
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "issuer": fingerprint(key.public_key()),
        "request": {**_asked(standing), "times": dict(standing.times)},
        "action": outcome.action,
        "level": {"code": level, "meaning": LEVELS[level]},
        "artefacts": {"before": dict(outcome.before), "after": after},
        "purged": dict(outcome.purged),
        "verdict": dict(outcome.verdict),
        "residual_risk": [*NOT_PROMISED, *_exported(folder), *outcome.residual],
        "journal": _journal(folder),
        "log": {"records": len(log.chain.records), "head": log.chain.head},
    }
    plain: dict[str, Any] = json.loads(canonical(statement))
    return plain


def _asked(standing: Standing) -> dict[str, Any]:
    return {"id": standing.id, **standing.signed.content, "requested_by": standing.signed.signer}


def _exported(folder: Path) -> list[str]:
    return [
        f"On {line['time'][:10]} the {line['kind']} after round {line['round']} was exported to {line['path']};"
        " that copy, and those made of it, have to be removed where they are."
        for place in (folder, *shard_folders(folder).values())
        for line in read_exports(place)
    ]


def _journal(folder: Path, size: int | None = None) -> dict[str, Any]:
    """Size and SHA-256 of the journal's whole lines so far; of its first ``size`` bytes where that is given."""
    path = folder / "journal.jsonl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror or error}") from error
    data = data[: data.rfind(b"\n") + 1] if size is None else data[:size]
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# Checking ----------------------------------------------------------------------------------------------------------


def _read(folder: Path, standing: Standing, keys: Keys) -> tuple[dict[str, Any] | None, list[str]]:
    """A certificate and what is wrong with its files; None where it is not genuine, and nothing in it can be used."""
    path, noted = _path(folder, standing.id), standing.facts.get("certified")
    if noted is None:
        return None, [f"{standing.id} is {standing.phase}; it has no certificate"]
    certificate: dict[str, Any] = read_json(path)
    if file_sha256(path) != noted["certificate_sha256"]:
        return None, [f"{path} was altered: it is not the file that the request log speaks of"]
    if problem := _forged(certificate, keys):
        return None, [f"{path} {problem}"]
    page = path.with_suffix(".html")
    if not page.is_file():
        return certificate, [f"{page} is missing"]
    if file_sha256(page) != certificate["page_sha256"]:
        return certificate, [f"{page} was altered: it is not the page that was certified"]
    return certificate, []


def _forged(certificate: Any, keys: Keys) -> str | None:
    """Why a certificate is nobody's who may certify; None for a genuine one."""
    try:
        signed = {"statement": certificate["statement"], "page_sha256": certificate["page_sha256"]}
        issuer, signature = signed["statement"]["issuer"], certificate["signature"]
        if signed["statement"]["format"] != FORMAT:
            return f"is not a {FORMAT}; read it with the version of fedlora that wrote it"
        if issuer not in keys:
            return f"is signed by the key {issuer[:16]}, which is not authorised"
    except (KeyError, TypeError):
        return "is no certificate; restore it from a copy"
    if not is_signed(keys[issuer], signature, signed):
        return "does not bear the signature of its issuer: it was altered or forged"
    return None


def _about_request(statement: Mapping[str, Any], standing: Standing, keys: Keys) -> list[str]:
    problems = []
    times = {phase: time for phase, time in standing.times.items() if phase != "certified"}
    if statement.get("request") != {**_asked(standing), "times": times}:
        problems.append(f"the certificate speaks of another request than {standing.id} in the request log")
    if statement.get("level") != {"code": standing.level, "meaning": LEVELS[standing.level or ""]}:
        problems.append(f"the certificate claims another level than {standing.id} reached, {standing.level}")
    if standing.signed.signer not in keys:
        problems.append(
            f"{standing.id} was asked for with the key {standing.signed.signer[:16]}, which is not authorised"
        )
    return problems


def _about_logs(folder: Path, statement: Mapping[str, Any]) -> list[str]:
    problems = []
    log, journal, records = statement["log"], statement["journal"], read_log(folder).records
    if not 0 < log["records"] <= len(records) or records[log["records"] - 1]["sha256"] != log["head"]:
        problems.append(
            f"the request log is another one than was certified: its record {log['records']} is not the same"
        )
    if _journal(folder, journal["bytes"]) != journal:
        problems.append(
            f"journal.jsonl is another one than was certified: its first {journal['bytes']} bytes were altered"
        )
    return problems


def _about_artefacts(folder: Path, standing: Standing, statement: Mapping[str, Any], keys: Keys) -> list[str]:
    expected: dict[str, str | None] = dict(statement["artefacts"]["after"])
    made: set[str] = set()
    for later in _later(folder, standing):
        certificate, problems = _read(folder, later, keys)
        if certificate is not None and not problems:
            artefacts = certificate["statement"]["artefacts"]
            for path in [path for path, digest in expected.items() if artefacts["before"].get(path) == digest]:
                expected[path] = artefacts["after"].get(path)
            # a later replay may draw from a seed what was removed with the rounds it had been drawn in
            made |= set(artefacts["after"].values()) - set(artefacts["before"].values())
    present = snapshot(folder)
    problems = [
        f"{path} {'is not what was certified' if path in present else 'was certified and is missing'}"
        for path, digest in sorted(expected.items())
        if digest and present.get(path) != digest
    ]
    return problems + still_there(statement["purged"], {path: d for path, d in present.items() if d not in made})


def _later(folder: Path, standing: Standing) -> list[Standing]:
    """Requests that were certified after this one, in that order."""
    order = [record["request"] for record in read_log(folder).records if record["phase"] == "certified"]
    known = read_requests(folder)
    return [known[name] for name in order[order.index(standing.id) + 1 :]]
