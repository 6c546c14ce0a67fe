"""A stored round without the target, for every strategy; and calibration by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, WRAPPERS, Aggregate, Contribution, RoundContext, State, compose
from fedlora.aggregation.cohort import Cohort, Pending
from fedlora.aggregation.combine import apply_delta, combine, make_delta
from fedlora.aggregation.trials import Start, rounds, train, warm
from fedlora.errors import AdapterError, ConfigError, RoundError
from fedlora.protocol import ClientInfo
from fedlora.unlearning.subtract import aggregate_without, calibrated


def flat(state: State) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        found |= {f"{key}/{k}": v for k, v in flat(value).items()} if isinstance(value, dict) else {key: value}
    return found


def same(mine: Any, theirs: Any) -> bool:
    return torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def identical(left: Aggregate, right: Aggregate) -> bool:
    mine, theirs = left.adapter.tensors(), right.adapter.tensors()
    patches = AdapterState(left.patch).tensors(), AdapterState(right.patch).tensors()
    kept = flat(left.state), flat(right.state)
    pairs = [(mine, theirs), patches, kept]
    return all(a.keys() == b.keys() and all(same(a[name], b[name]) for name in a) for a, b in pairs)


def without(start: Start, client: str) -> Start:
    """The same start in a federation that never had a client."""
    return replace(start, ctx=replace(start.ctx, members=[m for m in start.ctx.members if m.id != client]))


SPECS: list[Any] = [*STRATEGIES, ["scaffold", "fedit"], ["adam", "fedit"], ["clip", "flexlora"]]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_round_is_that_of_a_federation_without_the_target(spec: Any) -> None:
    strategy = compose(spec)
    start = list(rounds(strategy, 2))[-1]
    sent = train(strategy, start, list(start.ctx.members))
    found = aggregate_without(["ben"], strategy, sent, start.ctx, start.state)
    never = without(start, "ben")
    # every client trains as it did, and the target is not there
    others = [one for one in train(strategy, start, list(start.ctx.members)) if one.client.id != "ben"]
    assert identical(found, combine(strategy, others, never.ctx, never.state))
    assert not identical(found, combine(strategy, sent, start.ctx, start.state))


def one(client: str, B: float, weight: float) -> Contribution:
    trained = AdapterState({"q": LowRank(torch.tensor([[B]]), torch.ones(1, 1))})
    return Contribution(ClientInfo(client, 1, 1), weight, trained, trained)


def test_the_shares_of_the_others_sum_to_one_again() -> None:
    # 0.5 and 0.25 of a round become 2/3 and 1/3: 2/3 * 3 + 1/3 * 9 = 5
    sent = [one("a", 3.0, 0.5), one("b", 100.0, 0.25), one("c", 9.0, 0.25)]
    ctx = RoundContext(1, 1, 0, sent[0].received)
    found = aggregate_without({"b"}, STRATEGIES.create("fedit"), sent, ctx, {})
    assert found.adapter.modules["q"].B.tolist() == [[5.0]]


def test_several_targets_and_one_that_was_not_asked() -> None:
    sent = [one("a", 3.0, 0.5), one("b", 100.0, 0.25), one("c", 9.0, 0.25)]
    ctx, fedit = RoundContext(1, 1, 0, sent[0].received), STRATEGIES.create("fedit")
    assert aggregate_without({"a", "b"}, fedit, sent, ctx, {}).adapter.modules["q"].B.tolist() == [[9.0]]
    assert identical(aggregate_without({"z"}, fedit, sent, ctx, {}), combine(fedit, sent, ctx, {}))


def test_the_update_of_the_target_is_never_loaded() -> None:
    def gone() -> Contribution:
        raise AssertionError("the target's update was looked at")

    kept = one("a", 3.0, 0.5)
    cohort = Cohort([Pending(kept.client, 0.5, lambda: kept), Pending(ClientInfo("b", 1, 1), 0.5, gone)])
    ctx = RoundContext(1, 1, 0, kept.received)
    found = aggregate_without({"b"}, STRATEGIES.create("fedit"), cohort, ctx, {})
    assert found.adapter.modules["q"].B.tolist() == [[3.0]]


def test_a_round_of_the_target_alone_is_refused() -> None:
    ctx = RoundContext(7, 1, 0, one("a", 1.0, 1.0).received)
    with pytest.raises(RoundError, match="round 7: without a none of its 1 updates is left; leave the round out"):
        aggregate_without(["a"], STRATEGIES.create("fedit"), [one("a", 1.0, 1.0)], ctx, {})


def test_a_client_that_the_rule_cannot_do_without_is_refused() -> None:
    strategy = WRAPPERS.create("fltrust", inner=STRATEGIES.create("flexlora"), root="ada")
    start = warm(strategy)
    sent = train(strategy, start, list(start.ctx.members))
    with pytest.raises(ConfigError, match="strategy: fltrust needs ada in every round; it cannot be taken out of one"):
        aggregate_without(["ada"], strategy, sent, start.ctx, start.state)


# Calibration ------------------------------------------------------------------------------------------------


def test_a_calibrated_delta_has_the_stored_length_and_the_fresh_direction() -> None:
    stored = {"q:B": torch.tensor([[3.0], [4.0]]), ":head": torch.tensor([0.0, 2.0])}
    fresh = {"q:B": torch.tensor([[0.0], [0.1]]), ":head": torch.tensor([-7.0, 0.0])}
    found = calibrated(stored, fresh)
    assert_close(found["q:B"], torch.tensor([[0.0], [5.0]]))
    assert_close(found[":head"], torch.tensor([-2.0, 0.0]))


def test_no_direction_gives_no_change_and_no_length_none_either() -> None:
    found = calibrated({"q:A": torch.ones(2), "q:B": torch.zeros(2)}, {"q:A": torch.zeros(2), "q:B": torch.ones(2)})
    assert found["q:A"].tolist() == found["q:B"].tolist() == [0.0, 0.0]


def test_a_client_that_would_go_the_same_way_goes_as_far_as_it_did() -> None:
    strategy = STRATEGIES.create("fedit")
    start = warm(strategy)
    (sent, *_) = train(strategy, start, list(start.ctx.members))
    delta = make_delta(sent.received, sent.trained, frozenset({"A", "B", "dense"}))
    short = {name: tensor / 10 for name, tensor in delta.items()}
    again = apply_delta(sent.received, calibrated(delta, short)).tensors()
    for name, tensor in sent.trained.tensors().items():
        assert_close(again[name], tensor)


def test_deltas_of_other_parts_or_ranks_are_refused() -> None:
    two, three = {"q:A": torch.ones(2)}, {"q:A": torch.ones(3)}
    with pytest.raises(AdapterError, match=r"q:A: only the stored delta has it \(1 such tensors\); send"):
        calibrated(two, {})
    with pytest.raises(AdapterError, match=r"q:A: the fresh delta is \[3\], the stored one \[2\]; train at the same"):
        calibrated(two, three)
