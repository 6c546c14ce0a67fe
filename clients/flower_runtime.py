"""The Runtime API of a SuperLink or SuperNode, as a process that is not Flower's own uses it."""

from __future__ import annotations

import httpx
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient

_BUSY = frozenset({429, 502, 503, 504})  # worth another try


def runtime_client(
    address: str, insecure: bool, root: bytes | None, *, token: str = "", secret: bytes | None = None
) -> RuntimeHttpClient:
    """A client that asks for tasks, or with a token works on one.

    Args:
        address: host:port.
        root: PEM of the authority that signed the server's certificate.
        secret: of the SuperExec, for asking.
    """
    interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    if secret:
        methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))
    return RuntimeHttpClient.from_server_address(address, insecure, root, interceptors, retry_invoker=patient(30.0))


def patient(wait_s: float) -> RetryInvoker:
    """Tries again for so long while nobody answers. Flower's own waits forever, and ends the process on a refusal."""

    def hopeless(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code not in _BUSY
        return any(word in str(error).lower() for word in ("certificate", "ssl", "tls"))

    recoverable = (httpx.TransportError, httpx.HTTPStatusError)
    return RetryInvoker(lambda: exponential(max_delay=5), recoverable, None, wait_s, should_giveup=hopeless)


def heartbeat(client: RuntimeHttpClient) -> HeartbeatSender:
    """Says in the background that the task is being worked on; whether it still counts shows elsewhere."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPStatusError:
            return True  # a task that was given up: no beat brings it back
        except httpx.HTTPError:
            return False  # nobody answered; soon again
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    return sender
