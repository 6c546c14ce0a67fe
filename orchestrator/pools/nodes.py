"""Which node is which client: nodes are asked who they are, and asked again when they come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from clients.records import Parcel, read
from fedlora.errors import FedLoRAError, WireError
from fedlora.protocol import ClientInfo
from orchestrator.pools.post import Post, told

_LOOK_S = 2.0  # between looks at who is there
MAX_ROWS = 10**9  # that a client may claim; more would overflow sums of weights


class Nodes:
    """The nodes of a federation.

    Args:
        post: carries messages to them.
        recipe: of the run, as JSON.
        fingerprint: of the base that everybody must have.
        rank: the largest that a node may train at.
        alike: whether all have to train at it, and how many rows come to at most, where their answers are summed.
        keys: public key of every client's node, in PEM; None where registering is enough.
    """

    def __init__(
        self,
        post: Post,
        recipe: str,
        fingerprint: Callable[[], str],
        rank: int,
        keys: Mapping[str, bytes] | None = None,
        alike: int = 0,
    ):
        self._post, self._recipe, self._fingerprint, self._rank = post, recipe, fingerprint, rank
        self._alike = alike
        self._keys = keys
        self._asked: dict[str, int] = {}  # messages to nodes that have not said yet who they are
        self._client: dict[int, str] = {}
        self.members: dict[str, ClientInfo] = {}
        self.refused: dict[int, str] = {}
        self._looked = -_LOOK_S

    def wait_for(self, count: int, wait_s: float) -> list[ClientInfo]:
        """The clients, by name, once so many nodes have come.

        Raises:
            FedLoRAError: if they do not come in time; it says what kept out those that were refused.
        """
        ends = time.monotonic() + wait_s
        while len(self.members) < count:
            if time.monotonic() >= ends:
                found = ", ".join(sorted(self.members)) or "none"
                reasons = "".join(f"; node {node}: {reason}" for node, reason in self.refused.items())
                raise FedLoRAError(
                    f"flower: {len(self.members)} of {count} nodes came within {wait_s:g} s ({found}){reasons}"
                )
            self.look()
            if len(self.members) < count:
                time.sleep(self._post.poll_s)
        return sorted(self.members.values(), key=lambda member: member.id)

    def node_of(self, client: str) -> int | None:
        """Where a client is now; None where it is away."""
        return next((node for node, name in self._client.items() if name == client), None)

    def look(self) -> None:
        """See who has come and gone; at most every few seconds. Whoever came back says anew who it is."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            there = self._post.nodes()
            for node in [node for node in self._client if node not in there]:
                del self._client[node]
                self.refused.clear()  # whoever has come back under another number was refused its own name
            for node in [node for node in self.refused if node not in there]:
                del self.refused[node]
            asked = {*self._client, *self.refused, *self._asked.values()}
            for node in sorted(there.keys() - asked):
                if self._keys is not None and there[node].public_key not in self._keys.values():
                    self.refused[node] = "its key is not among flower.keys"
                    continue
                if message := self._post.send(node, "query", Parcel({"recipe": self._recipe})):
                    self._asked[message] = node
        for message, answer in self._post.collect(self._asked).items():
            node = self._asked.pop(message)
            if answer is None:
                continue  # it has gone again
            try:
                self._welcome(node, answer)
            except WireError as error:
                self.refused[node] = told(str(error))

    def _welcome(self, node: int, answer: Parcel) -> None:
        """Take a node in.

        Raises:
            WireError: what keeps it out, in a sentence.
        """
        if "error" in answer.note:
            raise WireError(str(answer.note["error"]))
        member = _checked(answer.note, self._rank)
        if self._alike and member.rank != self._rank:
            raise WireError(f"{member.id} trains at rank {member.rank}, and a secure sum needs lora.r ({self._rank})")
        if self._alike and member.num_examples > self._alike:
            raise WireError(f"{member.id} has {member.num_examples} rows, more than a secure sum has room for")
        if answer.note.get("base") != self._fingerprint():
            raise WireError(
                f"{member.id} has another base model (fingerprint {str(answer.note.get('base'))[:12]}, expected"
                f" {self._fingerprint()[:12]})"
            )
        info = self._post.nodes().get(node)
        if info is not None and info.name and info.name != member.id:
            raise WireError(f"the node registered as {info.name} says it is {member.id}")
        if self._keys is not None and (info is None or info.public_key != self._keys.get(member.id)):
            raise WireError(f"its key is not that of {member.id} in flower.keys")
        if self.node_of(member.id) is not None:
            raise WireError(f"another node is {member.id} already; every organisation needs a name of its own")
        self._client[node] = member.id
        self.members.setdefault(member.id, member)


def _checked(note: Mapping[str, Any], rank: int) -> ClientInfo:
    """What a node says of itself, within bounds.

    Raises:
        WireError: naming what is out of bounds.
    """
    member = read(ClientInfo, note.get("member"))
    if not 0 < len(member.id) <= 100 or not member.id.isprintable():
        raise WireError("its name is empty, longer than 100 characters, or cannot be printed")
    if not 1 <= member.rank <= rank:
        raise WireError(f"{member.id} trains at rank {member.rank}, and lora.r is {rank}")
    rows = [member.num_examples, member.num_heldout, *member.label_counts.values()]
    if not all(0 <= count <= MAX_ROWS for count in rows) or not member.num_examples or member.stages:
        raise WireError(f"{member.id} has {member.num_examples} rows to train on and {member.num_heldout} held out")
    return member
