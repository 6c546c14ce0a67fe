"""Who is asked: every rule by its statistics, and laws for all of them."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.plugins import load_plugins, unload_plugins
from fedlora.protocol import ClientInfo
from orchestrator.selection import SELECTORS, Draw, Oort, Record, Selector, build_selector, how_many

DRAWS = 4000


def federation(*rows: int) -> list[ClientInfo]:
    return [ClientInfo(f"c{i}", rank=4, num_examples=count) for i, count in enumerate(rows)]


def tally(rule: Selector, members: Sequence[ClientInfo], draw: Draw, draws: int = DRAWS) -> Counter[str]:
    """How often each client is drawn over many seeds."""
    return Counter(client for seed in range(draws) for client in rule.select(members, replace(draw, seed=seed)))


def expect(count: int, chance: float, draws: int = DRAWS) -> None:
    """Within four standard deviations of a binomial count; the seeds are fixed, so this never fails by chance."""
    assert abs(count - draws * chance) <= 4 * math.sqrt(draws * chance * (1 - chance)) + 1e-9


def heard(loss: float | None = 1.0, seconds: float | None = 1.0, asked: int = 1, last_round: int = 1) -> Record:
    return Record(asked=asked, used=asked, last_round=last_round, loss=loss, seconds=seconds)


# Uniform, weighted, in turn, independent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "per_round", "chosen"),
    [
        (0, 3, ["c5", "c6", "c9"]),
        (1, 0.5, ["c0", "c2", "c3", "c6", "c8"]),
        (2594780796533147419, 4, ["c1", "c4", "c6", "c7"]),
    ],
)
def test_uniform_draws_what_published_runs_drew(seed: int, per_round: float, chosen: list[str]) -> None:
    members = federation(*[10] * 10)
    assert build_selector("uniform").select(members, Draw(1, seed, how_many(per_round, 10), 10)) == chosen


def test_uniform_gives_everyone_the_same_chance() -> None:
    members = federation(1, 10, 100, 1000)
    for count in tally(build_selector("uniform"), members, Draw(1, 0, 1, 4)).values():
        expect(count, 1 / 4)


def test_weighted_draws_by_number_of_examples() -> None:
    counts = tally(build_selector("weighted"), federation(10, 20, 70), Draw(1, 0, 1, 3))
    for client, share in (("c0", 0.1), ("c1", 0.2), ("c2", 0.7)):
        expect(counts[client], share)


def test_weighted_draws_without_replacement_one_after_the_other() -> None:
    """The pair {c0, c1} comes as c0 then c1 or c1 then c0: 0.1 * 20/90 + 0.2 * 10/80."""
    rule, members = build_selector("weighted"), federation(10, 20, 70)
    pairs = Counter(tuple(rule.select(members, Draw(1, seed, 2, 3))) for seed in range(DRAWS))
    expect(pairs["c0", "c1"], 0.1 * 2 / 9 + 0.2 * 1 / 8)


def test_clients_without_rows_are_drawn_last() -> None:
    for seed in range(50):
        assert build_selector("weighted").select(federation(0, 5, 0, 5), Draw(1, seed, 2, 4)) == ["c1", "c3"]


def test_round_robin_asks_everyone_equally_often_whoever_is_away() -> None:
    members, rule, records = federation(*[10] * 7), build_selector("round_robin"), dict[str, Record]()
    away = np.random.default_rng(0)
    for number in range(1, 71):
        here = [client for client in members if away.random() < 0.8]
        for client in rule.select(here, Draw(number, 0, 2, 7, records)):
            records[client] = replace(records.get(client, Record()), asked=records.get(client, Record()).asked + 1)
    asked = [record.asked for record in records.values()]
    assert len(asked) == 7
    assert max(asked) - min(asked) <= 2


def test_round_robin_goes_on_in_member_order() -> None:
    members, rule = federation(1, 1, 1, 1, 1), build_selector("round_robin")
    assert rule.select(members, Draw(1, 0, 2, 5)) == ["c0", "c1"]
    assert rule.select(members, Draw(2, 0, 2, 5, {"c0": heard(), "c1": heard()})) == ["c2", "c3"]


def test_poisson_asks_each_client_on_its_own() -> None:
    """100 clients at chance 0.1: 10 in the mean, variance 9, and the fourth moment's bounds for both."""
    rule, members = build_selector("poisson"), federation(*[10] * 100)
    sizes = [len(rule.select(members, Draw(1, seed, 10, 100))) for seed in range(DRAWS)]
    assert statistics.mean(sizes) == pytest.approx(10, abs=4 * 3 / math.sqrt(DRAWS))
    assert statistics.variance(sizes) == pytest.approx(9, abs=4 * 9 * math.sqrt(2 / DRAWS))


def test_poisson_keeps_a_client_s_chance_while_others_are_away_and_may_ask_nobody() -> None:
    rule, here = build_selector("poisson"), federation(10, 10)
    sizes = Counter(len(rule.select(here, Draw(1, seed, 1, 10))) for seed in range(DRAWS))
    expect(sizes[0], 0.81)
    expect(sizes[2], 0.01)


# Power of choice --------------------------------------------------------------------------------------------------


def test_power_of_choice_takes_the_highest_loss_of_those_drawn() -> None:
    members = federation(*[10] * 8)
    records = {client.id: heard(loss=float(i)) for i, client in enumerate(members)}
    rule = build_selector({"power_of_choice": {"d": 8}})
    assert rule.select(members, Draw(5, 0, 3, 8, records)) == ["c5", "c6", "c7"]


def test_power_of_choice_draws_twice_as_many_as_it_asks() -> None:
    """Of 4 alike, 2 are drawn: the highest loss is asked if drawn (1/2), the lowest never."""
    members = federation(10, 10, 10, 10)
    records = {client.id: heard(loss=float(i)) for i, client in enumerate(members)}
    counts = tally(build_selector("power_of_choice"), members, Draw(5, 0, 1, 4, records))
    expect(counts["c3"], 1 / 2)
    assert counts["c0"] == 0


def test_power_of_choice_draws_by_number_of_examples() -> None:
    counts = tally(build_selector({"power_of_choice": {"d": 1}}), federation(10, 30), Draw(1, 0, 1, 2))
    expect(counts["c1"], 3 / 4)


def test_power_of_choice_asks_strangers_first_and_the_silent_last() -> None:
    members = federation(10, 10, 10)
    records = {"c0": heard(loss=None), "c1": heard(loss=9.0)}
    rule = build_selector({"power_of_choice": {"d": 3}})
    assert rule.select(members, Draw(5, 0, 1, 3, records)) == ["c2"]
    assert rule.select(members, Draw(5, 0, 2, 3, records)) == ["c1", "c2"]


# Oort -------------------------------------------------------------------------------------------------------------


def known(losses: Sequence[float], seconds: Sequence[float] | None = None) -> dict[str, Record]:
    times = seconds or [1.0] * len(losses)
    return {f"c{i}": heard(loss, t, last_round=9) for i, (loss, t) in enumerate(zip(losses, times, strict=True))}


def test_oort_prefers_clients_with_a_high_loss_on_many_examples() -> None:
    members = federation(*[10] * 8, 100, 100)
    counts = tally(build_selector("oort"), members, Draw(10, 0, 2, 10, known([1.0] * 10)), 200)
    assert set(counts) == {"c8", "c9"}
    counts = tally(
        build_selector("oort"), federation(*[10] * 10), Draw(10, 0, 2, 10, known([1.0] * 8 + [5.0] * 2)), 200
    )
    assert set(counts) == {"c8", "c9"}


def test_oort_draws_by_worth_among_those_near_the_last_place() -> None:
    """Twenty alike are all worth the last place, so all have the same chance."""
    counts = tally(build_selector("oort"), federation(*[10] * 20), Draw(10, 0, 5, 20, known([1.0] * 20)))
    for client in (f"c{i}" for i in range(20)):
        expect(counts[client], 1 / 4)


def test_oort_holds_slow_clients_back() -> None:
    """T is 1 s, the median; at twice that, worth falls to a quarter."""
    members, records = federation(*[10] * 5), known([1.0] * 5, [1.0, 1.0, 1.0, 1.0, 2.0])
    worth = Oort().worth(members, Draw(10, 0, 2, 5, records))
    assert worth[4] == pytest.approx(worth[0] / 4)
    assert Oort(alpha=0).worth(members, Draw(10, 0, 2, 5, records)) == pytest.approx([worth[0]] * 5)
    assert "c4" not in tally(build_selector("oort"), members, Draw(10, 0, 2, 5, records), 200)


def test_oort_comes_back_to_those_it_has_not_heard_of_for_long() -> None:
    """Worth is 1 from equal loss, and sqrt(0.1 ln 100 / last_round) for age: 0.679 since round 1, 0.068 since 99."""
    members = federation(10, 10)
    records = {"c0": heard(last_round=1), "c1": heard(last_round=99)}
    worth = Oort().worth(members, Draw(100, 0, 1, 2, records))
    assert worth == pytest.approx([1.6786, 1.0682], abs=1e-4)


def test_an_outlier_does_not_outweigh_everyone_in_oort() -> None:
    """The bound is the 95th percentile of 41 clients: the outlier's worth is that of the runner-up."""
    members = federation(*[10] * 41)
    worth = Oort().worth(members, Draw(1, 0, 5, 41, known([1.0] * 38 + [2.0, 2.0, 1e9])))
    assert worth[-1] == pytest.approx(worth[-2])


def test_oort_explores_less_from_round_to_round() -> None:
    """20 places: 18 for strangers in the first round, and 4 when the share has come down to its least."""
    members = federation(*[10] * 100)
    records = known([1.0] * 50)
    for number, share in ((1, 0.9), (11, 0.9 * 0.98**10), (500, 0.2)):
        new = [
            sum(client not in records for client in Oort().select(members, Draw(number, seed, 20, 100, records)))
            for seed in range(200)
        ]
        assert statistics.mean(new) == pytest.approx(20 * share, abs=0.2)  # a place more or less by chance
        assert max(new) - min(new) <= 1


def test_oort_gives_every_place_to_someone() -> None:
    members = federation(*[10] * 6)
    assert len(Oort().select(members, Draw(1, 0, 4, 6))) == 4  # nobody is known
    assert len(Oort().select(members, Draw(1, 0, 4, 6, known([1.0] * 6)))) == 4  # nobody is new
    assert len(Oort().select(members, Draw(300, 0, 4, 6, known([1.0])))) == 4
    assert len(Oort().select(members, Draw(300, 0, 9, 6, known([0.0] * 3)))) == 6


def test_oort_asks_a_client_that_failed_before_less_often_than_a_new_one() -> None:
    records = {"c0": Record(asked=3, last_round=4, failures=3)}
    counts = tally(build_selector("oort"), federation(10, 10), Draw(5, 0, 1, 2, records))
    expect(counts["c0"], 1 / 5)  # weights 1/4 and 1


# All rules --------------------------------------------------------------------------------------------------------


RECORDS = st.builds(
    Record,
    asked=st.integers(0, 50),
    used=st.integers(0, 50),
    last_round=st.integers(0, 50),
    loss=st.none() | st.floats(0, 1e12),
    seconds=st.none() | st.floats(0, 1e9),
    failures=st.integers(0, 50),
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[ClientInfo], Draw]:
    rows = draw(st.lists(st.integers(0, 10**6), max_size=20))
    members = federation(*rows)
    here = [member for member in members if draw(st.booleans())]
    records = {member.id: draw(RECORDS) for member in members if draw(st.booleans())}
    count = draw(st.integers(1, max(len(members), 1)))
    return here, Draw(draw(st.integers(1, 1000)), draw(st.integers(0, 2**63 - 1)), count, len(members), records)


@pytest.mark.parametrize("name", list(SELECTORS))
@given(situation=situations())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_rule_draws_candidates_once_each_in_their_order(
    name: str, situation: tuple[list[ClientInfo], Draw]
) -> None:
    candidates, draw = situation
    chosen = build_selector(name).select(candidates, draw)
    ids = [client.id for client in candidates]
    assert chosen == [client for client in ids if client in set(chosen)]
    assert len(chosen) == min(draw.count, len(ids)) or name == "poisson"


@pytest.mark.parametrize("name", list(SELECTORS))
@given(situation=situations())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_rule_draws_the_same_again_however_its_records_came(
    name: str, situation: tuple[list[ClientInfo], Draw]
) -> None:
    candidates, draw = situation
    rule = build_selector(name)
    first = rule.select(candidates, draw)
    backwards = replace(draw, records=dict(reversed(list(draw.records.items()))))
    assert first == rule.select(candidates, backwards) == build_selector(name).select(candidates, draw)


def test_a_record_survives_as_plain_data() -> None:
    record = Record(3, 2, 7, 0.5, None, 1)
    assert Record(**record.to_json()) == record


# Names, options, counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "unifrom is not known; did you mean uniform?"),
        ({"oort": {"explore": 0.5}}, "oort does not take these options: .*explore"),
        ({"uniform": {"d": 3}}, "uniform does not take these options"),
        ({"oort": {"cutoff": 3}}, "oort.cutoff is a number from 0 to 1, not 3"),
        ({"oort": {"alpha": -1}}, "oort.alpha is a number of at least 0, not -1"),
        ({"oort": {"percentile": "high"}}, "oort.percentile is a number from 0 to 100, not 'high'"),
        ({"power_of_choice": {"d": 0}}, "power_of_choice.d is a whole number of at least 1, not 0"),
        ({"oort": None, "uniform": None}, "one name with its options"),
        ({}, "one name with its options"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_made_says_why(spec: str | Mapping[str, Mapping[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_selector(spec)


def test_a_plug_in_file_brings_its_own_rule(tmp_path) -> None:
    file = tmp_path / "first_come.py"
    file.write_text(
        "from orchestrator.selection import SELECTORS, Selector\n"
        '@SELECTORS.register("first_come")\n'
        "class FirstCome(Selector):\n"
        "    def select(self, candidates, draw):\n"
        "        return [client.id for client in candidates[: draw.count]]\n"
    )
    load_plugins([str(file)])
    try:
        assert build_selector("first_come").select(federation(1, 1, 1), Draw(1, 0, 2, 3)) == ["c0", "c1"]
    finally:
        unload_plugins()
    assert "first_come" not in SELECTORS


@pytest.mark.parametrize(
    ("per_round", "registered", "count"),
    [(3, 10, 3), (30, 10, 10), (1.0, 10, 10), (1, 10, 1), (0.1, 30, 3), (0.11, 30, 4), (0.001, 30, 1), (4.0, 10, 4)],
)
def test_a_share_is_rounded_up_and_a_number_is_a_number(per_round: float, registered: int, count: int) -> None:
    assert how_many(per_round, registered) == count
