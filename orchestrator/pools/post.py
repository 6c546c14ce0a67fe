"""Parcels over Flower's Grid: sent to nodes, and collected as answers come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from clients.records import Parcel, parcel_of
from fedlora.errors import FedLoRAError, WireError

_NODES_S = 1.0  # how long an answer to who is there holds


class Post:
    """What the pool needs of a Grid, with its errors in our words.

    Args:
        poll_s: between looks for answers.
    """

    def __init__(self, grid: Grid, poll_s: float):
        self._grid, self.poll_s = grid, poll_s
        self._nodes: tuple[float, dict[int, NodeInfo]] = (-_NODES_S, {})

    def nodes(self) -> dict[int, NodeInfo]:
        """The nodes that are there, by id, with the public keys and the names they were registered under."""
        since, nodes = self._nodes
        if time.monotonic() - since >= _NODES_S:
            nodes = {info.node_id: info for info in self._call(self._grid.get_nodes)}
            self._nodes = time.monotonic(), nodes
        return nodes

    def send(self, node: int, kind: str, parcel: Parcel, ttl: float | None = None) -> str | None:
        """Hand a message over; it waits for its node.

        Args:
            ttl: seconds after which nobody needs an answer any more.

        Returns:
            The id of the message; None where the SuperLink did not take it.
        """
        message = Message(parcel.to_records(), node, kind, ttl=ttl)
        taken = self._call(self._grid.push_messages, [message])
        return taken[0] or None if taken else None

    def collect(self, messages: Iterable[str]) -> dict[str, Parcel | None]:
        """Answers that have come to these messages; None where the node has gone or its app has crashed.

        An answer that is no message of ours reads as a parcel with an error.
        """
        wanted = list(messages)
        answers: dict[str, Parcel | None] = {}
        for message in self._call(self._grid.pull_messages, wanted) if wanted else ():
            identity = message.metadata.reply_to_message_id
            if message.has_error():
                answers[identity] = None
                continue
            try:
                answers[identity] = parcel_of(message.content)
            except WireError as error:
                answers[identity] = Parcel({"error": str(error)})
        return answers

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return list(function(*arguments))
        except (httpx.HTTPError, RunNotRunningException, ConnectionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FedLoRAError(
                f"flower: the SuperLink does not carry this run any more ({reason:.200}); start it again, then give the"
                " same command: the run goes on from its last commit"
            ) from error


def told(text: Any, limit: int = 500) -> str:
    """What somebody else wrote, so that it can be printed: of bounded length, without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:limit])
