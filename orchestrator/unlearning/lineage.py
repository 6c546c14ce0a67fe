"""What descends from a client or a task, as lines to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.errors import UnlearningError, nearest
from fedlora.unlearning.provenance import Graph, Node
from orchestrator.report.markup import plural
from orchestrator.stores.files import read_json, shard_folders
from orchestrator.unlearning.provenance import read_provenance
from orchestrator.unlearning.traces import rounds_in_words

_SHOWN = {
    "aggregate": "global adapter",
    "ledger": "base ledger",
    "strategy": "strategy state",
    "optimizer": "server optimizer",
    "importance": "importance of weights",
    "selection": "selection",
    "replay": "replay buffers",
    "private": "kept on clients",
    "checkpoint": "checkpoints",
    "contributions": "contribution log",
    "adapter": "adapters",
    "export": "exports",
}


def lineage(folder: Path, *, client: str | None = None, task: str | None = None) -> list[str]:
    """What descends from one client or one task, and from when on; then what the folder does not tell.

    Raises:
        UnlearningError: if neither or both are named, or the run has none of that name.
        RunFolderError: not a run folder, or a log in it is damaged.
    """
    if (client is None) == (task is None):
        raise UnlearningError("lineage is that of one client or of one task; name one of them")
    if client is not None and (parts := shard_folders(folder)):
        return _in_its_shard(parts, client)
    graph = read_provenance(folder)
    root = graph.root("client", client) if client is not None else graph.root("task", task or "")
    return [*_told(graph, root), *(f"not known: {gap}" for gap in graph.gaps)]


def _in_its_shard(parts: Mapping[int, Path], client: str) -> list[str]:
    """What descends from a client in a run of shards: no other shard has learned from it."""
    homes = {row["client"]: number for number, part in parts.items() for row in read_json(part / "partition.json")}
    if client not in homes:
        raise UnlearningError(f"no shard of the run has a client {client}{nearest(client, homes)}")
    number = homes[client]
    told = f"client {client} is in shard {number} of {len(parts)}; the run's adapter and checkpoint are made of all"
    return [told, *(f"shard {number}: {line}" for line in lineage(parts[number], client=client))]


def _told(graph: Graph, root: Node) -> list[str]:
    used = [node for node in graph.successors(root) if node.kind == "update"]
    if not used:
        return [f"{root.kind} {root.name}: no update was ever used; nothing descends from it"]
    first, found = graph.first_round(root), graph.descendants(root)
    own = {node.id for node in used}
    taught = [node for node in found if node.kind == "update" and node.id not in own]
    rounds = rounds_in_words(sorted({node.round for node in used}))
    lines = [f"{root.kind} {root.name}: first used in round {first}; {plural(len(used), 'update')} in {rounds}"]
    if taught:
        lines.append(f"  trained from it: {plural(len(taught), 'update')}, from round {taught[0].round} on")
    if others := graph.dependents(root) if root.kind == "task" else ():
        lines.append(f"  tasks that build on it: {', '.join(others)}")
    for kind, title in _SHOWN.items():
        if nodes := [node for node in found if node.kind == kind]:
            lines.append(f"  {title}: {_which(kind, nodes)}")
    restart = graph.restart(root)
    where = f"from the checkpoint of round {restart}" if restart else "from the start of the run"
    return [*lines, f"  a replay without it begins {where}"]


def _which(kind: str, nodes: Sequence[Node]) -> str:
    if kind in ("ledger", "adapter", "export", "private"):
        listed = [f"{node.name}, {node.path}" if node.path != node.name else node.path for node in nodes[:20]]
        return "; ".join(listed) + (f"; and {len(nodes) - 20} more" if len(nodes) > 20 else "")
    if kind == "replay":
        return f"{len(nodes)}, drawn anew from rows, no files"
    rounds = rounds_in_words(sorted({node.round for node in nodes}))
    return rounds if kind in ("aggregate", "checkpoint", "contributions") else f"{nodes[-1].name}, {rounds}"
