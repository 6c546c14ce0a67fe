"""When a federation freezes: one merge per task, a shift soon after each boundary, whatever the unit of the loss."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fedlora.continual.plateau import POLICIES, Decision, Losses, Plateau, Policy, Published
from fedlora.errors import ConfigError

SEEDS = range(5)
TASKS = 10


@dataclass(frozen=True)
class Stream:
    """Ten tasks. In each, the loss decays from a jump to a floor of its own; clients differ in level by up to 9 times.

    Attributes:
        rounds: what the clients of each round report.
        tau: per task, the rounds in which the loss above the floor shrinks to 1/e.
        length: rounds per task.
    """

    rounds: list[Losses]
    tau: list[float]
    length: int

    def task(self, round: int) -> int:
        return (round - 1) // self.length

    def into_task(self, round: int) -> int:
        return (round - 1) % self.length


def stream(seed: int, clients: int = 10, asked: int = 10, length: int = 25, scale: float = 1.0) -> Stream:
    rng = random.Random(seed)
    level = {f"c{i}": 3 ** rng.uniform(-1, 1) for i in range(clients)}
    weight = {client: rng.randint(20, 200) for client in level}
    rounds: list[Losses] = []
    taus = []
    for _ in range(TASKS):
        floor, jump, tau = rng.uniform(0.2, 0.6), rng.uniform(1, 3), rng.uniform(1.5, 4)
        taus.append(tau)
        for age in range(length):
            mean = scale * (floor + jump * math.exp(-age / tau))
            cohort = rng.sample(list(level), asked)
            rounds.append({c: (level[c] * mean * (1 + 0.05 * rng.gauss(0, 1)), weight[c]) for c in cohort})
    return Stream(rounds, taus, length)


def observe(policy: Policy, rounds: Sequence[Losses], **options: Any) -> list[Decision]:
    state: Any = {}
    decisions = []
    for number, losses in enumerate(rounds, start=1):
        decisions.append(policy.observe(state, number, losses, **options))
        state = decisions[-1].state
    return decisions


def merges(decisions: Sequence[Decision]) -> list[int]:
    return [number for number, decision in enumerate(decisions, start=1) if decision.merge]


def shifts(decisions: Sequence[Decision]) -> list[int]:
    return [number for number, decision in enumerate(decisions, start=1) if decision.shift]


def equal(loss: float, clients: int = 4) -> Losses:
    return {f"c{i}": (loss, 10.0) for i in range(clients)}


def decaying(rounds: int, tau: float = 2.0, floor: float = 0.5) -> list[float]:
    return [floor + 2 * math.exp(-age / tau) for age in range(rounds)]


def check(data: Stream) -> None:
    decisions = observe(Plateau(), data.rounds)
    alarms = shifts(decisions)
    prompt = [number for number in alarms if data.task(number) > 0 and data.into_task(number) <= 3]
    assert [data.task(number) for number in prompt] == list(range(1, TASKS))
    assert len(alarms) - len(prompt) <= 1
    assert {data.task(number) for number in merges(decisions)} == set(range(TASKS))
    for number in merges(decisions):
        # flat: less than a tenth of the jump is still to be learned
        assert math.exp(-data.into_task(number) / data.tau[data.task(number)]) < 0.1


@pytest.mark.parametrize("scale", [1.0, 10.0, 0.001])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_is_frozen_once_flat_and_every_boundary_noticed_within_three_rounds(seed: int, scale: float) -> None:
    check(stream(seed, scale=scale))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_quarter_of_very_different_clients_per_round_is_enough_and_raises_no_false_alarm(seed: int) -> None:
    check(stream(seed, clients=20, asked=5))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_decision_depends_on_the_unit_of_the_loss(seed: int) -> None:
    one, ten, milli = (observe(Plateau(), stream(seed, 20, 5, scale=scale).rounds) for scale in (1.0, 10.0, 0.001))
    assert merges(one) == merges(ten) == merges(milli)
    assert shifts(one) == shifts(ten) == shifts(milli)


def test_a_change_in_who_takes_part_is_no_change_of_the_loss() -> None:
    rng = random.Random(7)
    easy, hard = {"e1": 0.1, "e2": 0.2, "e3": 0.3}, {"h1": 3.0, "h2": 4.0, "h3": 5.0}
    cohorts = [easy | hard] * 25 + [hard] * 20 + [easy] * 20
    rounds = [
        {client: (level * mean * (1 + 0.02 * rng.gauss(0, 1)), 10) for client, level in cohort.items()}
        for cohort, mean in zip(cohorts, decaying(65), strict=True)
    ]
    decisions = observe(Plateau(), rounds)
    assert len(merges(decisions)) == 1
    assert shifts(decisions) == []
    # the hard clients' own mean loss is 20 times that of the easy ones
    assert decisions[44].evidence["level"] == pytest.approx(decisions[64].evidence["level"], rel=0.1)


def test_one_wild_round_is_not_a_shift_but_two_high_ones_are() -> None:
    flat = [equal(loss) for loss in decaying(30)]
    assert shifts(observe(Plateau(), [*flat, equal(50.0), *[equal(0.5)] * 20])) == []
    assert shifts(observe(Plateau(), [*flat, equal(2.0), equal(1.5)])) == [32]


def test_after_a_merge_no_shift_is_announced_before_the_cool_down_is_over() -> None:
    flat = [equal(loss) for loss in decaying(40)]
    merged = merges(observe(Plateau(), flat))[0]
    rounds = [*flat[:merged], *[equal(3.0)] * 10]
    assert shifts(observe(Plateau(cooldown=0), rounds)) == [merged + 2]
    assert shifts(observe(Plateau(cooldown=5), rounds)) == [merged + 6]


def test_the_state_survives_json_and_is_never_changed_in_place() -> None:
    data = stream(0, clients=20, asked=5)
    text = "{}"
    for number, (losses, straight) in enumerate(zip(data.rounds, observe(Plateau(), data.rounds), strict=True), 1):
        state = json.loads(text)
        decision = Plateau().observe(state, number, losses)
        assert state == json.loads(text)
        assert (decision.merge, decision.shift, decision.evidence) == (
            straight.merge,
            straight.shift,
            straight.evidence,
        )
        assert json.loads(json.dumps(decision.evidence, allow_nan=False)) == decision.evidence
        text = json.dumps(decision.state, allow_nan=False)


def test_the_state_stays_as_small_as_its_windows() -> None:
    state: Any = observe(Plateau(window=3), [equal(1.0)] * 200)[-1].state
    assert len(state["levels"]) == 24
    assert {len(history) for history in state["clients"].values()} == {12}


def test_the_evidence_says_why_it_fired() -> None:
    data = stream(0)
    decisions = observe(Plateau(), data.rounds)
    merge = decisions[merges(decisions)[0] - 1].evidence
    assert (merge["phase"], merge["reason"], merge["window"], merge["ignored"]) == ("learning", "plateau", 3, [])
    assert merge["statistic"] <= merge["threshold"] == 0.05
    assert abs(merge["slope"]) * merge["window"] <= merge["threshold"] * merge["fall"]
    shift = decisions[shifts(decisions)[0] - 1].evidence
    assert (shift["phase"], shift["reason"]) == ("consolidated", "shift")
    assert shift["statistic"] >= shift["threshold"] == 8.0
    assert shift["slope"] > 0


def test_a_plateau_that_never_comes_is_bounded() -> None:
    falling = [equal(100.0 - number) for number in range(60)]
    assert merges(observe(Plateau(max_rounds=None), falling)) == []
    decisions = observe(Plateau(max_rounds=40), falling)
    assert merges(decisions) == [40]
    assert decisions[39].evidence["reason"] == "bounded by max_rounds"


def test_a_loss_that_never_fell_is_frozen_by_the_bound_alone() -> None:
    rng = random.Random(3)
    noise = [equal(1 + 0.05 * rng.gauss(0, 1)) for _ in range(60)]
    assert merges(observe(Plateau(max_rounds=None), noise)) == []
    assert merges(observe(Plateau(), [equal(0.0)] * 5)) == []


@pytest.mark.parametrize("policy", [Plateau(), Published(1.0, 0.01), POLICIES.create("period", rounds=3)])
def test_rounds_without_an_answer_change_nothing(policy: Policy) -> None:
    for decision in observe(policy, [equal(loss) for loss in decaying(12)]):
        for losses in ({}, {"c1": (math.nan, 10.0)}):
            silent = policy.observe(decision.state, 99, losses)
            assert (silent.state, silent.merge, silent.shift) == (decision.state, False, False)
            assert silent.evidence["ignored"] == sorted(losses)


@pytest.mark.parametrize("bad", [(math.nan, 10.0), (math.inf, 10.0), (-math.inf, 10.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_loss_that_is_no_number_is_ignored_and_the_evidence_names_its_client(bad: tuple[float, float]) -> None:
    clean = [equal(loss) for loss in decaying(30) + decaying(30)]
    dirty = [{**losses, "broken": bad} for losses in clean]
    expected, decisions = observe(Plateau(), clean), observe(Plateau(), dirty)
    assert [decision.state for decision in decisions] == [decision.state for decision in expected]
    assert all(decision.evidence["ignored"] == ["broken"] for decision in decisions)


def staggered(first: int, second: int) -> list[Losses]:
    """Ten clients: a new task reaches five of them in one round, the other five in another."""
    rng = random.Random(1)

    def loss(number: int, start: int) -> float:
        mean = decaying(number)[-1] + (2 * math.exp((start - number) / 4) if number >= start else 0)
        return mean * (1 + 0.05 * rng.gauss(0, 1))

    starts = {f"c{i}": first if i < 5 else second for i in range(10)}
    return [{client: (loss(number, start), 10) for client, start in starts.items()} for number in range(1, 51)]


def test_a_quorum_waits_until_enough_clients_have_shifted() -> None:
    rounds = staggered(30, 33)
    assert shifts(observe(Plateau(), rounds)) == [31]
    decisions = observe(Plateau(quorum=0.8), rounds)
    assert shifts(decisions) == [34]
    assert decisions[30].evidence["agreed"] == 0.5
    # half of them never shift
    assert shifts(observe(Plateau(quorum=0.8), staggered(30, 99))) == []


def test_a_quorum_waits_until_enough_clients_are_flat() -> None:
    # the mean is flat while c0 rises as fast as c1 falls; c2 alone agrees
    rounds = [
        {"c0": (loss + 0.3 * number, 10.0), "c1": (loss + 9 - 0.3 * number, 10.0), "c2": (loss, 10.0)}
        for number, loss in enumerate(decaying(30))
    ]
    assert len(merges(observe(Plateau(), rounds))) == 1
    assert merges(observe(Plateau(quorum=0.6), rounds)) == []


def test_the_published_rule_merges_too_often_and_its_thresholds_do_not_transfer() -> None:
    # fitted to this toy by hand: the floors are below 1, the noise of a round has a variance of about 0.01
    rule = Published(mean_threshold=1.0, variance_threshold=0.01)
    for seed in range(3):
        rounds = stream(seed, clients=20, asked=5, length=60).rounds
        assert len(merges(observe(Plateau(), rounds))) == TASKS
        assert len(merges(observe(rule, rounds))) > TASKS
    for scale in (10.0, 0.001):
        assert len(merges(observe(rule, stream(0, 20, 5, 60, scale).rounds))) < TASKS


def test_the_published_rule_by_hand() -> None:
    # windows of two: (4, 2) is high, (2, 2) is frozen with mean 2 and variance 0, (2, 3) exceeds 2 + 0 but varies too
    # much to be frozen again, (3, 3) is high
    rule = Published(mean_threshold=2.75, variance_threshold=0.1, window=2)
    decisions = observe(rule, [equal(loss) for loss in (4.0, 2.0, 2.0, 2.0, 3.0, 3.0)])
    assert (merges(decisions), shifts(decisions)) == ([3], [5])
    assert decisions[4].evidence["statistic"] == [2.5, 0.25]


def test_a_period_freezes_every_so_many_rounds_or_in_the_next_one_that_is_answered() -> None:
    policy = POLICIES.create("period", rounds=4)
    assert merges(observe(policy, [equal(1.0)] * 12)) == [4, 8, 12]
    assert merges(observe(policy, [*[equal(1.0)] * 3, {}, {}, *[equal(1.0)] * 7])) == [6, 8, 12]


def test_declared_boundaries_freeze_whoever_answered() -> None:
    policy = POLICIES.create("boundaries")
    assert not policy.observe({}, 1, equal(1.0)).merge
    assert policy.observe({}, 2, equal(1.0), boundary=True).merge
    assert policy.observe({}, 3, {}, boundary=True).merge


def test_never_means_never() -> None:
    assert merges(observe(POLICIES.create("never"), stream(0).rounds, boundary=True)) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plateau", {"window": 1}, "plateau.window must be a whole number of at least 2, not 1"),
        ("plateau", {"window": 2.5}, "plateau.window must be a whole number"),
        ("plateau", {"epsilon": 1.5}, "plateau.epsilon must be a number from 0 to 1, not 1.5"),
        ("plateau", {"epsilon": "small"}, "plateau.epsilon must be a number from 0 to 1, not 'small'"),
        ("plateau", {"min_rounds": 0}, "plateau.min_rounds"),
        ("plateau", {"patience": 0}, "plateau.patience"),
        ("plateau", {"threshold": 0}, "plateau.threshold must be a number of at least 1"),
        ("plateau", {"drift": -1.0}, "plateau.drift"),
        ("plateau", {"cooldown": -1}, "plateau.cooldown"),
        ("plateau", {"max_rounds": 0}, "plateau.max_rounds"),
        ("plateau", {"quorum": math.nan}, "plateau.quorum must be a number from 0 to 1, not nan"),
        ("plateau", {"windows": 3}, "plateau does not take these options"),
        ("published", {}, "mean_threshold"),
        ("published", {"mean_threshold": -1.0, "variance_threshold": 0.1}, "published.mean_threshold"),
        ("period", {"rounds": 0}, "period.rounds must be a whole number of at least 1, not 0"),
        ("plato", {}, "did you mean plateau"),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        POLICIES.create(name, **options)
    assert message in str(error.value)
