"""What client-level differential privacy asks of a run, and what the run spends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.aggregation import State, Strategy
from fedlora.aggregation.dp import DP, noisy_rounds
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.privacy.accountant import Accountant
from orchestrator.selection import Poisson, RoundRobin, Selector, Uniform, build_selector, how_many


@dataclass(frozen=True)
class Spending:
    """The privacy of a run.

    Attributes:
        clip: bound on the change of one client.
        accountant: of one round of the run.
        planned: clients a round is planned for.
        registered: clients of the federation.
        budget: epsilon that may be spent; None for no limit.
        asked: rounds of the configuration.
        fits: those of them that the budget allows.
    """

    clip: float
    accountant: Accountant
    planned: int
    registered: int
    budget: float | None
    asked: int
    fits: int

    @property
    def sampling(self) -> float:
        """Chance with which a round takes a client, as it is counted."""
        return self.accountant.sampling

    def spent(self, state: State) -> dict[str, Any]:
        """What the summary says of a run with this state of its strategy."""
        rounds, by = noisy_rounds(state), self.accountant
        return {
            "epsilon": by.epsilon(rounds),
            "delta": by.delta,
            "unit": "client",
            "rounds": rounds,
            "planned": self.planned,
            "clip": self.clip,
            "noise_multiplier": by.noise_multiplier,
            "sampling": by.sampling,
            "budget": self.budget,
            "fits": self.fits,
            "ended_by_budget": rounds == self.fits < self.asked,
        }

    def planned_words(self) -> str:
        """What the rounds of the configuration cost, and how many of them are played."""
        by = self.accountant
        drawn = f"drawn with chance {by.sampling:.3g}" if by.sampling < 1 else "all counted as asked"
        text = (
            f"epsilon {by.epsilon(self.asked):.3f} at delta {by.delta:g} after {self.asked} rounds of {self.planned} of"
            f" {self.registered} clients, {drawn}"
        )
        if self.fits < self.asked:
            text += f"; the budget of {self.budget:g} ends the run after {self.fits}, at {by.epsilon(self.fits):.3f}"
        if by.sampling == 1 and self.planned < self.registered:
            text += "; only clients.selection: poisson without a fleet gains from who was drawn being unknown"
        return text


def spending(strategy: Strategy, config: RunConfig, registered: int) -> Spending | None:
    """What a run will spend; None where its strategy is not private.

    Args:
        registered: clients of the federation, excluded ones too: draws are made among everybody.

    Raises:
        ConfigError: if the configuration says or does what the accounting does not cover, or cannot pay one round.
    """
    if not isinstance(strategy, DP):
        return None
    selector = build_selector(config.clients.selection)
    _check(strategy, config, selector, registered)
    planned = how_many(config.clients.per_round, registered)
    # a simulated fleet draws again where nobody was there, which gives a client a second chance
    drawn = isinstance(selector, Poisson) and config.fleet is None
    accountant = strategy.accountant(planned / registered if drawn else 1.0)
    budget, fits = strategy.budget, config.rounds
    if budget is not None:
        fits = accountant.rounds_within(budget, config.rounds)
        if not fits:
            raise ConfigError(
                f"strategy: one round costs an epsilon of {accountant.epsilon(1):.3f}, and dp.budget is {budget:g};"
                " raise noise_multiplier or the budget, or ask fewer clients a round by clients.selection: poisson"
            )
    return Spending(strategy.clip, accountant, planned, registered, budget, config.rounds, fits)


def told(plan: Spending) -> Mapping[str, Any]:
    """The plan as an event of the journal."""
    by = plan.accountant
    return {
        "text": plan.planned_words(),
        "delta": by.delta,
        "sampling": by.sampling,
        "epsilon": by.epsilon(plan.asked),
        "budget": plan.budget,
        "rounds": plan.asked,
        "fits": plan.fits,
    }


def _check(strategy: DP, config: RunConfig, selector: Selector, registered: int) -> None:
    """Raise ``ConfigError`` for whatever would let more out than is counted, with the way out."""
    schedule, chosen = config.schedule, config.clients.selection
    rule = chosen if isinstance(chosen, str) else next(iter(chosen))
    reasons = {
        "set weighting: uniform; how many rows a client has is private too": config.weighting != "uniform",
        f"clients.selection: {rule} may go by what clients have or report, and one client would decide who else is"
        " asked; use poisson, uniform or round_robin": type(selector) not in (Poisson, Uniform, RoundRobin),
        "schedule.mode: async and schedule.late: keep use updates of several rounds at once, and a round counts one of"
        " each client; use synchronous rounds with late: drop": schedule.mode == "async" or schedule.late == "keep",
        "schedule.over_selection lets a fast client push another one out; set it to 1": schedule.over_selection > 1,
        "schedule.quorum would tell how many answered; set it to 0": schedule.quorum > 0,
        "the rounds of a stream are not counted: what freezes it are losses without noise; leave continual out": (
            config.continual is not None
        ),
        "forgetting asks named clients, and no draw hides them; leave it out": bool(config.forgetting),
        "contributions keeps what clients sent, and no action may make a model of it without noise; leave it out": (
            config.contributions is not None
        ),
        "wire.error_feedback has clients send what was clipped or lost in earlier rounds; set it to false": (
            config.wire.error_feedback
        ),
        f"dp.delta of {strategy.delta:g} allows one of {registered} clients to be told outright; set it below"
        f" {1 / registered:.2g}": strategy.delta * registered >= 1,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ConfigError(f"strategy: dp: {reason}")
