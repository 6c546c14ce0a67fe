"""A node's own executor: runs the installed ClientApp, whatever app a SuperLink delivers.

Flower's SuperNode takes an app's code from the SuperLink and starts it. Started with ``--isolation process`` it only
offers each message to an executor; this one opens no bundle, knows a single app, and keeps its base model loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from clients.flower import app
from clients.flower_runtime import heartbeat, runtime_client
from fedlora.errors import ConfigError, FedLoRAError

_LOG = logging.getLogger(__name__)
_POLL_S = 0.2
_START_S = 60.0  # that a SuperNode takes at most before it answers its executor
_PR_SET_PDEATHSIG = 1  # prctl(2)
_OURS = ("--isolation", "--superexec-auth-secret-file", "--port", "--host")


def supernode(arguments: Sequence[str]) -> int:
    """A SuperNode and its executor, until one of them ends.

    Args:
        arguments: of ``flower-supernode``.

    Returns:
        The exit code of the SuperNode.

    Raises:
        ConfigError: for an argument that is not the user's to give here.
        FedLoRAError: if the SuperNode cannot be started.
    """
    if odd := next((word for word in arguments if word.split("=")[0] in _OURS), None):
        raise ConfigError(f"flower supernode: leave {odd} out; it is what keeps foreign code from being run here")
    port = _free_port()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop is a Ctrl-C
    with tempfile.TemporaryDirectory(prefix="fedlora-node-") as folder:
        secret = Path(folder) / "secret"
        secret.touch(mode=0o600)
        secret.write_bytes(secrets.token_bytes(32))
        ours = ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
        command = ["flower-supernode", *arguments, *ours, "--superexec-auth-secret-file", str(secret)]
        program = Path(sys.executable).with_name(command[0])
        command[0] = str(program) if program.exists() else command[0]
        try:
            process = subprocess.Popen(command, preexec_fn=_end_with(os.getpid()))
        except OSError as error:
            raise FedLoRAError(f"flower: cannot start flower-supernode ({error}); is Flower installed?") from error
        try:
            work(f"127.0.0.1:{port}", secret.read_bytes(), app, process)
        except KeyboardInterrupt:
            _LOG.warning("stopped")
        finally:
            process.terminate()  # it says goodbye to the SuperLink, so that it can come back at once
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        return process.wait()


def work(address: str, secret: bytes, client_app: ClientApp, process: subprocess.Popen[bytes]) -> None:
    """Execute one message after another until the SuperNode ends."""
    patient_until = time.monotonic() + _START_S
    with contextlib.closing(runtime_client(address, True, None, secret=secret)) as client:
        client._retry_invoker = None  # here silence means that the SuperNode starts or ends
        while process.poll() is None:
            try:
                found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            except httpx.TransportError:
                if time.monotonic() > patient_until:
                    return
                time.sleep(_POLL_S)
                continue
            patient_until = time.monotonic() + _START_S
            if found.token:
                _execute(address, found.token, client_app)
            else:
                time.sleep(_POLL_S)


def _execute(address: str, token: str, client_app: ClientApp) -> None:
    """One message: pulled, answered, pushed. What goes wrong with it costs this message."""
    with contextlib.closing(runtime_client(address, True, None, token=token)) as client:
        beating = heartbeat(client)
        context: Context | None = None
        try:
            message, context, *_ = pull_task_input(client)  # the app that came with it is left unopened
            try:
                reply = client_app(message, context)
            except Exception as error:  # noqa: BLE001 - an unknown kind of message, or a node-config that lacks something
                _LOG.exception("a message could not be answered")
                reply = Message(Error(code=2, reason=f"{type(error).__name__}: {error}"[:500]), reply_to=message)
            push_message(client, reply, context)
            push_task_output(client, context, SubStatus.COMPLETED, "")
        except (httpx.HTTPError, RuntimeError, ValueError):
            _LOG.exception("a message was lost")
            push_task_output(client, context, SubStatus.FAILED, "the executor could not carry the message")
        finally:
            beating.stop()


def _end_with(parent: int) -> Callable[[], None]:
    """Makes a child end when this process is killed: a SuperNode without an executor would only seem to be there."""

    def ask() -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux only
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # it was killed in between

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
