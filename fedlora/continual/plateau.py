"""When a federation freezes what it has learned: rules over the losses that clients report.

A policy sees one observation per round: the loss of the model each client received, on its fresh data, before it
trained. It remembers nothing itself. Its state is plain data that goes in and comes out, and starts as ``{}``::

    policy, state = POLICIES.create("plateau"), {}
    decision = policy.observe(state, round, {"c1": (2.31, 120), "c2": (1.94, 80)})
    state = decision.state
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import fmean, median, pvariance
from typing import Any

from fedlora.errors import ConfigError
from fedlora.registry import Registry

Losses = Mapping[str, tuple[float, float]]  # client -> (loss, weight)
State = Mapping[str, Any]

LEARNING, CONSOLIDATED = "learning", "consolidated"
HUGE = 1e100  # squares and sums of anything smaller are finite


@dataclass(frozen=True)
class Decision:
    """What a round's losses lead to.

    Attributes:
        state: for the next round.
        merge: freeze the active adapter and start a fresh one.
        shift: the data have changed.
        evidence: why, for a report.

    State and evidence are plain data: they survive JSON.
    """

    state: State
    merge: bool
    shift: bool
    evidence: dict[str, Any]


class Policy(ABC):
    """A rule for when to freeze."""

    name: str

    @abstractmethod
    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        """The decision of a round. Without a usable loss nothing changes, except at a declared boundary.

        Args:
            state: of the last decision; ``{}`` at first. Never changed in place.
            round: 1-based.
            losses: of the clients that answered, possibly none. A loss that is not finite or has no weight is
                ignored, and the evidence names its client.
            boundary: whether a task is declared to end with this round.
        """


POLICIES: Registry[Policy] = Registry("continual policy")


@POLICIES.register("plateau")
@dataclass(frozen=True)
class Plateau(Policy):
    """Freeze once the loss has stopped falling; learn again once it has risen.

    Learning ends when the mean loss of a window of rounds differs from that of the window before by little, compared
    with the fall so far. After that a Page-Hinkley test looks for a rise. Each client's loss is standardised by its
    own history first, so that a change in who takes part is no change of the loss. No decision depends on the unit
    of the loss. Rounds in which nobody answered do not count.

    Args:
        window: rounds.
        epsilon: the difference of two windows that counts as none, as a share of the fall so far.
        min_rounds: that learning takes at least.
        patience: rounds in a row that must look flat.
        threshold: of the Page-Hinkley statistic, in standard deviations of the noise. A round adds at most half of
            it, so that no single round is a shift.
        drift: the rise over the mean that a round may show without adding to the statistic, in the same unit.
        cooldown: rounds after a merge in which no shift is announced.
        max_rounds: of learning, after which its result is frozen as it is; None for no bound.
        quorum: share of the round's clients whose own losses must show the same; 0 leaves it to the mean. Clients
            seen in fewer than two windows of rounds do not vote.

    Source: two-phase rule of Online-LoRA (Wei et al., 2024, arXiv 2411.05663); test of Hinkley (1971).
    """

    name = "plateau"

    window: int = 4
    epsilon: float = 0.05
    min_rounds: int = 8
    patience: int = 2
    threshold: float = 8.0
    drift: float = 1.0
    cooldown: int = 2
    max_rounds: int | None = 100
    quorum: float = 0.0

    def __post_init__(self) -> None:
        _whole("plateau.window", self.window, 2)
        _within("plateau.epsilon", self.epsilon, 0, 1)
        _whole("plateau.min_rounds", self.min_rounds, 1)
        _whole("plateau.patience", self.patience, 1)
        _within("plateau.threshold", self.threshold, 0)
        _within("plateau.drift", self.drift, 0)
        _whole("plateau.cooldown", self.cooldown, 0)
        if self.max_rounds is not None:
            _whole("plateau.max_rounds", self.max_rounds, 1)
        _within("plateau.quorum", self.quorum, 0, 1)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, ignored = _heard(losses)
        evidence = {"policy": self.name, "round": round, "ignored": ignored}
        if not heard:
            return Decision(state, False, False, evidence | {"reason": "no usable loss"})
        seen = self._with_losses(state, heard)
        decide = self._learning if seen["phase"] == LEARNING else self._consolidated
        after, why = decide(seen, heard)
        merge, shift = (after.get("phase") == phase for phase in (CONSOLIDATED, LEARNING))
        evidence |= {"phase": seen["phase"], "age": seen["age"], "window": self.window, "level": seen["levels"][-1]}
        return Decision(seen | after, merge, shift, evidence | why)

    def _with_losses(self, state: State, heard: Losses) -> dict[str, Any]:
        clients, crowd = state.get("clients", {}), state.get("crowd", [])
        mean = _mean(heard.values())
        # only clients with a history tell how the loss moved; where there is none, the crowd's has to do
        known = [(_standardised(loss, clients[c]), weight) for c, (loss, weight) in heard.items() if c in clients]
        level = _mean(known) if known else _standardised(mean, crowd)
        keep = 4 * self.window
        heard_of = {c: [*clients.get(c, []), [loss, level]][-keep:] for c, (loss, _) in heard.items()}
        phase, peak = state.get("phase", LEARNING), state.get("peak", level)
        return {
            "phase": phase,
            "age": state.get("age", 0) + 1,
            "flat": state.get("flat", 0),
            "peak": max(peak, level) if phase == LEARNING else peak,
            "levels": [*state.get("levels", []), level][-2 * keep :],
            "crowd": [*crowd, [mean, level]][-keep:],
            "clients": {**clients, **heard_of},
        }

    def _learning(self, seen: State, heard: Losses) -> tuple[dict[str, Any], dict[str, Any]]:
        levels, age = seen["levels"], seen["age"]
        change, now = _change(levels, self.window)
        fall = seen["peak"] - now
        noise = _noise(levels[-2 * self.window :], seen["peak"], fall)
        early = len(levels) < 2 * self.window or age < self.min_rounds
        flat = 0 if early or fall < 4 * noise or abs(change) > self.epsilon * fall else seen["flat"] + 1

        def shows(own: Sequence[float]) -> bool:
            # a client alone is noisier than the mean of a round
            spread = _noise(own, 0, 0) * math.sqrt(2 / self.window)
            return abs(_change(own, self.window)[0]) <= self.epsilon * fall + spread

        agreed = self._agreed(shows, seen, heard) if flat >= self.patience else None
        plateau = agreed is not None and agreed >= self.quorum
        bounded = self.max_rounds is not None and age >= self.max_rounds
        why = {
            "slope": change / self.window,
            "fall": fall,
            "noise": noise,
            "statistic": abs(change) / fall if fall > 0 else None,
            "threshold": self.epsilon,
            "flat": flat,
            "agreed": agreed,
            "reason": "plateau" if plateau else "bounded by max_rounds" if bounded else "learning",
        }
        if plateau or bounded:
            return {"phase": CONSOLIDATED, "age": 0, "flat": 0}, why
        return {"flat": flat}, why

    def _consolidated(self, seen: State, heard: Losses) -> tuple[dict[str, Any], dict[str, Any]]:
        settled = 2 * self.window
        levels = seen["levels"][-(settled + seen["age"]) :]
        fall = seen["peak"] - fmean(levels[:settled])
        noise = _noise(seen["levels"], seen["peak"], fall)
        limit = self.threshold * noise
        sums = _page_hinkley(levels, settled, self.drift * noise, limit)

        def shows(own: Sequence[float]) -> bool:
            spread = _noise(own, seen["peak"], fall)
            own_limit = self.threshold * spread
            return own_limit in _page_hinkley(own, settled, self.drift * spread, own_limit)

        alarm = limit > 0 and sums[-1] >= limit
        agreed = self._agreed(shows, seen, heard) if alarm else None
        shift = agreed is not None and agreed >= self.quorum and seen["age"] > self.cooldown
        why = {
            "slope": _change(seen["levels"], self.window)[0] / self.window,
            "fall": fall,
            "noise": noise,
            "statistic": sums[-1] / noise if noise else None,
            "threshold": self.threshold,
            "agreed": agreed,
            "reason": "shift" if shift else "consolidated",
        }
        if not shift:
            return {}, why
        # the new task began where the statistic left zero
        rising = levels[-len(list(takewhile(bool, reversed(sums)))) :]
        return {"phase": LEARNING, "age": 0, "flat": 0, "levels": rising, "peak": max(rising)}, why

    def _agreed(self, shows: Callable[[Sequence[float]], bool], seen: State, heard: Losses) -> float:
        """Share of the round's clients whose own losses show it; 1 where nobody votes."""
        if not self.quorum:
            return 1.0
        histories = [seen["clients"][client] for client in heard]
        votes = [shows([_standardised(x, h) for x, _ in h]) for h in histories if len(h) >= 2 * self.window]
        return fmean(votes) if votes else 1.0


@POLICIES.register("published")
@dataclass(frozen=True)
class Published(Policy):
    """The rule of Online-LoRA, with thresholds in the unit of the loss.

    Freezes when mean and variance of a window are both below their thresholds. Then waits until the mean of the
    window exceeds that of the last plateau by one standard deviation of it.

    Args:
        mean_threshold, variance_threshold: must be found anew for every task and model.
        window: rounds.

    Source: Wei et al., 2024, arXiv 2411.05663, section 3.2 and appendix B.
    """

    name = "published"

    mean_threshold: float
    variance_threshold: float
    window: int = 5

    def __post_init__(self) -> None:
        _within("published.mean_threshold", self.mean_threshold, 0)
        _within("published.variance_threshold", self.variance_threshold, 0)
        _whole("published.window", self.window, 2)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, ignored = _heard(losses)
        evidence = {"policy": self.name, "round": round, "ignored": ignored}
        if not heard:
            return Decision(state, False, False, evidence | {"reason": "no usable loss"})
        levels = [*state.get("levels", []), _mean(heard.values())][-self.window :]
        mean, variance = fmean(levels), pvariance(levels)
        rearm = state.get("rearm")  # the mean that ends the last plateau; None while learning
        shift = rearm is not None and mean > rearm
        low = mean < self.mean_threshold and variance < self.variance_threshold
        merge = len(levels) == self.window and low and (rearm is None or shift)
        evidence |= {
            "phase": LEARNING if rearm is None else CONSOLIDATED,
            "window": self.window,
            "slope": (levels[-1] - levels[0]) / max(len(levels) - 1, 1),
            "statistic": [mean, variance],
            "threshold": [self.mean_threshold, self.variance_threshold],
            "rearm": rearm,
        }
        after = mean + math.sqrt(variance) if merge else None if shift else rearm
        return Decision({"levels": levels, "rearm": after}, merge, shift, evidence)


@POLICIES.register("period")
@dataclass(frozen=True)
class Period(Policy):
    """Freeze every so many rounds. Where nobody answers in that round, the next one in which somebody does.

    Args:
        rounds: between two merges.
    """

    name = "period"

    rounds: int

    def __post_init__(self) -> None:
        _whole("period.rounds", self.rounds, 1)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, ignored = _heard(losses)
        evidence = {"policy": self.name, "round": round, "ignored": ignored, "rounds": self.rounds}
        merge = bool(heard) and round // self.rounds > state.get("merged", 0) // self.rounds
        return Decision({"merged": round} if merge else state, merge, False, evidence)


@POLICIES.register("boundaries")
@dataclass(frozen=True)
class Boundaries(Policy):
    """Freeze where a task is declared to end, whoever answered."""

    name = "boundaries"

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        return Decision(state, boundary, False, {"policy": self.name, "round": round, "boundary": boundary})


@POLICIES.register("never")
@dataclass(frozen=True)
class Never(Policy):
    """One adapter for the whole stream."""

    name = "never"

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        return Decision(state, False, False, {"policy": self.name, "round": round})


def build_policy(choice: str | Mapping[str, Mapping[str, Any] | None]) -> Policy:
    """The policy of a configuration: a name, or ``{name: {option: value}}``.

    Raises:
        ConfigError: an unknown name, or options it does not take.
    """
    name, options = (choice, None) if isinstance(choice, str) else next(iter(choice.items()))
    return POLICIES.create(name, **dict(options or {}))


def _heard(losses: Losses) -> tuple[Losses, list[str]]:
    """The losses that can be used, and the clients whose cannot."""
    # a NaN is not smaller than anything
    heard = {c: (loss, weight) for c, (loss, weight) in losses.items() if abs(loss) < HUGE and 0 < weight < HUGE}
    return heard, sorted(losses.keys() - heard.keys())


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    pairs = list(weighted)
    return math.fsum(value * weight for value, weight in pairs) / math.fsum(weight for _, weight in pairs)


def _standardised(loss: float, history: Sequence[Sequence[float]]) -> float:
    """A client's loss on the scale of the federation.

    Its z-score against the client's own history, read with the mean and the spread that the federation's level had
    in the same rounds: what the level was when the client took part says nothing about who the client is.

    Args:
        loss: of one round.
        history: (own loss, level of the federation) per round in which the client took part; without any, the loss
            stays as it is.
    """
    if not history:
        return loss
    losses, levels = zip(*history, strict=True)
    (mean, spread), (level, scale) = _moments(losses), _moments(levels)
    return level + (loss - mean) * (scale / spread if scale and spread else 1.0)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = fmean(values)
    # few rounds tell little about a spread, so at first the mean is the unit
    return mean, math.hypot(mean / 3, *(value - mean for value in values))


def _change(values: Sequence[float], window: int) -> tuple[float, float]:
    """How far the mean of the last window is above that of the one before, and the mean of the last."""
    now = fmean(values[-window:])
    before = values[-2 * window : -window]
    return (now - fmean(before) if before else 0.0), now


def _noise(values: Sequence[float], peak: float, fall: float) -> float:
    """Standard deviation from round to round: robust, and no less than what would matter to nobody."""
    steps = [abs(b - a) for a, b in pairwise(values)] or [0.0]
    # a normal difference of two rounds has its median size at 0.954 standard deviations of one
    return max(median(steps) / 0.954, 0.02 * fall, 0.001 * abs(peak))


def _page_hinkley(values: Sequence[float], settled: int, drift: float, limit: float) -> list[float]:
    """The statistic after each value from number ``settled`` on; 0 if there is none. It stays within 0..``limit``."""
    sums = [0.0]
    for n in range(settled, len(values)):
        rise = values[n] - fmean(values[:n]) - drift
        sums.append(min(max(sums[-1] + min(rise, limit / 2), 0.0), limit))
    return sums


def _whole(option: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"continual: {option} must be a whole number of at least {least}, not {value!r}")


def _within(option: str, value: object, least: float, most: float = math.inf) -> None:
    if not isinstance(value, int | float) or not least <= value <= most:
        span = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ConfigError(f"continual: {option} must be a number of {span}, not {value!r}")
