"""Real numbers as integers: what a sum of them is off by, and that it is the same in any order."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureSumError
from fedlora.privacy.fixed_point import MOST_WEIGHT, FixedPoint
from fedlora.privacy.summand import CUT, count_numbers, from_ring, to_ring

CLIPS = st.sampled_from([1e-3, 0.1, 1.0, 3.0, 1e4])
CLIENTS = st.lists(st.tuples(st.integers(1, 10_000), st.lists(st.floats(-1, 1), min_size=4, max_size=4)), min_size=1)


@settings(max_examples=200, deadline=None)
@given(clip=CLIPS, clients=CLIENTS, spare=st.integers(0, 1000))
def test_the_mean_of_a_sum_is_off_by_no_more_than_the_error_it_states(
    clip: float, clients: list[tuple[int, list[float]]], spare: int
) -> None:
    weights, values = [weight for weight, _ in clients], np.array([row for _, row in clients]) * clip
    ring = FixedPoint(clip, sum(weights) + spare)
    terms = [ring.encode(row, weight) for weight, row in zip(weights, values, strict=True)]
    total = sum(terms, np.zeros(4, np.uint64))
    assert np.array_equal(total, sum(reversed(terms), np.zeros(4, np.uint64)))
    expected = np.average(values, axis=0, weights=weights)
    assert np.abs(ring.mean(total, sum(weights)) - expected).max() <= ring.error
    assert ring.within(total, sum(weights), len(clients))


@pytest.mark.parametrize("total", [1, 7, 8, 1000, MOST_WEIGHT])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_largest_sum_does_not_wrap_around(total: int, side: float) -> None:
    ring = FixedPoint(0.5, total)
    assert ring.mean(ring.encode(np.array([side * 9.0]), total), total)[0] == side * 0.5
    assert FixedPoint(1.0, total).error <= 1e-8


def test_numbers_beyond_the_clip_are_cut_and_counted() -> None:
    delta = {"b": torch.tensor([[0.25, -2.0], [0.5, 1.5]]), "a": torch.tensor([-0.5])}
    shapes = {name: tuple(tensor.shape) for name, tensor in delta.items()}
    numbers = to_ring(delta, {"loss": 2.0, "tokens": 30, "steps": 2}, 4, clip=1.0, total=4)
    assert len(numbers) == count_numbers(shapes)
    summed = from_ring(numbers, shapes, 1, clip=1.0, total=4)
    assert torch.equal(summed.delta["b"], torch.tensor([[0.25, -1.0], [0.5, 1.0]]))
    assert torch.equal(summed.delta["a"], torch.tensor([-0.5]))
    assert summed.losses == {"loss": 2.0, "first_loss": 0.0}
    assert summed.counts == {"steps": 2, "tokens": 30, "rows": 0, "dropped_rows": 0, CUT: 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_cut_to_size(value: float) -> None:
    for delta, loss in (([value], 1.0), ([0.0], value)):
        with pytest.raises(SecureSumError, match="not finite"):
            to_ring({"a": torch.tensor(delta)}, {"loss": loss}, 1, 1.0, 1)


@pytest.mark.parametrize("place", range(9))
def test_a_sum_that_nobody_can_have_come_to_is_noticed(place: int) -> None:
    shapes: dict[str, Sequence[int]] = {"a": (1,)}
    numbers = to_ring({"a": torch.tensor([0.1])}, {"loss": 1.0}, 2, 1.0, 8)
    numbers[place] += np.uint64(1 << 63)
    with pytest.raises(SecureSumError, match="no sum of honest answers"):
        from_ring(numbers, shapes, 1, 1.0, 8)  # type: ignore[arg-type]
