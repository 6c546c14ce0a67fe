"""The built-in strategies, by numbers small enough to check by hand and against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, Aggregate, Contribution, RoundContext
from fedlora.aggregation.combine import apply_delta, combine, hand_out, make_delta, part_of, serve_ranks
from fedlora.errors import ConfigError, RankError, RoundError
from fedlora.protocol import ClientInfo

QUIET = settings(deadline=None, derandomize=True, max_examples=80)


def sent(client: str, B: list, A: list, weight: float = 1.0, head: float = 0.0) -> Contribution:
    """An update of one module ``q`` and a head of one number."""
    trained = AdapterState({"q": LowRank(torch.tensor(B), torch.tensor(A))}, {"head": torch.tensor([head])})
    return Contribution(ClientInfo(client, len(A), num_examples=1), weight, trained, trained)


def run(name: str, updates: list[Contribution], rank: int) -> AdapterState:
    return outcome(name, updates, rank).adapter


def outcome(name: str, updates: list[Contribution], rank: int) -> Aggregate:
    """The whole answer, from a global adapter of zeros at the global rank."""
    zero = updates[0].received.map(lambda u: LowRank(torch.zeros(u.shape[0], rank), torch.zeros(rank, u.shape[1])))
    return combine(STRATEGIES.create(name), updates, RoundContext(1, rank, seed=0, adapter=zero), {})


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


# rbla, hetlora ----------------------------------------------------------------------------------------------


def test_rbla_averages_a_component_over_those_who_have_it_and_keeps_what_nobody_has() -> None:
    # shares are 1/4 and 3/4; the second component is c2's alone and stays whole, the third is nobody's
    c1 = sent("c1", [[4.0]], [[4.0, 8.0]], weight=1)
    c2 = sent("c2", [[8.0, 4.0]], [[0.0, 4.0], [8.0, 4.0]], weight=3)
    before = AdapterState({"q": LowRank(torch.full((1, 3), 9.0), torch.full((3, 2), 9.0))})
    q = combine(STRATEGIES.create("rbla"), [c1, c2], RoundContext(1, 3, 0, before), {}).adapter.modules["q"]
    assert q.B.tolist() == [[7.0, 4.0, 9.0]]
    assert q.A.tolist() == [[1.0, 5.0], [8.0, 4.0], [9.0, 9.0]]


def test_hetlora_weighs_by_the_norm_of_what_was_learned() -> None:
    # norms 1 and 3 are shares of 1/4 and 3/4, whatever the weights
    c1, c2 = sent("c1", [[1.0]], [[1.0]], weight=90, head=4.0), sent("c2", [[3.0]], [[1.0]], weight=10, head=8.0)
    came = run("hetlora", [c1, c2], rank=1)
    assert (came.modules["q"].B.item(), came.dense["head"].item()) == (2.5, 7.0)


def test_hetlora_cuts_a_rank_whose_last_component_shrank_for_good() -> None:
    strategy = STRATEGIES.create("hetlora")
    client = ClientInfo("c1", rank=2, num_examples=1)
    wide = sent("c1", [[1.0, 2.0]], [[1.0], [2.0]]).trained
    narrow = sent("c1", [[1.0, 1.0]], [[1.0], [1.0]]).trained
    ctx = RoundContext(1, 2, 0, wide)
    grown = strategy.aggregate([Contribution(client, 1.0, wide, narrow)], ctx, {})
    assert strategy.plan(ctx, client, grown.state).rank == 2
    shrunk = strategy.aggregate([Contribution(client, 1.0, narrow, wide)], ctx, {})
    assert strategy.plan(ctx, client, shrunk.state).rank == 1


# lora_fair, fedrot ------------------------------------------------------------------------------------------


def test_lora_fair_makes_up_for_the_error_of_the_means_as_far_as_the_ridge_lets_it() -> None:
    # S* = 5, the means are 2 and 2; dB = (5 - 4) * 2 / (4 + ridge)
    c1, c2 = sent("c1", [[1.0]], [[1.0]]), sent("c2", [[3.0]], [[3.0]])
    q = combine(STRATEGIES.create("lora_fair", ridge=1.0), [c1, c2], RoundContext(1, 1, 0), {}).adapter.modules["q"]
    assert q.B.item() == pytest.approx(2.4)
    assert q.A.item() == 2.0


def test_fedrot_undoes_a_turn_of_the_basis_before_it_averages() -> None:
    # c2 sends c1's update with both components swapped: a plain mean of factors would lose it
    B, A = [[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 2.0]]
    swapped = sent("c2", [[0.0, 1.0], [2.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]])
    first = sent("c1", B, A)
    c2 = Contribution(swapped.client, 1.0, swapped.trained, first.received)
    q = run("fedrot", [first, c2], rank=2).modules["q"]
    assert torch.allclose(q.B @ q.A, torch.diag(torch.tensor([1.0, 4.0])), atol=1e-6)


# florist ----------------------------------------------------------------------------------------------------


def test_florist_keeps_as_many_singular_values_as_the_energy_asks_for() -> None:
    # diag(3, 1): the first holds 9/10 of the energy
    update = sent("c1", [[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    for tau, kept in ((0.9, 1), (0.91, 2)):
        strategy = STRATEGIES.create("florist", tau=tau)
        assert combine(strategy, [update], RoundContext(1, 2, 0), {}).adapter.modules["q"].rank == kept


# flora, fedex, fedex_het ------------------------------------------------------------------------------------


def test_flora_moves_the_stack_into_the_base_and_starts_afresh() -> None:
    c1, c2 = sent("c1", [[1.0]], [[1.0]], weight=1), sent("c2", [[3.0]], [[3.0]], weight=3)
    came = outcome("flora", [c1, c2], rank=1)
    assert (came.patch["q"].B @ came.patch["q"].A).item() == pytest.approx(0.25 + 6.75)
    assert came.adapter.modules["q"].B.item() == 0
    assert came.adapter.modules["q"].A.item() != 0


def test_fedex_puts_the_covariance_of_the_factors_into_the_base() -> None:
    came = outcome("fedex", [sent("c1", [[1.0]], [[1.0]]), sent("c2", [[3.0]], [[3.0]])], rank=1)
    assert (came.adapter.modules["q"].B @ came.adapter.modules["q"].A).item() == 4.0
    assert (came.patch["q"].B @ came.patch["q"].A).item() == pytest.approx(1.0)


def test_fedex_het_freezes_for_a_small_client_what_a_large_one_may_train() -> None:
    # the mean is diag(4, 1): both components stay at the global rank 2; rank 1 trains the first, sees the second
    c1, c2 = sent("c1", [[8.0], [0.0]], [[1.0, 0.0]]), sent("c2", [[0.0], [1.0]], [[0.0, 2.0]])
    came = outcome("fedex_het", [c1, c2], rank=2)
    assert came.patch == {}
    client, ctx = ClientInfo("c1", rank=1, num_examples=1), RoundContext(2, 2, 0, came.adapter)
    handed = STRATEGIES.create("fedex_het").redistribute(came.adapter, client, ctx, {})
    seen = [update["q"].B @ update["q"].A for update in (handed.modules, handed.frozen)]
    assert torch.allclose(seen[0], torch.diag(torch.tensor([4.0, 0.0])), atol=1e-6)
    assert torch.allclose(seen[1], torch.diag(torch.tensor([0.0, 1.0])), atol=1e-6)


# ffa, rolora, fedsa, fedsb ----------------------------------------------------------------------------------


def test_rolora_trains_b_first_and_then_takes_turns() -> None:
    strategy, client = STRATEGIES.create("rolora"), ClientInfo("c1", 1, 1)
    update = sent("c1", [[2.0]], [[1.0]])
    ctx = RoundContext(1, 1, 0, update.received)
    state, turns = {}, []
    for _ in range(4):
        turns.append("".join(sorted(strategy.plan(ctx, client, state).train - {"dense"})))
        state = combine(strategy, [update], ctx, state).state
    assert turns == ["B", "A", "B", "A"]


def test_ffa_starts_from_orthonormal_rows_that_span_what_the_drawn_ones_do() -> None:
    fresh = initial_adapter({"q": (5, 9)}, {}, 3, seed=1)
    A = STRATEGIES.create("ffa").start(fresh, seed=1).modules["q"].A
    assert torch.allclose(A @ A.T, torch.eye(3), atol=1e-6)
    coefficients = fresh.modules["q"].A @ A.T
    assert torch.allclose(coefficients @ A, fresh.modules["q"].A, atol=1e-6)


def test_fedsa_shares_a_and_nothing_else() -> None:
    plan = STRATEGIES.create("fedsa").plan(RoundContext(1, 1, 0), ClientInfo("c1", 1, 1), {})
    assert (plan.send, plan.keep) == ({"A"}, {"B", "dense"})


def test_fedsb_averages_cores_between_fixed_factors() -> None:
    strategy = STRATEGIES.create("fedsb")
    start = strategy.start(initial_adapter({"q": (4, 6)}, {}, 2, seed=1), seed=1)
    q = start.modules["q"]
    sides = [
        Contribution(ClientInfo(name, 2, 1), 1.0, AdapterState({"q": LowRank(q.B, q.A, value * torch.eye(2))}), start)
        for name, value in (("c1", 1.0), ("c2", 3.0))
    ]
    came = combine(strategy, sides, RoundContext(1, 2, 0, start), {}).adapter.modules["q"]
    assert torch.equal(came.C, 2.0 * torch.eye(2))
    assert torch.equal(came.B, q.B)
    assert torch.equal(came.A, q.A)
    assert torch.allclose(q.B.T @ q.B, torch.eye(2), atol=1e-6)


# What the framework does for all of them --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in STRATEGIES if STRATEGIES.create(n).traits.weighted and n != "fedsa"])
def test_weights_are_shares_of_those_who_answered(name: str) -> None:
    # with c3 gone, weights 1 and 3 of c1 and c2 are shares of 1/4 and 3/4, not of 1/8 and 3/8
    c1, c2 = sent("c1", [[1.0]], [[1.0]], 1, head=4.0), sent("c2", [[1.0]], [[1.0]], 3, head=8.0)
    assert run(name, [c1, c2], rank=1).dense["head"].tolist() == [7.0]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_round_without_any_weight_is_an_error_that_says_so(name: str) -> None:
    for updates in ([], [sent("c1", [[1.0]], [[1.0]], weight=0.0)]):
        with pytest.raises(RoundError, match=rf"round 1: no update carries any weight \({len(updates)} admitted\)"):
            combine(STRATEGIES.create(name), updates, RoundContext(1, 1, seed=0), {})


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
    client, ctx = ClientInfo("c1", rank=1, num_examples=1), RoundContext(1, 2, seed=0, adapter=nothing)
    q = hand_out(STRATEGIES.create("flexlora"), client, ctx, {}, fresh).modules["q"]
    assert (q.B.tolist(), q.A.tolist()) == ([[0.0], [0.0]], [[1.0, 2.0]])


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_says_what_it_computes_and_where_it_is_from(name: str) -> None:
    strategy = STRATEGIES.create(name)
    assert strategy.name == name
    assert any(sign in strategy.equation for sign in ("sum", "S*", "[w_1 B_1"))
    assert "arXiv" in strategy.source


def test_head_only_averages_the_head_and_leaves_every_pair_as_it_was() -> None:
    c1, c2 = sent("c1", [[0.0]], [[8.0]], weight=1, head=1.0), sent("c2", [[0.0]], [[8.0]], weight=3, head=5.0)
    ctx = RoundContext(1, 1, seed=0, adapter=c1.received)
    strategy = STRATEGIES.create("head_only")
    came = combine(strategy, [c1, c2], ctx, {}).adapter
    assert came.dense["head"].tolist() == [4.0]
    assert came.modules == c1.received.modules
    plan = strategy.plan(ctx, c1.client, {})
    assert plan.train == plan.send == {"dense"}


def test_an_unknown_strategy_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"strategy: flexlore is not known; did you mean flexlora\?"):
        STRATEGIES.create("flexlore")
