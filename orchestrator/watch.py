"""Following a run that another process plays: its folder's journal, or its events on a Redis server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedlora.errors import RunFolderError, RunInterrupted
from orchestrator.lease import current_holder
from orchestrator.runs import find
from orchestrator.stores.files import read_json

if TYPE_CHECKING:
    from orchestrator.stores.redis import RedisView

Listener = Callable[[str, Mapping[str, Any]], None]
ENDS = ("run_finished", "run_failed", "run_interrupted")
POLL_S = 0.2


class Source(Protocol):
    """Where a run's records come from."""

    def records(self) -> list[dict[str, Any]]:
        """Those that came since the last call, in order; after a short wait where there are none.

        Raises:
            ConnectionError: they cannot be had at the moment. So does ``is_played``.
        """
        ...

    def is_played(self) -> bool:
        """Whether somebody plays the run right now."""
        ...

    def summary(self) -> dict[str, Any] | None:
        """The finished run's own; None where it cannot be seen."""
        ...


def watch(source: Source, listen: Listener) -> tuple[int, dict[str, Any]]:
    """Tell every event, those of the past first, until the run has ended.

    A run that nobody plays and that has not ended is waited for: it may be about to be resumed, and ``run_silent`` says
    so once.

    Returns:
        The exit code of the run itself, and the record it ended with.
    """
    last: dict[str, Any] = {}
    unreachable = silent = False
    while True:
        try:
            played = source.is_played()  # before the records: what the last holder wrote is then among them
            records = source.records()
        except ConnectionError as error:
            if not unreachable:
                listen("store_down", {"url": "the server", "reason": str(error)})
            unreachable = True
            time.sleep(POLL_S)
            continue
        if unreachable:
            listen("store_up", {"url": "the server"})
        unreachable = False
        for last in records:
            listen(last["event"], {name: value for name, value in last.items() if name != "event"})
        event = last.get("event")
        over = not played and not records
        if event == "run_finished" or (event in ENDS and over):
            return _exit_code(last), last
        if over and not silent:
            listen("run_silent", {})
        silent = over


def open_source(run: str, redis_url: str | None) -> Source:
    """Find a run by its folder or, on a Redis server, by its name or id.

    Raises:
        RunFolderError: there is no such run; names those there are.
    """
    folder = Path(run)
    if (folder / "config.yaml").is_file():
        return Journal(folder)
    known = sorted({str(path) for near in (folder.parent, Path("runs")) if near.is_dir() for path in find(near)})
    told = f"run folders here: {', '.join(known[:8])}" if known else "there are no run folders here"
    if not redis_url:
        raise RunFolderError(f"{run} is not a run folder; {told}. A run elsewhere needs --redis or $FEDLORA_REDIS")
    from orchestrator.stores.redis import RedisView

    view = RedisView(redis_url)
    try:
        runs = view.runs()
    except ConnectionError as error:
        raise RunFolderError(f"{run} is not a run folder, and {error}; {told}") from error
    # the newest of equal names: an id tells them apart
    for pointer in runs:
        if run in (pointer["id"], pointer["name"], pointer["folder"], Path(pointer["folder"]).name):
            return Stream(view, pointer["id"])
    there = ", ".join(f"{pointer['name']} ({pointer['id']}, {pointer['status']})" for pointer in runs[:8]) or "no run"
    raise RunFolderError(f"{view.url} knows no run {run}; it knows {there}, and {told}")


class Journal:
    """A run folder's journal, followed as it grows. It may be torn, replaced or not there yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / "journal.jsonl"
        self._offset, self._first = 0, b""

    def records(self) -> list[dict[str, Any]]:
        """See ``Source``."""
        whole = b""
        if self._path.is_file():
            with self._path.open("rb") as file:
                first = file.readline()
                if first != self._first or os.fstat(file.fileno()).st_size < self._offset:
                    self._offset, self._first = 0, first  # the run was started over
                file.seek(self._offset)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offset += len(whole)
        if not whole:
            time.sleep(POLL_S)
        return [json.loads(line) for line in whole.splitlines()]

    def is_played(self) -> bool:
        """See ``Source``."""
        return current_holder(self.folder) is not None

    def summary(self) -> dict[str, Any] | None:
        """The run's own, if it has finished."""
        path = self.folder / "summary.json"
        return read_json(path) if path.is_file() else None


class Stream:
    """A run's events on a Redis server."""

    def __init__(self, view: RedisView, run: str):
        self._view, self._run, self._after = view, run, "0-0"

    def records(self) -> list[dict[str, Any]]:
        """See ``Source``."""
        found = list(self._view.events(self._run, self._after))
        if found:
            self._after = found[-1][0]
        return [record for _, record in found]

    def is_played(self) -> bool:
        """See ``Source``."""
        return self._view.holder(self._run) is not None

    def summary(self) -> None:
        """It lies in the run folder, which need not be on this machine."""


def _exit_code(record: Mapping[str, Any]) -> int:
    codes = {"run_finished": 0, "run_interrupted": RunInterrupted.exit_code}
    return int(record.get("exit_code", codes.get(record["event"], 1)))
