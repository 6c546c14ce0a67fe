"""The Flower pool on a Grid in this process: real messages, real ClientApps, the runtime of every other pool."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.noop import NoopRuntime
from clients.records import Parcel, parcel_of, sha256
from fedlora.adapter.wire import decode_update, encode_update
from fedlora.config import FlowerConfig, RunConfig
from fedlora.errors import FedLoRAError, RunInterrupted
from fedlora.protocol import BaseInfo, ClientInfo, ClientPool, EvalResult, EvalTask, TrainTask
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.flower.keys import read_keys, write_node_key
from orchestrator.pools.flower import GRID, FlowerPool
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from tests.conftest import quiet
from tests.flower_grid import MemoryGrid, grid_of
from tests.orchestrator.test_admission import ATTACKS, after_round
from tests.pools import PoolSuite, UnrulySuite
from tests.scripted import DENSE, MEMBERS, SITES, answer, federation, first_state
from tests.silos import RANKS, served, together, write_files
from tests.unruly import Unruly

SIX = {f"c{i}": rank for i, rank in enumerate((2, 4, 8, 2, 4, 8))}


class LoneUnruly(Unruly):
    """Only the one client that a node is."""

    def members(self) -> list[ClientInfo]:
        return [ClientInfo(self._config.name or "server", 2, 16)]


class TestFlowerPool(PoolSuite):
    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        return write_files(tmp_path_factory.mktemp("files"), list(SIX))

    @pytest.fixture(scope="class")
    def pool(self, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientPool]:
        folder = tmp_path_factory.mktemp("flower")
        silos = [(name, files[name], rank) for name, rank in SIX.items()]
        grid = grid_of(folder / "nodes", silos, {"tell_labels": True})
        pool = FlowerPool(served(folder / "run", files["test"], flower__nodes=6), grid)
        yield pool
        pool.close()

    @pytest.fixture(scope="class")
    def reference(self, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ClientPool:
        return LocalPool(together(tmp_path_factory.mktemp("reference"), files, list(SIX.values()), files["test"]))


class TestFlowerPoolOfUnrulyClients(UnrulySuite):
    @pytest.fixture(scope="class")
    def pool(self, tmp_path_factory: pytest.TempPathFactory) -> ClientPool:
        folder = tmp_path_factory.mktemp("unruly")
        names = [*"abcdefg", "hangs", "fails", "warm"]
        grid = grid_of(folder, [(name, "nowhere.jsonl", 2) for name in names], {"tell_errors": True}, LoneUnruly)
        pool = FlowerPool(served(folder / "run", None, flower__nodes=len(names)), grid, LoneUnruly)
        pool.members()
        return pool


def play(config: RunConfig, grid: MemoryGrid, listen: launch.Listener = quiet) -> dict[str, Any]:
    """A whole run on these nodes."""
    token = GRID.set(grid)
    try:
        return launch.run(config, listen)
    finally:
        GRID.reset(token)


@pytest.mark.parametrize("own_test", [True, False], ids=["test rows at the server", "test rows at the nodes"])
def test_a_run_equals_that_of_the_local_pool(tmp_path: Path, own_test: bool) -> None:
    files = write_files(tmp_path / "files", list(RANKS))
    test = files["test"] if own_test else None
    settings = {"strategy": "fedex_het", "rounds": 2}
    local = launch.run(together(tmp_path / "local", files, list(RANKS.values()), test, **settings), quiet)
    grid = grid_of(tmp_path / "nodes", [(name, files[name], rank) for name, rank in RANKS.items()])
    flower = play(served(tmp_path / "flower", test, flower__nodes=3, **settings), grid)
    one, other = (load_latest(tmp_path / name)[0] for name in ("local", "flower"))
    assert one is not None
    assert other is not None
    for name, tensor in one.adapter.tensors().items():
        torch.testing.assert_close(other.adapter.tensors()[name], tensor, rtol=0, atol=1e-6)
    assert [e.payload for e in one.ledger.entries] == [e.payload for e in other.ledger.entries]
    assert flower["final"] == pytest.approx(local["final"], rel=1e-5)


# Nodes that come, go, refuse and lie ------------------------------------------------------------------------------


def test_a_secure_sum_over_nodes_equals_that_of_the_local_pool_and_shows_no_update(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", list(RANKS))
    changes = {"strategy": "fedit", "privacy": {"secure_sum": {}}, "rounds": 2, "evaluation__every": 10}
    policy = {"require_secure_sum": True}
    grid = grid_of(tmp_path / "nodes", [(name, files[name], 4) for name in RANKS], policy)
    config = served(tmp_path / "flower", files["test"], flower__nodes=3, lora__r=4, **changes)
    play(config, grid)
    launch.run(together(tmp_path / "local", files, [4, 4, 4], files["test"], lora__r=4, **changes), quiet)
    one, other = (load_latest(tmp_path / folder)[0] for folder in ("flower", "local"))
    assert one is not None
    assert other is not None
    assert one.adapter.tensors().keys() == other.adapter.tensors().keys()
    for name, tensor in other.adapter.tensors().items():
        torch.testing.assert_close(one.adapter.tensors()[name], tensor, rtol=1e-6, atol=1e-6)
    told = {**changes, "privacy": {}, "flower__wait_s": 1.0, "flower__nodes": 3, "lora__r": 4}
    with pytest.raises(FedLoRAError, match="require_secure_sum is set, the server asks for updates as they are"):
        play(served(tmp_path / "plain", files["test"], **told), grid)


@pytest.fixture
def three(tmp_path: Path) -> MemoryGrid:
    """Nodes with a file and a rank each."""
    files = write_files(tmp_path / "files", list(RANKS))
    return grid_of(tmp_path / "nodes", [(name, files[name], rank) for name, rank in RANKS.items()])


@pytest.fixture
def light(tmp_path: Path) -> MemoryGrid:
    """The same nodes without a model, which say at once who they are."""
    return grid_of(tmp_path / "nodes", [(name, "nowhere.jsonl", 2) for name in RANKS], None, LoneUnruly)


def lies() -> Iterator[Callable[[Parcel], Parcel]]:
    """Answers to tasks of training, one worse than the other."""

    def update_with(answer: Parcel, value: float) -> Parcel:
        (payload,) = answer.payloads.values()
        honest = decode_update(payload)
        delta = {name: torch.full_like(tensor, value) for name, tensor in honest.delta.items()}
        told = honest.client, honest.round, honest.received, delta, honest.num_examples, {"loss": 1.0}
        return with_payload(answer, encode_update(*told))

    def with_payload(answer: Parcel, payload: bytes) -> Parcel:
        return Parcel({**answer.note, "payload": sha256(payload)}, {sha256(payload): payload})

    yield lambda answer: update_with(answer, math.nan)
    yield lambda answer: update_with(answer, 1e30)
    yield lambda answer: with_payload(answer, b"\x80\x04\x95not safetensors")
    yield lambda answer: Parcel({"lacks": ["0" * 64]})
    yield lambda answer: Parcel({"payload": ["x"], "seconds": "soon", "stats": {"pid": "x"}, "traceback": 3})
    yield lambda answer: Parcel({**answer.note, "error": "\x1b[2J" + "x" * 10_000, "payload": None}, {})


def test_a_lying_node_costs_only_itself(tmp_path: Path, three: MemoryGrid) -> None:
    told, scores = list(lies()), [math.nan, -1.0, 1.0]
    hostile = next(node for node in three.nodes.values() if node.config["client"] == "birch")
    turns = iter(told)

    def tamper(kind: str, answer: Parcel) -> Parcel:
        if kind == "train":
            return next(turns, told[-1])(answer)
        if kind == "evaluate":
            value = scores[len(hostile.received) % 3]
            return Parcel(
                {"results": [{**one, "loss_sum": value, "num_correct": 10**9} for one in answer.note["results"]]}
            )
        return answer

    hostile.tamper = tamper
    events: list[tuple[str, Any]] = []
    config = served(tmp_path / "run", tmp_path / "files" / "test.jsonl", flower__nodes=3, rounds=len(told))
    summary = play(config, three, lambda event, fields: events.append((event, fields)))
    assert summary["status"] == "finished"
    rounds = [fields for event, fields in events if event == "round_committed"]
    assert [row["admitted"] for row in rounds] == [["amber", "cedar"]] * len(told)
    assert all(row["clients"]["count"] == 2 for row in rounds)
    reasons = [f["reason"] for event, f in events if event in ("update_refused", "client_failed")]
    assert "not finite" in reasons[0] or "max_update_norm" in reasons[0]
    assert "max_update_norm" in reasons[1]
    assert "not a valid message" in reasons[2]
    assert all(len(reason) <= 600 and reason.isprintable() for reason in reasons)


def test_a_node_that_goes_costs_its_rounds_and_catches_up_on_the_ledger(tmp_path: Path, three: MemoryGrid) -> None:
    away = next(node for node in three.nodes.values() if node.config["client"] == "cedar")
    rows: list[Any] = []

    def watch(event: str, fields: Any) -> None:
        if event == "round_committed":
            rows.append(fields)
            away.there = fields["round"] not in (1, 2)

    test = tmp_path / "files" / "test.jsonl"
    play(served(tmp_path / "run", test, flower__nodes=3, rounds=9, strategy="fedex_het"), three, watch)
    took_part = [row["round"] for row in rows if "cedar" in row["admitted"]]
    assert took_part[0] == 1
    assert not {2, 3} & set(took_part)
    assert 9 in took_part
    assert all({"amber", "birch"} <= set(row["admitted"]) for row in rows)
    parcels = [parcel_of(message.content) for message in away.received]
    patches = [key for parcel in parcels for key in parcel.payloads if key in dict(map(reversed, ledger_of(parcel)))]
    assert len(patches) == len(set(patches)) >= 6  # each travelled once, those that it had missed too


def ledger_of(parcel: Parcel) -> list[Any]:
    """Pairs of id and hash."""
    return list(parcel.note.get("ledger", []))


def test_a_node_that_lost_its_disk_is_sent_the_whole_ledger(tmp_path: Path, three: MemoryGrid) -> None:
    forgetful = next(node for node in three.nodes.values() if node.config["client"] == "amber")
    rows: list[Any] = []

    def watch(event: str, fields: Any) -> None:
        if event == "round_committed":
            rows.append(fields)
            shutil.rmtree(Path(forgetful.config["state"]) / "patches", ignore_errors=True)

    test = tmp_path / "files" / "test.jsonl"
    play(served(tmp_path / "run", test, flower__nodes=3, rounds=3, strategy="fedex_het"), three, watch)
    assert [row["admitted"] for row in rows] == [["amber", "birch", "cedar"]] * 3


def test_a_node_whose_policy_refuses_is_left_out_and_a_run_that_waits_for_it_says_why(
    tmp_path: Path, three: MemoryGrid
) -> None:
    strict = three.nodes[101]
    Path(strict.config["policy"]).write_text("strategies: [fedit]\n")
    test = tmp_path / "files" / "test.jsonl"
    short = served(tmp_path / "run", test, flower__nodes=3).model_copy(
        update={"flower": FlowerConfig(nodes=3, wait_s=8, poll_s=0.05)}
    )
    with pytest.raises(FedLoRAError, match=r"2 of 3 nodes came .* strategies are fedit, the server's strategy has"):
        play(short, three)
    summary = play(served(tmp_path / "other", test, flower__nodes=2, rounds=1), three)
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "amber"}, "another node is amber already"),
        ({"id": "x\x1b[2J"}, "cannot be printed"),
        ({"rank": 64}, "trains at rank 64, and lora.r is 16"),
        ({"num_examples": 10**30}, "rows to train on"),
        ({"num_examples": 0}, "rows to train on"),
        ({"rank": "many"}, "rank"),
    ],
    ids=["name taken", "name of control characters", "rank", "rows", "no rows", "not a number"],
)
def test_what_a_node_says_of_itself_is_checked(
    tmp_path: Path, light: MemoryGrid, change: dict[str, Any], reason: str
) -> None:
    light.nodes[101].tamper = lambda kind, answer: Parcel(
        {**answer.note, "member": {**answer.note["member"], **change}} if kind == "query" else answer.note
    )
    config = served(tmp_path / "run", None).model_copy(update={"flower": FlowerConfig(nodes=3, wait_s=1, poll_s=0.05)})
    with pytest.raises(FedLoRAError, match=reason):
        FlowerPool(config, light, LoneUnruly).members()


def test_a_node_is_held_to_the_name_it_was_registered_under(tmp_path: Path, light: MemoryGrid) -> None:
    light.nodes[101].name = "somebody-else"
    config = served(tmp_path / "run", None).model_copy(update={"flower": FlowerConfig(nodes=3, wait_s=1, poll_s=0.05)})
    with pytest.raises(FedLoRAError, match="the node registered as somebody-else says it is birch"):
        FlowerPool(config, light, LoneUnruly).members()


def test_with_keys_a_node_is_who_its_key_says_and_nobody_else_takes_part(tmp_path: Path, light: MemoryGrid) -> None:
    files = {name: write_node_key(tmp_path / "keys" / name)[1] for name in RANKS}
    keys = read_keys({name: str(path) for name, path in files.items()})
    light.nodes[100].key, light.nodes[101].key = keys["amber"], keys["cedar"]  # birch with cedar's key, cedar with none
    listed = {name: str(path) for name, path in files.items()}
    settings = FlowerConfig(nodes=3, wait_s=1, poll_s=0.05, keys=listed)
    config = served(tmp_path / "run", None).model_copy(update={"flower": settings})
    with pytest.raises(FedLoRAError) as refusal:
        FlowerPool(config, light, LoneUnruly).members()
    assert "1 of 3 nodes came within 1 s (amber)" in str(refusal.value)
    assert "node 101: its key is not that of birch in flower.keys" in str(refusal.value)
    assert "node 102: its key is not among flower.keys" in str(refusal.value)


def test_no_label_counts_reach_the_server_unless_the_policy_says_so(tmp_path: Path, three: MemoryGrid) -> None:
    Path(three.nodes[100].config["policy"]).write_text("tell_labels: true\n")
    members = FlowerPool(served(tmp_path / "run", None, flower__nodes=3), three).members()
    assert [bool(member.label_counts) for member in members] == [True, False, False]


def test_a_run_that_was_cut_short_goes_on_with_what_the_nodes_keep(tmp_path: Path, three: MemoryGrid) -> None:
    test = tmp_path / "files" / "test.jsonl"
    settings = {"flower__nodes": 3, "rounds": 4, "strategy": ["personal_head", "fedex_het"]}
    whole = play(served(tmp_path / "whole", test, **settings), three)

    def stop(event: str, fields: Any) -> None:
        if event == "round_committed" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        play(served(tmp_path / "cut", test, **settings), three, stop)
    again = play(served(tmp_path / "cut", test, **settings), three)
    assert again["final"] == pytest.approx(whole["final"], rel=1e-6)


# Every bad update of the admission tests ---------------------------------------------------------------------------


class Scripted(NoopRuntime):
    """A node of ``tests.scripted``; the answers of c2 go through ``tamper`` first."""

    def __init__(self, config: RunConfig, threads: int, tamper: Any = None):
        super().__init__(config, threads)
        self._tamper = tamper

    def members(self) -> list[ClientInfo]:
        return [member for member in MEMBERS if member.id == self._config.name]

    def base(self) -> BaseInfo:
        return BaseInfo("causal-lm", (), "scripted", SITES, DENSE, 1)

    def train(self, task: TrainTask) -> bytes:
        honest = answer(task, self.members()[0].num_examples)
        payload = encode_update(**honest)
        return self._tamper(task, honest) or payload if task.client == "c2" and self._tamper else payload

    def evaluate(self, task: EvalTask) -> EvalResult:
        return EvalResult(task.subject, 1.0, 1, 1, 1)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_node_with_a_bad_update_is_refused_and_the_adapter_is_that_of_the_others(tmp_path: Path, name: str) -> None:
    make, reason = ATTACKS[name]
    tamper = make()
    silos = [(member.id, "rows.jsonl", 4) for member in MEMBERS]
    grid = grid_of(tmp_path / "nodes", silos, runtime=lambda config, threads: Scripted(config, threads, tamper))
    pool = FlowerPool(served(tmp_path / "run", None, flower__nodes=5), grid, Scripted)
    assert [member.id for member in pool.members()] == [member.id for member in MEMBERS]
    fed = federation(pool, pool.members())
    attacked = play_round(fed, play_round(fed, first_state(fed)))
    assert attacked.row is not None
    assert reason in attacked.row["refused"]["c2"]
    assert attacked.row["admitted"] == ["c0", "c1", "c3", "c4"]
    others = after_round(members=[member for member in MEMBERS if member.id != "c2"])
    for key, tensor in others.adapter.tensors().items():
        assert torch.equal(attacked.adapter.tensors()[key], tensor), key
