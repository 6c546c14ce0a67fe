"""Task-vector negation, against dense float64 matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, Contribution
from fedlora.aggregation.combine import combine
from fedlora.aggregation.trials import multiply, train, warm
from fedlora.errors import AdapterError, ConfigError, RoundError
from fedlora.protocol import ClientInfo
from fedlora.unlearning.negation import negate, task_vector


def adapter(seed: int, rank: int, head: float = 0.0) -> AdapterState:
    draw = torch.Generator().manual_seed(seed)
    sites = {"q": (7, 5), "v": (6, 9)}
    pairs = {
        path: LowRank(torch.randn(out, rank, generator=draw), torch.randn(rank, width, generator=draw))
        for path, (out, width) in sites.items()
    }
    return AdapterState(pairs, {"head": torch.tensor([head, 1.0])})


def update(seed: int, rank: int, weight: float, head: float = 0.0) -> Contribution:
    return Contribution(ClientInfo("c7", rank, 1), weight, adapter(seed, rank, head), adapter(seed + 50, rank))


def vector_of(updates: list[Contribution]) -> dict[str, Tensor]:
    moves = [(u.weight, multiply(u.trained), multiply(u.received)) for u in updates]
    return {path: sum((w * (t[path] - r[path]) for w, t, r in moves), torch.zeros(())) for path in ("q", "v")}


UPDATES = [update(1, 2, weight=0.25, head=2.0), update(2, 3, weight=0.5, head=4.0)]


def test_the_task_vector_is_the_weighted_sum_of_what_the_target_changed() -> None:
    found = task_vector(UPDATES)
    assert found.rank == 2 * (2 + 3)
    for path, expected in vector_of(UPDATES).items():
        assert_close(multiply(found)[path], expected, atol=1e-6, rtol=1e-6)
    assert found.dense["head"].tolist() == [0.25 * 2.0 + 0.5 * 4.0, 0.0]


def test_negation_is_the_best_approximation_at_the_rank_of_the_adapter_and_says_how_far_off_it_is() -> None:
    start = adapter(9, 4, head=5.0)
    found = negate(start, UPDATES, strength=0.5)
    lost, kept = 0.0, 0.0
    for path, vector in vector_of(UPDATES).items():
        exact = multiply(start)[path] - 0.5 * vector
        values = torch.linalg.svdvals(exact)
        came = multiply(found.adapter)[path]
        # Eckart-Young: nothing of rank 4 is closer
        assert float((exact - came).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-5)
        lost, kept = lost + float(values[4:].square().sum()), kept + float(values.square().sum())
        assert found.adapter.modules[path].rank == 4
    assert found.error == pytest.approx((lost / kept) ** 0.5, rel=1e-5)
    assert found.error > 0.01
    assert found.adapter.dense["head"].tolist() == [5.0 - 0.5 * 2.5, 1.0]


def test_what_fits_the_rank_loses_nothing() -> None:
    # rank 1 + 1 + 1 within 4
    start, one = adapter(9, 4), update(3, 1, weight=1.0)
    small = start.map(lambda u: LowRank(torch.cat([u.B[:, :1], torch.zeros(u.B.shape[0], 3)], dim=1), u.A))
    found = negate(small, [one])
    for path, vector in vector_of([one]).items():
        assert_close(multiply(found.adapter)[path], multiply(small)[path] - vector, atol=1e-5, rtol=1e-5)
    assert found.error < 1e-6  # the rounding of float32


def test_after_one_round_of_an_exact_rule_it_gives_the_others_and_what_the_target_received() -> None:
    # S = sum_k w_k S_k, less w_t (S_t - R_t); a global rank of 4 does not hold it, so the dense head is looked at
    strategy = STRATEGIES.create("flexlora")
    start = warm(strategy)
    sent = train(strategy, start, list(start.ctx.members))
    total = sum(one.weight for one in sent)
    updates = [replace(one, weight=one.weight / total) for one in sent]
    outcome = combine(strategy, sent, start.ctx, start.state)
    target, others = updates[0], updates[1:]
    found = negate(outcome.adapter, [target])
    expected = sum(
        (one.weight * one.trained.dense["head.weight"] for one in others),
        target.weight * target.received.dense["head.weight"],
    )
    assert_close(found.adapter.dense["head.weight"], expected)


def test_taking_away_the_whole_adapter_leaves_zeros() -> None:
    start = adapter(9, 2)
    zero = start.map(lambda u: LowRank(torch.zeros_like(u.B), u.A))
    nothing = AdapterState(zero.modules, {"head": torch.zeros(2)})
    found = negate(start, [Contribution(ClientInfo("c7", 2, 1), 1.0, start, nothing)])
    # what cancels in float64 leaves rounding of float32 at most
    assert all(float(product.norm()) < 1e-5 for product in multiply(found.adapter).values())
    assert found.adapter.dense["head"].tolist() == [0.0, 0.0]
    assert found.share == pytest.approx(1.0)


def test_inputs_and_what_is_frozen_stay() -> None:
    start = adapter(9, 2)
    frozen = {"q": LowRank(torch.ones(7, 1), torch.ones(1, 5))}
    beside = AdapterState(start.modules, start.dense, frozen)
    before = {name: tensor.clone() for name, tensor in beside.tensors().items()}
    sent = [replace(one, trained=replace(one.trained, frozen=frozen)) for one in UPDATES]
    found = negate(beside, sent)
    assert all(torch.equal(before[name], tensor) for name, tensor in beside.tensors().items())
    assert torch.equal(found.adapter.frozen["q"].B, frozen["q"].B)
    plain = negate(start, UPDATES).adapter
    assert torch.equal(found.adapter.modules["q"].B, plain.modules["q"].B)


def test_what_makes_no_sense_is_refused() -> None:
    start = adapter(9, 2)
    with pytest.raises(RoundError, match="no update of the target is at hand; keep a contribution log"):
        negate(start, [])
    for strength in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"negation: strength must be a number above 0, not {strength}"):
            negate(start, UPDATES, strength)
    other = AdapterState({"q": start.modules["q"]}, start.dense)
    with pytest.raises(AdapterError, match="v: module of client c7 is not part of this adapter"):
        negate(other, UPDATES)
    core = start.map(lambda u: LowRank(u.B, u.A, torch.eye(2)))
    with pytest.raises(AdapterError, match="q: the adapter has a core between fixed factors"):
        negate(core, UPDATES)
    with pytest.raises(AdapterError, match="q: client c7 has a core"):
        negate(start, [replace(UPDATES[0], trained=core)])
