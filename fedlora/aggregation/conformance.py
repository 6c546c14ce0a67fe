"""The laws every aggregation strategy passes: plain functions, for pytest and for a user's own file.

A law looks at a strategy through the framework, as a run does: clients are planned for, handed an adapter,
trained (a seeded push on the parts that train), and only what travels comes back. ``check_all`` names the laws
that do not hold, each with an example.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.adapter.algebra import mean_dense
from fedlora.adapter.state import LowRank
from fedlora.aggregation import trials
from fedlora.aggregation.base import Strategy
from fedlora.aggregation.combine import combine, part_of
from fedlora.aggregation.evidence import (
    LawBroken,
    between,
    contents,
    described_ranks,
    expect,
    identical,
    load_state,
    same_tree,
    save_state,
    well_formed,
)
from fedlora.errors import ConfigError, RankError
from fedlora.protocol import TrainPlan

CLOSE = 1e-5  # a hundred times the rounding of float32 factors
EXACT = 1e-6  # what ``exact`` promises


@dataclass(frozen=True)
class Law:
    """One promise of a strategy.

    Attributes:
        name: the law as a sentence.
        check: raises ``LawBroken`` if it does not hold.
        applies: whether this strategy makes the promise.
    """

    name: str
    check: Callable[[Strategy], None]
    applies: Callable[[Strategy], bool] = field(default=lambda strategy: True)


def check_all(strategy: Strategy) -> list[tuple[Law, LawBroken]]:
    """The laws that ``strategy`` breaks, in order; empty for a sound one.

    A strategy that raises breaks the law it was being checked for; the original error is the cause.
    """
    broken = []
    for law in LAWS:
        if not law.applies(strategy):
            continue
        try:
            law.check(strategy)
        except LawBroken as error:
            broken.append((law, error))
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
            failure = LawBroken(f"raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            broken.append((law, failure))
    return broken


def _one_client(strategy: Strategy) -> None:
    for start in (trials.cold(strategy), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.clients([trials.RANK]))
        outcome = combine(strategy, updates, start.ctx, start.state)
        told = f"ada alone sent rank {trials.RANK} with weight 1 (or declare Traits(idempotent=False))"
        expect(trials.product(outcome), trials.mean_product(updates), CLOSE, told)


def _equal_clients(strategy: Strategy) -> None:
    for start in (trials.cold(strategy), trials.warm(strategy)):
        (sent,) = trials.train(strategy, start, trials.clients([trials.RANK]))
        copies = [
            replace(sent, client=client, weight=weight)
            for client, weight in zip(trials.clients([trials.RANK] * 4), trials.WEIGHTS, strict=True)
        ]
        outcome = combine(strategy, copies, start.ctx, start.state)
        told = (
            f"4 clients sent the same update of rank {trials.RANK} with weights 0.1, 0.2, 0.3, 0.4"
            " (or declare Traits(idempotent=False))"
        )
        expect(trials.product(outcome), trials.multiply(sent.trained), CLOSE, told)


def _order_and_scale(strategy: Strategy) -> None:
    for start in (trials.cold(strategy), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        outcome = combine(strategy, updates, start.ctx, start.state)
        backwards = combine(strategy, updates[::-1], start.ctx, start.state)
        identical(
            backwards.adapter,
            outcome.adapter,
            "the same 4 updates arrived in reverse order; what is remembered goes into the state, not onto self",
        )
        scaled = [replace(update, weight=update.weight * 1000) for update in updates]
        told = "weights 1, 2, 3, 4 became 1000, 2000, 3000, 4000"
        expect(trials.product(combine(strategy, scaled, start.ctx, start.state)), trials.product(outcome), CLOSE, told)


def _untouched(strategy: Strategy) -> None:
    for start in trials.rounds(strategy, 2):
        clients = trials.cohort(strategy)
        updates = trials.train(strategy, start, clients)
        given: dict[str, object] = {
            "state": start.state,
            **{update.client.id: contents(update) for update in updates},
        }
        before = copy.deepcopy(given)
        outcome = combine(strategy, updates, start.ctx, start.state)
        same_tree(given, before, "aggregate changed what it was given")
        after = trials.begin(strategy, start.ctx.round + 1, outcome.adapter, outcome.state)
        made: dict[str, object] = {"state": after.state, "adapter": after.adapter.tensors()}
        before = copy.deepcopy(made)
        for client in clients:
            plan, _ = trials.receive(strategy, after, client)
            strategy.broadcast(replace(client, rank=plan.rank), after.ctx, after.state)
        same_tree(made, before, "plan, redistribute or broadcast changed what it was given")


def _unequal_ranks(strategy: Strategy) -> None:
    if not strategy.traits.mixed_ranks:
        return _refuses_unequal_ranks(strategy)
    # the global rank may be absent from a round, and a client may be alone in it
    for ranks in (trials.MIXED, (1, 2, 3), (2,)):
        for start in (trials.cold(strategy), trials.warm(strategy)):
            told = f"mixed_ranks is declared, which is the default; ranks {list(ranks)}, global rank {trials.RANK}"
            try:
                updates = trials.train(strategy, start, trials.clients(ranks))
                outcome = combine(strategy, updates, start.ctx, start.state)
            except Exception as error:
                raise LawBroken(f"{told}: raised {type(error).__name__}: {error}") from error
            well_formed(outcome.adapter, told)
    return None


def _refuses_unequal_ranks(strategy: Strategy) -> None:
    start = trials.warm(strategy)
    updates = trials.train(strategy, start, trials.clients([trials.RANK] * 3))
    narrow = updates[1].trained.map(lambda update: LowRank(update.B[:, :2], update.A[:2]))
    ben = replace(updates[1].client, rank=2)
    updates[1] = replace(updates[1], client=ben, trained=narrow, received=narrow)
    told = f"mixed_ranks is not declared; ada, ben, cleo sent ranks {trials.RANK}, 2, {trials.RANK}"
    try:
        combine(strategy, updates, start.ctx, start.state)
    except (RankError, ConfigError) as refusal:
        if "ben" not in str(refusal):
            raise LawBroken(f"{told}: the refusal does not name ben: {refusal}") from refusal
    except Exception as error:
        raise LawBroken(f"{told}: expected a RankError that names ben, came {type(error).__name__}: {error}") from error
    else:
        raise LawBroken(f"{told}: expected a RankError that names ben, came an adapter")


def _state_survives(strategy: Strategy) -> None:
    made = copy.deepcopy(strategy)
    for start in trials.rounds(strategy, 3):
        restarted = copy.deepcopy(made)  # in another process it remembers nothing but the state
        restored = replace(start, state=load_state(save_state(start.state)))
        same_tree(restored.state, start.state, f"the state at round {start.ctx.round} was saved and loaded")
        one, other = (
            combine(who, trials.train(who, where, trials.cohort(who)), where.ctx, where.state)
            for who, where in ((strategy, start), (restarted, restored))
        )
        told = (
            f"round {start.ctx.round} was run once as it was and once from the saved state by another object;"
            " keep nothing on self"
        )
        identical(other.adapter, one.adapter, told)
        same_tree(other.state, one.state, told)


def _exact(strategy: Strategy) -> None:
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        outcome = combine(strategy, updates, start.ctx, start.state)
        told = f"exact is declared; {described_ranks(updates)}"
        expect(trials.product(outcome), trials.mean_product(updates), EXACT, told)


def _linear(strategy: Strategy) -> None:
    """What is received is held fixed, so linear in what is sent is affine in what was trained."""
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        X = trials.train(strategy, start, trials.cohort(strategy), "x")
        Y = trials.train(strategy, start, trials.cohort(strategy), "y")
        F_X, F_Y = (combine(strategy, sent, start.ctx, start.state).adapter.tensors() for sent in (X, Y))
        for t in (0.5, 3.0):
            mixed = [replace(x, trained=between(x.trained, y.trained, t)) for x, y in zip(X, Y, strict=True)]
            came = combine(strategy, mixed, start.ctx, start.state).adapter.tensors()
            if {name: F.shape for name, F in came.items()} != {name: F.shape for name, F in F_X.items()}:
                raise LawBroken("linear is declared, but the shapes of the result depend on the values sent")
            expected = {name: (1 - t) * F_X[name].double() + t * F_Y[name].double() for name in F_X}
            told = f"linear is declared; every client sent x + {t} (y - x), expected F(x) + {t} (F(y) - F(x))"
            expect({name: F.double() for name, F in came.items()}, expected, CLOSE, told)


def _dense_mean(strategy: Strategy) -> None:
    for start in (trials.cold(strategy), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        outcome = combine(strategy, updates, start.ctx, start.state)
        shares = [update.weight / sum(trials.WEIGHTS) for update in updates]
        expected = mean_dense([update.trained.to(torch.float64) for update in updates], shares)
        came = {name: tensor.double() for name, tensor in outcome.adapter.dense.items()}
        told = (
            "4 clients sent heads with weights 0.1, 0.2, 0.3, 0.4 (a rule with weights of its own declares"
            " Traits(weighted=False))"
        )
        expect(came, expected, CLOSE, told)


def _zero_weight(strategy: Strategy) -> None:
    for start in (trials.cold(strategy), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        place = next(i for i, update in enumerate(updates) if update.client.id not in strategy.required)
        silent = replace(updates[place], weight=0.0)
        others = [update for update in updates if update.client.id != silent.client.id]
        total = sum(update.weight for update in others)
        rest = [replace(update, weight=update.weight / total) for update in others]
        # wrappers re-weight by calling aggregate themselves, so zeros reach it past the framework too
        alone = strategy.aggregate(rest, start.ctx, start.state)
        for outcome in (
            combine(strategy, [silent, *rest], start.ctx, start.state),
            strategy.aggregate([silent, *rest], start.ctx, start.state),
        ):
            names = ", ".join(update.client.id for update in others)
            told = f"{silent.client.id}'s update has weight 0; expected the result of {names} alone"
            expect(trials.product(outcome), trials.product(alone), CLOSE, told)
            expect(outcome.adapter.dense, alone.adapter.dense, CLOSE, told)


def _can_learn(strategy: Strategy) -> None:
    for start in trials.rounds(strategy, 3):
        for client in trials.cohort(strategy):
            plan, handed = trials.receive(strategy, start, client)
            if strategy.traits.head_only:
                # its pairs may lie as they like, since none of them is to move
                if plan.train != {"dense"}:
                    raise LawBroken(
                        f"head_only is declared; round {start.ctx.round}, client {client.id}: trains {_parts(plan)},"
                        " expected dense alone"
                    )
                continue
            for path, update in handed.modules.items():
                live_A, live_B = (update.A != 0).any(dim=1), (update.B != 0).any(dim=0)
                told = f"{path}: round {start.ctx.round}, client {client.id} of rank {client.rank}"
                dead = (~live_A & ~live_B).nonzero().flatten().tolist()
                if dead:
                    raise LawBroken(f"{told}: components {dead} are zero in both factors and can never move")
                # the gradient of B is G A^T, that of A is B^T G
                moves = (live_A & ("B" in plan.train)) | (live_B & ("A" in plan.train))
                moves |= live_A & live_B & ("C" in plan.train)  # that of a core is B^T G A^T
                if not (moves.all() if start.ctx.round == 1 else moves.any()):
                    raise LawBroken(
                        f"{told}: trains {_parts(plan)}, B is {_zeros(live_B)} and A is {_zeros(live_A)},"
                        " so the gradient of what trains is zero"
                    )


def _handed_out(strategy: Strategy) -> None:
    best = type(strategy).redistribute is Strategy.redistribute  # the default promises the optimum
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        for client in trials.cohort(strategy):
            plan, handed = trials.receive(strategy, start, client)
            told = f"handed to {client.id} of rank {client.rank} in round {start.ctx.round}"
            if not 1 <= plan.rank <= client.rank:
                raise LawBroken(f"{told}: planned at rank {plan.rank}; expected 1 to {client.rank}")
            well_formed(handed, told)
            for path, update in handed.modules.items():
                if update.rank != plan.rank:
                    raise LawBroken(f"{path}: {told}: rank {update.rank}; expected {plan.rank}")
                full = start.adapter.modules[path]
                if best or plan.rank >= full.rank:
                    _no_worse_than_needed(f"{path}: {told}", trials.multiply(handed)[path], full, plan.rank)


def _no_worse_than_needed(told: str, seen: Tensor, full: LowRank, rank: int) -> None:
    wanted = trials.dense_product(full)
    lost = float(torch.linalg.norm(wanted - seen))
    needed = float(torch.linalg.norm(torch.linalg.svdvals(wanted)[rank:]))
    if lost > needed + CLOSE * float(torch.linalg.norm(wanted)):
        raise LawBroken(
            f"{told}: rank {full.rank} at rank {rank} is off by {lost:.6f} in Frobenius norm; {needed:.6f} is possible"
        )


def _same_for_same_plan(strategy: Strategy) -> None:
    """The round loop encodes one payload per distinct plan and sends it to every client that has it."""
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        told = f"ada and ben have the same plan in round {start.ctx.round}"
        (one, handed), (other, as_well) = (
            trials.receive(strategy, start, c) for c in trials.clients([trials.RANK, trials.RANK])
        )
        if one == other:
            identical(as_well, handed, told)
            ada, ben = trials.clients([trials.RANK, trials.RANK])
            sent, too = (strategy.broadcast(replace(c, rank=one.rank), start.ctx, start.state) for c in (ada, ben))
            same_tree(dict(too), dict(sent), f"{told}; extra tensors")


def _finite_and_fitting(strategy: Strategy) -> None:
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        outcome = combine(strategy, updates, start.ctx, start.state)
        told = f"round {start.ctx.round}, {described_ranks(updates)}"
        well_formed(outcome.adapter, told)
        if outcome.adapter.rank > trials.RANK:
            raise LawBroken(f"{told}: the result has rank {outcome.adapter.rank}; expected at most {trials.RANK}")
        for name, value in outcome.metrics.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise LawBroken(f"{told}: metric {name} is {value!r:.60}; expected a finite int or float")


def _patches(strategy: Strategy) -> None:
    for start in (*trials.rounds(strategy, 3), trials.warm(strategy)):
        updates = trials.train(strategy, start, trials.cohort(strategy))
        outcome = combine(strategy, updates, start.ctx, start.state)
        told = f"round {start.ctx.round}"
        if outcome.patch and not strategy.traits.patches_base:
            raise LawBroken(f"{told}: the base is patched, but patches_base is not declared")
        for path, update in outcome.patch.items():
            if path not in trials.SITES or update.shape != trials.SITES[path]:
                raise LawBroken(f"{told}: patch of {path} {list(update.shape)}; the modules are {trials.SITES}")
            if not (torch.isfinite(update.B).all() and torch.isfinite(update.A).all()):
                raise LawBroken(f"{told}: the patch of {path} has values that are not finite")


def _traffic(strategy: Strategy) -> None:
    formulas, shapes = strategy.traffic, tuple(trials.SITES.values())
    for start in trials.rounds(strategy, 3):
        cohort = trials.cohort(strategy)
        plans = {client.id: strategy.plan(start.ctx, client, start.state) for client in cohort}
        ranks = [plan.rank for plan in plans.values()]
        for client in cohort:
            plan, handed = trials.receive(strategy, start, client)
            told = f"round {start.ctx.round}, client {client.id} of rank {plan.rank}"
            if plan.send & plan.keep:
                raise LawBroken(f"{told}: {sorted(plan.send & plan.keep)} are both sent and kept")
            if ("dense" in plan.send) != formulas.dense:
                raise LawBroken(f"{told}: traffic.dense is {formulas.dense}, but it sends {_listed(plan.send)}")
            flat = handed.tensors()
            extras = strategy.broadcast(replace(client, rank=plan.rank), start.ctx, start.state)
            for formula, tensors in (
                ("up", [t for name, t in flat.items() if part_of(name) in plan.send - {"dense"}]),
                ("down", [t for name, t in flat.items() if part_of(name) != "dense"]),
                ("extras", [t for name, t in extras.items() if not _beside_dense(name)]),
            ):
                text = getattr(formulas, formula)
                expected = formulas.count(text, shapes, plan.rank, trials.RANK, ranks, start.ctx.round)
                came = sum(tensor.numel() for tensor in tensors)
                if came != expected:
                    raise LawBroken(f"{told}: {formula} is declared as {text} = {expected} numbers, came {came}")
            about = formulas.dense_extras * sum(tensor.numel() for tensor in handed.dense.values())
            came = sum(tensor.numel() for name, tensor in extras.items() if _beside_dense(name))
            if not about <= came <= 2 * about:
                raise LawBroken(
                    f"{told}: traffic.dense_extras is {formulas.dense_extras}, so those beside dense tensors should"
                    f" come to about {about} numbers, came {came}"
                )
        updates = trials.train(strategy, start, cohort)
        outcome = combine(strategy, updates, start.ctx, start.state)
        most = formulas.count(formulas.patch, shapes, trials.RANK, trials.RANK, ranks, start.ctx.round)
        came = sum(update.B.numel() + update.A.numel() for update in outcome.patch.values())
        if came > most:
            told = f"round {start.ctx.round}: the patch is declared as at most {formulas.patch} = {most} numbers"
            raise LawBroken(f"{told}, came {came}")


LAWS: tuple[Law, ...] = (
    Law("one client in gives the same update out", _one_client, lambda s: s.traits.idempotent),
    Law("equal clients give that client", _equal_clients, lambda s: s.traits.idempotent),
    Law("order of arrival and scaling of weights change nothing", _order_and_scale),
    Law("no input is changed in place", _untouched),
    Law("unequal ranks work, or are refused by a message that names the client", _unequal_ranks),
    Law("the state survives save and load", _state_survives),
    Law("declared exact, the update is the weighted mean of the updates", _exact, lambda s: s.traits.exact),
    Law("declared linear, the result is linear in what clients send", _linear, lambda s: s.traits.linear),
    Law("dense tensors are averaged by weight", _dense_mean, lambda s: s.traits.weighted),
    Law("an update of zero weight changes nothing", _zero_weight),
    Law("a start from B = 0 can learn", _can_learn),
    Law("each client is handed its rank, and no worse an approximation than needed", _handed_out),
    Law("clients with the same plan are handed the same adapter", _same_for_same_plan),
    Law("the result is finite and fits the global adapter", _finite_and_fitting),
    Law("the base is patched only by a strategy that says so", _patches),
    Law("bytes up and down are those of the declared formula", _traffic),
)


def _beside_dense(extra: str) -> bool:
    """Whether an extra tensor, ``channel/name``, is named after a tensor that is trained in full."""
    return part_of(extra.partition("/")[2] or extra) == "dense"


def _parts(plan: TrainPlan) -> str:
    return _listed(plan.train)


def _listed(parts: frozenset[str]) -> str:
    return ", ".join(sorted(parts)) or "nothing"


def _zeros(live: Tensor) -> str:
    return "not zero" if live.all() else f"zero in components {(~live).nonzero().flatten().tolist()}"
