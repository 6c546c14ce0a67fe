"""Rules that get as many copies of the mean of all changes make of them what they make of the changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.aggregation import STRATEGIES, compose, trials
from fedlora.aggregation.base import Contribution, Strategy
from fedlora.aggregation.combine import apply_delta, combine, make_delta
from fedlora.protocol import PARTS

WITH_MEANS = ["fedit", "fedsb", "ffa", "head_only", "rbla", "rolora", "zero_pad"]
STACKS: list[Any] = [
    *WITH_MEANS,
    [{"server_momentum": {"beta": 0.9}}, "fedit"],
    ["adam", "ffa"],
    ["yogi", "rolora"],
    ["fedprox", "zero_pad"],
]


def averaged(updates: list[Contribution]) -> list[Contribution]:
    """Everybody's change is the weighted mean."""
    total = sum(update.weight for update in updates)
    changes = [make_delta(update.received, update.trained, PARTS | {"C"}) for update in updates]
    mean = {
        name: sum(
            (u.weight / total * change[name] for u, change in zip(updates, changes, strict=True)), torch.zeros(())
        )
        for name in changes[0]
    }
    return [replace(update, trained=apply_delta(update.received, mean)) for update in updates]


def starts(strategy: Strategy) -> list[trials.Start]:
    return [trials.warm(strategy), *trials.rounds(strategy, 3)]


def test_these_rules_take_means_and_no_other_does() -> None:
    found = {name for name in STRATEGIES if compose(name).traits.takes_means and not compose(name).traits.personal}
    assert found == set(WITH_MEANS)


@pytest.mark.parametrize("spec", STACKS, ids=str)
def test_copies_of_the_mean_give_what_the_changes_give(spec: Any) -> None:
    strategy = compose(spec)
    clients = trials.clients([trials.RANK] * len(trials.NAMES))
    for start in starts(strategy):
        updates = trials.train(strategy, start, clients)
        one, other = (combine(strategy, some, start.ctx, start.state) for some in (updates, averaged(updates)))
        for name, tensor in one.adapter.tensors().items():
            torch.testing.assert_close(other.adapter.tensors()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["flexlora", "flora", "fedex", ["krum", "fedit"], ["coordinate_median", "ffa"]], ids=str
)
def test_others_come_to_something_else(spec: Any) -> None:
    strategy = compose(spec)
    clients, start = trials.clients([trials.RANK] * len(trials.NAMES)), trials.warm(strategy)
    updates = trials.train(strategy, start, clients)
    one, other = (combine(strategy, some, start.ctx, start.state) for some in (updates, averaged(updates)))
    apart = max(float((trials.product(one)[path] - trials.product(other)[path]).abs().max()) for path in trials.SITES)
    assert apart > 0.01
