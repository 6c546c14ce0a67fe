"""Telling a run's Redis server, where there is one, what happens in the run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from fedlora.config import RunConfig
from orchestrator.lease import Lease

STATUS = {
    **dict.fromkeys(("run_opened", "run_resumed", "run_started", "round_committed"), "running"),
    "run_finished": "finished",
    "run_failed": "failed",
    "run_interrupted": "interrupted",
}


class Announcer:
    """Publishes every event, and what follows from it: the latest pointer and who takes part."""

    def __init__(self, lease: Lease, config: RunConfig, place: str):
        self._store = lease.store
        self._pointer: dict[str, Any] = {
            "name": config.name or place.rpartition("/")[2],
            "folder": place,
            "host": socket.gethostname(),
            "round": 0,
            "rounds": config.rounds,
            "status": "running",
            "adapter_sha256": None,
        }
        self._host = {"host": socket.gethostname(), "pid": os.getpid()}

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Pass on one record of the journal, which has ``time``, ``event`` and its fields. Never fails."""
        if self._store is None:
            return
        event = record["event"]
        self._store.publish(record)
        if event in ("run_opened", "run_resumed"):
            self._store.register("orchestrator", str(os.getpid()), self._host)
        if event == "worker_ready":
            facts = {name: value for name, value in record.items() if name not in ("time", "event")}
            self._store.register("worker", f"{self._host['host']}:{record['pid']}", facts)
        if event in STATUS:
            moved = {name: record[name] for name in ("round", "adapter_sha256") if name in record}
            self._pointer |= {**moved, "status": STATUS[event], "time": record["time"]}
            self._store.point(self._pointer)
