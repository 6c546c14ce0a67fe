"""A Grid in this process: real Flower messages, taken apart and put together as on the wire, to real ClientApps."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from clients.attempt import OpenRuntime, open_runtime
from clients.flower import make_app
from clients.records import Parcel, parcel_of

Tamper = Callable[[str, Parcel], Parcel]


class Node:
    """A SuperNode with its ClientApp; every message in a thread of its own, as in a process of its own.

    Args:
        turn: held while it works. Nodes here share torch's one generator, as they do not elsewhere.
    """

    def __init__(self, app: ClientApp, config: Mapping[str, Any], turn: AbstractContextManager[Any]):
        self.app, self.config, self.turn = app, dict(config), turn
        self.name, self.key, self.there = "", b"", True
        self.tamper: Tamper | None = None  # what a hostile node makes of its honest answers, by type of message
        self.received: list[Message] = []

    def handle(self, message: Message, node_id: int) -> Message:
        self.received.append(message)
        context = Context(1, node_id, dict(self.config), RecordDict(), {})
        try:
            with self.turn:
                reply = self.app(message, context)
        except Exception as error:  # noqa: BLE001 - as flwr-clientapp does
            return Message(Error(2, str(error)), reply_to=message)
        if self.tamper is None:
            return reply
        made = self.tamper(message.metadata.message_type, parcel_of(reply.content))
        return Message(made.to_records(), reply_to=message)


class MemoryGrid(Grid):
    """Carries messages between a pool and nodes in this process."""

    def __init__(self, nodes: Mapping[int, Node]):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = dict(nodes)
        self._replies: dict[str, Message | None] = {}
        self._to: dict[str, int] = {}
        self._messages: dict[str, Message] = {}
        self._locks = {node: threading.Lock() for node in nodes}

    def set_run(self, run: Any) -> None:
        pass

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        there = {number: node for number, node in self.nodes.items() if node.there}
        return [NodeInfo(node_id=number, name=node.name, public_key=node.key) for number, node in there.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(_over_the_wire(message)) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for identity in message_ids:
            reply = self._replies.get(identity)
            if reply is not None:
                found.append(self._replies.pop(identity))
            elif not self.nodes[self._to[identity]].there:
                found.append(Message(Error(5, "node unavailable"), reply_to=self._sent(identity)))
        return [message for message in found if message]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def _push(self, message: Message) -> str:
        identity, number = message.metadata.message_id, message.metadata.dst_node_id
        self._to[identity] = number
        node = self.nodes[number]
        self._messages[identity] = message

        def work() -> None:
            reply = node.handle(message, number)
            if node.there:
                self._replies[identity] = _over_the_wire(reply)

        if node.there:  # the pool may not have noticed yet
            threading.Thread(target=work, daemon=True).start()
        return identity

    def _sent(self, identity: str) -> Message:
        return self._messages[identity]


def _over_the_wire(message: Message) -> Message:
    """As it arrives: every object as bytes and back."""
    contents = {key: thing.deflate() for key, thing in get_all_nested_objects(message).items()}
    identity = message.object_id
    arrived: Message = inflate_object_from_contents(identity, contents)  # type: ignore[assignment]
    arrived.metadata.__dict__["_message_id"] = identity
    return arrived


def node_config(
    folder: Path,
    client: str,
    data: Path | str,
    rank: int,
    policy: Mapping[str, Any] | None = None,
    model: str = "builtin:tiny-bert",
) -> dict[str, Any]:
    """What ``--node-config`` says of a node whose things lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "client_policy.yaml"
    rules.write_text(yaml.safe_dump({"min_score_rows": 1, **(policy or {})}))
    own = {"client": client, "data": str(data), "model": model, "rank": rank, "threads": 1}
    return {**own, "state": str(folder / "state"), "policy": str(rules)}


def grid_of(
    folder: Path,
    silos: Sequence[tuple[str, Path | str, int]],
    policy: Mapping[str, Any] | None = None,
    runtime: OpenRuntime = open_runtime,
) -> MemoryGrid:
    """A grid with a node for each (client, file, rank)."""
    nodes: dict[int, Node] = {}
    turn: AbstractContextManager[Any] = threading.Lock() if runtime is open_runtime else contextlib.nullcontext()
    for number, (client, data, rank) in enumerate(silos, 100):
        nodes[number] = Node(make_app(runtime), node_config(folder / client, client, data, rank, policy), turn)
    return MemoryGrid(nodes)
