"""Client-level privacy: what one client can do to the sum, and what is added to it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import Contribution, RoundContext, compose
from fedlora.aggregation.combine import apply_delta, combine
from fedlora.aggregation.dp import clipped_sum
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo

RANK, OUT, IN = 3, 5, 4
GLOBAL = AdapterState({"q": LowRank(torch.zeros(OUT, RANK), torch.ones(RANK, IN))}, {"head": torch.zeros(2, 3)})
ZEROS = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in GLOBAL.tensors().items()}
LARGE = 200  # of a head with enough entries to measure the noise on


def sent(client: str, rank: int, values: Sequence[float], weight: float = 1.0) -> Contribution:
    """A client of this rank that changed every tensor; ``values`` are repeated over the entries."""
    received = GLOBAL.map(lambda u: LowRank(u.B[:, :rank], u.A[:rank]))
    flat = torch.tensor(values)
    delta = {
        name: flat.repeat(tensor.numel())[: tensor.numel()].reshape(tensor.shape)
        for name, tensor in received.tensors().items()
    }
    return Contribution(ClientInfo(client, rank, 10), weight, apply_delta(received, delta), received)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=7)
CLIENTS = st.lists(st.tuples(st.integers(1, RANK), VALUES), min_size=1, max_size=5)
CLIPS = st.floats(1e-3, 1e3)


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(1, RANK), values=VALUES, clip=CLIPS)
def test_no_change_is_longer_than_clip_and_a_shorter_one_stays(rank: int, values: list[float], clip: float) -> None:
    update = sent("c0", rank, values)
    before, after = update.received.tensors(), update.trained.tensors()
    change = norm({name: after[name].double() - before[name].double() for name in after})
    assert norm(clipped_sum([update], ZEROS, clip)) == pytest.approx(min(change, clip), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(clients=CLIENTS, left_out=st.integers(0, 4), clip=CLIPS)
def test_without_any_one_client_the_sum_is_another_by_at_most_clip(
    clients: list[tuple[int, list[float]]], left_out: int, clip: float
) -> None:
    updates = [sent(f"c{i}", rank, values) for i, (rank, values) in enumerate(clients)]
    others = [update for i, update in enumerate(updates) if i != left_out % len(updates)]
    whole, rest = (clipped_sum(some, ZEROS, clip) for some in (updates, others))
    assert norm({name: whole[name] - rest[name] for name in whole}) <= clip * (1 + 1e-9)


def test_a_hand_made_round_without_noise_to_speak_of() -> None:
    # two clients of rank 1, changes of norm 5 + 4 + 6 = 15 entries of 1: sqrt(15), clipped to 1.5; four were planned
    updates = [sent("ada", 1, [1.0]), sent("ben", 1, [1.0])]
    head = clipped_sum(updates, ZEROS, 1.5)[":head"]
    assert torch.allclose(head, torch.full((2, 3), 2 * 1.5 / math.sqrt(15), dtype=torch.float64))


def test_sum_and_noise_are_divided_by_the_planned_cohort_and_not_by_who_answered() -> None:
    strategy = compose([{"dp": {"clip": 1.0, "noise_multiplier": 0.5}}, "zero_pad"])
    three = [sent(name, RANK, [2.0, -1.0]) for name in ("ada", "ben", "cleo")]

    def moved(updates: list[Contribution], planned: int) -> torch.Tensor:
        ctx = RoundContext(1, RANK, 7, GLOBAL, planned=planned)
        return combine(strategy, updates, ctx, {}).adapter.dense["head"].double()

    assert torch.allclose(moved(three, 4), 2 * moved(three, 8), atol=1e-6)
    share = clipped_sum(three[:1], ZEROS, 1.0)[":head"] / 4
    assert torch.allclose(moved(three, 4) - moved(three[:2], 4), share, atol=1e-6)  # the same noise, one client less


def test_the_noise_has_the_standard_deviation_that_the_accountant_counts() -> None:
    wide = AdapterState({"q": GLOBAL.modules["q"]}, {"head": torch.zeros(LARGE, LARGE)})
    strategy = compose([{"dp": {"clip": 3.0, "noise_multiplier": 0.5}}, "head_only"])
    ctx = RoundContext(1, RANK, 7, wide, planned=10)
    head = combine(strategy, [], ctx, {}).adapter.dense["head"]
    # 40,000 draws: the standard error of a standard deviation is its 283rd part
    assert float(head.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert abs(float(head.mean())) < 5 * 0.15 / LARGE


def test_a_round_that_nobody_answered_adds_noise_and_counts() -> None:
    strategy = compose([{"dp": {"clip": 1.0, "noise_multiplier": 1.0}}, "fedit"])
    state: Any = {}
    for number in (1, 2):
        outcome = combine(strategy, [], RoundContext(number, RANK, number, GLOBAL, planned=2), state)
        state = outcome.state
        assert state["rounds"] == number
        assert outcome.adapter.modules["q"].B.any()
    assert outcome.metrics["epsilon"] == strategy.accountant(1.0).epsilon(2)


def test_weights_say_nothing_and_another_round_draws_other_noise() -> None:
    strategy = compose(["dp", "fedit"])
    ctx = RoundContext(1, RANK, 7, GLOBAL, planned=2)
    one, other = [sent("ada", RANK, [1.0]), sent("ben", RANK, [-3.0])], [sent("ada", RANK, [1.0], 9.0)]
    other.append(sent("ben", RANK, [-3.0], 1.0))
    first = combine(strategy, one, ctx, {}).adapter.tensors()
    assert all(torch.equal(t, first[n]) for n, t in combine(strategy, other, ctx, {}).adapter.tensors().items())
    later = combine(strategy, one, replace(ctx, round=2), {}).adapter.tensors()
    assert not any(torch.equal(tensor, first[name]) for name, tensor in later.items())


def test_what_does_not_travel_has_neither_a_change_nor_noise() -> None:
    ctx = RoundContext(1, RANK, 7, GLOBAL, planned=2)
    state: Any = {}
    moved = []
    for _ in range(2):
        outcome = combine(compose(["dp", "rolora"]), [sent("ada", RANK, [1.0])], ctx, state)
        state, q = outcome.state, outcome.adapter.modules["q"]
        moved.append((torch.equal(q.B, GLOBAL.modules["q"].B), torch.equal(q.A, GLOBAL.modules["q"].A)))
    assert moved == [(False, True), (True, False)]


def test_a_server_optimiser_inside_goes_on_from_the_noised_mean() -> None:
    ctx = RoundContext(1, RANK, 7, GLOBAL, planned=2)
    plain = combine(compose(["dp", "fedit"]), [sent("ada", RANK, [1.0])], ctx, {}).adapter.tensors()
    first = combine(compose(["dp", "server_momentum", "fedit"]), [sent("ada", RANK, [1.0])], ctx, {})
    assert all(torch.allclose(tensor, plain[name]) for name, tensor in first.adapter.tensors().items())
    velocity = first.state["inner"]["velocity"]
    assert torch.allclose(velocity[":head"], plain[":head"])


@pytest.mark.parametrize(
    ("stack", "reason"),
    [
        (["dp", "flexlora"], "flexlora is no mean of those in a fixed basis; use fedit, zero_pad, ffa"),
        (["dp", "flora"], "flora is no mean of those"),
        (["dp", "hetlora"], "hetlora is no mean of those"),
        (["dp", "rbla"], "rbla divides each component by the clients that have it.*use zero_pad"),
        (["dp", "fedsa"], "fedsa keeps parts on the clients, and no noise is on what these do"),
        (["dp", "personal_head", "ffa"], r"personal_head\(ffa\) keeps parts on the clients"),
        (["dp", "scaffold", "ffa"], "with scaffold clients send tensors beside the factors"),
        (["dp", "prototypes", "ffa"], "with prototypes clients send tensors beside the factors"),
        (["dp", "ewc", "zero_pad"], "protects what a stream has frozen"),
        (["dp", "lwf", "zero_pad"], "protects what a stream has frozen"),
        (["dp", "krum", "zero_pad"], "krum looks at single updates.*leave krum out"),
        (["dp", {"clip": {"max_norm": 1.0}}, "ffa"], "clip looks at single updates"),
        (["clip", "dp", "ffa"], "dp puts noise on what clients send.*clip stands around it; put dp first"),
        (["server_momentum", "dp", "ffa"], "put dp first"),
        (["dp", "inflora", "ffa"], "inflora chooses a factor after all others have spoken"),
        ([{"dp": {"clip": 0}}, "ffa"], "dp needs clip > 0"),
        ([{"dp": {"noise_multiplier": 0.0}}, "ffa"], "noise_multiplier >= 0.1"),
        ([{"dp": {"delta": 1.0}}, "ffa"], "1e-12 <= delta < 1"),
        ([{"dp": {"budget": 0}}, "ffa"], "dp.budget is an epsilon above 0, not 0"),
    ],
)
def test_a_stack_whose_privacy_is_not_proved_is_refused(stack: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        compose(stack)


@pytest.mark.parametrize("rule", ["fedit", "zero_pad", "ffa", "rolora", "fedsb", "head_only"])
@pytest.mark.parametrize("inside", ["fedprox", "adam"])
def test_sound_stacks_are_taken(rule: str, inside: str) -> None:
    compose(["dp", inside, rule])
