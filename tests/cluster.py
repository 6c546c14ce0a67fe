"""A Ray cluster of several nodes on this machine, each started by ``ray start`` as on machines of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STORE = 100_000_000  # bytes of the object store of a node; the least Ray takes is 75 MB


@dataclass
class Node:
    """One ``ray start --block`` and everything it started, in a process group."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> Path:
        """What ``ray start`` said."""
        return self.folder.with_suffix(".log")

    @property
    def raylet(self) -> int:
        """Process id of the node's own daemon."""
        return next(one.pid for one in self._processes() if one.name() == "raylet")

    def holds_a_worker(self) -> bool:
        """Whether one of our actors lives here."""
        return any(line.startswith("ray::RayWorker") for one in self._processes() for line in one.cmdline()[:1])

    def kill(self) -> None:
        """As if the machine lost power: everything at once, with kill -9."""
        processes = self._processes()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


@dataclass
class Cluster:
    """A head and worker nodes with one core each."""

    folder: Path
    dashboard: str
    environment: dict[str, str]
    head_options: list[str]
    nodes: list[Node]

    @property
    def address(self) -> str:
        """Where the head listens to other nodes, as it wrote it down."""
        return (self.nodes[0].folder / "ray_current_cluster").read_text().strip()

    @property
    def workers(self) -> list[Node]:
        """All nodes but the head, dead ones too."""
        return self.nodes[1:]

    def start_head(self) -> None:
        """Start the head; returns when it takes jobs."""
        self.nodes[:] = [_start(self._new_folder(), self.head_options, self.environment)]
        wait_until(lambda: bool(self.alive() and self.address), "the head starts", 90, self.nodes[0].log)

    def kill(self) -> None:
        """End every process of the cluster, jobs included."""
        for node in self.nodes:
            node.kill()
        # a job's driver is in a session of its own, and works in a copy of the code below the folder
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder) in one.cwd() or any(str(self.folder) in part for part in one.cmdline()):
                    one.kill()

    def add_worker(self) -> Node:
        """Start another node; returns when the head knows it."""
        before = self.alive()
        node = _start(self._new_folder(), ["--address", self.address], self.environment)
        self.nodes.append(node)
        wait_until(lambda: bool(self.alive() - before), "a node joins", 60, node.log)
        return node

    def alive(self) -> set[str]:
        """Ids of the nodes that the head believes to be there."""
        with urllib.request.urlopen(f"{self.dashboard}/nodes?view=summary", timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        return {node["raylet"]["nodeId"] for node in summary if node["raylet"].get("state") == "ALIVE"}

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this cluster would, in the repository; its output is one text."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            timeout=timeout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )

    @contextlib.contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """The same command while something else happens; it does not outlive the block."""
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _new_folder(self) -> Path:
        return self.folder / f"n{len([*self.folder.glob('*.log')])}"


@contextlib.contextmanager
def ray_cluster(workers: int = 2) -> Iterator[Cluster]:
    """A running cluster; all of its processes are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fl", dir="/tmp"))  # a socket's path may have 107 bytes, and Ray adds 80
    port, dashboard, client = free_ports(3)
    options = ["--head", "--port", str(port), "--ray-client-server-port", str(client)]
    options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    cluster = Cluster(folder, f"http://127.0.0.1:{dashboard}", _environment(), options, [])
    try:
        cluster.start_head()
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], what: str, seconds: float, log: Path | None = None) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: naming ``what`` was waited for, with the end of the log.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, KeyError):
            if condition():
                return
        time.sleep(0.05)
    tail = log.read_text()[-2000:] if log and log.exists() else ""
    raise TimeoutError(f"waited {seconds} s until {what}\n{tail}")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(folder: Path, options: list[str], environment: dict[str, str]) -> Node:
    """``ray start`` in a process group of its own. Every port that has a default would be taken twice."""
    folder.mkdir()
    (agent,) = free_ports(1)
    command = [str(BIN / "ray"), "start", "--block", "--num-cpus", "1", "--object-store-memory", str(STORE)]
    command += ["--temp-dir", str(folder), "--dashboard-agent-listen-port", str(agent), "--disable-usage-stats"]
    with folder.with_suffix(".log").open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    return Node(process, folder)


def _environment() -> dict[str, str]:
    """Ours, without what would point at another cluster; ``python`` is this interpreter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # a dead node is noticed after 3 s, not 15: its port refuses at once, while a slow node may take its time
    return kept | ours | {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "500"}
