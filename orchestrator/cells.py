"""The runs of a comparison: one after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError, RunInterrupted
from orchestrator import launch
from orchestrator.launch import Listener
from orchestrator.stores.files import read_config, read_json, read_lines


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison.

    Attributes:
        label: what a person calls it, such as ``flexlora, seed 1``.
        config: what is run, and where.
    """

    label: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def finished(self) -> bool:
        """Whether this very run is already there, from start to end."""
        path = self.folder / "summary.json"
        if not path.exists() or read_json(path).get("status") != "finished":
            return False
        return read_config(self.folder).sha256() == self.config.sha256()


@dataclass(frozen=True)
class Failure:
    """Why a cell has no numbers; ``traceback`` only where the problem was not one of the user's."""

    reason: str
    traceback: str = ""


def play_cells(cells: Sequence[Cell], jobs: int, listen: Listener) -> Iterator[tuple[Cell, Failure | None]]:
    """Run cells, ``jobs`` at a time, and give each when it ends. A cell that fails costs itself only.

    Raises:
        RunInterrupted, KeyboardInterrupt: the user stopped it; what is committed stays.
    """
    if jobs == 1 or len(cells) == 1:
        for cell in cells:
            listen("cell_started", {"run": cell.label})
            yield cell, _play(cell.config, listen)
    else:
        yield from _in_processes(cells, jobs, listen)


def numbers(cell: Cell) -> dict[str, Any]:
    """What a finished run comes to, read from its folder.

    Raises:
        RunFolderError: if a file in it is missing or damaged.
    """
    summary, rounds = read_json(cell.folder / "summary.json"), read_lines(cell.folder / "metrics.jsonl")
    spread = rounds[-1]["clients"] if rounds else None
    sent, curve = 0, []
    if summary["initial"]:
        curve.append({"round": 0, "bytes_up": 0, "accuracy": summary["initial"]["accuracy"]})
    for row in rounds:
        sent += row["bytes_up"]
        if row["eval"]:
            curve.append({"round": row["round"], "bytes_up": sent, "accuracy": row["eval"]["accuracy"]})
    return {
        "metric": summary["metric"],
        "accuracy": summary["final"]["accuracy"],
        "loss": summary["final"]["loss"],
        "worst_client": spread["accuracy"]["worst"] if spread else None,
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "server_s": summary["seconds"].get("aggregate", 0.0),
        "wall_s": summary["wall_s"],
        "curve": curve,
    }


def _play(config: RunConfig, listen: Listener) -> Failure | None:
    try:
        launch.run(config, listen)
    except RunInterrupted:
        raise
    except FedLoRAError as error:
        return Failure(str(error))
    except Exception as error:  # noqa: BLE001 - one cell's bug must not cost the others their hours
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
    return None


def _in_processes(cells: Sequence[Cell], jobs: int, listen: Listener) -> Iterator[tuple[Cell, Failure | None]]:
    # forks of a server that has imported everything and run nothing: a fork of this process, whose torch has started
    # threads, can hang
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.launch", "clients.runtime"])
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Cell] = {}
    waiting = deque(cells)

    def start() -> Connection:
        ours, theirs = context.Pipe()
        workers[ours] = process = context.Process(target=_work, args=(theirs,))
        process.start()
        theirs.close()  # only the worker's end is left, so that its death ends the pipe
        return ours

    def give(worker: Connection) -> None:
        if waiting:
            busy[worker] = cell = waiting.popleft()
            listen("cell_started", {"run": cell.label})
            with suppress(OSError):  # a worker that has died is noticed where its answer is awaited
                worker.send(cell.config)

    try:
        for _ in range(min(jobs, len(cells))):
            give(start())
        while busy:
            for worker in wait(list(busy)):
                assert isinstance(worker, Connection)
                cell = busy.pop(worker)
                try:
                    failure = worker.recv()
                except (EOFError, OSError):
                    process = workers.pop(worker)
                    process.join()
                    failure = Failure(f"its process {_end(process.exitcode)}; repeat the command to go on with it")
                    if waiting:
                        give(start())
                else:
                    give(worker)
                yield cell, failure
    finally:
        for worker, process in workers.items():
            if worker in busy:
                process.terminate()  # its run abandons the round, and keeps what is committed
            worker.close()
        for process in workers.values():
            process.join()


def _work(pipe: Connection) -> None:
    """A worker's life: cells in, failures out, until the pipe ends."""
    signal(SIGINT, SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides what it stops
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            pipe.send(_play(pipe.recv(), lambda event, fields: None))
    except (EOFError, BrokenPipeError, RunInterrupted, KeyboardInterrupt):
        pipe.close()


def _end_with_parent() -> None:
    """Die when the parent was killed: the repeated command must not meet us writing in the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end(code: int | None) -> str:
    return f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
