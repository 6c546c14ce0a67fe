"""Provenance: what descends from a client or a task, read from the folders of real runs."""

import json
import shutil
from pathlib import Path

import pytest

from fedlora.errors import RunFolderError, UnlearningError
from fedlora.unlearning.provenance import Graph, GraphBuilder, Node
from orchestrator import launch
from orchestrator.artifacts import export, open_run
from orchestrator.exports import read_exports
from orchestrator.stores.files import read_lines
from orchestrator.unlearning.lineage import lineage
from orchestrator.unlearning.provenance import read_provenance
from tests.conftest import quiet, toy_config

STEP = {"training__max_steps": 1, "clients__per_round": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds of three of six clients, with momentum, and control variates that clients keep; exported."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    strategy = [{"server_momentum": {}}, "scaffold", "zero_pad"]
    launch.run(toy_config(folder, strategy=strategy, rounds=4, **STEP), quiet)
    export(open_run(folder), folder.parent / "exported", merge=False)
    return folder


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of one round with importance and replay."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    continual = {"split": 2, "rounds": 1, "loss_labels": "met", "replay": {"rows": 4}}
    launch.run(toy_config(folder, strategy=["ewc", "flexlora"], continual=continual, rounds=2, **STEP), quiet)
    return folder


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of one round, each with an adapter of its own."""
    folder = tmp_path_factory.mktemp("isolated") / "run"
    continual = {"split": 2, "rounds": 1, "isolated": True}
    launch.run(toy_config(folder, continual=continual, rounds=2, keep_checkpoints=9, **STEP), quiet)
    return folder


def late_joiner(folder: Path) -> tuple[str, int]:
    """The client that was used first as late as any, and in which round."""
    first: dict[str, int] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        for client in row["admitted"]:
            first.setdefault(client, row["round"])
    client = max(first, key=lambda name: (first[name], name))
    assert first[client] > 1  # the test is about something
    return client, first[client]


def ids(graph: Graph, kind: str, name: str) -> set[str]:
    return {node.id for node in graph.descendants(graph.root(kind, name))}


def test_everything_from_a_clients_first_round_on_descends_from_it_and_nothing_before(plain: Path) -> None:
    graph = read_provenance(plain)
    client, first = late_joiner(plain)
    root = graph.root("client", client)
    found = graph.descendants(root)
    assert graph.first_round(root) == first
    assert min(node.round for node in found) == first
    assert {node.id for node in found if node.kind == "aggregate"} == {f"aggregate:{n}" for n in range(first, 5)}
    assert {"optimizer", "strategy", "checkpoint", "adapter", "export"} <= {node.kind for node in found}
    # its own update of the first round, and whoever trained from a model that had it
    rows = {row["round"]: row["admitted"] for row in read_lines(plain / "metrics.jsonl")}
    expected = {f"update:{first}:{client}"} | {f"update:{n}:{c}" for n in rows if n > first for c in rows[n]}
    assert {node.id for node in found if node.kind == "update"} == expected


def test_what_clients_keep_descends_from_others_through_the_model_they_received(plain: Path) -> None:
    graph = read_provenance(plain)
    kept = [node for node in graph.nodes.values() if node.kind == "private"]
    assert {node.path for node in kept} == {
        str(p.relative_to(plain)) for p in (plain / "private").rglob("*.safetensors")
    }
    client, first = late_joiner(plain)
    touched = ids(graph, "client", client)
    for node in kept:
        own = node.id == f"private:{first}:{client}"
        assert (node.id in touched) == (node.round > first or own)


def test_a_replay_begins_at_the_newest_checkpoint_that_the_client_did_not_touch(plain: Path, isolated: Path) -> None:
    graph = read_provenance(isolated)  # keeps every checkpoint
    for client, first in {c: row["round"] for row in reversed(_rows(isolated)) for c in row["admitted"]}.items():
        assert graph.restart(graph.root("client", client)) == first - 1
    graph = read_provenance(plain)  # keeps those of rounds 3 and 4
    client, first = late_joiner(plain)
    assert graph.restart(graph.root("client", client)) == (3 if first == 4 else 0)
    assert "no checkpoint is left of rounds 0 to 2 (keep_checkpoints: 2): a replay cannot begin there" in graph.gaps


def _rows(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


def test_a_task_lives_on_in_what_was_frozen_what_is_replayed_and_what_is_important(streamed: Path) -> None:
    graph = read_provenance(streamed)
    first, second = graph.root("task", "task1"), graph.root("task", "task2")
    kinds = {node.kind for node in graph.descendants(first)}
    assert {"replay", "importance", "ledger", "checkpoint", "adapter"} <= kinds
    assert graph.dependents(first) == ("task2",)
    assert graph.dependents(second) == ()
    assert graph.first_round(second) == 2
    assert "ledger" not in {node.kind for node in graph.descendants(second)}
    entry = graph.nodes["ledger:1"]
    assert (streamed / entry.path).is_file()
    assert {"update:2:" + client for client in _rows(streamed)[1]["admitted"]} <= {
        n.id for n in graph.successors(entry)
    }
    # the buffer of a client holds rows of the first task, and is the client's own
    replayed = [node for node in graph.descendants(first) if node.kind == "replay"]
    owner = replayed[0].id.rpartition(":")[2]
    assert replayed[0].id in ids(graph, "client", owner)


def test_isolated_tasks_share_nothing_but_the_checkpoints_they_lie_in(isolated: Path) -> None:
    graph = read_provenance(isolated)
    first, second = graph.root("task", "task1"), graph.root("task", "task2")
    assert graph.dependents(first) == graph.dependents(second) == ()
    assert {"adapter:adapter/task1", "ledger:1", "checkpoint:1", "checkpoint:2"} <= ids(graph, "task", "task1")
    assert not {"adapter:adapter/task2", "adapter:adapter", "aggregate:2"} & ids(graph, "task", "task1")
    assert {"adapter:adapter/task2", "adapter:adapter", "checkpoint:2"} <= ids(graph, "task", "task2")
    assert "checkpoint:1" not in ids(graph, "task", "task2")


def test_lineage_tells_what_descends_and_what_is_not_known(plain: Path, streamed: Path) -> None:
    client, first = late_joiner(plain)
    lines = "\n".join(lineage(plain, client=client))
    assert f"client {client}: first used in round {first};" in lines
    assert "server optimizer: velocity" in lines
    assert f"{plain.parent / 'exported'}" in lines
    assert "not known: no checkpoint is left of rounds 0 to 2" in lines
    lines = "\n".join(lineage(streamed, task="task1"))
    assert "tasks that build on it: task2" in lines
    assert "base ledger: ledger entry 1 (merge), ledger/" in lines
    assert "a replay without it begins from the start of the run" in lines
    with pytest.raises(UnlearningError, match="the run has no client c11; did you mean c1"):
        lineage(plain, client="c11")
    with pytest.raises(UnlearningError, match="one client or of one task"):
        lineage(plain)


def test_a_client_that_was_never_used_has_no_descendants(isolated: Path) -> None:
    used = {client for row in _rows(isolated) for client in row["admitted"]}
    idle = sorted({f"c{i}" for i in range(6)} - used)
    assert idle
    assert (
        lineage(isolated, client=idle[0])[0] == f"client {idle[0]}: no update was ever used; nothing descends from it"
    )


def test_what_the_folder_does_not_tell_is_said_and_assumed_for_the_worst(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[2:]))
    path = folder / "checkpoints" / "round-0004" / "state.json"
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "ledger").mkdir()
    (folder / "ledger" / "stray.safetensors").write_text("x")
    graph = read_provenance(folder)
    assert len(graph.gaps) == 4
    told = " ".join(graph.gaps)
    assert "metrics.jsonl has no row for rounds 1 to 2: everybody is taken to have been in" in told
    assert "state.json is truncated or altered" in told
    assert "ledger/ holds 1 files that no checkpoint names, such as stray.safetensors" in told
    assert {graph.first_round(graph.root("client", f"c{i}")) for i in range(6)} == {1}
    assert "checkpoint:4" in ids(graph, "client", "c0")
    with pytest.raises(RunFolderError, match="not a run folder"):
        read_provenance(tmp_path)


def test_a_late_update_comes_from_the_model_of_its_start(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    journal = read_lines(folder / "journal.jsonl")
    client, first = late_joiner(plain)
    other = next(c for c in _rows(plain)[first]["admitted"] if c != client)  # of the round after its first
    for line in journal:
        if line["event"] == "update_admitted" and (line["round"], line["client"]) == (first + 1, other):
            line["staleness"] = 1
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    assert f"update:{first + 1}:{other}" in ids(read_provenance(plain), "client", client)
    assert f"update:{first + 1}:{other}" not in ids(read_provenance(folder), "client", client)


def test_an_export_is_noted_with_the_hash_of_its_weights(plain: Path) -> None:
    (line,) = read_exports(plain)
    assert (line["kind"], line["round"], line["path"]) == ("adapter", 4, str(plain.parent / "exported"))
    assert list(line["weights"]) == ["adapter_model.safetensors"]


def test_descendants_follow_edges_and_nothing_else() -> None:
    graph = GraphBuilder()
    for name, sources in {"a": [], "b": ["a"], "c": ["b", "nowhere"], "d": []}.items():
        graph.add(Node(name, "update", name), sources)
    built = graph.built()
    assert [node.id for node in built.descendants(built.nodes["a"])] == ["b", "c"]
    assert built.descendants(built.nodes["d"]) == ()
