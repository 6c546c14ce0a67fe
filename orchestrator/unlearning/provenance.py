"""Provenance from a run folder alone: who trained what, and what came of it.

Nothing is recorded for this: who took part is in metrics.jsonl, how old updates were in journal.jsonl, patches and
freezes in the newest checkpoint. Where the folder does not tell, the graph has too many edges rather than too few, and
a gap says so. The logs themselves (journal, metrics, summary) hold numbers about clients and are no part of the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.private_state import private_files
from fedlora.config import RunConfig
from fedlora.errors import UnlearningError
from fedlora.unlearning.provenance import Graph, GraphBuilder, Node
from orchestrator.checkpoint import checkpoints
from orchestrator.contributions import log_file, read_log
from orchestrator.exports import read_exports
from orchestrator.results import WEIGHTS
from orchestrator.unlearning.traces import Traces, gaps, read_traces

_WITHOUT_MEMORY = ("uniform", "weighted", "poisson")  # selection that looks at no client's past
_PARTS = {"velocity": "optimizer", "mean": "optimizer", "square": "optimizer"}
_PARTS |= {"importance": "importance", "now": "importance"}  # any other part is the strategy's


def read_provenance(folder: Path) -> Graph:
    """The provenance graph of a run, finished or not.

    Raises:
        RunFolderError: not a run folder, or a log in it is damaged.
    """
    run, damage = read_traces(folder)
    graph = GraphBuilder(gaps=[*damage, *gaps(run)])
    _add_roots(graph, run)
    _Rounds(graph, run).add_all()
    _add_files(graph, run)
    return graph.built()


def _add_roots(graph: GraphBuilder, run: Traces) -> None:
    for client in run.clients:
        graph.add(Node(f"client:{client}", "client", client))
    for task in run.course.names if run.course else ():
        graph.add(Node(f"task:{task}", "task", task))


class _Rounds:
    """Adds what happened, round by round. ``starts`` is what each round began from, which late updates look up."""

    def __init__(self, graph: GraphBuilder, run: Traces):
        self.graph, self.run = graph, run
        self.starts: dict[int, list[str]] = {}
        self.kinds = _strategy_parts(run)
        self.chosen = _selection(run.config)
        self.kept = _private_files(run)
        self.latest: dict[str, int] = {}  # round of each client's last update since the last freeze

    def add_all(self) -> None:
        begins: list[str] = []
        for number, row in self.run.rows.items():
            self.starts[number] = begins
            updates = [self._update(number, client) for client in row["admitted"]]
            for client, path in self.kept.get(number, {}).items():
                self._private(number, client, path)
            model = self._model(number, [*begins, *updates])
            entries = self._ledger(number, [*begins, *updates])
            if number in self.run.freezes:
                self.latest = {}
            # an isolated task begins with a fresh adapter on the bare base: nothing goes on but who is chosen
            fresh = self.run.isolated and number in self.run.freezes
            begins = [name for name in model if not fresh or name.startswith("selection:")] + entries

    def _update(self, number: int, client: str) -> str:
        given = number - self.run.staleness.get((number, client), 0)
        sources = [f"client:{client}", *self.starts.get(given, self.starts[number]), *self._rows(client, given)]
        if self.kept and client in self.latest:
            sources.append(f"update:{self.latest[client]}:{client}")
        self.latest[client] = number
        return self.graph.add(Node(f"update:{number}:{client}", "update", f"update of {client}", number), sources)

    def _rows(self, client: str, given: int) -> list[str]:
        """The tasks whose rows a client trained on, and its buffer of earlier ones."""
        course = self.run.course
        if course is None:
            return []
        settings = self.run.config.continual
        assert settings is not None
        now = course.task_of(client, given)
        if now is None:
            return [f"task:{name}" for name in course.names]

        def around(place: int) -> list[str]:
            """A task; and its neighbours, where a share of their rows comes with it."""
            reach = 1 if settings.blur else 0
            return [f"task:{name}" for name in course.names[max(place - reach, 0) : place + reach + 1]]

        earlier = course.met_by(client, given) - {now}
        if not (settings.replay and earlier):
            return around(now)
        sources = [f"client:{client}", *(name for task in sorted(earlier) for name in around(task))]
        name = f"replay buffer of {client} beside {course.names[now]} (drawn anew from its rows, no file)"
        return [*around(now), self.graph.add(Node(f"replay:{now}:{client}", "replay", name, given), sources)]

    def _private(self, number: int, client: str, path: str) -> None:
        sources = [f"update:{number}:{client}"]
        if sources[0] not in self.graph.nodes:  # what was answered and not used still came from the model and the rows
            sources = [f"client:{client}", *self.starts[number], *self._rows(client, number)]
        what = f"what {client} keeps to itself"
        self.graph.add(Node(f"private:{number}:{client}", "private", what, number, path), sources)

    def _model(self, number: int, sources: Sequence[str]) -> list[str]:
        """The adapter after a round, what the strategy keeps, and what selection remembers."""
        made = [self.graph.add(Node(f"aggregate:{number}", "aggregate", "global adapter", number), sources)]
        for kind, names in self.kinds.items():
            made.append(self.graph.add(Node(f"{kind}:{number}", kind, names, number), sources))
        if self.chosen:
            what = f"what {self.chosen} selection knows of the clients"
            made.append(self.graph.add(Node(f"selection:{number}", "selection", what, number), sources))
        return made

    def _ledger(self, number: int, sources: Sequence[str]) -> list[str]:
        """Entries of this round; those that the next round sees are returned."""
        ids = {entry["parent"]: place - 1 for place, entry in enumerate(self.run.ledger) if entry["parent"]}
        added = []
        for place, entry in enumerate(self.run.ledger):
            provenance = entry["provenance"]
            if provenance["round"] != number:
                continue
            if entry["replaces"]:
                combined = [ids[name] for name in provenance.get("combines", ()) if name in ids]
                places = {*combined, *range(max(place - entry["replaces"], 0), place)}
                origin = [f"ledger:{other + 1}" for other in sorted(places)]
            else:
                origin = list(sources) if entry["kind"] == "patch" else [f"aggregate:{number}"]
            name = f"ledger entry {entry['index']} ({entry['kind']})"
            path = f"ledger/{entry['payload']}.safetensors"
            added.append(self.graph.add(Node(f"ledger:{place + 1}", "ledger", name, number, path), origin))
        active = {f"ledger:{place + 1}" for place in self.run.entries(number)}
        return [name for name in added if name in active]


def _add_files(graph: GraphBuilder, run: Traces) -> None:
    """Checkpoints, the contribution log, adapters and exports: what is made of all the rest."""
    for path in checkpoints(run.folder):
        number = int(path.name.removeprefix("round-"))
        place = path.relative_to(run.folder).as_posix()
        kept = [f"{kind}:{number}" for kind in ("aggregate", "strategy", "optimizer", "importance", "selection")]
        kept += [f"ledger:{i + 1}" for i, entry in enumerate(run.ledger) if entry["provenance"]["round"] <= number]
        graph.add(Node(f"checkpoint:{number}", "checkpoint", path.name, number, place), kept)
    _add_log(graph, run)
    for weights in sorted((run.folder / "adapter").rglob(WEIGHTS)):
        place = weights.parent.relative_to(run.folder).as_posix()
        graph.add(Node(f"adapter:{place}", "adapter", place, run.last, place), _of_adapter(run, place))
    for count, line in enumerate(read_exports(run.folder), 1):
        name = f"{line['kind']} exported on {line['time'][:10]}"
        node = Node(f"export:{count}", "export", name, line["round"], line["path"])
        graph.add(node, _of_model(run, line["round"]))


def _add_log(graph: GraphBuilder, run: Traces) -> None:
    """What rounds were given to aggregate, with the model and the strategy's state that they began with."""
    try:
        logged = read_log(run.folder).entries
    except UnlearningError as error:
        graph.gaps.append(str(error))
        return
    for number in logged.keys() & run.rows.keys():
        place = log_file(run.folder, number).relative_to(run.folder).as_posix()
        kept = [f"update:{number}:{client}" for client in run.rows[number]["admitted"]]
        kept += [f"{kind}:{number - 1}" for kind in ("aggregate", "strategy", "optimizer", "importance")]
        graph.add(Node(f"contributions:{number}", "contributions", f"log of round {number}", number, place), kept)


def _of_model(run: Traces, number: int) -> list[str]:
    """What the model after a round is made of."""
    return [f"aggregate:{number}", *(f"ledger:{place + 1}" for place in run.entries(number))]


def _of_adapter(run: Traces, place: str) -> list[str]:
    """What an adapter in the folder is made of: a task's entry where tasks are isolated, else the model at the end."""
    names, task = run.course.names if run.course else (), place.removeprefix("adapter/")
    for position, entry in enumerate(run.ledger):
        if entry["kind"] == "task" and task in names and entry["provenance"]["task"] == names.index(task):
            return [f"ledger:{position + 1}"]
    return _of_model(run, run.last)


def _private_files(run: Traces) -> dict[int, dict[str, str]]:
    """Paths of what clients keep, by round and client; empty where they keep nothing, or not in this folder."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for client in run.clients:
        for number, path in private_files(run.folder / "private", client).items():
            found[number][client] = path.relative_to(run.folder).as_posix()
    return dict(found)


def _strategy_parts(run: Traces) -> dict[str, str]:
    """What the strategy keeps, by kind of node, from every checkpoint: at a freeze some of it may be away."""
    found: dict[str, dict[str, None]] = defaultdict(dict)

    def walk(tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            if key == "inner" and isinstance(value, Mapping):
                walk(value)
            else:
                found[_PARTS.get(key, "strategy")][key] = None

    for note in run.notes.values():
        walk(note["strategy"])
    if not run.notes:
        found["strategy"]["unknown"] = None
    return {kind: ", ".join(names) for kind, names in sorted(found.items())}


def _selection(config: RunConfig) -> str:
    """The rule of selection where it looks at what clients did before; else nothing."""
    rule = config.clients.selection
    name = rule if isinstance(rule, str) else next(iter(rule))
    return "" if name in _WITHOUT_MEMORY else name
