"""What a rank costs, said before a run and compared with what then travels."""

import struct
from pathlib import Path

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.wire import digest, encode_adapter
from fedlora.aggregation import compose
from fedlora.aggregation.base import RoundContext
from fedlora.aggregation.combine import hand_out
from fedlora.protocol import TrainTask
from orchestrator.budget import Outline, budget, budget_lines
from orchestrator.validate import validate
from tests.conftest import toy_config

SITES = {"a": (10, 6), "b": (4, 4)}


def plain(tmp_path: Path, **changes: object):
    return toy_config(tmp_path / "run", **changes)


def test_the_numbers_of_a_plain_rule_can_be_worked_out_by_hand(tmp_path: Path) -> None:
    """Rank 2: 2 * (10 + 6 + 4 + 4) + 5 = 53 numbers of 4 bytes; training holds each four times."""
    found = budget(compose("zero_pad"), {"c0": 2, "c1": 2, "c2": 4}, Outline(4, SITES, 5), plain(tmp_path))
    assert found["ranks"] == [
        {
            "rank": 2,
            "clients": 2,
            "parameters": 53,
            "trained": 53,
            "memory_bytes": 848,
            "down_bytes": 212,
            "up_bytes": 212,
        },
        {"rank": 4, "clients": 1, "parameters": 101, "trained": 101}
        | {"memory_bytes": 1616, "down_bytes": 404, "up_bytes": 404},
    ]
    assert found["round"] == {"clients": 3, "down_bytes": 828, "up_bytes": 828}
    assert found["patch_bytes"] == 0


def test_plain_gradient_descent_keeps_no_optimizer_state(tmp_path: Path) -> None:
    found = budget(compose("zero_pad"), {"c0": 2}, Outline(4, SITES, 5), plain(tmp_path, training__optim="sgd"))
    assert found["ranks"][0]["memory_bytes"] == 2 * 212


def test_a_round_counts_whoever_is_asked(tmp_path: Path) -> None:
    def clients(**changes: object) -> int:
        config = plain(tmp_path, **changes)
        return budget(compose("zero_pad"), dict.fromkeys("abcdefghij", 2), Outline(4, SITES, 5), config)["round"][
            "clients"
        ]

    assert clients(clients__per_round=4) == 4
    assert clients(clients__per_round=0.5, schedule__over_selection=1.3) == 7  # ceil(5 * 1.3)
    assert clients(clients__per_round=8, schedule={"mode": "async", "buffer": 3}) == 3


def test_of_factors_trained_in_turn_the_larger_round_counts(tmp_path: Path) -> None:
    """RoLoRA sends 2 * (10 + 4) numbers of B in odd rounds and 2 * (6 + 4) of A in even ones."""
    found = budget(compose("rolora"), {"c0": 2}, Outline(2, SITES, 0), plain(tmp_path))
    assert (found["ranks"][0]["trained"], found["ranks"][0]["up_bytes"]) == (28, 112)


WRAPPED = [["scaffold", "zero_pad"], ["scaffold", "head_only"], ["prototypes", "flexlora"], ["inflora", "ffa"]]


@pytest.mark.parametrize("strategy", ["flexlora", "ffa", "fedsa", "fedsb", "rolora", *WRAPPED], ids=str)
def test_what_is_told_is_what_travels_headers_aside(tmp_path: Path, strategy: object) -> None:
    config = plain(tmp_path, strategy=strategy, clients__ranks=4, clients__count=2)
    facts, problems = validate(config)
    assert not problems
    (row,) = facts["budget"]["ranks"]
    runtime, rule = ClientRuntime(config), compose(config.strategy)
    client, base = runtime.members()[0], runtime.base()
    fresh = initial_adapter(base.sites, base.dense, 8, 0)
    ctx = RoundContext(1, 8, 0, rule.start(fresh, 0), runtime.members())
    plan = rule.plan(ctx, client, {})
    payload = encode_adapter(hand_out(rule, client, ctx, {}, fresh), rule.broadcast(client, ctx, {}))
    answer = runtime.train(TrainTask(1, client.id, plan, payload, digest(payload), 0))
    assert (row["down_bytes"], row["up_bytes"]) == (content(payload), content(answer))


@pytest.mark.parametrize("wire", [{"up": "int8"}, {"up": "int4", "top_k": 0.25}, {"top_k": 0.1}], ids=str)
def test_of_packed_updates_what_is_told_is_what_travels_scales_aside(tmp_path: Path, wire: dict[str, object]) -> None:
    config = plain(tmp_path, strategy=["scaffold", "zero_pad"], clients__ranks=4, wire=wire)
    facts, _ = validate(config)
    (row,) = facts["budget"]["ranks"]
    runtime, rule = ClientRuntime(config), compose(config.strategy)
    client, base = runtime.members()[0], runtime.base()
    ctx = RoundContext(1, 8, 0, initial_adapter(base.sites, base.dense, 8, 0), runtime.members())
    payload = encode_adapter(hand_out(rule, client, ctx, {}, ctx.adapter), rule.broadcast(client, ctx, {}))
    answer = runtime.train(TrainTask(1, client.id, rule.plan(ctx, client, {}), payload, digest(payload), 0))
    scales = 4 * (8 * len(base.sites) + 5) if "up" in wire else 0  # of A and B at rank 4, and of the head
    assert 0 <= content(answer) - row["up_bytes"] - scales < 2 * len(base.sites) + 8  # one value more of each tensor


def content(message: bytes) -> int:
    """Bytes of a safetensors message without its header."""
    return len(message) - 8 - struct.unpack("<Q", message[:8])[0]


def test_validate_prints_a_row_per_rank_and_the_sum_of_a_round(tmp_path: Path) -> None:
    facts, _ = validate(plain(tmp_path, strategy="flora"))
    lines = budget_lines(facts["budget"])
    assert lines[0].split() == ["rank", "clients", "parameters", "trained", "memory", "down", "up"]
    assert [line.split()[:2] for line in lines[1:4]] == [["2", "2"], ["4", "2"], ["8", "2"]]
    assert lines[4].startswith("a round of 6 clients: ")
    assert "a patch of the base of at most" in lines[4]


def test_validate_names_a_misspelt_rule_of_selection(tmp_path: Path) -> None:
    _, problems = validate(plain(tmp_path, clients__selection="ort"))
    assert ["did you mean oort?" in str(problem) for problem in problems] == [True]


def test_the_outline_costs_no_memory() -> None:
    assert all(tensor.device == torch.device("meta") for tensor in Outline(4, SITES, 5).state().tensors().values())
