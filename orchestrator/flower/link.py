"""Playing a run from here on a SuperLink elsewhere: this process takes the part of Flower's ServerApp.

A SuperLink started with ``--isolation process`` leaves ServerApps to whoever asks for them. A run is started over its
Control API, and its ServerApp task taken over its Runtime API; the run folder, the screen and the exit code stay here.
The app that is handed in holds no code: nodes never run what a SuperLink sends them (see ``clients.flower_worker``).
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from clients.flower_runtime import heartbeat, patient, runtime_client
from fedlora.config import FlowerConfig
from fedlora.errors import ConfigError, FedLoRAError
from orchestrator.flower.app import PYPROJECT

TAKE_S = 20.0  # how long a SuperLink may take to hand out the task of a run that it has accepted

_STUB = b"""\
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    raise RuntimeError("fedlora run --pool flower plays this run itself: start the SuperLink with --isolation process")
"""
_NO_CLIENT = b"""\
from flwr.clientapp import ClientApp

app = ClientApp()  # a node runs the app that is installed there: fedlora flower supernode
"""


def connect(settings: FlowerConfig) -> tuple[Grid, Callable[[], None]]:
    """Start a run on a SuperLink and take its ServerApp task.

    Returns:
        The Grid, and what ends the run.

    Raises:
        FedLoRAError: if no SuperLink answers at the address, or it does not hand the task out.
        ConfigError: if a file of certificates or secrets cannot be read.
    """
    assert settings.address is not None
    address = settings.address
    root = None if settings.insecure else _read(settings.root_certificates, "root_certificates")
    secret = _read(settings.secret_file, "secret_file")
    if root is None and not settings.insecure:
        raise ConfigError(
            "flower.root_certificates: give the PEM file of the authority that signed the SuperLink's certificate, or"
            " set flower.insecure: true to try things out on one machine"
        )
    try:
        run_id = _start(settings, root)
        token = _take(settings, root, secret, run_id)
        grid = HttpGrid(address, settings.insecure, root, token=token)
        grid._retry_invoker = patient(settings.wait_s)
        pulled = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    except httpx.HTTPStatusError as error:
        raise FedLoRAError(f"flower: the SuperLink at {address} refuses: {_said(error.response)}") from error
    except httpx.HTTPError as error:
        raise FedLoRAError(f"flower: no SuperLink answers at {address} ({error})") from error
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = pulled.task_id, run_id, pulled.context.node_id
    grid.set_run(run_from_proto(pulled.run))
    beating = heartbeat(grid._runtime_client)

    def close() -> None:
        beating.stop()
        grid._retry_invoker.max_tries = 1
        with contextlib.suppress(Exception):  # a SuperLink that is gone ends the run by itself
            grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
        grid.close()

    return grid, close


def _start(settings: FlowerConfig, root: bytes | None) -> int:
    """The id of a new run of an app that holds no code of ours."""
    files = {"pyproject.toml": PYPROJECT.encode(), "config.yaml": b""}
    files |= {"server_app.py": _STUB, "client_app.py": _NO_CLIENT}
    content, _ = build_fab_from_files(files)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    versions = [RuntimeVersionHttpInterceptor(component_name="flwr-cli")]
    client = ControlHttpClient.from_server_address(str(settings.address), settings.insecure, root, versions)
    with contextlib.closing(client):
        started = client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
    return int(started.run_id)


def _take(settings: FlowerConfig, root: bytes | None, secret: bytes | None, run_id: int) -> str:
    """The token of the run's ServerApp task. Whatever an earlier process left waiting is ended on the way."""
    where = str(settings.address), settings.insecure, root
    ends = time.monotonic() + TAKE_S
    with contextlib.closing(runtime_client(*where, secret=secret)) as client:
        while time.monotonic() < ends:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if found.token and found.task.run_id == run_id:
                return str(found.token)
            if not found.token:
                time.sleep(0.2)
                continue
            with contextlib.closing(runtime_client(*where, token=found.token)) as other:
                other.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.STOPPED, details="nobody plays it"))
    raise FedLoRAError(
        f"flower: the SuperLink at {settings.address} started the run and did not hand it over; start it with"
        " --isolation process, and end other programs that take its ServerApps (flower-superexec)"
    )


def _read(path: str | None, key: str) -> bytes | None:
    try:
        return None if path is None else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"flower.{key}: cannot read {path}: {error.strerror or error}") from error


def _said(response: httpx.Response) -> str:
    return f"HTTP {response.status_code} {' '.join(response.text.split())[:200]}"
