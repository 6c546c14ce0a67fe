"""Hostile updates: each costs one client, and the global adapter is that of the others."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.adapter.wire import encode_update
from fedlora.errors import RoundError
from fedlora.protocol import ClientInfo, Reply, TrainTask
from orchestrator.rounds import play_round
from orchestrator.state import RunState
from tests.scripted import MEMBERS, ScriptedPool, federation, first_state


def after_round(tamper: Any = None, members: Sequence[ClientInfo] = MEMBERS) -> RunState:
    fed = federation(ScriptedPool(tamper), members)
    return play_round(fed, play_round(fed, first_state(fed)))


def with_delta(change: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    def tamper(task: TrainTask, honest: dict[str, Any]) -> bytes:
        change(honest["delta"])
        return encode_update(**honest)

    return tamper


def with_field(**fields: Any) -> Any:
    return lambda task, honest: encode_update(**(honest | fields))


class Replay:
    """Sends the answer of the first round again in the second."""

    def __init__(self) -> None:
        self.first: bytes | None = None

    def __call__(self, task: TrainTask, honest: dict[str, Any]) -> bytes:
        if self.first is None:
            self.first = encode_update(**honest)
            return b"noise"  # in the first round this client is refused too, so that both rounds compare
        return self.first


ATTACKS: dict[str, tuple[Any, str]] = {
    "NaN": (lambda: with_delta(lambda d: d["layer:A"][0, 0].fill_(float("nan"))), "not finite"),
    "infinite": (lambda: with_delta(lambda d: d[":head"].fill_(float("inf"))), "not finite"),
    "squares that float32 cannot hold": (
        lambda: with_delta(lambda d: d["layer:A"][0, 0].fill_(1e25)),
        "norm of the change is 1e+25",
    ),
    "wrong shape": (lambda: with_delta(lambda d: d.update({"layer:B": torch.ones(4, 20)})), "expected [20, 4]"),
    "extra key": (lambda: with_delta(lambda d: d.update({"other:B": torch.ones(1, 1)})), "was not asked for"),
    "missing key": (lambda: with_delta(lambda d: d.pop("layer:A")), "is missing"),
    "one row that would broadcast": (
        lambda: with_delta(lambda d: d.update({"layer:A": torch.ones(1, 8)})),
        "shape [1, 8], expected [4, 8]",
    ),
    "1e9 examples": (lambda: with_field(num_examples=10**9), "claims 1000000000 examples"),
    "a loss of 1e308": (lambda: with_field(metrics={"loss": 1e308}), "is 1e+308, above"),
    "no examples": (lambda: with_field(num_examples=0), "claims 0 examples"),
    "replayed from last round": (Replay, "replayed"),
    "signed by another": (lambda: with_field(client="c1"), "signed 'c1'"),
    "huge": (lambda: with_delta(lambda d: d["layer:B"].mul_(1e6)), "above admission.max_update_norm"),
    "a metric name that cannot be printed": (
        lambda: with_field(metrics={"\ud800[/x]": 1e13}),
        "metric ",
    ),
    "pickle": (lambda: lambda task, honest: pickle.dumps(honest), "not a valid message"),
    "truncated": (lambda: lambda task, honest: encode_update(**honest)[:-7], "not a valid message"),
    "oversized": (lambda: lambda task, honest: encode_update(**honest) + bytes(10**6), "at most"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bad_update_is_refused_with_its_reason_and_the_adapter_is_that_of_the_other_four(name: str) -> None:
    make, reason = ATTACKS[name]
    attacked = after_round(make())
    assert attacked.row is not None
    assert reason in attacked.row["refused"]["c2"]
    assert attacked.row["admitted"] == ["c0", "c1", "c3", "c4"]
    others = after_round(members=[member for member in MEMBERS if member.id != "c2"])
    for tensor_name, tensor in others.adapter.tensors().items():
        assert torch.equal(attacked.adapter.tensors()[tensor_name], tensor), tensor_name


def test_a_second_answer_in_one_round_is_refused_and_the_first_stands() -> None:
    class Twice(ScriptedPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            for reply in super().train(tasks):
                yield from (reply, reply)

    once, twice = (play_round(federation(p), first_state(federation(p))) for p in (ScriptedPool(), Twice()))
    assert twice.row is not None
    assert len(twice.row["refused"]) == 4  # the round is over with the fifth answer
    assert set(twice.row["refused"].values()) == {"answered twice; the first answer stands"}
    assert all(torch.equal(t, twice.adapter.tensors()[n]) for n, t in once.adapter.tensors().items())


def test_an_answer_nobody_asked_for_is_refused() -> None:
    class Stranger(ScriptedPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            for reply in super().train(tasks):
                yield replace(reply, client="mallory") if reply.client == "c2" else reply

    fed = federation(Stranger())
    row = play_round(fed, first_state(fed)).row
    assert row is not None
    assert row["refused"] == {"mallory": "was not asked in this round"}


def test_a_round_without_a_usable_update_changes_nothing_and_three_in_a_row_end_the_run() -> None:
    class Broken(ScriptedPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            yield from (Reply(task.client, error="out of memory") for task in tasks)

    fed = federation(Broken())
    state = first_state(fed)
    for _ in range(2):
        state = play_round(fed, state)
        assert all(torch.equal(t, fed.fresh.tensors()[n]) for n, t in state.adapter.tensors().items())
    with pytest.raises(RoundError, match="3 rounds in a row brought no usable update; in round 3, c0: out of memory"):
        play_round(fed, state)
    recovered = play_round(replace(fed, pool=ScriptedPool()), state)
    assert recovered.empty_rounds == 0


def test_the_order_of_arrival_changes_nothing() -> None:
    class Backwards(ScriptedPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            yield from reversed(list(super().train(tasks)))

    forwards, backwards = (play_round(federation(p), first_state(federation(p))) for p in (ScriptedPool(), Backwards()))
    assert all(torch.equal(t, backwards.adapter.tensors()[n]) for n, t in forwards.adapter.tensors().items())
    assert forwards.row is not None
    assert backwards.row is not None
    assert forwards.row["admitted"] == backwards.row["admitted"]


def test_playing_a_round_leaves_the_state_it_came_from_untouched() -> None:
    fed = federation(ScriptedPool())
    state = first_state(fed)
    before = {name: tensor.clone() for name, tensor in state.adapter.tensors().items()}
    play_round(fed, state)
    assert state.round == 0
    assert all(torch.equal(t, before[n]) for n, t in state.adapter.tensors().items())


def test_clients_of_one_rank_share_one_payload() -> None:
    class Watching(ScriptedPool):
        def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
            assert len({id(task.adapter) for task in tasks}) == 2
            yield from super().train(tasks)

    members = [replace(member, rank=(2, 4)[i % 2]) for i, member in enumerate(MEMBERS)]
    fed = federation(Watching(), members)
    play_round(fed, first_state(fed))
