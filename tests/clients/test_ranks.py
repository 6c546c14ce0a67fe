"""Who trains at which rank."""

import pytest

from clients.ranks import assign_ranks
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
