"""Statistics on scores: small numbers that can be counted, and laws."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import VerificationError
from fedlora.unlearning.separation import (
    KolmogorovSmirnov,
    auc,
    auc_error,
    exposure,
    kolmogorov_smirnov,
    ks_critical,
    share_error,
)

numbers = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=9)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    # of 2 x 3 pairs: 3 > 1, 3 > 2, 3 = 3 (half), 2 > 1, 2 = 2 (half), 2 < 3
    assert auc([3, 2], [1, 2, 3]) == 4 / 6
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    assert auc([math.inf, 0], [-math.inf]) == 1


@settings(max_examples=30)
@given(numbers, numbers)
def test_auc_of_a_set_with_itself_is_one_half_and_exchanging_the_sets_mirrors_it(one, other) -> None:
    assert auc(one, one) == 0.5
    assert auc(one, other) == pytest.approx(1 - auc(other, one))


@settings(max_examples=30)
@given(numbers, numbers)
def test_auc_sees_nothing_but_the_order(one, other) -> None:
    assert auc([x**3 for x in one], [x**3 for x in other]) == auc(one, other)


def test_ks_is_the_largest_distance_of_the_distribution_functions() -> None:
    # after 2 the first function is at 2/2, the second at 1/4
    found = kolmogorov_smirnov([1, 2], [2, 3, 4, 5])
    assert (found.statistic, found.n, found.m) == (0.75, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 4), (2, 5)])
def test_p_of_full_separation_is_two_orders_of_all(n: int, m: int) -> None:
    found = kolmogorov_smirnov(range(n), range(n, n + m))
    assert found.statistic == 1
    assert found.p == pytest.approx(2 / math.comb(n + m, n))


@settings(max_examples=30)
@given(numbers)
def test_ks_of_equal_samples_is_zero_with_p_one(one) -> None:
    assert kolmogorov_smirnov(one, one) == KolmogorovSmirnov(0.0, 1.0, len(one), len(one))


@settings(max_examples=30)
@given(numbers, numbers)
def test_ks_does_not_care_which_sample_comes_first(one, other) -> None:
    left, right = kolmogorov_smirnov(one, other), kolmogorov_smirnov(other, one)
    assert left.statistic == right.statistic
    assert left.p == pytest.approx(right.p)
    assert 0 <= left.statistic <= 1


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_p_is_the_share_of_all_orders_that_are_as_far_apart(n: int, m: int, pick: int) -> None:
    places = list(itertools.combinations(range(n + m), n))

    def found(chosen: tuple[int, ...]) -> KolmogorovSmirnov:
        return kolmogorov_smirnov(chosen, [place for place in range(n + m) if place not in chosen])

    given_ = found(places[pick % len(places)])
    counted = sum(found(chosen).statistic >= given_.statistic for chosen in places) / len(places)
    assert given_.p == pytest.approx(counted)


def test_large_samples_use_the_limit_which_is_close_to_the_exact_value_before_it() -> None:
    shifted = [0.1 * 300 + x for x in range(300)]
    exact = kolmogorov_smirnov(range(300), shifted)
    limit = kolmogorov_smirnov(range(400), [0.1 * 400 + x for x in range(400)])
    assert exact.statistic == limit.statistic == pytest.approx(0.1)
    assert 0.05 < exact.p < 0.15
    assert limit.p == pytest.approx(2 * (math.exp(-4) - math.exp(-16)), rel=1e-3)


def test_exposure_is_the_bits_by_which_a_canary_stands_out() -> None:
    references = [float(x) for x in range(1, 16)]
    assert exposure(0.5, references) == 4  # first of 16
    assert exposure(99, references) == 0  # last
    assert exposure(8.5, references) == pytest.approx(math.log2(16 / 9))  # eight are likelier
    assert exposure(1, references) == pytest.approx(math.log2(16 / 1.5))  # a tie is half a rank


def test_errors_of_small_sets_are_those_of_the_textbook() -> None:
    assert auc_error(24, 24) == pytest.approx(0.119, abs=1e-3)
    assert ks_critical(20, 20) == pytest.approx(0.43, abs=1e-2)
    assert share_error(49, 98) == pytest.approx(math.sqrt(2 * 0.25 / 98))
    assert share_error(0, 24) > 0


@pytest.mark.parametrize("measure", [auc, kolmogorov_smirnov])
def test_nothing_and_not_a_number_are_refused(measure) -> None:
    with pytest.raises(VerificationError, match="no scores"):
        measure([], [1.0])
    with pytest.raises(VerificationError, match="not a number; did the model diverge?"):
        measure([1.0], [math.nan, 1.0])


def test_a_canary_without_references_or_without_a_loss_is_refused() -> None:
    with pytest.raises(VerificationError, match="references: no scores"):
        exposure(1.0, [])
    with pytest.raises(VerificationError, match="the canary's loss is not a number"):
        exposure(math.nan, [1.0])
