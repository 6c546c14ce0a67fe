"""Who trains at which rank."""

import pytest

from clients.ranks import assign_ranks
from fedlora.config import parse_config
from fedlora.errors import ConfigError

CLIENTS = [f"c{i}" for i in range(10)]


def test_ranks_default_to_the_global_one_or_are_dealt_in_turn() -> None:
    assert set(assign_ranks(CLIENTS, None, 8, None, 0).values()) == {8}
    assert list(assign_ranks(CLIENTS[:5], [4, 8, 16], 16, None, 0).values()) == [4, 8, 16, 4, 8]


def test_shares_become_whole_clients_by_largest_remainder() -> None:
    ranks = assign_ranks(CLIENTS, {"distribution": {4: 0.5, 8: 0.25, 16: 0.25}}, 16, None, 0)
    counts = [list(ranks.values()).count(rank) for rank in (4, 8, 16)]
    assert counts in ([5, 3, 2], [5, 2, 3])
    assert ranks == assign_ranks(CLIENTS, {"distribution": {4: 0.5, 8: 0.25, 16: 0.25}}, 16, None, 0)


def test_memory_gives_the_largest_rank_whose_need_is_met() -> None:
    ranks = assign_ranks(CLIENTS[:3], {"by_memory_gb": {4: 0, 8: 8, 16: 16}}, 16, [4, 16, 8], 0)
    assert list(ranks.values()) == [4, 16, 8]


def test_too_little_memory_for_any_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="c0 declares 2 GB, less than any rank needs"):
        assign_ranks(CLIENTS, {"by_memory_gb": {8: 8}}, 16, [2], 0)


def test_speed_gives_the_largest_rank_whose_need_is_met() -> None:
    ranks = assign_ranks(CLIENTS[:4], {"by_speed": {4: 0, 8: 20, 16: 100}}, 16, [10, 250, 20], 0)
    assert list(ranks.values()) == [4, 16, 8, 4]


def test_too_slow_for_any_rank_is_refused_in_its_own_unit() -> None:
    with pytest.raises(ConfigError, match="c1 declares 5 examples/s, less than any rank needs \\(8 examples/s\\)"):
        assign_ranks(CLIENTS, {"by_speed": {8: 8, 16: 20}}, 16, [9, 5], 0)


@pytest.mark.parametrize(("rule", "key"), [("by_memory_gb", "memory_gb"), ("by_speed", "examples_per_s")])
def test_ranks_by_a_resource_need_what_clients_declare_of_it(rule: str, key: str) -> None:
    content = {"model": {"name": "m"}, "data": {"name": "d"}, "clients": {"ranks": {rule: {4: 0, 8: 2}}}}
    with pytest.raises(ConfigError, match=f"ranks {rule} needs {key}"):
        parse_config(content)
    content["clients"] |= {"memory_gb": [1, 2], "examples_per_s": [3, 4]}
    assert parse_config(content).clients.declared == {"memory_gb": [1, 2], "examples_per_s": [3, 4]}[key]
