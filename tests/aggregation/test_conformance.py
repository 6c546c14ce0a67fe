"""Every registered strategy passes every law, and every law can fail."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import pytest
import torch

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import add, mean_factors, mean_update, subtract
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, WRAPPERS, compose
from fedlora.aggregation.alternating import RoLoRA
from fedlora.aggregation.averaging import FedIT, ZeroPad
from fedlora.aggregation.base import Aggregate, Strategy, Traits
from fedlora.aggregation.conformance import LAWS, Law, check_all
from fedlora.aggregation.evidence import LawBroken, load_state, save_state
from fedlora.aggregation.product import FlexLoRA
from fedlora.aggregation.shared import FedSA
from fedlora.aggregation.stacking import FedEx, FLoRA
from fedlora.aggregation.traffic import Traffic
from fedlora.aggregation.wrapper import described
from fedlora.errors import ConfigError, RankError

BY_NAME = {law.name: law for law in LAWS}
KINDS = ("fedit", "rolora", "flexlora", "fedsa", "fedsb", "fedex_het", "head_only")
OPTIONS = {"fltrust": {"root": "ada"}}


def stacks() -> list[list[Any]]:
    """Every wrapper over one rule of each kind that it can stand on, and one stack of two."""
    found: list[list[Any]] = [[{"server_momentum": {"beta": 0.9}}, {"clip": {"max_norm": 1.0}}, "flexlora"]]
    found += [["inflora", "ffa"], [{"inflora": {"refresh": False}}, "ffa"]]
    found += [["inflora", "fedprox", {"clip": {"max_norm": 1.0}}, {"ffa": {"orthogonal": False}}]]
    for wrapper, rule in product(WRAPPERS, KINDS):
        stack = [{wrapper: OPTIONS.get(wrapper, {})}, rule]
        with contextlib.suppress(ConfigError):
            compose(stack)
            found.append(stack)
    return found


def promises() -> Iterator[Any]:
    """Every law that a strategy or a stack must pass; wrappers over a few kinds of rules are quick."""
    for spec, law in product([*STRATEGIES, *stacks()], LAWS):
        if law.applies(compose(spec)):
            rule = spec[-1] if isinstance(spec, list) else spec
            quick = not isinstance(spec, list) or rule in ("fedit", "flexlora", "fedex_het", "ffa")
            marks = () if quick else pytest.mark.slow
            yield pytest.param(spec, law, id=f"{described(compose(spec))}: {law.name}", marks=marks)


PROMISES = [*promises()]


@pytest.mark.parametrize(("spec", "law"), PROMISES)
def test_every_strategy_and_sound_stack_passes_every_law_that_applies(spec: Any, law: Law) -> None:
    law.check(compose(spec))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([{"adam": {}}, "flexlora"], "adam works on factor coordinates, and flexlora changes their basis every round"),
        (["trimmed_mean", "flora"], "use multi_krum or geometric_median, or trimmed_mean over ffa"),
        (["scaffold", "fedex_het"], "use fedprox, or scaffold over ffa"),
        (["krum", "hetlora"], "krum hands out weights, but hetlora uses its own"),
        (["geometric_median", "clip", "coordinate_median", "ffa"], "geometric_median hands out weights"),
        (["adam", "server_momentum", "ffa"], "would be two server optimisers"),
        (["coordinate_median", "scaffold", "ffa"], "scaffold must hear from every client.*use fedprox"),
        (["multi_krum", "scaffold", "zero_pad"], "multi_krum leaves some out"),
        (["scaffold", "trimmed_mean", "ffa"], "trimmed_mean does not look at control variates"),
        (["personal_head", "scaffold", "ffa"], "put it before personal_head"),
        (["krum", "fedsa"], "krum compares whole updates, and fedsa keeps a factor on the clients"),
        (["coordinate_median", "hetlora"], "makes one update of all, and hetlora weighs each"),
        (["inflora", "flexlora"], r"flexlora does not keep one A for everyone; use \[inflora, ffa\]"),
        (["inflora", "rolora"], "rolora does not keep one A"),
        (["inflora", "krum", "ffa"], "krum does not look at sketches of inputs.*use clip"),
        (["inflora", "trimmed_mean", "ffa"], "trimmed_mean does not look at sketches"),
        (["inflora", "server_momentum", "ffa"], "server_momentum carries B from round to round"),
        (["inflora", "scaffold", "ffa"], "scaffold carries B from round to round"),
        (["inflora", "staleness", "ffa"], "staleness carries B from round to round"),
        (["server_momentum", "inflora", "ffa"], "server_momentum stands around it; put inflora first"),
        (["multi_krum", "inflora", "ffa"], "multi_krum stands around it; put inflora first"),
        ([{"inflora": {"energy": 0}}, "ffa"], "inflora needs 0 < energy <= 1"),
        (["personal_head", "head_only"], "shares nothing but the head.*put personal_head over a rule such as flexlora"),
        (["o_lora", "clip", "head_only"], r"clip\(head_only\) patches the base in every round or trains no A"),
        (["prototypes", "fedsa"], "fedsa keeps heads on the clients; use flexlora, zero_pad, fedit or head_only"),
        (["prototypes", "personal_head", "flexlora"], "personal_head.* keeps heads on the clients"),
        (["personal_head", "prototypes", "flexlora"], "is made on the server.*leave one of them out"),
        (["server_momentum", "clip", "prototypes", "ffa"], "and server_momentum over it would move it; put prototypes"),
        (["scaffold", "prototypes", "ffa"], "put prototypes before scaffold"),
        (["prototypes", "krum", "flexlora"], "krum does not look at class means, which a bad client would send"),
        (["prototypes", "clip", "trimmed_mean", "ffa"], "trimmed_mean does not look at class means"),
        (["krum", "prototypes", "flexlora"], "krum hands out weights, but prototypes uses its own"),
        (
            [{"prototypes": {"metric": "dot"}}, "ffa"],
            "metric is cosine or euclidean or mahalanobis, not dot",
        ),
        ([{"prototypes": {"memory": 2}}, "ffa"], "memory from 0 to 1, .* not 1.0, 2, 0.1 and None"),
        (["clip", "fedprox", "clip", "flexlora"], "clip stands in the stack twice"),
        (["clip"], r"clip is a wrapper and needs a rule after it: \[clip, flexlora\]"),
        (["flexlora", "fedit"], "flexlora is a rule, and a stack has one, at its end"),
        ([], "the list is empty"),
        (["cilp", "flexlora"], "cilp is not known; did you mean clip"),
        ([{"clip": {"max_norm": 0}}, "fedit"], "clip.max_norm is a positive number or median"),
        ([{"clip": {"norm": 1}}, "fedit"], "clip does not take these options"),
        ([["clip"], "fedit"], "neither a name nor one name with its options"),
    ],
)
def test_an_unsound_stack_is_refused_with_one_sentence_and_a_way_out(spec: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        compose(spec)


def test_the_names_of_laws_are_distinct_sentences() -> None:
    assert len(BY_NAME) == len(LAWS)
    assert all(len(name.split()) > 4 for name in BY_NAME)


# Strategies as others may write them ----------------------------------------------------------------------


class Momentum(Strategy):
    """FedAvg with server momentum: keeps nested tensors, numbers and strings."""

    name = "momentum"
    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=False)

    def aggregate(self, updates, ctx, state):
        mean = FedIT().aggregate(updates, ctx, {}).adapter
        before = updates[0].received
        step = subtract(mean, before).tensors()
        old = state.get("velocity", {})
        velocity = {name: 0.9 * old[name] + step[name] if old else step[name] for name in step}
        adapter = add(before, AdapterState.from_tensors(velocity))
        kept = {"velocity": velocity, "steps": state.get("steps", 0) + 1, "rule": "heavy ball", "empty": {}}
        return Aggregate(adapter, kept, {"norm": float(velocity[next(iter(velocity))].norm())})


class Restarting(FlexLoRA):
    """Hands out rank-0 adapters that the framework revives, as a strategy with base patches will."""

    def redistribute(self, adapter, client, ctx, state):
        smaller = adapter.map(lambda update: LowRank(update.B[:, :0], update.A[:0]))
        return smaller.map(lambda update: ranks.pad(update, client.rank))


def scaled(state: AdapterState, factor: float) -> AdapterState:
    return AdapterState.from_tensors({name: factor * tensor for name, tensor in state.tensors().items()})


@pytest.mark.parametrize("strategy", [RoLoRA(), Momentum()], ids=lambda strategy: strategy.name)
def test_strategies_with_phases_and_state_pass_too(strategy: Strategy) -> None:
    assert check_all(strategy) == []


def test_a_restart_from_rank_zero_is_taken_for_what_it_is() -> None:
    # without a base patch to carry the update, forgetting it is worse than needed; nothing else is wrong
    broken = [law.name for law, _ in check_all(Restarting())]
    assert broken == ["each client is handed its rank, and no worse an approximation than needed"]


# One broken strategy per law --------------------------------------------------------------------------------


class NeverAverages(ZeroPad):
    """Divides by one client too many."""

    def aggregate(self, updates, ctx, state):
        share = len(updates) / (len(updates) + 1)
        return super().aggregate([replace(u, weight=u.weight * share) for u in updates], ctx, state)


class Sums(ZeroPad):
    """Adds the updates up."""

    def aggregate(self, updates, ctx, state):
        return super().aggregate([replace(u, weight=1.0) for u in updates], ctx, state)


class Remembers(ZeroPad):
    """Keeps a count on ``self``."""

    def __init__(self):
        self.calls = 0

    def aggregate(self, updates, ctx, state):
        self.calls += 1
        outcome = super().aggregate(updates, ctx, state)
        return Aggregate(scaled(outcome.adapter, 1 + self.calls * 1e-3), state)


class InPlace(FedIT):
    """Weighs the factors where they lie."""

    def aggregate(self, updates, ctx, state):
        for update in updates:
            for module in update.trained.modules.values():
                module.B.mul_(update.weight)
        return Aggregate(mean_factors([u.trained for u in updates], [1.0] * len(updates)), state)


class PadsSilently(ZeroPad):
    """Says that it needs equal ranks, and takes others."""

    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=False)


class RefusesNobody(FedIT):
    """Refuses unequal ranks without a word about who sent them."""

    def aggregate(self, updates, ctx, state):
        if len({update.trained.rank for update in updates}) > 1:
            raise RankError("ranks differ")
        return super().aggregate(updates, ctx, state)


class Overpromises(FedIT):
    """Says that it takes mixed ranks, and does not."""

    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=True)


class KeepsAList(ZeroPad):
    """A list of past rounds is not a state."""

    def aggregate(self, updates, ctx, state):
        history = [*state.get("history", []), ctx.round]
        return Aggregate(super().aggregate(updates, ctx, state).adapter, {"history": history})


class RemembersOnSelf(ZeroPad):
    """Averages with last round's adapter, which it keeps on ``self``; another process does not have it."""

    def __init__(self):
        self.last: dict[int, AdapterState] = {}

    def aggregate(self, updates, ctx, state):
        adapter = super().aggregate(updates, ctx, state).adapter
        before = self.last.get(ctx.round - 1, adapter)
        self.last[ctx.round] = adapter
        return Aggregate(mean_factors([adapter, before], [0.5, 0.5]), state)


class CallsItselfExact(FedIT):
    """The mean of factors is not the mean of updates."""

    traits = Traits(exact=True, linear=True, fixed_gauge=True, mixed_ranks=False)


class CallsItselfLinear(FlexLoRA):
    """A truncation is not linear."""

    traits = Traits(linear=True)


class ForgetsHeads(FlexLoRA):
    """The first client's head wins."""

    def aggregate(self, updates, ctx, state):
        outcome = super().aggregate(updates, ctx, state)
        return Aggregate(AdapterState(outcome.adapter.modules, updates[0].trained.dense), state)


class PlainMean(ZeroPad):
    """Every client counts the same."""

    def aggregate(self, updates, ctx, state):
        return super().aggregate([replace(u, weight=1 / len(updates)) for u in updates], ctx, state)


class StartsWithA(RoLoRA):
    """At B = 0 the gradient of A is zero."""

    def plan(self, ctx, client, state):
        return super().plan(ctx, client, {"turn": "B" if state.get("turn", "B") == "A" else "A"})


class TrainsTheHeadUnasked(FedIT):
    """Nothing but the head trains, and nobody is told."""

    def plan(self, ctx, client, state):
        return replace(super().plan(ctx, client, state), train=frozenset({"dense"}))


class CallsItselfHeadOnly(FedIT):
    """Says that only the head trains, so that nobody looks at its pairs."""

    traits = Traits(linear=True, fixed_gauge=True, mixed_ranks=False, head_only=True)


class IgnoresRanks(FlexLoRA):
    """Everyone receives the global rank."""

    def redistribute(self, adapter, client, ctx, state):
        return adapter


class DropsTheLast(FlexLoRA):
    """The right rank, but one component fewer than there is room for."""

    def redistribute(self, adapter, client, ctx, state):
        return adapter.map(lambda update: ranks.resize(ranks.truncate(update, 1), client.rank))


class PlaysFavourites(ZeroPad):
    """Turns the sign of what ben gets."""

    def redistribute(self, adapter, client, ctx, state):
        handed = super().redistribute(adapter, client, ctx, state)
        return handed.map(lambda u: LowRank(-u.B, -u.A)) if client.id == "ben" else handed


class Stacks(Strategy):
    """Returns the whole stack and lets it grow from round to round."""

    name = "stacks"
    traits = Traits(exact=True)

    def aggregate(self, updates, ctx, state):
        return Aggregate(mean_update([u.trained for u in updates], [u.weight for u in updates]), state)


class DividesByNobody(ZeroPad):
    """Averages a component over those who have it, and by zero where nobody does."""

    def aggregate(self, updates, ctx, state):
        outcome = super().aggregate(updates, ctx, state)
        shares = torch.tensor([sum(u.weight for u in updates if u.trained.rank > row) for row in range(ctx.rank + 1)])[
            : ctx.rank
        ]
        return Aggregate(outcome.adapter.map(lambda u: LowRank(u.B / shares, u.A / shares[:, None])), state)


class NotANumber(ZeroPad):
    """Takes the root of a negative number."""

    def aggregate(self, updates, ctx, state):
        outcome = super().aggregate(updates, ctx, state)
        return Aggregate(outcome.adapter.map(lambda u: LowRank(u.B, u.A.sqrt())), state)


class PatchesUnasked(FLoRA):
    """Moves the update into the base without saying so."""

    traits = Traits(exact=True)


class PatchesElsewhere(FLoRA):
    """Patches a module that has no adapter."""

    def aggregate(self, updates, ctx, state):
        outcome = super().aggregate(updates, ctx, state)
        return replace(outcome, patch={"lm_head": next(iter(outcome.patch.values()))})


class SendsMoreThanItSays(RoLoRA):
    """Declares that B never travels up."""

    traffic = Traffic(up="r*n")


class TellsHalfOfWhatItSendsAlong(ZeroPad):
    """Counts what goes beside modules, and not what goes beside the head."""

    traffic = Traffic(extras="r*n")

    def broadcast(self, client, ctx, state):
        tensors = self.redistribute(ctx.adapter, client, ctx, state).tensors()
        return {f"control/{name}": tensor for name, tensor in tensors.items() if not name.endswith(":B")}


class BigPatch(FedEx):
    """Stacks the residual without recompressing it, and forgets that that is more."""

    traffic = Traffic(patch="r*(m + n)")


class KeepsWhatItSends(FedSA):
    """A part cannot be personal and shared."""

    def plan(self, ctx, client, state):
        return replace(super().plan(ctx, client, state), keep=frozenset({"A", "B", "dense"}))


class Failing:
    """Which strategies break which law, and what the message says of it."""

    cases: ClassVar[dict[str, list[tuple[Callable[[], Strategy], str]]]] = {
        "one client in gives the same update out": [(NeverAverages, "weight 1 .*: entry .* should be .*, is ")],
        "equal clients give that client": [(Sums, "4 clients sent the same update")],
        "order of arrival and scaling of weights change nothing": [(Remembers, "in reverse order")],
        "no input is changed in place": [(InPlace, "aggregate changed .*: ada.trained.layers.0.query:B")],
        "unequal ranks work, or are refused by a message that names the client": [
            (PadsSilently, "expected a RankError that names ben, came an adapter"),
            (RefusesNobody, "does not name ben: ranks differ"),
            (Overpromises, "mixed_ranks is declared.*raised RankError"),
            (DividesByNobody, "has nan at"),
        ],
        "the state survives save and load": [
            (KeepsAList, r"state.history is \[1\] \(list\)"),
            (RemembersOnSelf, "round 2 was run once as it was and once from the saved state"),
        ],
        "declared exact, the update is the weighted mean of the updates": [(CallsItselfExact, "allowed 1e-06")],
        "declared linear, the result is linear in what clients send": [(CallsItselfLinear, "F\\(y\\)")],
        "dense tensors are averaged by weight": [(ForgetsHeads, "head.weight .* sent heads")],
        "an update of zero weight changes nothing": [(PlainMean, "ada's update has weight 0")],
        "a start from B = 0 can learn": [
            (StartsWithA, "trains A, dense, B is zero in components"),
            (TrainsTheHeadUnasked, "trains dense, B is zero in components .* so the gradient of what trains is zero"),
            (CallsItselfHeadOnly, "head_only is declared; round 1, client ada: trains A, B, dense, expected dense"),
        ],
        "each client is handed its rank, and no worse an approximation than needed": [
            (IgnoresRanks, "handed to ben of rank 1 in round 1: rank 4; expected 1"),
            (DropsTheLast, "rank 4 at rank 4 is off by .*; 0.000000 is possible"),
        ],
        "clients with the same plan are handed the same adapter": [(PlaysFavourites, "ada and ben")],
        "the result is finite and fits the global adapter": [
            (Stacks, "the result has rank 10; expected at most 4"),
            (NotANumber, "has nan at"),
        ],
        "the base is patched only by a strategy that says so": [
            (PatchesUnasked, "patches_base is not declared"),
            (PatchesElsewhere, "patch of lm_head"),
        ],
        "bytes up and down are those of the declared formula": [
            (SendsMoreThanItSays, r"up is declared as r\*n = .* numbers, came"),
            (TellsHalfOfWhatItSendsAlong, "should come to about 0 numbers, came 6"),
            (BigPatch, "the patch is declared as at most"),
            (KeepsWhatItSends, r"\['A'\] are both sent and kept"),
        ],
    }


BROKEN = [
    pytest.param(BY_NAME[name], strategy, message, id=f"{strategy.__name__}: {name}")
    for name, cases in Failing.cases.items()
    for strategy, message in cases
]


def test_every_law_has_a_strategy_that_breaks_it() -> None:
    assert list(Failing.cases) == [law.name for law in LAWS]


@pytest.mark.parametrize(("law", "strategy", "message"), BROKEN)
def test_a_broken_strategy_is_found_out_with_an_example(
    law: Law, strategy: Callable[[], Strategy], message: str
) -> None:
    assert law.applies(strategy())
    with pytest.raises(LawBroken, match=f"(?s){message}"):
        law.check(strategy())


def test_check_all_names_the_broken_laws_only() -> None:
    failures = check_all(CallsItselfExact())
    assert [law.name for law, _ in failures] == ["declared exact, the update is the weighted mean of the updates"]
    assert "layers.0.query [7, 5]" in str(failures[0][1])


def test_a_strategy_that_raises_breaks_its_laws_instead_of_the_check() -> None:
    class Typo(FedIT):
        def aggregate(self, updates, ctx, state):
            return updates[0].adaptor

    failures = check_all(Typo())
    assert len(failures) == sum(law.applies(Typo()) for law in LAWS)
    message = "raised AttributeError: 'Contribution' object has no attribute 'adaptor'"
    assert str(failures[0][1]) == message
    assert isinstance(failures[0][1].__cause__, AttributeError)


# States as bytes --------------------------------------------------------------------------------------------


def test_a_state_of_nested_tensors_numbers_and_strings_comes_back() -> None:
    state = {
        "velocity": {"a.b:A": torch.arange(6.0).reshape(2, 3).T, "c/d": torch.tensor(3, dtype=torch.int64)},
        "velocity.a": {},
        "steps": 3,
        "rate": 0.1,
        "rule": "tensor",
    }
    back = load_state(save_state(state))
    assert torch.equal(back["velocity"]["a.b:A"], state["velocity"]["a.b:A"])
    assert torch.equal(back["velocity"]["c/d"], torch.tensor(3))
    del back["velocity"], state["velocity"]
    assert back == state


def test_one_tensor_kept_under_two_names_can_be_saved() -> None:
    tensor = torch.ones(2)
    back = load_state(save_state({"now": tensor, "best": tensor}))
    assert torch.equal(back["now"], back["best"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": None}}, "state.a.b is None"),
        ({"a": {1: 2.0}}, "state.a has the key 1"),
        ({"a": float("nan")}, "state.a is nan"),
        ({"a": (1, 2)}, "tuple"),
    ],
)
def test_anything_else_in_a_state_is_named(state: dict, message: str) -> None:
    with pytest.raises(LawBroken, match=message):
        save_state(state)
