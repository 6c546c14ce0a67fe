"""Actions on the contribution log: aggregate again without a client, or take its updates away by arithmetic."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.adapter.algebra import norm, scaled
from fedlora.adapter.state import AdapterState
from fedlora.aggregation import Strategy, compose
from fedlora.aggregation.base import Contribution
from fedlora.aggregation.coordinate import Coordinatewise
from fedlora.aggregation.staleness import Staleness
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, UnlearningError
from fedlora.unlearning.negation import entered, negate, task_vector
from orchestrator.patches import within_budget
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_json, write_json
from orchestrator.unlearning.actions import ACTIONS, Facts
from orchestrator.unlearning.again import (
    Traced,
    aggregate_again,
    context,
    ledger_at,
    logged_rounds,
    members_of,
    trace,
)
from orchestrator.unlearning.approximate import Approximate
from orchestrator.unlearning.job import Job, finished_state
from orchestrator.unlearning.rollback import Rollback
from orchestrator.unlearning.traces import rounds_in_words

_TOLD = "told.json"


class FromLog(Approximate):
    """An action that needs the contribution log of the run."""

    def check(self, folder: Path, plan: Rollback) -> None:
        super().check(folder, plan)
        config, state = read_config(folder), finished_state(folder)
        traced = trace(folder, state, plan.clients)
        if not traced.used:
            raise UnlearningError(f"{self.name}: no round learned from an update of it; use rollback")
        if not traced.present:
            raise UnlearningError(
                f"{self.name} needs the contribution log, and this run kept none; use rollback. A run keeps one with"
                " contributions: {} in its configuration"
            )
        self.check_log(folder, config, state, compose(config.strategy), traced)

    @abstractmethod
    def check_log(self, folder: Path, config: RunConfig, state: RunState, strategy: Strategy, traced: Traced) -> None:
        """Raise ``UnlearningError`` where the log or the strategy does not do."""

    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        config = read_config(job.folder)
        changed, told = self.changed(job.folder, config, plan, state)
        write_json(job.space / _TOLD, told)
        if changed.ledger.head != state.ledger.head:
            changed = replace(changed, caught_up={})  # what clients have is no part of this ledger
        return self.config(job, plan), changed

    @abstractmethod
    def changed(
        self, folder: Path, config: RunConfig, plan: Rollback, state: RunState
    ) -> tuple[RunState, Mapping[str, Any]]:
        """The state without the target, and what the certificate is to say of it."""

    def make(self, job: Job, plan: Rollback) -> Facts:
        made = super().make(job, plan)
        return {**made, **read_json(job.space / _TOLD)}


@ACTIONS.register("subtract")
class Subtract(FromLog):
    """Every stored round from the target's first one on is aggregated again without it, then rounds mend the model."""

    def check_log(self, folder: Path, config: RunConfig, state: RunState, strategy: Strategy, traced: Traced) -> None:
        if missing := traced.missing:
            raise UnlearningError(
                f"subtract needs every round from {traced.used[0]} on, and the contribution log has no"
                f" {rounds_in_words(missing)} ({_why(config, missing)}); use negation, which takes what is there, or"
                " rollback"
            )
        if not strategy.traits.fixed_gauge and not strategy.traits.mixed_ranks:
            raise UnlearningError(
                f"subtract: {strategy.name} can only take a change of the adapter that it was made to; use negation or"
                " rollback"
            )
        for logged in logged_rounds(folder, state, traced.needed):
            ledger_at(state, logged.ledger)
            if logged.extras:
                raise UnlearningError(
                    f"subtract: clients answered to what {config.strategy_name} sent beside the adapter, and cannot be"
                    " asked again; use negation or rollback"
                )

    def changed(
        self, folder: Path, config: RunConfig, plan: Rollback, state: RunState
    ) -> tuple[RunState, Mapping[str, Any]]:
        found = aggregate_again(folder, config, state, plan.clients)
        doubts = ["What the others learned from a model with it is in their updates; subtraction does not reach that."]
        if found.left_out:
            doubts.append(f"Without it {rounds_in_words(found.left_out)} had too few updates, and count for nothing.")
        if found.rounded:
            doubts.append("The log keeps changes in float16: what was aggregated again was rounded to that.")
        rounds = len(trace(folder, state, plan.clients).needed)
        return replace(state, adapter=found.adapter, ledger=found.ledger), {
            "rounds_aggregated": rounds - len(found.left_out),
            "doubts": doubts,
        }


@ACTIONS.register("negation")
class Negation(FromLog):
    """What the target's updates added is taken away again, then rounds mend the model.

    Args:
        strength: above 0; 1 takes away what was added.
    """

    def __init__(self, strength: float = 1.0, repair_rounds: int = 2, gate: bool = True):
        super().__init__(repair_rounds, gate)
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < math.inf:
            raise ConfigError(f"unlearning action: negation needs strength above 0, not {strength!r}")
        self.strength = float(strength)

    def check_log(self, folder: Path, config: RunConfig, state: RunState, strategy: Strategy, traced: Traced) -> None:
        if not traced.held:
            raise UnlearningError(
                f"negation: it was used in {rounds_in_words(traced.used)}, and the contribution log has none of these"
                f" ({_why(config, traced.used)}); use rollback"
            )
        merging = [one.name for one in strategy.layers() if isinstance(one, Coordinatewise | Staleness)]
        if merging or strategy.traits.core or strategy.traits.personal:
            what = merging[0] if merging else strategy.name
            raise UnlearningError(f"negation: under {what} the model holds no share of one client's; use rollback")
        for _ in logged_rounds(folder, state, traced.held):
            pass

    def changed(
        self, folder: Path, config: RunConfig, plan: Rollback, state: RunState
    ) -> tuple[RunState, Mapping[str, Any]]:
        strategy, traced = compose(config.strategy), trace(folder, state, plan.clients)
        updates = _entered(folder, config, strategy, plan, state)
        told: dict[str, Any] = {"strength": self.strength, "rounds_negated": len(traced.held)}
        doubts = ["What the others built upon its updates stays, and what they share with it is taken from them too."]
        if len(traced.held) < len(traced.used):
            doubts.append(f"Of {len(traced.used)} rounds with its updates the log has {len(traced.held)}.")
        told["doubts"] = doubts
        if not updates:
            return state, told  # a robust rule took none of them
        if not strategy.traits.patches_base:
            found = negate(state.adapter, updates, self.strength)
            return replace(state, adapter=found.adapter), {**told, "share": found.share, "lost": found.error}
        vector = task_vector(updates)
        patch = {path: scaled(update, -self.strength) for path, update in vector.modules.items()}
        ledger = state.ledger.append(patch, "patch", {"round": state.round, "strategy": self.name, "contributors": {}})
        ledger, _ = within_budget(ledger, config.ledger.max_rank, state.round)
        dense = {name: t - self.strength * vector.dense[name] for name, t in state.adapter.dense.items()}
        adapter = AdapterState(state.adapter.modules, dense, state.adapter.frozen)
        return replace(state, adapter=adapter, ledger=ledger), {**told, "norm": self.strength * norm(vector)}


def _entered(
    folder: Path, config: RunConfig, strategy: Strategy, plan: Rollback, state: RunState
) -> list[Contribution]:
    """The target's updates in the log, as the rule was given them."""
    members, found = members_of(folder), []
    for logged in logged_rounds(folder, state, trace(folder, state, plan.clients).held):
        given = entered(strategy, logged.updates, context(config, logged, logged.adapter, members))
        found += [update for update in given if update.client.id in plan.clients]
    return found


def _why(config: RunConfig, missing: tuple[int, ...] | list[int]) -> str:
    """Why rounds are not in the log."""
    settings = config.contributions
    if settings and settings.every > 1 and any(number % settings.every for number in missing):
        return f"contributions.every: {settings.every}"
    if settings and settings.keep_rounds is not None and min(missing) <= config.rounds - settings.keep_rounds:
        return f"contributions.keep_rounds: {settings.keep_rounds}"
    return "it was off then, or an earlier request has replaced these rounds"
