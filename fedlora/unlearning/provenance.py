"""The provenance graph: what of a run was influenced by whom. A node is a thing, an edge says ``influences``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.errors import UnlearningError, nearest

KINDS = (
    *("client", "task"),  # whom or what a request can name
    *("update", "aggregate", "strategy", "optimizer", "importance", "selection", "replay", "private"),
    *("ledger", "checkpoint", "contributions", "adapter", "export"),
)


@dataclass(frozen=True)
class Node:
    """One thing.

    Attributes:
        id: such as ``update:7:c3``.
        kind: see ``KINDS``.
        name: for people.
        round: that it belongs to; 0 where it belongs to none.
        path: of its file or folder, relative to the run folder or absolute; ``""`` for what has none of its own.
    """

    id: str
    kind: str
    name: str
    round: int = 0
    path: str = ""


@dataclass(frozen=True)
class Graph:
    """All nodes and edges of a run, and a sentence for everything its folder does not tell."""

    nodes: Mapping[str, Node]
    influences: Mapping[str, tuple[str, ...]]
    gaps: tuple[str, ...] = ()

    def root(self, kind: str, name: str) -> Node:
        """The node of a client or of a task.

        Raises:
            UnlearningError: if the run has none of that name.
        """
        if node := self.nodes.get(f"{kind}:{name}"):
            return node
        known = [node.name for node in self.nodes.values() if node.kind == kind]
        raise UnlearningError(f"the run has no {kind} {name}{nearest(name, known)}")

    def successors(self, node: Node) -> tuple[Node, ...]:
        """What a node influences directly."""
        return tuple(self.nodes[name] for name in self.influences.get(node.id, ()))

    def descendants(self, *roots: Node) -> tuple[Node, ...]:
        """Everything that these influence, directly or not, without themselves: by round, then by kind."""
        seen = {node.id for node in roots}
        waiting = [*seen]
        while waiting:
            for name in self.influences.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        found = [self.nodes[name] for name in seen - {node.id for node in roots}]
        return tuple(sorted(found, key=lambda node: (node.round, KINDS.index(node.kind), node.id)))

    def first_round(self, root: Node) -> int | None:
        """The round whose model a client's or task's rows reached first; None if they never did."""
        return min((node.round for node in self.successors(root) if node.kind == "update"), default=None)

    def restart(self, root: Node) -> int:
        """The newest committed round that a replay without the root can go on from; 0 is the start of the run."""
        first, touched = self.first_round(root), {node.id for node in self.descendants(root)}
        kept = [node.round for node in self.nodes.values() if node.kind == "checkpoint" and node.id not in touched]
        return max((round for round in kept if first is None or round < first), default=0)

    def dependents(self, task: Node) -> tuple[str, ...]:
        """Names of the other tasks that were trained on from this one; it cannot be dropped without replaying them."""
        own = {node.id for node in self.successors(task)}
        touched = {node.id for node in self.descendants(task)} - own
        others = [node for node in self.nodes.values() if node.kind == "task" and node != task]
        return tuple(node.name for node in others if touched & set(self.influences.get(node.id, ())))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        nodes = [vars(node) for node in self.nodes.values()]
        return {"nodes": nodes, "influences": {k: list(v) for k, v in self.influences.items()}, "gaps": list(self.gaps)}


@dataclass
class GraphBuilder:
    """A graph under construction."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[str, dict[str, None]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def add(self, node: Node, sources: Iterable[str] = ()) -> str:
        """A node, and edges to it from those of its sources that are there; returns its id."""
        self.nodes.setdefault(node.id, node)
        for source in sources:
            if source in self.nodes:
                self.edges.setdefault(source, {})[node.id] = None
        return node.id

    def built(self) -> Graph:
        """The graph as it is now."""
        return Graph(dict(self.nodes), {name: tuple(there) for name, there in self.edges.items()}, tuple(self.gaps))
