"""One orchestrator plays a run at a time; whoever lost the run commits nothing more.

The run folder decides. Each holder creates ``lease.<token>.json``, which the file system lets only one process do,
keeps it locked while it lives, and touches it as its heartbeat; its token is one more than any before it. A run is free
when the newest of these files was released, when its lock is gone (kill -9 does that at once), or when its heartbeat
stood still for ``lease_s``. A Redis server, where there is one, tells the same to orchestrators that do not share the
folder; without its answer a run goes on under the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import LeaseHeld, LeaseLost
from orchestrator.stores.files import writing

if TYPE_CHECKING:
    from orchestrator.stores.redis import RedisStore


@dataclass(frozen=True)
class Holder:
    """Who plays a run.

    Attributes:
        id: of this hold, not of the process.
        token: fencing token; grows with every holder.
        since: UTC time in ISO format.
        lease_s: seconds of silence after which the run may be taken over.
    """

    id: str
    token: int
    host: str
    pid: int
    since: str
    lease_s: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def hold(folder: Path, redis_url: str | None, lease_s: float, name: str | None = None) -> Iterator[Lease]:
    """Own a run until the block ends.

    Args:
        folder: the run folder; created where it is missing.
        redis_url: server that mirrors the lease; unreachable is as good as none.
        lease_s: seconds of silence after which others may take over.
        name: of the run on the server; default the folder's path.

    Raises:
        LeaseHeld: another process plays the run; nothing in its folder was touched.
        RunFolderError: the folder cannot be written.
        ConfigError: the URL is not one of a Redis server.
    """
    store = None
    if redis_url:
        from orchestrator.stores.redis import RedisStore  # most runs have no server to import a client for

        store = RedisStore(redis_url, name or str(folder.resolve()), lease_s)
    lease = Lease(folder, store, lease_s)
    try:
        yield lease
    finally:
        lease.release()


def refuse_if_held(folder: Path) -> None:
    """Say so if somebody plays the run right now.

    Raises:
        LeaseHeld: names the holder.
    """
    if holder := current_holder(folder):
        raise _held(folder, holder)


def current_holder(folder: Path) -> Holder | None:
    """Who plays a run right now, as far as its folder tells; None if nobody does. Changes nothing."""
    seen = _newest(folder)
    return seen.holder if seen and not seen.free() and not seen.stale() else None


class Lease:
    """A run that this process owns.

    Attributes:
        holder: how others see this process.
        store: the Redis mirror, or None.
    """

    def __init__(self, folder: Path, store: RedisStore | None, lease_s: float):
        self._folder, self.store = folder, store
        self._rival: Mapping[str, Any] | None = None
        with writing(folder):
            self.holder, self._path, self._file = _claim(folder, store, lease_s)
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Make sure that this process still owns the run; call it before every commit.

        Raises:
            LeaseLost: somebody else has taken over; what this process would write now is not wanted.
        """
        if self.store and not self._rival:
            self._rival = self.store.renew(asdict(self.holder))
        if not self._rival and _is_there(self._path):
            return
        newest = _newest(self._folder)
        other = Holder(**self._rival) if self._rival else newest.holder if newest else None
        raise LeaseLost(
            f"{self._folder}: this process was silent for too long and lost the run to {other or 'nobody we know'};"
            f" it wrote nothing more. Follow the run with: fedlora watch {self._folder}"
        )

    def news(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events about the mirror that the user has not heard of: ``store_down``, ``store_up``."""
        while self.store and self.store.news:
            yield self.store.news.popleft()

    def release(self) -> None:
        """Let the next one in without waiting. Safe to call twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._keeper.join()
        if self.store:
            self.store.close(asdict(self.holder))
        _release(self._file)

    def _keep(self) -> None:
        """Stay alive in the eyes of others, until the end or until somebody else took over."""
        while not self._ended.wait(self.holder.lease_s / 3):
            with contextlib.suppress(OSError):
                os.utime(self._file)
            if self.store and not self._rival:
                self._rival = self.store.beat(asdict(self.holder))


@dataclass(frozen=True)
class _Seen:
    """A lease file at one moment. ``holder`` is None while it is being written."""

    holder: Holder | None
    released: bool
    locked: bool
    beat: int

    def stale(self) -> bool:
        limit = self.holder.lease_s if self.holder else 0.0
        return abs(time.time() - self.beat / 1e9) > limit

    def free(self) -> bool | None:
        """Whether the run can be taken; None if only watching the heartbeat can tell."""
        if self.released:
            return True
        if self.holder and self.locked and not self.stale():
            return False
        if self.holder and not self.locked and self.holder.host == socket.gethostname():
            return True  # the lock goes with the process; from another host it may just not be visible
        return None


def _claim(folder: Path, store: RedisStore | None, lease_s: float) -> tuple[Holder, Path, int]:
    """Create the next lease file and lock it."""
    while True:
        newest, previous = _wait_until_free(folder, lease_s)
        floor, rival = store.peek() if store else (0, None)
        if rival and not (previous and rival["id"] == previous.id):
            raise _held(folder, Holder(**rival))
        token = max(newest, floor) + 1
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = Holder(uuid.uuid4().hex, token, socket.gethostname(), os.getpid(), since, lease_s)
        folder.mkdir(parents=True, exist_ok=True)
        path = _path(folder, token)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o644)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: heartbeats have to do
            fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, json.dumps(asdict(holder)).encode() + b"\n")
        files = _lease_files(folder)
        if not files or files[-1][0] != token:  # we were slow, and others have come and gone meanwhile
            path.unlink(missing_ok=True)
            os.close(file)
            continue
        for _, old in files[:-1]:
            old.unlink(missing_ok=True)
        rival = store.claim(asdict(holder), previous.id if previous else "") if store else None
        if rival:
            _release(file)
            raise _held(folder, Holder(**rival))
        return holder, path, file


def _wait_until_free(folder: Path, lease_s: float) -> tuple[int, Holder | None]:
    """The newest token and its holder, once nobody plays the run any more. Waits at most for one silent lease.

    Raises:
        LeaseHeld: its holder is alive.
    """
    while files := _lease_files(folder):
        token, path = files[-1]
        with contextlib.suppress(FileNotFoundError):
            seen = _look(path)
            free = seen.free()
            if free is None:
                free = _stands_still(path, seen, seen.holder.lease_s if seen.holder else lease_s)
            if free:
                return token, seen.holder
            if seen.holder:
                raise _held(folder, seen.holder)
    return 0, None


def _stands_still(path: Path, seen: _Seen, lease_s: float) -> bool:
    """Watch a heartbeat by our own clock; clocks of different machines need not agree."""
    deadline = time.monotonic() + lease_s
    while time.monotonic() < deadline:
        now = _look(path)
        if now.released:
            return True
        if now.beat != seen.beat:
            return False
        time.sleep(min(0.05, lease_s / 20))
    return True


def _look(path: Path) -> _Seen:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
            locked = False
        except BlockingIOError:
            locked = True
        except OSError:
            locked = False
        beat = os.fstat(file.fileno()).st_mtime_ns
        lines = file.read().splitlines()
    holder = None
    with contextlib.suppress(ValueError, TypeError, IndexError):
        holder = Holder(**json.loads(lines[0]))
    return _Seen(holder, len(lines) > 1, locked, beat)


def _newest(folder: Path) -> _Seen | None:
    files = _lease_files(folder)
    try:
        return _look(files[-1][1]) if files else None
    except OSError:
        return None


def _is_there(path: Path) -> bool:
    """Opened, since a network file system answers that from the server and a mere ``stat`` from its cache."""
    try:
        path.open("rb").close()
    except OSError:  # a stale handle of a network folder is no proof of ownership either
        return False
    return True


def _release(file: int) -> None:
    with contextlib.suppress(OSError):
        os.write(file, b"released\n")
    os.close(file)


def _held(folder: Path, holder: Holder) -> LeaseHeld:
    return LeaseHeld(
        f"{folder} is being played by {holder}; wait for it, follow it with: fedlora watch {folder}, or stop it first."
        f" Should it be dead, its lease ends after {holder.lease_s:g} s of silence"
    )


def _lease_files(folder: Path) -> list[tuple[int, Path]]:
    """By token, oldest first."""
    found = ((path.name.split("."), path) for path in folder.glob("lease.*.json"))
    return sorted((int(parts[1]), path) for parts, path in found if len(parts) == 3 and parts[1].isdigit())


def _path(folder: Path, token: int) -> Path:
    return folder / f"lease.{token}.json"
