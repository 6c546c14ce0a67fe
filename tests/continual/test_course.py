"""Whose turn which task is."""

import pytest

from fedlora.config import ContinualConfig
from fedlora.continual.course import Course

CLIENTS = [f"c{i}" for i in range(20)]


def test_tasks_take_their_rounds_one_after_the_other() -> None:
    course = Course(("a", "b", "c"), (2, 1, 3))
    assert course.total == 6
    assert [course.at(number) for number in range(1, 9)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [number for number in range(1, 7) if course.ends(number)] == [2, 3, 6]
    assert all(course.task_of("c0", number) == course.at(number) for number in range(1, 7))
    assert [sorted(course.met(number)) for number in (1, 3, 6)] == [[0], [0, 1], [0, 1, 2]]


def test_a_task_that_ended_early_lets_those_after_it_begin_earlier() -> None:
    course = Course(("a", "b", "c"), (5, 5, 5)).after((2, 7))
    assert course.total == 12
    assert [course.at(number) for number in (1, 2, 3, 7, 8, 12, 13)] == [0, 0, 1, 1, 2, 2, 2]
    assert [number for number in range(1, 13) if course.ends(number)] == [2, 7, 12]
    assert course.after((2, 7, 8)).total == 8


def test_in_an_order_of_its_own_every_client_meets_every_task_once() -> None:
    course = Course(("a", "b", "c"), (1, 1, 1), shuffled=True, seed=3)
    orders = {client: tuple(course.task_of(client, number) for number in (1, 2, 3)) for client in CLIENTS}
    assert all(sorted(order) == [0, 1, 2] for order in orders.values())
    assert len(set(orders.values())) > 1
    assert course.met(1) == {0, 1, 2}
    assert course.met_by("c0", 2) == set(orders["c0"][:2])


def test_a_client_that_is_behind_meets_each_task_later_and_nobody_leaves_the_stream() -> None:
    course = Course(("a", "b"), (4, 4), stagger=3, seed=1)
    delays = {}
    for client in CLIENTS:
        begins = next(number for number in range(1, 20) if course.task_of(client, number) == 1)
        delays[client] = begins - 5
        assert course.task_of(client, 1) == 0
    assert set(delays.values()) == {0, 1, 2, 3}


def test_joint_training_has_all_tasks_from_the_start() -> None:
    course = Course(("a", "b"), (1, 1), joint=True)
    assert course.task_of("c0", 1) is None
    assert course.met(1) == course.met_by("c0", 1) == {0, 1}


@pytest.mark.parametrize("client", CLIENTS[:3])
def test_a_course_depends_on_the_seed_and_on_nothing_else(client: str) -> None:
    names, rounds = tuple("abcdefgh"), (1,) * 8
    one, same, other = (Course(names, rounds, shuffled=True, seed=seed) for seed in (1, 1, 2))
    order = [one.task_of(client, number) for number in range(1, 9)]
    assert order == [same.task_of(client, number) for number in range(1, 9)]
    assert order != [other.task_of(client, number) for number in range(1, 9)]


def test_the_rounds_of_a_task_that_is_left_out_are_nobodys_and_the_others_keep_their_numbers() -> None:
    settings = {"split": 4, "rounds": 2}
    whole = Course.of(ContinualConfig.model_validate(settings), 0)
    course = Course.of(ContinualConfig.model_validate({**settings, "without": ["task2", "task4"]}), 0)
    assert course.names == ("task1", "task3")
    assert (course.skipped, course.total) == ({3, 4}, 6)
    played = [0]
    while played[-1] < course.total:
        played.append(course.following(played[-1]))
    assert played == [0, 1, 2, 5, 6]
    assert [course.names[course.at(number)] for number in played[1:]] == [
        whole.names[whole.at(number)] for number in played[1:]
    ]
    assert [number for number in played if course.ends(number)] == [2, 6]
    assert [course.left_out(number) for number in played[1:]] == [0, 0, 1, 1]


def test_a_task_that_ended_early_is_followed_by_all_the_rounds_that_are_left_out() -> None:
    settings = ContinualConfig.model_validate({"split": 3, "rounds": 4, "without": ["task2"]})
    course = Course.of(settings, 0).after((2,))
    assert [course.following(number) for number in (0, 1, 2, 7)] == [1, 2, 7, 8]
    assert (course.skipped, course.total) == ({3, 4, 5, 6}, 10)
    first = Course.of(settings.model_copy(update={"without": ["task1"]}), 0)
    assert (first.following(0), first.total) == (5, 12)
