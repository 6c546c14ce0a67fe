"""Runs whose clients send packed updates: bytes, crashes, pools, what a client keeps, and what is refused."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.noop import NoopRuntime
from clients.private_state import PrivateState
from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.packing import PLAIN, Packing
from fedlora.adapter.rank import first
from fedlora.adapter.wire import decode_update, digest, encode_adapter, encode_update
from fedlora.errors import ConfigError
from fedlora.protocol import ClientUpdate, Reply, TrainPlan, TrainTask
from orchestrator import launch, outbox
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from orchestrator.stores.files import read_json, read_lines
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config
from tests.scripted import MEMBERS, ScriptedPool, answer, federation, first_state

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["orchestrator.launch", "clients.runtime", "tests.conftest"])
FEEDBACK = {"up": "int8", "error_feedback": True}


def fed_back(folder: Path | str, **changes: Any) -> Any:
    """Mixed ranks over a rule with a fixed basis, not everybody in every round."""
    settings = {"strategy": "zero_pad", "wire": FEEDBACK, "clients__per_round": 4, "rounds": 4}
    return toy_config(folder, **settings | changes)


# What a run tells -------------------------------------------------------------------------------------------------


def test_a_run_tells_what_its_updates_weigh_and_would_have_weighed(tmp_path: Path) -> None:
    plain = launch.run(toy_config(tmp_path / "plain", rounds=1), quiet)
    packed = launch.run(toy_config(tmp_path / "packed", rounds=1, wire__up="int8"), quiet)
    (row,), (packed_row,) = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "packed"))
    assert packed_row["refused"] == packed_row["failed"] == {}
    assert packed["bytes_up"] == packed_row["bytes_up"] < packed_row["bytes_up_fp32"] < row["bytes_up"]
    assert row["bytes_up"] - packed_row["bytes_up_fp32"] < 6 * 2000  # the headers of six messages
    assert "bytes_up_fp32" not in row
    assert packed["bytes_down"] == plain["bytes_down"]
    assert packed["final"]["loss"] == pytest.approx(plain["final"]["loss"], rel=0.02)


def test_clients_that_only_pretend_pack_too(tmp_path: Path) -> None:
    config = toy_config(tmp_path, wire={"up": "int4", "top_k": 0.5})
    runtime = NoopRuntime(config, 1)
    payload = encode_adapter(initial_adapter(runtime.base().sites, {}, 2, 0))
    reply = runtime.train(TrainTask(1, "c0", TrainPlan(2), payload, digest(payload), 0))
    assert decode_update(reply, packing=Packing("int4", 0.5)).delta


def test_what_is_equal_is_encoded_once_per_rank_and_patches_of_the_base_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[bytes] = []
    sent: list[tuple[int, int, list[str]]] = []

    def encode(*arguments: Any) -> bytes:
        encoded.append(encode_adapter(*arguments))
        return encoded[-1]

    class Watched(LocalPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            patches = {id(patch.payload) for task in tasks for patch in task.ledger}
            sent.append((len({id(task.adapter) for task in tasks}), len(patches), [task.client for task in tasks]))
            yield from super().train(tasks, timeout_s)

    monkeypatch.setattr(outbox, "encode_adapter", encode)
    monkeypatch.setattr(launch, "open_pool", Watched)
    # ranks 2, 4 and 8 for six clients; flora patches the base, so that every round has another ledger
    launch.run(toy_config(tmp_path, strategy="flora", wire__up="int8"), quiet)
    assert len(encoded) == 3 * 3
    assert [(adapters, patches, len(clients)) for adapters, patches, clients in sent] == [(3, n, 6) for n in range(3)]
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows[0]["bytes_down"] == 2 * sum(map(len, encoded[:3]))


# A crash, and another pool ----------------------------------------------------------------------------------------


def _play(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(fed_back(folder), quiet)


def _resume(folder: str) -> None:
    launch.resume(Path(folder), quiet)


def in_a_process(function: Any, *arguments: Any) -> int | None:
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.slow
def test_killed_anywhere_a_run_with_error_feedback_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert in_a_process(_play, str(tmp_path / "whole"), "") == 0
    expected = read_json(tmp_path / "whole" / "summary.json")
    # while clients have stored what they keep of a round that will be repeated, and between commit and log
    for failpoint in ("round.answered:3", "round.aggregated:3", "commit.renamed:3"):
        folder = tmp_path / failpoint
        assert in_a_process(_play, str(folder), failpoint) == -signal.SIGKILL
        assert in_a_process(_resume, str(folder)) == 0
        summary = read_json(folder / "summary.json")
        assert (summary["adapter_sha256"], summary["bytes_up"]) == (expected["adapter_sha256"], expected["bytes_up"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_packed_run_on_ray_has_the_adapter_of_the_local_run(tmp_path: Path) -> None:
    local = launch.run(fed_back(tmp_path / "local"), quiet)
    ray = launch.run(fed_back(tmp_path / "ray", pool="ray", ray__workers=2), quiet)
    assert (ray["adapter_sha256"], ray["bytes_up"]) == (local["adapter_sha256"], local["bytes_up"])


# What a client keeps ----------------------------------------------------------------------------------------------


def learn(runtime: ClientRuntime, number: int, accepted: int, rank: int = 4) -> ClientUpdate:
    """What comes of a round of c0 that starts where every round does."""
    base = runtime.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 8, 0).map(lambda update: first(update, rank)))
    task = TrainTask(number, "c0", TrainPlan(rank), payload, digest(payload), seed=number, accepted=accepted)
    return decode_update(runtime.train(task))


@pytest.mark.parametrize("wire", [FEEDBACK, {"up": "int4", "error_feedback": True}, {"top_k": 0.2}], ids=str)
def test_what_a_client_has_sent_is_what_it_learned_but_for_what_it_still_keeps(
    tmp_path: Path, wire: dict[str, Any]
) -> None:
    packed = ClientRuntime(toy_config(tmp_path / "packed", wire={**wire, "error_feedback": True}), 1)
    plain = ClientRuntime(toy_config(tmp_path / "plain"), 1)
    sent = [learn(packed, number, accepted=number - 1).delta for number in (1, 2, 3)]
    meant = [learn(plain, number, accepted=0).delta for number in (1, 2, 3)]
    unsent = PrivateState(tmp_path / "packed" / "private", 2).load("c0", 3).unsent
    assert sorted(unsent) == sorted(sent[0])
    assert any(tensor.any() for tensor in unsent.values())
    for name in unsent:
        came, asked = (torch.stack([delta[name] for delta in deltas]).sum(dim=0) for deltas in (sent, meant))
        torch.testing.assert_close(came, asked - unsent[name], rtol=1e-5, atol=1e-6)


def test_what_a_refused_update_left_unsent_is_forgotten_with_it(tmp_path: Path) -> None:
    runtime = ClientRuntime(toy_config(tmp_path / "run", wire=FEEDBACK), 1)
    fresh = learn(runtime, 3, accepted=0).delta
    learn(runtime, 1, accepted=0)
    learn(runtime, 2, accepted=1)  # refused by the server: round 3 goes on from round 1
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in learn(runtime, 3, accepted=1).delta.items())
    again = ClientRuntime(toy_config(tmp_path / "again", wire=FEEDBACK), 1)
    learn(again, 1, accepted=0)
    for name, tensor in learn(again, 3, accepted=1).delta.items():
        assert torch.equal(tensor, learn(runtime, 3, accepted=1).delta[name])
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in learn(runtime, 3, accepted=0).delta.items())


def test_what_is_unsent_follows_the_rank(tmp_path: Path) -> None:
    runtime = ClientRuntime(toy_config(tmp_path, wire=FEEDBACK), 1)
    for number, rank in ((1, 4), (2, 2), (3, 8)):
        learn(runtime, number, number - 1, rank)
        unsent = PrivateState(tmp_path / "private", 2).load("c0", number).unsent
        assert {tensor.shape[0] for name, tensor in unsent.items() if name.endswith(":A")} == {rank}


def test_without_feedback_a_client_keeps_nothing(tmp_path: Path) -> None:
    learn(ClientRuntime(toy_config(tmp_path, wire__up="int8"), 1), 1, 0)
    assert not (tmp_path / "private").exists()


# What the server takes --------------------------------------------------------------------------------------------


class Packing8(ScriptedPool):
    """Everybody sends int8, but for c2, which packs as it likes."""

    def __init__(self, c2: Packing):
        super().__init__()
        self._c2 = c2

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        rows = {member.id: member.num_examples for member in MEMBERS}
        for task in tasks:
            packing = self._c2 if task.client == "c2" else Packing("int8")
            yield Reply(task.client, encode_update(**answer(task, rows[task.client]), packing=packing))


@pytest.mark.parametrize("c2", [PLAIN, Packing("int4"), Packing("int8", 0.5), Packing("int8")], ids=lambda p: p.form)
def test_an_update_that_is_packed_otherwise_costs_its_client_only(c2: Packing) -> None:
    fed = federation(Packing8(c2), packing=Packing("int8"))
    row = play_round(fed, first_state(fed)).row
    assert row is not None
    others = ["c0", "c1", "c3", "c4"]
    assert row["admitted"] == (sorted([*others, "c2"]) if c2.form == "int8" else others)
    assert all(f"values came as '{c2.form}'; expected int8" in reason for reason in row["refused"].values())


def test_a_packed_message_is_as_large_as_it_may_be_and_no_larger() -> None:
    class Large(Packing8):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            for reply in super().train(tasks):
                assert reply.payload is not None
                yield Reply(reply.client, bytes(reply.payload) + bytes(1 << 17)) if reply.client == "c2" else reply

    fed = federation(Large(Packing("int8")), packing=Packing("int8"))
    row = play_round(fed, first_state(fed)).row
    assert row is not None
    assert "at most" in row["refused"]["c2"]


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ({"up": "int2"}, "config: wire.up is 'int2': input should be 'fp32', 'int8' or 'int4'"),
        ({"top_k": 0}, "config: wire.top_k is '0': input should be greater than 0"),
        ({"top_k": 1.5}, "config: wire.top_k is '1.5': input should be less than 1"),
        ({"error_feedback": True}, "config: wire: error_feedback has nothing to feed back.*use int8, int4 or top_k"),
        ({"upp": "int8"}, "config: wire.upp is not a key; did you mean wire.up?"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(tmp_path: Path, wire: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, wire=wire)


def test_feedback_over_a_rule_that_changes_the_basis_is_refused(tmp_path: Path) -> None:
    for strategy, refused in (("flexlora", True), ("flora", True), ("rolora", False), (["scaffold", "rbla"], False)):
        _, problems = validate(toy_config(tmp_path, strategy=strategy, wire=FEEDBACK))
        said = [str(problem) for problem in problems]
        assert (["changes their basis every round; use ffa, rolora" in one for one in said] == [True]) == refused
    with pytest.raises(ConfigError, match="wire.error_feedback"):
        launch.run(toy_config(tmp_path / "run", wire=FEEDBACK), quiet)


def test_nobody_who_forgets_sends_later_what_it_kept(tmp_path: Path) -> None:
    entry = {
        "clients": ["c0"],
        "first": 3,
        "last": 3,
        "loss": "npo",
        "steps": 1,
        "learning_rate": 0.01,
        "max_norm": 1.0,
    }
    with pytest.raises(ConfigError, match="forgetting: with wire.error_feedback clients would later send"):
        fed_back(tmp_path, forgetting=[entry], clients__exclude=["c0"])
