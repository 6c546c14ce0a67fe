"""Flower's SuperLink with one door for nodes and another for its owner.

Since 1.41 one port carries the Fleet API, where nodes are authenticated, and the Control and Runtime APIs, where nobody
is: whoever reaches those can register a node, start a run or take one over. Here they answer this machine only.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from importlib import import_module
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN = ("/v1/fleet/", "/health")  # to nodes


class FleetOnly:
    """ASGI middleware: from elsewhere, only what nodes need."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind, path = scope["type"], scope.get("path", "")
        if kind == "lifespan" or _is_here(scope.get("client")) or (path.startswith(_OPEN) and ".." not in path):
            await self._app(scope, receive, send)
            return
        text = b"only the Fleet API answers from elsewhere; use the SuperLink's own machine, or a tunnel to it\n"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def _is_here(client: Any) -> bool:
    try:
        address = ipaddress.ip_address(client[0])
    except (TypeError, ValueError, IndexError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def superlink(arguments: Sequence[str]) -> None:
    """``flower-superlink`` with these arguments, behind ``FleetOnly``; returns when it is stopped."""
    import uvicorn
    from flwr.superlink.main import create_app

    flower = import_module("flwr.superlink.cli.flower_superlink")  # its package has a function of the same name
    sys.argv = ["flower-superlink", *arguments]
    settings = flower._parse_superlink_lifespan_config()
    app = create_app(settings, flower.SuperLinkLifespan)
    tls = {"ssl_certfile": settings.ssl_certfile, "ssl_keyfile": settings.ssl_keyfile}
    # no header of a proxy may say where a request comes from
    uvicorn.run(FleetOnly(app), host=settings.host, port=settings.port, proxy_headers=False, log_level="info", **tls)
