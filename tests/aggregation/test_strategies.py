"""The built-in strategies, by numbers small enough to check by hand and against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, Contribution, RoundContext
from fedlora.aggregation.combine import apply_delta, combine, hand_out, make_delta, part_of, serve_ranks
from fedlora.errors import ConfigError, RankError, RoundError
from fedlora.protocol import ClientInfo

QUIET = settings(deadline=None, derandomize=True, max_examples=80)


def sent(client: str, B: list, A: list, weight: float = 1.0, head: float = 0.0) -> Contribution:
    """An update of one module ``q`` and a head of one number."""
    trained = AdapterState({"q": LowRank(torch.tensor(B), torch.tensor(A))}, {"head": torch.tensor([head])})
    return Contribution(ClientInfo(client, len(A), num_examples=1), weight, trained, trained)


def run(name: str, updates: list[Contribution], rank: int) -> AdapterState:
    return combine(STRATEGIES.create(name), updates, RoundContext(1, rank, seed=0), {}).adapter


# fedit ------------------------------------------------------------------------------------------------------


def test_fedit_averages_both_factors_by_weight() -> None:
    # weights 1 and 3 are shares of 1/4 and 3/4
    c1 = sent("c1", [[4.0], [0.0]], [[8.0, 0.0, 0.0]], weight=1, head=1.0)
    c2 = sent("c2", [[0.0], [8.0]], [[0.0, 4.0, 4.0]], weight=3, head=5.0)
    came = run("fedit", [c1, c2], rank=1)
    assert came.modules["q"].B.tolist() == [[1.0], [6.0]]
    assert came.modules["q"].A.tolist() == [[2.0, 3.0, 3.0]]
    assert came.dense["head"].tolist() == [4.0]


def test_fedit_is_off_by_the_covariance_of_the_factors() -> None:
    # products 1 * 1 and 3 * 3 have the mean 5, the factors the mean 2 * 2 = 4; the error is 1 * 1
    c1, c2 = sent("c1", [[1.0]], [[1.0]]), sent("c2", [[3.0]], [[3.0]])
    q = run("fedit", [c1, c2], rank=1).modules["q"]
    assert (q.B @ q.A).item() == 4.0


def test_fedit_refuses_another_rank_and_names_module_client_and_alternatives() -> None:
    c1, c2 = sent("c1", [[1.0, 1.0]], [[1.0], [1.0]]), sent("c17", [[1.0]], [[1.0]])
    with pytest.raises(RankError) as refusal:
        run("fedit", [c1, c2], rank=2)
    assert str(refusal.value).startswith("q: client c17 sent rank 1 to fedit, which needs equal ranks (global rank 2)")
    assert "flexlora" in str(refusal.value)


def test_a_rule_for_equal_ranks_trains_everyone_at_the_smallest() -> None:
    ranks = {"c1": 8, "c2": 4}
    assert serve_ranks(STRATEGIES.create("fedit"), ranks, rank=16) == ({"c1": 4, "c2": 4}, 4)
    for name in ("zero_pad", "flexlora"):
        assert serve_ranks(STRATEGIES.create(name), ranks, rank=16) == (ranks, 16)


# zero_pad ---------------------------------------------------------------------------------------------------


def test_zero_pad_dilutes_the_components_few_clients_have() -> None:
    # shares are 1/4 and 3/4; the second component is c2's alone, and keeps 3/4 of it in each factor
    c1 = sent("c1", [[4.0]], [[4.0, 8.0]], weight=1)
    c2 = sent("c2", [[8.0, 4.0]], [[0.0, 4.0], [8.0, 4.0]], weight=3)
    q = run("zero_pad", [c1, c2], rank=3).modules["q"]
    assert q.B.tolist() == [[7.0, 3.0, 0.0]]
    assert q.A.tolist() == [[1.0, 5.0], [6.0, 3.0], [0.0, 0.0]]


def test_zero_pad_hands_out_the_first_components() -> None:
    adapter = sent("server", [[1.0, 2.0, 3.0]], [[1.0], [2.0], [3.0]]).trained
    client, ctx = ClientInfo("c1", rank=2, num_examples=1), RoundContext(1, 3, seed=0)
    q = STRATEGIES.create("zero_pad").redistribute(adapter, client, ctx, {}).modules["q"]
    assert (q.B.tolist(), q.A.tolist()) == ([[1.0, 2.0]], [[1.0], [2.0]])


def test_zero_pad_is_fedit_at_equal_ranks() -> None:
    c1 = sent("c1", [[1.0, 2.0]], [[3.0], [4.0]], weight=2)
    c2 = sent("c2", [[5.0, 6.0]], [[7.0], [8.0]], weight=5)
    one, other = (run(name, [c1, c2], rank=2).tensors() for name in ("fedit", "zero_pad"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# flexlora ---------------------------------------------------------------------------------------------------


def test_flexlora_keeps_the_largest_direction_of_the_mean() -> None:
    # the mean update is diag(4, 1); at rank 1 it is diag(4, 0), with the root of 4 on each side
    c1 = sent("c1", [[8.0], [0.0]], [[1.0, 0.0]])
    c2 = sent("c2", [[0.0], [1.0]], [[0.0, 2.0]])
    q = run("flexlora", [c1, c2], rank=1).modules["q"]
    assert torch.allclose(q.B @ q.A, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert q.B.norm().item() == pytest.approx(2.0)
    assert q.A.norm().item() == pytest.approx(2.0)


def test_flexlora_is_exact_where_the_mean_has_room() -> None:
    c1, c2 = sent("c1", [[1.0]], [[1.0]]), sent("c2", [[3.0]], [[3.0]])
    q = run("flexlora", [c1, c2], rank=2).modules["q"]
    assert (q.B @ q.A).item() == pytest.approx(5.0)  # where fedit gives 4


@QUIET
@given(
    shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    clients=st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from([1.0, 8.0, 16.0, 32.0]), st.floats(0.01, 10)),
        min_size=1,
        max_size=6,
    ),
    rank=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_flexlora_is_the_dense_optimum_at_any_shapes_ranks_alphas_and_weights(shape, clients, rank, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates, mean = [], torch.zeros(shape, dtype=torch.float64)
    total = sum(weight for _, _, weight in clients)
    for number, (own, alpha, weight) in enumerate(clients):
        raw_B = torch.randn(shape[0], own, generator=generator)
        A = torch.randn(own, shape[1], generator=generator)
        B = raw_B * (alpha / own)  # effective units: each client has its own alpha / r
        client = ClientInfo(f"c{number}", own, num_examples=1)
        trained = AdapterState({"q": LowRank(B, A)})
        updates.append(Contribution(client, weight, trained, trained))
        mean += weight / total * (alpha / own) * (raw_B.double() @ A.double())
    came = run("flexlora", updates, rank)
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    off = torch.linalg.norm(came.modules["q"].B.double() @ came.modules["q"].A.double() - mean)
    assert came.modules["q"].rank == rank
    # compared by how far each is from the mean: where singular values nearly tie, the optimum is not unique
    assert off <= torch.linalg.norm(best - mean) + 1e-5 * torch.linalg.norm(mean)
    for own in range(1, rank + 1):
        client = ClientInfo("c0", own, num_examples=1)
        handed = STRATEGIES.create("flexlora").redistribute(came, client, RoundContext(2, rank, seed=0), {})
        lost = torch.linalg.norm(handed.modules["q"].B.double() @ handed.modules["q"].A.double() - mean)
        assert handed.modules["q"].rank == own
        assert lost <= torch.linalg.norm(S[own:]) + 1e-5 * torch.linalg.norm(mean)


# What the framework does for all of them --------------------------------------------------------------------


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_weights_are_shares_of_those_who_answered(name: str) -> None:
    # with c3 gone, weights 1 and 3 of c1 and c2 are shares of 1/4 and 3/4, not of 1/8 and 3/8
    c1, c2 = sent("c1", [[1.0]], [[1.0]], 1, head=4.0), sent("c2", [[1.0]], [[1.0]], 3, head=8.0)
    came = run(name, [c1, c2], rank=1)
    assert came.dense["head"].tolist() == [7.0]
    assert (came.modules["q"].B @ came.modules["q"].A).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_round_without_any_weight_is_an_error_that_says_so(name: str) -> None:
    for updates in ([], [sent("c1", [[1.0]], [[1.0]], weight=0.0)]):
        with pytest.raises(RoundError, match=rf"round 1: no update carries any weight \({len(updates)} admitted\)"):
            run(name, updates, rank=1)


def test_a_strategy_sees_updates_in_client_order_and_none_without_weight() -> None:
    seen = []

    class Watching(type(STRATEGIES.create("fedit"))):
        def aggregate(self, updates, ctx, state):
            seen.extend((update.client.id, update.weight) for update in updates)
            return super().aggregate(updates, ctx, state)

    updates = [sent(name, [[1.0]], [[1.0]], weight) for name, weight in (("c2", 3.0), ("c9", 0.0), ("c1", 1.0))]
    combine(Watching(), updates, RoundContext(1, 1, seed=0), {})
    assert seen == [("c1", 0.25), ("c2", 0.75)]


@pytest.mark.parametrize(
    "send", [{"A"}, {"B"}, {"dense"}, {"A", "B"}, {"A", "B", "dense"}, set()], ids=lambda parts: "".join(sorted(parts))
)
def test_parts_that_do_not_travel_stay_as_the_client_received_them(send: set) -> None:
    received = sent("c1", [[1.0]], [[2.0]], head=3.0).trained
    trained = sent("c1", [[10.0]], [[20.0]], head=30.0).trained
    delta = make_delta(received, trained, frozenset(send))
    assert {part_of(name) for name in delta} == send
    came = apply_delta(received, delta).tensors()
    expected = {"q:B": 10.0 if "B" in send else 1.0, "q:A": 20.0 if "A" in send else 2.0}
    expected[":head"] = 30.0 if "dense" in send else 3.0
    assert {name: tensor.item() for name, tensor in came.items()} == expected


def test_what_is_handed_out_can_learn_even_after_a_truncation_to_nothing() -> None:
    fresh = AdapterState({"q": LowRank(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))})
    nothing = AdapterState({"q": LowRank(torch.zeros(2, 2), torch.zeros(2, 2))})
    client, ctx = ClientInfo("c1", rank=1, num_examples=1), RoundContext(1, 2, seed=0)
    q = hand_out(STRATEGIES.create("flexlora"), nothing, client, ctx, {}, fresh).modules["q"]
    assert (q.B.tolist(), q.A.tolist()) == ([[0.0], [0.0]], [[1.0, 2.0]])


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_says_what_it_computes_and_where_it_is_from(name: str) -> None:
    strategy = STRATEGIES.create(name)
    assert strategy.name == name
    assert "sum" in strategy.equation
    assert "arXiv" in strategy.source


def test_an_unknown_strategy_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"strategy: flexlore is not known; did you mean flexlora\?"):
        STRATEGIES.create("flexlore")
