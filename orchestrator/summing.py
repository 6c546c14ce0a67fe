"""What secure sums ask of a run: everything behind them has to be content with the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.aggregation import Strategy
from fedlora.aggregation.wrapper import looks_at_single_updates
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.privacy.fixed_point import MOST_WEIGHT, FixedPoint
from fedlora.privacy.secure_sum import FEWEST, needed
from orchestrator.selection import Oort, PowerOfChoice, build_selector, how_many

INSTEAD = "use fedit, zero_pad, rbla, ffa, rolora, fedsb or head_only"


@dataclass(frozen=True)
class Summing:
    """The secure sums of a run.

    Attributes:
        planned: clients a round asks.
        threshold: of these without whom it has no sum.
        clip: what values are cut to.
        error: the most by which a value of the mean is off.
    """

    planned: int
    threshold: int
    clip: float
    error: float

    def words(self) -> str:
        """What a round promises."""
        return (
            f"sums of at least {self.threshold} of {self.planned} clients; values are cut to {self.clip:g} and off by"
            f" {self.error:.1g} at the most"
        )


def summing(strategy: Strategy, config: RunConfig, ranks: Mapping[str, int], heaviest: int) -> Summing | None:
    """How a run sums; None where updates travel as they are.

    Args:
        ranks: of every client, as the strategy serves them.
        heaviest: the most rows that one client has.

    Raises:
        ConfigError: if something needs to see single updates, or would show them.
    """
    settings = config.privacy.secure_sum
    if settings is None:
        return None
    _check_strategy(strategy)
    planned = how_many(config.clients.per_round, len(ranks))
    _check_rest(config, ranks, planned)
    total = planned if config.weighting == "uniform" else planned * heaviest
    if total > MOST_WEIGHT:
        raise ConfigError(
            f"privacy.secure_sum: {planned} clients of up to {heaviest} rows have more weight than {MOST_WEIGHT}, above"
            " which the sum is no longer exact; set weighting: uniform"
        )
    return Summing(planned, needed(settings.threshold, planned), settings.clip, FixedPoint(settings.clip, total).error)


def _check_strategy(strategy: Strategy) -> None:
    *wrappers, rule = strategy.layers()
    if not rule.traits.takes_means:
        raise ConfigError(
            f"privacy.secure_sum: the server gets the sum of all changes of the factors, and {rule.name} needs each"
            f" client's own; {INSTEAD}"
        )
    for layer in (rule, *wrappers):
        if looks_at_single_updates(layer):
            raise ConfigError(
                f"privacy.secure_sum: {layer.name} looks at single updates, and the server gets their sum alone; leave"
                f" {layer.name} out"
            )
        if layer.traffic.extras != "0" or layer.traffic.dense_extras:
            raise ConfigError(
                f"privacy.secure_sum: with {layer.name} clients send tensors beside their change, and these are not"
                " summed; leave it out, or use fedprox"
            )
        if layer.traits.personal:
            raise ConfigError(
                f"privacy.secure_sum: {layer.name} keeps parts on the clients, and the sum is of whole changes;"
                f" {INSTEAD}"
            )


def _check_rest(config: RunConfig, ranks: Mapping[str, int], planned: int) -> None:
    schedule, selector = config.schedule, build_selector(config.clients.selection)
    reasons = {
        f"clients train at ranks {', '.join(map(str, sorted(set(ranks.values()))))}, and changes of different shapes"
        " have no sum; give all of them one rank (clients.ranks), or use fedit, which trains everybody at the smallest"
        " one": len(set(ranks.values())) > 1,
        f"a round asks {planned} clients, and a sum needs {FEWEST}: one of two tells each of them what the other one"
        " sent; raise clients.per_round": planned < FEWEST,
        "a mask is made for one round, and schedule.mode: async and schedule.late: keep use answers of several; use"
        " synchronous rounds with late: drop": schedule.mode == "async" or schedule.late == "keep",
        "with schedule.over_selection a round closes before everybody has answered, and the sum opens only then; set it"
        " to 1, and a schedule.deadline_s if clients hang": schedule.over_selection > 1,
        "clients.selection goes by the loss or the time of single clients, and the server learns no losses; use"
        " uniform, weighted, round_robin or poisson": isinstance(selector, Oort | PowerOfChoice),
        "wire.up and wire.top_k round and leave out values of single changes, and masked values look all alike; set"
        " wire.up: fp32 without top_k": config.wire.up != "fp32" or config.wire.top_k is not None,
        "attack is for studying what the server sees of attackers, and here it sees none; leave it out": (
            config.attack is not None
        ),
        "contributions keeps what single clients sent, and nobody but them has it; leave it out, and take clients out"
        " by playing rounds again": config.contributions is not None,
        "forgetting asks single clients for their changes, and the sum of one is that one; leave it out": (
            bool(config.forgetting)
        ),
        "a stream is measured, frozen and routed by what single clients report; leave continual out": (
            config.continual is not None
        ),
        "in federation.shards fewer clients share a sum, and how many answer in each is not known; set shards to 1": (
            config.federation.shards > 1
        ),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ConfigError(f"privacy.secure_sum: {reason}")
