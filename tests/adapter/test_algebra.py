"""Sums, means and inner products, against small dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter.algebra import add, inner, mean_dense, mean_factors, mean_update, norm, subtract
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import RankError

QUIET = settings(deadline=None, derandomize=True, max_examples=40)


def random_update(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


def product(update: LowRank) -> torch.Tensor:
    return update.B.double() @ update.A.double()


def one(B: list, A: list, head: list) -> AdapterState:
    """An adapter with the module ``q`` and a head."""
    return AdapterState({"q": LowRank(torch.tensor(B), torch.tensor(A))}, {"classifier.bias": torch.tensor(head)})


def test_add_adds_the_factors_and_not_the_updates() -> None:
    total = add(one([[1.0], [2.0]], [[1.0, 0.0]], [1.0]), one([[3.0], [0.0]], [[0.0, 1.0]], [5.0]))
    assert total.modules["q"].B.tolist() == [[4.0], [2.0]]
    assert total.modules["q"].A.tolist() == [[1.0, 1.0]]
    assert total.dense["classifier.bias"].tolist() == [6.0]


def test_subtract_undoes_add() -> None:
    left, right = one([[1.0]], [[2.0]], [3.0]), one([[4.0]], [[5.0]], [6.0])
    back = subtract(add(left, right), right)
    assert {name: tensor.tolist() for name, tensor in back.tensors().items()} == {
        name: tensor.tolist() for name, tensor in left.tensors().items()
    }


def test_the_mean_of_factors_is_not_the_mean_of_updates() -> None:
    # products 2 and 8 have the mean 5; factors (1, 2) and (2, 4) have the means 1.5 and 3, product 4.5
    states = [one([[1.0]], [[2.0]], [0.0]), one([[2.0]], [[4.0]], [4.0])]
    factors, update = mean_factors(states, [0.5, 0.5]), mean_update(states, [0.5, 0.5])
    assert product(factors.modules["q"]).item() == 4.5
    assert product(update.modules["q"]).item() == 5.0
    assert factors.dense["classifier.bias"].item() == update.dense["classifier.bias"].item() == 2.0


def test_factors_of_different_ranks_have_no_mean() -> None:
    narrow = AdapterState({"layers.3.q_proj": random_update(4, 3, 1)})
    wide = AdapterState({"layers.3.q_proj": random_update(4, 3, 2)})
    with pytest.raises(RankError, match=r"layers\.3\.q_proj: factors of ranks \[1, 2\]"):
        mean_factors([narrow, wide], [0.5, 0.5])
    with pytest.raises(RankError):
        add(narrow, wide)


@QUIET
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    data=st.data(),
)
def test_the_stack_is_the_exact_weighted_sum_at_any_ranks(shape, ranks, data) -> None:
    weights = data.draw(st.lists(st.floats(0, 3), min_size=len(ranks), max_size=len(ranks)))
    updates = [random_update(*shape, rank, seed) for seed, rank in enumerate(ranks)]
    stack = mean_update([AdapterState({"q": update}) for update in updates], weights).modules["q"]
    expected = sum(weight * product(update) for weight, update in zip(weights, updates, strict=True))
    assert stack.rank == sum(ranks)
    # float32 rounds each w B once; the sums are in float64
    assert torch.allclose(product(stack), expected, rtol=1e-5, atol=1e-5)


def test_dense_tensors_are_summed_by_weight() -> None:
    states = [one([[0.0]], [[0.0]], [4.0, 0.0]), one([[0.0]], [[0.0]], [0.0, 8.0])]
    assert mean_dense(states, [0.25, 0.75])["classifier.bias"].tolist() == [1.0, 6.0]


@QUIET
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), left=st.integers(1, 6), right=st.integers(1, 6))
def test_the_inner_product_is_that_of_the_multiplied_matrices(shape, left, right) -> None:
    one, other = random_update(*shape, left, 1), random_update(*shape, right, 2)
    expected = (product(one) * product(other)).sum()
    size = product(one).norm() * product(other).norm()
    assert abs(inner(one, other) - expected) <= 1e-5 * size + 1e-5  # float32 sums of at most 54 terms


def test_the_norm_covers_modules_and_dense_tensors_together() -> None:
    # |[[3, 0], [0, 0]]|^2 = 9, |(0, 4)|^2 = 16
    assert norm(one([[3.0], [0.0]], [[1.0, 0.0]], [0.0, 4.0])) == 5.0


def test_the_norm_of_nothing_is_zero() -> None:
    assert norm(AdapterState()) == 0.0


def test_the_norm_of_a_small_change_is_not_lost_between_large_factors() -> None:
    # B A + (-B) (A + e): the update is -B e of norm 1e-3, between products of norm 1e3
    B, A = torch.full((1, 1), 1000.0), torch.ones(1, 1)
    e = torch.full((1, 1), 2.0**-20)  # exact in float32 next to 1
    stack = LowRank(torch.cat([B, -B], dim=1), torch.cat([A, A + e], dim=0))
    # squares of 1e6 cancel to 1e-6: float64 keeps four digits of that, float32 none
    assert norm(AdapterState({"q": stack})) == pytest.approx(1000 * 2.0**-20, rel=1e-3)


def test_no_operation_changes_its_arguments() -> None:
    left, right = one([[1.0]], [[2.0]], [3.0]), one([[4.0]], [[5.0]], [6.0])
    for operation in (add, subtract, lambda a, b: mean_update([a, b], [0.5, 0.5])):
        operation(left, right)
    assert [tensor.item() for tensor in left.tensors().values()] == [3.0, 2.0, 1.0]
    assert [tensor.item() for tensor in right.tensors().values()] == [6.0, 5.0, 4.0]
