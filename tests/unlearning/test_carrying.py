"""Stored updates as changes of another adapter: what rounds come to without a target that shaped them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter.algebra import stack
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, Contribution, RoundContext, Strategy, compose
from fedlora.aggregation.combine import combine, hand_out
from fedlora.aggregation.trials import FRESH, Start, begin, cohort, cold, multiply, train
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from fedlora.unlearning.negation import entered
from fedlora.unlearning.subtract import aggregate_without, carrying

Stored = list[tuple[Start, list[Contribution]]]


def play(strategy: Strategy, count: int, late: str = "") -> tuple[Stored, Start]:
    """Rounds with their updates, and what comes after them. ``late`` takes part in the last one only."""
    stored, start = [], cold(strategy)
    for round in range(1, count + 1):
        asked = [client for client in cohort(strategy) if round == count or client.id != late]
        sent = train(strategy, start, asked)
        stored.append((start, sent))
        outcome = combine(strategy, sent, start.ctx, start.state)
        start = begin(strategy, round + 1, outcome.adapter, outcome.state)
    return stored, start


def starts(strategy: Strategy, ctx: RoundContext, state: Any) -> Callable[[ClientInfo], AdapterState]:
    return lambda client: hand_out(strategy, client, ctx, state, FRESH)


def again(strategy: Strategy, stored: Stored, *targets: str) -> tuple[AdapterState, list[dict[str, LowRank]]]:
    """The rounds without the targets: the adapter, and the patches of the base."""
    adapter, state, patches = stored[0][0].adapter, stored[0][0].state, []
    for start, sent in stored:
        ctx = RoundContext(start.ctx.round, start.ctx.rank, start.ctx.seed, revive(adapter, FRESH), start.ctx.members)
        carried = carrying(strategy, starts(strategy, ctx, state))
        outcome = aggregate_without(targets, carried, sent, ctx, state)
        adapter, state = outcome.adapter, outcome.state
        patches.append(dict(outcome.patch))
    return adapter, patches


def shares(sent: Sequence[Contribution], target: str) -> list[tuple[float, Contribution]]:
    others = [update for update in sent if update.client.id != target]
    total = sum(update.weight for update in others)
    return [(update.weight / total, update) for update in others]


def test_changes_add_up_where_the_basis_is_fixed() -> None:
    # x' = x_0 + sum over rounds of the mean change of the others, factor by factor, by hand
    fedit = compose("fedit")
    stored, _ = play(fedit, 3)
    expected = {name: tensor.double() for name, tensor in stored[0][0].adapter.tensors().items()}
    for _, sent in stored:
        for share, update in shares(sent, "ben"):
            before, after = update.received.tensors(), update.trained.tensors()
            for name in expected:
                expected[name] = expected[name] + share * (after[name] - before[name]).double()
    found, _ = again(fedit, stored, "ben")
    for name, tensor in found.tensors().items():
        assert_close(tensor.double(), expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["fedex_het", "flora"])
def test_products_add_up_under_exact_rules_the_base_included(rule: str) -> None:
    strategy = compose(rule)
    stored, _ = play(strategy, 3)
    expected = multiply(stored[0][0].adapter)
    for _, sent in stored:
        for share, update in shares(sent, "ben"):
            after, before = multiply(update.trained), multiply(update.received)
            expected = {path: total + share * (after[path] - before[path]) for path, total in expected.items()}
    adapter, patches = again(strategy, stored, "ben")
    found = multiply(AdapterState(stack([adapter.whole().modules, *patches])))
    for path, total in expected.items():
        assert_close(found[path], total, atol=2e-5, rtol=1e-5)


RULES: list[Any] = ["fedit", "zero_pad", "flexlora", "fedex_het", ["clip", "flexlora"], ["clip", "fedit"]]


@pytest.mark.parametrize("spec", [*RULES, "flora", "rbla", "hetlora", ["adam", "fedit"]], ids=str)
def test_a_target_of_the_last_round_only_leaves_the_aggregate_of_the_others(spec: Any) -> None:
    strategy = compose(spec)
    stored, _ = play(strategy, 3, late="dan")
    start, sent = stored[-1]
    ctx = RoundContext(start.ctx.round, start.ctx.rank, start.ctx.seed, start.adapter, start.ctx.members)
    others = [update for update in sent if update.client.id != "dan"]
    expected = combine(strategy, others, ctx, start.state).adapter.tensors()
    found, _ = again(strategy, stored, "dan")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.tensors().items())


@pytest.mark.parametrize("spec", RULES, ids=str)
def test_nothing_changes_where_nobody_is_taken_out(spec: Any) -> None:
    strategy = compose(spec)
    stored, end = play(strategy, 3)
    found, _ = again(strategy, stored)
    expected = end.adapter
    assert all(torch.equal(t, found.tensors()[n]) for n, t in expected.tensors().items() if "frozen" not in n)


def test_to_average_the_stored_adapters_again_would_bring_the_target_back() -> None:
    fedit = compose("fedit")
    stored, _ = play(fedit, 2)
    start, sent = stored[1]
    plain = aggregate_without(["ben"], fedit, sent, start.ctx, start.state).adapter.tensors()
    carried = again(fedit, stored, "ben")[0].tensors()
    # what ben did in round 1 is in what everybody received in round 2, with its share
    first = aggregate_without(["ben"], fedit, stored[0][1], stored[0][0].ctx, {}).adapter.tensors()
    for name, tensor in plain.items():
        assert_close(tensor - carried[name], start.adapter.tensors()[name] - first[name], atol=1e-5, rtol=1e-5)
        assert not torch.equal(tensor, carried[name])


def test_clipping_shortens_what_the_client_did_whatever_it_is_carried_to() -> None:
    # the clipped change of every update has norm 0.5 at most, and is the one that is carried
    strategy = compose([{"clip": {"max_norm": 0.5}}, "fedit"])
    stored, _ = play(strategy, 2)
    found, _ = again(strategy, stored, "ben")
    start = stored[0][0].adapter.tensors()
    moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in found.tensors().items()])
    assert 0 < float(moved.norm()) <= 2 * 0.5 + 1e-4


def test_a_rule_that_only_knows_its_own_basis_is_refused() -> None:
    fedex = STRATEGIES.create("fedex")
    with pytest.raises(ConfigError, match="fedex can only take a change of the adapter that it was made to"):
        carrying(fedex, lambda client: AdapterState())


def test_what_entered_is_clipped_and_weighed() -> None:
    strategy = compose([{"clip": {"max_norm": 0.5}}, "fedit"])
    start = cold(strategy)
    given = entered(strategy, train(strategy, start, cohort(strategy)), start.ctx)
    assert [round(update.weight, 6) for update in given] == [0.1, 0.2, 0.3, 0.4]

    def change(update: Contribution) -> Tensor:
        before = update.received.tensors()
        return torch.cat([(t - before[n]).flatten() for n, t in update.trained.tensors().items()])

    assert [float(change(update).norm()) for update in given] == pytest.approx([0.5] * 4, rel=1e-4)
