"""When a federation freezes what it has learned: rules over the losses that clients report.

A policy sees one observation per round: the loss of the model each client received, on its fresh data, before it
trained. It remembers nothing itself. Its state goes in and comes out, and starts as ``{}``::

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
from typing import Any, ClassVar

from fedlora.errors import ConfigError
from fedlora.registry import Registry

Losses = Mapping[str, tuple[float, float]]  # client -> (loss, weight)
State = Mapping[str, Any]

LEARNING, CONSOLIDATED = "learning", "consolidated"
HUGE = 1e100  # squares and sums of anything smaller are finite


@dataclass(frozen=True)
class Decision:
    """What a round's losses lead to. State and evidence are plain data that survive JSON.

    Attributes:
        state: for the next round.
        merge: freeze the active adapter and start a fresh one.
        shift: the data have changed.
        evidence: why, for a report.
    """

    state: State
    merge: bool
    shift: bool
    evidence: dict[str, Any]


class Policy(ABC):
    """A rule for when to freeze."""

    name: ClassVar[str]

    @abstractmethod
    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        """The decision of a round. Without a usable loss nothing changes, except at a declared boundary.

        Args:
            state: of the last decision; never changed in place.
            round: 1-based.
            losses: of the clients that answered, possibly none. One that is not finite or has no weight is ignored,
                and the evidence names its client.
            boundary: whether a task is declared to end with this round.
        """


POLICIES: Registry[Policy] = Registry("continual policy")


@POLICIES.register("plateau")
@dataclass(frozen=True)
class Plateau(Policy):
    """Freeze once the loss has stopped falling; learn again once it has risen.

    Learning ends when two windows of rounds differ by little, compared with the fall so far. After that a
    Page-Hinkley test looks for a rise. Each client's loss is standardised by its own history first, so that a change
    in who takes part is no change of the loss. The unit of the loss does not matter. Rounds without an answer do not
    count.

    Args:
        window: rounds.
        epsilon: the difference of two windows that counts as none, as a share of the fall so far.
        min_rounds: that learning takes at least.
        patience: rounds in a row that must look flat.
        threshold: of the Page-Hinkley statistic, in standard deviations of the noise. A round adds at most half of
            it, so that no single round is a shift.
        drift: the rise that adds nothing to the statistic, in the same unit.
        cooldown: rounds after a merge in which no shift is announced.
        max_rounds: of learning, after which its result is frozen as it is; None for no bound.
        quorum: share of the round's clients whose own losses must show the same, in their last two windows; 0 leaves
            it to the mean. A client votes once it has been seen in two windows of rounds.

    Source: phases of Online-LoRA (Wei et al., 2024, arXiv 2411.05663); test of Page (1954) and Hinkley (1971).
    """

    window: int = 3
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
        _within("plateau.threshold", self.threshold, 1)
        _within("plateau.drift", self.drift, 0)
        _whole("plateau.cooldown", self.cooldown, 0)
        if self.max_rounds is not None:
            _whole("plateau.max_rounds", self.max_rounds, 1)
        _within("plateau.quorum", self.quorum, 0, 1)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, evidence = _heard(self, round, losses)
        if not heard:
            return Decision(state, False, False, evidence)
        seen = self._with_losses(state, heard)
        learning = seen["phase"] == LEARNING
        change, why = self._learning(seen, heard) if learning else self._consolidated(seen, heard)
        evidence |= {"phase": seen["phase"], "age": seen["age"], "level": seen["levels"][-1], "window": self.window}
        evidence["slope"] = _change(seen["levels"], self.window) / self.window
        changed = "phase" in change
        return Decision(seen | change, changed and learning, changed and not learning, evidence | why)

    def _with_losses(self, state: State, heard: Losses) -> dict[str, Any]:
        clients, crowd = state.get("clients", {}), state.get("crowd", [])
        mean = _mean(heard.values())
        # newcomers cannot tell whether the loss moved; where there is nobody else, the crowd's history has to do
        known = [(_standardised(loss, clients[c]), weight) for c, (loss, weight) in heard.items() if c in clients]
        level = _mean(known) if known else _standardised(mean, crowd)
        phase, peak = state.get("phase", LEARNING), state.get("peak", level)
        keep = 4 * self.window
        told = {c: [*clients.get(c, []), [loss, level]][-keep:] for c, (loss, _) in heard.items()}
        return {
            "phase": phase,
            "age": state.get("age", 0) + 1,
            "flat": state.get("flat", 0),
            "peak": max(peak, level) if phase == LEARNING else peak,
            "levels": [*state.get("levels", []), level][-2 * keep :],
            "crowd": [*crowd, [mean, level]][-keep:],
            "clients": {**clients, **told},
        }

    def _learning(self, seen: State, heard: Losses) -> tuple[dict[str, Any], dict[str, Any]]:
        levels, age, both = seen["levels"], seen["age"], 2 * self.window
        fall = seen["peak"] - fmean(levels[-self.window :])
        noise = _noise(levels[-both:], seen["peak"], fall)
        change = abs(_change(levels, self.window))
        early = age < self.min_rounds or len(levels) < both
        # a fall that could be noise has taught nothing that is worth freezing
        flat = 0 if early or fall < 4 * noise or change > self.epsilon * fall else seen["flat"] + 1

        def shows(own: Sequence[float]) -> bool:
            # one client is noisier than the mean of a round
            error = _noise(own[-both:]) * math.sqrt(2 / self.window)
            return abs(_change(own, self.window)) <= self.epsilon * fall + error

        plateau, agreed = self._agreed(flat >= self.patience, shows, seen, heard)
        bounded = self.max_rounds is not None and age >= self.max_rounds
        why = {"statistic": change / fall if fall > 0 else None, "threshold": self.epsilon, "fall": fall}
        why |= {"noise": noise, "flat": flat, "agreed": agreed}
        if plateau or bounded:
            why["reason"] = "plateau" if plateau else "bounded by max_rounds"
            return {"phase": CONSOLIDATED, "age": 0, "flat": 0}, why
        return {"flat": flat}, why

    def _consolidated(self, seen: State, heard: Losses) -> tuple[dict[str, Any], dict[str, Any]]:
        settled = 2 * self.window
        levels = seen["levels"][-(settled + seen["age"]) :]
        fall = seen["peak"] - fmean(levels[:settled])
        noise = _noise(levels, seen["peak"], fall)

        def sums(values: Sequence[float], noise: float) -> list[float]:
            return _page_hinkley(values, settled, noise, self.drift, self.threshold)

        def shows(own: Sequence[float]) -> bool:
            return max(sums(own, _noise(own, seen["peak"], fall))) >= self.threshold

        risen = sums(levels, noise)
        alarm = risen[-1] >= self.threshold and seen["age"] > self.cooldown
        shift, agreed = self._agreed(alarm, shows, seen, heard)
        why = {"statistic": risen[-1], "threshold": self.threshold, "fall": fall, "noise": noise, "agreed": agreed}
        if not shift:
            return {}, why
        # the new task began where the statistic left zero
        rise = levels[-len(list(takewhile(bool, reversed(risen)))) :]
        return {"phase": LEARNING, "age": 0, "levels": rise, "peak": max(rise)}, why | {"reason": "shift"}

    def _agreed(
        self, found: bool, shows: Callable[[Sequence[float]], bool], seen: State, heard: Losses
    ) -> tuple[bool, float | None]:
        """Whether the quorum bears out what the mean shows, and the share of clients that do; None without a vote."""
        histories = [seen["clients"][client] for client in heard] if found and self.quorum else []
        voters = [history for history in histories if len(history) >= 2 * self.window]
        if not voters:
            return found, None
        agreed = fmean(shows([_standardised(loss, history) for loss, _ in history]) for history in voters)
        return agreed >= self.quorum, agreed


@POLICIES.register("published")
@dataclass(frozen=True)
class Published(Policy):
    """The rule of Online-LoRA: freeze when mean and variance of a window are both below their thresholds.

    Then wait until the mean exceeds that of the last plateau by one standard deviation.

    Args:
        mean_threshold, variance_threshold: in the unit of the loss; to be found anew for every task and model.
        window: rounds.

    Source: Wei et al., 2024, arXiv 2411.05663; the order of the tests is that of their code.
    """

    mean_threshold: float
    variance_threshold: float
    window: int = 5

    def __post_init__(self) -> None:
        _within("published.mean_threshold", self.mean_threshold, 0)
        _within("published.variance_threshold", self.variance_threshold, 0)
        _whole("published.window", self.window, 2)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, evidence = _heard(self, round, losses)
        if not heard:
            return Decision(state, False, False, evidence)
        levels = [*state.get("levels", []), _mean(heard.values())][-self.window :]
        mean, variance = fmean(levels), pvariance(levels)
        rearm = state.get("rearm")  # the mean that ends the last plateau; None while learning
        shift = rearm is not None and mean > rearm
        low = mean < self.mean_threshold and variance < self.variance_threshold
        merge = low and len(levels) == self.window and (rearm is None or shift)
        evidence |= {"phase": LEARNING if rearm is None else CONSOLIDATED, "window": self.window, "rearm": rearm}
        evidence |= {"statistic": [mean, variance], "threshold": [self.mean_threshold, self.variance_threshold]}
        after = mean + math.sqrt(variance) if merge else None if shift else rearm
        return Decision({"levels": levels, "rearm": after}, merge, shift, evidence)


@POLICIES.register("period")
@dataclass(frozen=True)
class Period(Policy):
    """Freeze every so many rounds, or in the next one in which somebody answers."""

    rounds: int

    def __post_init__(self) -> None:
        _whole("period.rounds", self.rounds, 1)

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        heard, evidence = _heard(self, round, losses)
        merge = bool(heard) and round // self.rounds > state.get("merged", 0) // self.rounds
        return Decision({"merged": round} if merge else state, merge, False, evidence | {"rounds": self.rounds})


@POLICIES.register("boundaries")
@dataclass(frozen=True)
class Boundaries(Policy):
    """Freeze where a task is declared to end, whoever answered."""

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        _, evidence = _heard(self, round, losses)
        return Decision(state, boundary, False, evidence | {"boundary": boundary})


@POLICIES.register("never")
@dataclass(frozen=True)
class Never(Policy):
    """One adapter for the whole stream."""

    def observe(self, state: State, round: int, losses: Losses, *, boundary: bool = False) -> Decision:
        _, evidence = _heard(self, round, losses)
        return Decision(state, False, False, evidence)


def build_policy(choice: str | Mapping[str, Mapping[str, Any] | None]) -> Policy:
    """The policy of a configuration: a name, or ``{name: {option: value}}``.

    Raises:
        ConfigError: an unknown name, or options it does not take.
    """
    return _build(choice, "continual.freeze")


def build_stop(choice: str | Mapping[str, Mapping[str, Any] | None]) -> Policy:
    """The rule that ends a task: a policy that looks at the loss.

    Raises:
        ConfigError: see ``build_policy``; also a policy that does not.
    """
    stop = _build(choice, "continual.until")
    if not isinstance(stop, Plateau | Published):
        raise ConfigError(
            f"continual.until: {stop.name} does not look at the loss; use plateau or published, or give rounds alone"
        )
    return stop


def _build(choice: str | Mapping[str, Mapping[str, Any] | None], key: str) -> Policy:
    if not isinstance(choice, str) and len(choice) != 1:
        raise ConfigError(f"{key} is one policy with its options, not {len(choice)}: {', '.join(choice)}")
    name, options = (choice, None) if isinstance(choice, str) else next(iter(choice.items()))
    return POLICIES.create(name, **dict(options or {}))


def _heard(policy: Policy, round: int, losses: Losses) -> tuple[Losses, dict[str, Any]]:
    """The losses that can be used, and evidence that names the clients whose cannot."""
    # a NaN is not smaller than anything
    heard = {c: (loss, weight) for c, (loss, weight) in losses.items() if abs(loss) < HUGE and 0 < weight < HUGE}
    return heard, {"policy": policy.name, "round": round, "ignored": sorted(losses.keys() - heard.keys())}


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    values, weights = zip(*weighted, strict=True)
    return fmean(values, weights)


def _standardised(loss: float, history: Sequence[Sequence[float]]) -> float:
    """A loss on the scale of the federation: its z-score against the client's own history, read there.

    Mean and spread of the federation are those of the rounds in which the client took part: one that was last seen
    when every loss was high is not mistaken for one whose losses are high.

    Args:
        loss: of the client.
        history: (its loss, level of the federation) per round it took part in. Without any, the loss stays as it is.
    """
    if not history:
        return loss
    losses, levels = zip(*history, strict=True)
    (mean, spread), (level, scale) = _moments(losses), _moments(levels)
    return level + (loss - mean) * (scale / spread if scale and spread else 1.0)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = fmean(values)
    # a few rounds tell nothing about a spread, so at first the mean is the unit
    return mean, math.hypot(mean / 3, *(value - mean for value in values))


def _change(values: Sequence[float], window: int) -> float:
    """Mean of the last window minus that of the one before."""
    before = values[-2 * window : -window]
    return fmean(values[-window:]) - fmean(before) if before else 0.0


def _noise(values: Sequence[float], peak: float = 0.0, fall: float = 0.0) -> float:
    """Standard deviation of a round, robustly, and at least what is too small to matter next to peak and fall."""
    steps = [abs(after - before) for before, after in pairwise(values)] or [0.0]
    # of normal noise, half of the steps are below 0.954 standard deviations
    return max(median(steps) / 0.954, 0.02 * fall, 0.001 * abs(peak))


def _page_hinkley(values: Sequence[float], settled: int, noise: float, drift: float, threshold: float) -> list[float]:
    """The statistic, 0 to ``threshold``, after each value from index ``settled`` on, preceded by a 0."""
    sums = [0.0]
    for n in range(settled, len(values)):
        # against the median, which one wild round does not move
        rise = (values[n] - median(values[:n])) / noise - drift if noise else 0.0
        sums.append(min(max(sums[-1] + min(rise, threshold / 2), 0.0), threshold))
    return sums


def _whole(option: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"continual: {option} must be a whole number of at least {least}, not {value!r}")


def _within(option: str, value: object, least: float, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"continual: {option} must be a number {span}, not {value!r}")
