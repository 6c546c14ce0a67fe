"""A real SuperLink with TLS and node authentication, and real SuperNodes, as processes on this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.flower.keys import write_certificates, write_node_key
from tests.flower_grid import node_config

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def wait_until(what: Callable[[], object], seconds: float = 120.0) -> None:
    """Until a condition holds."""
    ends = time.monotonic() + seconds
    while not what():
        if time.monotonic() > ends:
            pytest.fail(f"not within {seconds:g} s")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """One federation in a folder of its own.

    Args:
        isolation: of the SuperLink: ``process`` for ``fedlora run --pool flower``, ``subprocess`` for ``flwr run``.
    """

    def __init__(self, folder: Path, isolation: str = "process"):
        self.folder, self.isolation, self.port = folder, isolation, free_port()
        self.certificates, self.secret = folder / "certs", folder / "secret"
        write_certificates(self.certificates, ["127.0.0.1"])
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        )
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **threads, **quiet, "FLWR_HOME": str(home), "PATH": path}
        self.environment["PYTHONPATH"] = str(ROOT)
        self._running: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.link = self.start_link()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A process in a group of its own, with its output in ``<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_link(self) -> subprocess.Popen[bytes]:
        """The SuperLink; again on the same port and database after it was killed."""
        tls = [f"--ssl-{kind}={self.certificates / name}" for kind, name in _TLS]
        settings = ["--isolation", self.isolation, "--database", str(self.folder / "state.db")]
        settings += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        if self.isolation == "process":
            self.secret.write_bytes(b"only who may take runs knows this")
            settings += ["--superexec-auth-secret-file", str(self.secret)]
        process = self.start("superlink", "fedlora", "flower", "superlink", *tls, *settings, "--port", str(self.port))
        wait_until(lambda: self.answers() or process.poll() is not None)
        assert process.poll() is None, self.log("superlink")
        return process

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def flwr(self, *arguments: str) -> str:
        """What a command of Flower's own line prints."""
        done = subprocess.run(
            ["flwr", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def register(self, client: str) -> None:
        """Make a node's key pair, and make it known to the SuperLink under the client's name."""
        write_node_key(self.folder / "keys" / client)
        self.flwr("supernode", "register", str(self.folder / "keys" / f"{client}.pub"), "here", "--name", client)

    def start_node(
        self, client: str, data: Path, rank: int, plain: bool = False, model: str = "builtin:tiny-bert"
    ) -> subprocess.Popen[bytes]:
        """A node as docs/flower.md starts it.

        Args:
            plain: with Flower's own command, which runs the code that the SuperLink delivers.
        """
        own = node_config(self.folder / "nodes" / client, client, data, rank, model=model)
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
        program = ["flower-supernode", "--port", str(free_port())] if plain else ["fedlora", "flower", "supernode"]
        return self.start(client, *program, *self._joins(client), "--node-config", told)

    def _joins(self, key: str) -> list[str]:
        trust = ["--superlink", self.address, "--root-certificates", str(self.certificates / "ca.crt")]
        return [*trust, "--auth-supernode-private-key", str(self.folder / "keys" / key)]

    def run(self, config: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """``fedlora run --pool flower``, whose events go to ``<name of the configuration>.log``."""
        there = ["--pool", "flower", "--address", self.address, "--json"]
        trust = {"root_certificates": self.certificates / "ca.crt", "secret_file": self.secret}
        settings = [word for key, path in trust.items() for word in ("--set", f"flower.{key}={path}")]
        return self.start(config.stem, "fedlora", "run", str(config), *there, *settings, *arguments)

    def close(self) -> None:
        for process in self._running:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """A process and all it has started, at once and without a goodbye."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def site(folder: Path, isolation: str = "process") -> Iterator[Site]:
    """A federation that leaves no process behind."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = Site(folder, isolation)
    try:
        yield opened
    finally:
        opened.close()


_TLS = (("ca-certfile", "ca.crt"), ("certfile", "server.pem"), ("keyfile", "server.key"))
