"""The request log of a run: ``unlearning/requests.jsonl``, append-only, every line chained to the one before.

The first line is chained to the configuration and to the journal line that opened the run, so that a log cannot be
carried to another run. Lines are added under an exclusive lock, which is not the run's lease: a request may come while
the run is played, and waits for its turn in the log. Lines that were cut off at the end leave no trace here; a
certificate holds how far the log had come.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError, UnlearningError, nearest
from fedlora.unlearning.canonical import canonical, digest
from fedlora.unlearning.chain import Chain, link, read_chain
from fedlora.unlearning.keys import Keys
from fedlora.unlearning.request import Request, SignedRequest
from fedlora.unlearning.standing import REFUSED, Standing, check_step, fold
from orchestrator.failpoints import reach
from orchestrator.stores.files import UNFINISHED, home_of, read_config, read_json, sync_folder, writing

FOLDER, LOG = "unlearning", "unlearning/requests.jsonl"


def identity(folder: Path) -> str:
    """What a run is to a signed request and to the log: a hash of its configuration and of its first journal line.

    Raises:
        RunFolderError: if the journal does not begin with the line that opened the run.
    """
    return digest(_origin(folder))


def receive(folder: Path, signed: SignedRequest, keys: Keys) -> Standing:
    """Note a request, or that it is refused and why. The same request again is the same entry.

    Args:
        keys: public keys of those who may ask.

    Returns:
        Where the request stands; refused where it cannot be done.

    Raises:
        UnlearningError: if its signature is not its signer's, or it is meant for another run; nothing is noted then.
        RunFolderError: if the log is damaged, or the folder is not that of a run.
    """
    if home := home_of(folder):
        raise UnlearningError(f"{folder} is a shard of {home}; ask for it there, or its part in the whole would stay")
    if not (folder / "partition.json").exists() and read_config(folder).federation.shards > 1:
        raise UnlearningError(UNFINISHED.format(folder))
    run = identity(folder)
    if not signed.is_genuine():
        raise UnlearningError(
            f"{signed.request}: the signature is not that of key {signed.public_key[:12]}; sign again"
        )
    if signed.run != run:
        raise UnlearningError(f"{signed.request}: it was signed for the run {signed.run[:12]}; {folder} is {run[:12]}")
    with open_log(folder) as log:
        same = [known for known in log.requests.values() if known.signed.content == signed.content]
        reason = _not_authorised(signed, keys)
        if reason is None:
            if standing := next((known for known in same if known.phase != REFUSED), None):
                return standing
            reason = _refusal(folder, signed.request, log.requests)
        if reason and (standing := next((known for known in same if known.reason == reason), None)):
            return standing
        facts = signed.note() | ({"reason": reason} if reason else {})
        # a refusal is one line: after a crash between two, what was refused would look received
        return log.add(f"R{len(log.requests) + 1}", REFUSED if reason else "received", facts)


def advance(folder: Path, request: str, phase: str, facts: Mapping[str, Any] | None = None) -> Standing:
    """Note that a request has reached its next phase. Noting the same again changes nothing.

    Args:
        phase: ``contained`` may be left out, no other one.
        facts: plain JSON data; those of ``executed`` name the ``level`` that was reached.

    Raises:
        UnlearningError: unknown request, a phase out of turn, or facts that JSON cannot hold.
        RunFolderError: if the log is damaged or cannot be written.
    """
    plain = json.loads(canonical(dict(facts or {})))
    with open_log(folder) as log:
        standing = named(log.requests, request)
        return log.add(request, phase, plain) if check_step(standing, phase, plain) else standing


def refuse(folder: Path, request: str, reason: str) -> Standing:
    """End a request that cannot be carried through; the same may be asked again."""
    return advance(folder, request, REFUSED, {"reason": reason})


def find_request(folder: Path, request: str) -> Standing:
    """Where one request stands.

    Raises:
        UnlearningError: if there is none of that id.
        RunFolderError: if the log is damaged.
    """
    return named(read_requests(folder), request)


def read_requests(folder: Path) -> dict[str, Standing]:
    """Where every request stands, by id, oldest first; empty where nobody asked for anything.

    Raises:
        RunFolderError: if the log is damaged; names the line.
    """
    return _folded(folder, read_log(folder))


def pending(folder: Path) -> list[Standing]:
    """Requests with something left to do, oldest first: what a killed process, or a round boundary, goes on with."""
    return [standing for standing in read_requests(folder).values() if standing.is_open]


def check_log(folder: Path) -> list[str]:
    """A sentence for every line of the log that is not what was written; empty for a sound log, and for none."""
    chain = read_log(folder)
    problems = [f"{LOG}: {problem}" for problem in chain.problems]
    if not problems:
        forged = [known.id for known in fold(chain.records).values() if not known.signed.is_genuine()]
        problems = [f"{LOG}: {name} does not bear the signature of who asked for it" for name in forged]
    return problems


def read_log(folder: Path) -> Chain:
    """The log as it is, checked and not refused.

    Raises:
        RunFolderError: if it cannot be read.
    """
    path = folder / LOG
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror or error}") from error
    return read_chain(data, identity(folder)) if data else Chain((), (), 0)


@dataclass
class Log:
    """The log while its lock is held.

    Attributes:
        start: what the first record is chained to.
        chain, requests: the log as it was when it was locked.
    """

    path: Path
    start: str
    chain: Chain
    requests: dict[str, Standing]

    def add(self, request: str, phase: str, facts: Mapping[str, Any]) -> Standing:
        """One more line, on the disk when this returns."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        content = {"time": time, "request": request, "phase": phase, "facts": dict(facts)}
        record = link(self.chain.head or self.start, content)
        with writing(self.path), self.path.open("ab") as file:
            file.truncate(self.chain.whole)
            last = self.path.read_bytes()[-1:]
            file.write((b"\n" if last not in (b"", b"\n") else b"") + canonical(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            sync_folder(self.path.parent)
        standing = fold([*self.chain.records, record])[request]
        reach(f"request.{phase}", standing.number)
        return standing


@contextlib.contextmanager
def open_log(folder: Path) -> Iterator[Log]:
    """The log, for this process alone until the block ends.

    Raises:
        RunFolderError: if the log is damaged, or the folder cannot be written or is not that of a run.
    """
    start, path = identity(folder), folder / LOG
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with writing(path):
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits: a line takes milliseconds
        chain = read_log(folder)
        yield Log(path, start, chain, _folded(folder, chain))
    finally:
        os.close(lock)  # and with it the lock, as at any other end of the process


def _folded(folder: Path, chain: Chain) -> dict[str, Standing]:
    if chain.problems:
        raise RunFolderError(f"{folder / LOG}: {chain.problems[0]}; restore the file from a copy")
    return fold(chain.records)


def named(requests: Mapping[str, Standing], name: str) -> Standing:
    """The request of that id. Raises ``UnlearningError`` if there is none."""
    if name not in requests:
        raise UnlearningError(f"there is no request {name}{nearest(name, requests)}")
    return requests[name]


def _origin(folder: Path) -> dict[str, str]:
    """Hashes of the configuration the run was opened with, and of the journal line that says so."""
    path = folder / "journal.jsonl"
    try:
        with path.open("rb") as file:
            line = file.readline()
        opened = json.loads(line)
        return {"config_sha256": opened["config_sha256"], "opened_sha256": hashlib.sha256(line).hexdigest()}
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read ({error.strerror}); requests are about a run that has begun"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} does not begin with the line that opened the run; restore it") from error


# Why a request is refused ------------------------------------------------------------------------------------------


def _not_authorised(signed: SignedRequest, keys: Keys) -> str | None:
    if signed.signer in keys:
        return None
    return f"the key {signed.signer[:16]} is not authorised ({len(keys)} are); ask who keeps the authorised keys"


def _refusal(folder: Path, request: Request, requests: Mapping[str, Standing]) -> str | None:
    """Why a request cannot be done; None if it can be tried."""
    return _repeated(request, requests) or _unknown(folder, request) or _last_of_all(folder, request, requests)


def _unknown(folder: Path, request: Request) -> str | None:
    """Clients, tasks and labels that the run does not have. What is hashed is known to the clients only."""
    if request.kind == "client":
        # one that an approximate action took out can be asked for again
        known = [*_clients(folder), *read_config(folder).clients.exclude]
    elif request.kind == "task":
        known = _tasks(folder)
        if gone := _left_out(folder) & set(request.target):
            return f"task {min(gone)} is left out of the run already (continual.without)"
    elif request.kind == "class":
        known = [str(label) for label in read_json(folder / "labels.json")]
    else:
        return None
    noun = "label" if request.kind == "class" else request.kind
    if not known:
        return f"the run has no {noun}s, so there is no {noun} {request.target[0]} to take out"
    strange = next((name for name in request.target if name not in known), None)
    return None if strange is None else f"unknown {noun} {strange}{nearest(strange, known)}"


def _repeated(request: Request, requests: Mapping[str, Standing]) -> str | None:
    """That all of the target is gone, or that another request is taking all of it out."""
    alike = [known for known in requests.values() if known.request.kind == request.kind]
    gone = {name: known for known in alike if known.erased for name in known.request.target}
    if gone.keys() >= set(request.target):
        by = gone[request.target[0]]
        return f"{request} was already erased by {by.id} (level {by.level})"
    for known in alike:
        if known.is_open and set(known.request.target) >= set(request.target):
            return f"{known.id} asks for {known.request} already and is {known.phase}; let it end first"
    return None


def _last_of_all(folder: Path, request: Request, requests: Mapping[str, Standing]) -> str | None:
    """That no client, or no task, would be left."""
    if request.kind not in ("client", "task"):
        return None
    leaving = {
        name
        for known in requests.values()
        if known.request.kind == request.kind and (known.is_open or known.erased)
        for name in known.request.target
    }
    present = _clients(folder) if request.kind == "client" else _tasks(folder)
    left = set(present) - leaving - set(request.target)
    return None if left else f"it would leave no {request.kind}s; to give up everything, delete the run"


def _clients(folder: Path) -> list[str]:
    return [row["client"] for row in read_json(folder / "partition.json")]


def _tasks(folder: Path) -> list[str]:
    """Names of the tasks that are not left out."""
    continual = read_config(folder).continual
    return [continual.names[place] for place in continual.present] if continual and not continual.live else []


def _left_out(folder: Path) -> set[str]:
    continual = read_config(folder).continual
    return set(continual.without) if continual else set()
