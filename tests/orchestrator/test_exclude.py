"""Clients that are left out of a run, and clients that come later."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from orchestrator import launch
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

Toy = Callable[..., RunConfig]


def selected(config: RunConfig) -> list[list[str]]:
    return [row["selected"] for row in read_lines(Path(config.output_dir) / "metrics.jsonl")]


OTHERS = ("weighted", "poisson", "round_robin", "power_of_choice")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize("selection", ["uniform", "oort", *SLOW])
def test_who_is_excluded_is_missing_from_the_draws_that_would_have_been(tmp_path: Path, selection: str) -> None:
    clients = {"count": 6, "ranks": [2, 4, 8], "per_round": 3, "selection": selection}
    whole = toy_config(tmp_path / "whole", clients=clients, rounds=4)
    launch.run(whole, quiet)
    before = selected(whole)
    target = before[1][0]
    config = toy_config(tmp_path / "without", clients={**clients, "exclude": [target]}, rounds=4)
    launch.run(config, quiet)
    after = selected(config)
    first = next(i for i, row in enumerate(before) if target in row)
    assert after[:first] == before[:first]
    assert after[first] == [client for client in before[first] if client != target]
    assert not any(target in row for row in after)
    partition = read_json(Path(config.output_dir) / "partition.json")
    assert target not in [row["client"] for row in partition]


def test_a_client_may_join_later(toy: Toy) -> None:
    config = toy(clients__joins={"c1": 3}, rounds=4)
    launch.run(config, quiet)
    assert [("c1" in row) for row in selected(config)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({"exclude": ["c77"]}, "clients.exclude: there is no client c77"),
        ({"joins": {"x1": 2}}, "clients.joins: there is no client x1"),
        ({"exclude": [f"c{i}" for i in range(6)]}, "clients.exclude leaves no client to train"),
    ],
)
def test_names_that_are_not_there_are_refused(toy: Toy, clients: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch.run(toy(clients={"count": 6, **clients}), quiet)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_excluded_client_that_is_the_only_one_online_does_not_stop_the_clock(tmp_path: Path, mode: str) -> None:
    strategy = ["staleness", "flexlora"] if mode == "async" else "flexlora"
    for seed in (0, 2):
        clients = {"count": 6, "per_round": 2, "ranks": [2], "exclude": ["c1"]}
        schedule = {"mode": mode, "buffer": 1} if mode == "async" else {}
        config = toy_config(
            tmp_path / str(seed),
            clients=clients,
            fleet={"online": 0.05},
            seed=seed,
            strategy=strategy,
            schedule=schedule,
        )
        launch.run(config, quiet)
        assert any(selected(config))
