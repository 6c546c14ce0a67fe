"""The metrics of a stream, against matrices small enough to work out by hand."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.continual.metrics import Scores
from fedlora.errors import DataError

QUIET = settings(deadline=None, derandomize=True, max_examples=60)

# after task 0, 1, 2; columns are tasks in the order of the stream
THREE = Scores(((0.8, 0.3, 0.2), (0.6, 0.9, 0.4), (0.7, 0.5, 1.0)), initial=(0.1, 0.2, 0.1))


@st.composite
def complete(draw: st.DrawFn, least: int = 2) -> Scores:
    """Every score of a stream, in hundredths, and the ones before it."""
    count = draw(st.integers(least, 5))
    row = st.lists(st.integers(0, 100).map(lambda n: n / 100), min_size=count, max_size=count).map(tuple)
    return Scores(tuple(draw(row) for _ in range(count)), draw(row))


def test_the_metrics_of_three_tasks_by_hand() -> None:
    assert THREE.describe() == pytest.approx(
        {
            "ACC": (0.7 + 0.5 + 1.0) / 3,
            "AIA": (0.8 + (0.6 + 0.9) / 2 + (0.7 + 0.5 + 1.0) / 3) / 3,
            "forgetting": ((0.8 - 0.7) + (0.9 - 0.5)) / 2,
            "BWT": ((0.7 - 0.8) + (0.5 - 0.9)) / 2,
            "FWT": ((0.3 - 0.2) + (0.4 - 0.1)) / 2,
            "learning_accuracy": (0.8 + 0.9 + 1.0) / 3,
        }
    )


def test_forgetting_is_measured_from_the_best_score_and_bwt_from_the_first() -> None:
    # task 0: learned at 0.5, best 0.9 after task 1, ends at 0.6; task 1: 0.8 throughout
    scores = Scores(((0.5, 0.0, 0.0), (0.9, 0.8, 0.0), (0.6, 0.8, 0.7)))
    assert scores.forgetting == pytest.approx((0.9 - 0.6) / 2)
    assert scores.bwt == pytest.approx((0.6 - 0.5) / 2)


def test_a_stream_that_is_not_over_is_measured_on_what_was_learned() -> None:
    # rows 0 and 1 of THREE: task 2 was not learned, so its column does not count
    assert Scores(THREE.rows[:2], THREE.initial).describe() == pytest.approx(
        {"ACC": 0.75, "AIA": (0.8 + 0.75) / 2, "forgetting": 0.2, "BWT": -0.2, "FWT": 0.1, "learning_accuracy": 0.85}
    )


def test_one_task_has_no_forgetting_and_no_transfer() -> None:
    assert Scores(((0.8,),), initial=(0.1,)).describe() == {
        "ACC": 0.8,
        "AIA": 0.8,
        "forgetting": None,
        "BWT": None,
        "FWT": None,
        "learning_accuracy": 0.8,
    }


def test_nothing_learned_has_no_metrics() -> None:
    assert set(Scores(initial=(0.5, 0.5)).describe().values()) == {None}


def test_without_scores_before_the_first_task_there_is_no_forward_transfer() -> None:
    assert Scores(THREE.rows).fwt is None
    assert Scores(THREE.rows).bwt == THREE.bwt


def test_rows_may_end_at_the_task_just_learned() -> None:
    short = Scores(((0.8,), (0.6, 0.9), (0.7, 0.5, 1.0)), THREE.initial)
    assert short.describe() == {**THREE.describe(), "FWT": None}  # which needs R[0, 1] and R[1, 2]


def test_a_metric_is_not_made_up_from_the_scores_that_are_left() -> None:
    at_the_end = Scores(((None, None, None), (None, None, None), (0.7, 0.5, 1.0)))
    assert at_the_end.acc == pytest.approx(2.2 / 3)
    assert (at_the_end.aia, at_the_end.forgetting, at_the_end.bwt, at_the_end.learning_accuracy) == (None,) * 4


def test_a_task_that_a_client_has_no_data_for_is_left_out() -> None:
    client = Scores(((None, 0.3), (None, 0.9)), initial=(None, 0.2))
    assert client.describe() == pytest.approx(
        {"ACC": 0.9, "AIA": 0.9, "forgetting": None, "BWT": None, "FWT": 0.1, "learning_accuracy": 0.9}
    )


def test_rows_are_added_to_a_new_matrix() -> None:
    one = Scores(initial=(0.1, 0.2)).with_row([0.8, 0.3])
    two = one.with_row([0.6, 0.9])
    assert (len(one.rows), two.rows, two.initial) == (1, ((0.8, 0.3), (0.6, 0.9)), (0.1, 0.2))


@pytest.mark.parametrize("scores", [Scores(), THREE, Scores(((0.8, None), (None, 0.9))), Scores(initial=())])
def test_scores_travel_as_json(scores: Scores) -> None:
    assert Scores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False))) == scores


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_is_a_number(bad: float) -> None:
    with pytest.raises(DataError, match="score on task 1 after task 2: .* is not a number; use None"):
        Scores(THREE.rows[:2]).with_row([0.1, bad, 0.2])
    with pytest.raises(DataError, match="score on task 0 before the first task"):
        Scores(initial=(bad,))


@QUIET
@given(complete())
def test_what_was_gained_by_learning_is_what_is_left_and_what_was_lost(scores: Scores) -> None:
    # mean_i R[T-1, i] - R[i, i] has the terms of BWT and a zero for the last task
    count = len(scores.rows)
    assert scores.acc - scores.learning_accuracy == pytest.approx(scores.bwt * (count - 1) / count)


@QUIET
@given(complete())
def test_forgetting_is_at_least_what_backward_transfer_lost(scores: Scores) -> None:
    assert scores.forgetting >= -scores.bwt - 1e-12


@QUIET
@given(complete(), st.floats(-1, 1))
def test_differences_do_not_depend_on_where_the_scores_start(scores: Scores, shift: float) -> None:
    moved = Scores(
        tuple(tuple(s + shift for s in row) for row in scores.rows), tuple(s + shift for s in scores.initial)
    )
    assert moved.acc == pytest.approx(scores.acc + shift)
    assert (moved.forgetting, moved.bwt, moved.fwt) == pytest.approx(
        (scores.forgetting, scores.bwt, scores.fwt), abs=1e-12
    )


@QUIET
@given(complete())
def test_a_model_that_never_loses_forgets_nothing(scores: Scores) -> None:
    rising = [scores.rows[0]]
    for row in scores.rows[1:]:
        rising.append(tuple(map(max, rising[-1], row)))
    assert all(now >= before for last, row in pairwise(rising) for before, now in zip(last, row, strict=True))
    assert Scores(tuple(rising)).forgetting <= 0 <= Scores(tuple(rising)).bwt
