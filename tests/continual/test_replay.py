"""What a client keeps of earlier tasks."""

from collections import Counter

from fedlora.continual.replay import kept_rows as buffer
from fedlora.continual.replay import met_rows
from fedlora.continual.stream import Task

LABELS = dict(enumerate(["a"] * 40 + ["b"] * 10 + ["c"] * 30))
TASKS = [
    Task("one", (0, 1), {"c0": range(50)}, {}, ()),
    Task("two", (2,), {"c0": range(50, 80), "c1": [50]}, {}, ()),
]


def kept_rows(
    tasks: list[Task], earlier: set[int], client: str, size: int, labels: dict[int, str] | None, seed: int
) -> list[int]:
    return buffer(met_rows(tasks, earlier, client), client, size, labels, seed)


def test_a_buffer_has_rows_of_earlier_tasks_only_and_no_more_than_it_may() -> None:
    rows = kept_rows(TASKS, {0}, "c0", 12, None, seed=0)
    assert len(set(rows)) == 12
    assert set(rows) <= set(range(50))
    assert kept_rows(TASKS, set(), "c0", 12, None, seed=0) == []
    assert kept_rows(TASKS, {1}, "c1", 12, None, seed=0) == [50]


def test_a_row_that_has_left_the_buffer_never_comes_back() -> None:
    before = set(kept_rows(TASKS, {0}, "c0", 12, None, seed=0))
    after = set(kept_rows(TASKS, {0, 1}, "c0", 12, None, seed=0))
    assert after & set(range(50)) <= before
    assert after & set(range(50, 80))


def test_every_row_is_as_likely_to_stay() -> None:
    kept = Counter(row for seed in range(400) for row in kept_rows(TASKS, {0, 1}, "c0", 20, None, seed))
    assert min(kept[row] for row in range(80)) > 60
    assert max(kept[row] for row in range(80)) < 145


def test_a_balanced_buffer_has_as_many_rows_of_each_label() -> None:
    rows = kept_rows(TASKS, {0, 1}, "c0", 24, LABELS, seed=0)
    assert Counter(LABELS[row] for row in rows) == {"a": 8, "b": 8, "c": 8}
    few = kept_rows(TASKS, {0, 1}, "c0", 36, LABELS, seed=0)
    assert Counter(LABELS[row] for row in few) == {"a": 13, "b": 10, "c": 13}


def test_clients_and_seeds_keep_other_rows_and_the_same_ones_every_time() -> None:
    assert kept_rows(TASKS, {0}, "c0", 12, None, 0) == kept_rows(TASKS, {0}, "c0", 12, None, 0)
    assert kept_rows(TASKS, {0}, "c0", 12, None, 0) != kept_rows(TASKS, {0}, "c0", 12, None, 1)
