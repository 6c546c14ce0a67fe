"""What noise of the clients' own asks of a run, and what each client has spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.aggregation import Strategy
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.privacy.accountant import Accountant
from orchestrator.selection import Oort, PowerOfChoice, Record, build_selector, how_many


@dataclass(frozen=True)
class LocalSpending:
    """The local privacy of a run.

    Attributes:
        clip: bound on the change of one client.
        noise_multiplier: standard deviation of the noise in units of clip.
        accountant: of one task of a client. Any two changes are two clips apart at the most, and the server knows who
            was asked: the noise counts half, and draws hide nothing.
        rounds: tasks of a client that every round asks.
        share: of the clients that a round asks.
    """

    clip: float
    noise_multiplier: float
    accountant: Accountant
    rounds: int
    share: float

    def spent(self, records: Mapping[str, Record]) -> dict[str, Any]:
        """What the summary says of a run that has asked clients as often as these records have it."""
        epsilons = {client: self.accountant.epsilon(record.asked) for client, record in sorted(records.items())}
        return {
            "epsilon": max(epsilons.values(), default=0.0),
            "delta": self.accountant.delta,
            "unit": "everything one client has",
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "clients": epsilons,
        }

    def words(self) -> str:
        """What the rounds of the configuration cost."""
        by = self.accountant
        text = f"epsilon {by.epsilon(self.rounds):.3f} at delta {by.delta:g} for a client after {self.rounds} tasks"
        usual = max(1, round(self.rounds * self.share))
        return text if usual == self.rounds else f"{text}, {by.epsilon(usual):.3f} after {usual}, as many as is usual"


def local_spending(strategy: Strategy, config: RunConfig, registered: int) -> LocalSpending | None:
    """What each client's noise comes to; None where clients add none.

    Raises:
        ConfigError: if clients would send more that depends on their rows than what has noise on it.
    """
    settings = config.privacy.local
    if settings is None:
        return None
    _check(strategy, config)
    accountant = Accountant(settings.noise_multiplier / 2, 1.0, settings.delta)
    share = how_many(config.clients.per_round, registered) / registered
    return LocalSpending(settings.clip, settings.noise_multiplier, accountant, config.rounds, share)


def _check(strategy: Strategy, config: RunConfig) -> None:
    layers, selector = strategy.layers(), build_selector(config.clients.selection)
    beside = next((one.name for one in layers if one.traffic.extras != "0" or one.traffic.dense_extras), None)
    reasons = {
        f"with {beside} clients send tensors beside their change, which have no noise on them; leave it out, or use"
        " fedprox": beside is not None,
        "set weighting: uniform; how many rows a client has is its own business": config.weighting != "uniform",
        "scores of the clients' own rows have no noise on them; set evaluation.per_client: false": (
            config.evaluation.per_client
        ),
        "without data.test_file nodes score rows of their own for the server, without noise; set it": (
            config.pool == "flower" and not config.data.test_file
        ),
        "personal parts are scored by the clients, without noise; use a strategy that shares all it trains": (
            strategy.traits.personal
        ),
        "clients.selection goes by losses, which clients keep; use uniform, weighted, round_robin or poisson": (
            isinstance(selector, Oort | PowerOfChoice)
        ),
        "owners that forget report how far they have come, without noise; leave forgetting out": bool(
            config.forgetting
        ),
        "what a client has spent is counted in one run, and each of federation.shards is one; set shards to 1": (
            config.federation.shards > 1
        ),
        "a stream is measured and frozen by what clients report without noise; leave continual out": (
            config.continual is not None
        ),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ConfigError(f"privacy.local: {reason}")
