"""The gate: is a model like one that never saw the rows, in everything measured and in both directions?

    verdict = judge(candidate, control, second, before=before)

``control`` was trained without the target, ``second`` too but with another seed: how far the two lie apart is what
chance does. A model that still knows the rows fails, and so does one that knows less of them than the control, which
gives them away as well. Weights are not compared: their distance proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from fedlora.errors import VerificationError
from fedlora.unlearning.measures import Measured, RowScores, plain
from fedlora.unlearning.separation import auc_error, kolmogorov_smirnov, ks_critical, share_error

CANARIES, REFERENCES = 8, 63  # at least: the mean exposure of fewer is chance, and 63 references reach 6 bits


@dataclass(frozen=True)
class Tolerances:
    """What counts as equal.

    A margin is the largest of the tolerance, ``factor`` times the difference of the two controls, and what chance
    alone does between two models that know nothing of so few rows: two standard errors, for KS its 5 % point. It is
    never more than ``widest`` tolerances, since a gate as wide as that would let anything pass; a check whose controls
    already differ by more fails.

    Attributes:
        loss: mean loss of a set, in nats; as a share of the control's where that is above one nat.
        accuracy: share of rows, of forget rows and paraphrases.
        retain: the same of retain rows, where chance is given no room: models agree on what they know.
        auc: of membership inference.
        ks: Kolmogorov-Smirnov distance to the control's scores of the forget rows.
        exposure: mean over the canaries, in bits.
        relearning: share of the control's steps; never less than one step.
        factor: two controls are one draw of chance, and a third of the same kind is twice as far from the first in
            about one measure of four; the tolerance must carry what chance does, the factor is for noisier runs.
        rows: least number of forget, held-out and retain rows and of paraphrases.
    """

    loss: float = 0.2
    accuracy: float = 0.1
    retain: float = 0.05
    auc: float = 0.1
    ks: float = 0.15
    exposure: float = 1.0
    relearning: float = 0.25
    factor: float = 2.0
    widest: float = 3.0
    rows: int = 20


@dataclass(frozen=True)
class Check:
    """One measure of the candidate beside that of the control.

    Attributes:
        name: such as ``forget.loss``, or ``nf4.forget.loss`` after rounding the weights.
        value, control: of the candidate and of the control.
        noise: how far the second control is from the first.
        margin: how far the candidate may be.
        n: rows behind the value, all sets together.
        reason: why it passed or failed, for a person.
    """

    name: str
    value: float
    control: float
    noise: float
    margin: float
    n: int
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says: it passes if every check does."""

    passed: bool
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries; infinities as text, which JSON has no number for."""
        return {"passed": self.passed, "checks": [_to_json(check) for check in self.checks]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Verdict:
        """Inverse of ``to_json``.

        Raises:
            VerificationError: if the verdict does not follow from its checks.
        """
        checks = tuple(
            Check(**{**check, **{name: float(check[name]) for name in _NUMBERS}}) for check in data["checks"]
        )
        verdict = Verdict(data["passed"], checks)
        if not checks or verdict.passed != all(check.passed for check in checks):
            raise VerificationError(
                f"the verdict says passed={verdict.passed}, but {len(verdict.failures)} of {len(checks)} checks failed"
            )
        return verdict


def judge(
    candidate: Measured,
    control: Measured,
    second: Measured,
    tolerances: Tolerances | None = None,
    before: Measured | None = None,
) -> Verdict:
    """Hold a candidate against two controls.

    Args:
        before: the model as it was before anything was taken out. Given, the gate must reject it for what it
            knows of the rows: where they left no trace that can be seen, passing proves nothing.

    Raises:
        VerificationError: if the models were not measured on the same rows and in the same way, if a control's score
            is not a finite number, or if there are too few rows to tell anything.
    """
    allowed = tolerances or Tolerances()
    models = {"candidate": candidate, "control": control, "second control": second}
    _check_comparable(models if before is None else models | {"model before": before})
    _check_sizes(control, allowed)
    checks = tuple(_checks(candidate, control, second, allowed, ""))
    if before is not None:
        rejected = {check.name for check in _checks(before, control, second, allowed, "") if not check.passed}
        # a check that fails the control itself tells nothing about anyone
        vain = {check.name for check in _checks(control, control, second, allowed, "") if not check.passed}
        telling = [name for name in sorted(rejected - vain) if "retain." not in name]
        checks += (_power(telling, len(checks)),)
    return Verdict(all(check.passed for check in checks), checks)


@dataclass(frozen=True)
class _Measure:
    """How one number is judged.

    Attributes:
        n: rows behind it.
        low, high: what it means to be that far below or above the control; None where that is allowed.
        chance: how far apart two models may be that know nothing of these rows.
    """

    name: str
    tolerance: float
    n: int
    low: str | None
    high: str | None
    chance: float = 0.0
    unit: str = ""


_Reader: TypeAlias = Callable[[Any], float]

_KNOWS = "it still knows rows it was to forget"
_LESS = "over-forgetting: it knows less of the rows than a model that never saw them, which gives them away too"
_TELLS = "forget rows can be told from rows that were never seen: it still knows them"
_UNDER = "over-forgetting: forget rows can be told from rows that were never seen by how little it knows of them"
_SPREAD = "its scores of the forget rows are spread unlike those of a model that never saw them"
_FELL = "what was to be kept got worse"
_FAST = "the rows come back too fast: they are still in the weights"


def _checks(
    candidate: Measured, control: Measured, second: Measured, allowed: Tolerances, prefix: str
) -> Iterator[Check]:
    for measure, read in _measures(control, allowed):
        named = replace(measure, name=prefix + measure.name)
        yield _check(named, read(candidate), read(control), read(second), allowed)
    for name in ("losses",) if control.forget.single else ("losses", "min_k"):
        yield _spread(name, candidate.forget, control.forget, second.forget, allowed, prefix)
    if control.relearned is not None:
        yield _relearning(candidate, control, second, allowed)
    for precision in control.quantised:
        mine, theirs, other = (model.quantised[precision] for model in (candidate, control, second))
        yield from _checks(mine, theirs, other, allowed, f"{prefix}{precision}.")


def _measures(control: Measured, allowed: Tolerances) -> Iterator[tuple[_Measure, _Reader]]:
    """Every number of one precision, and how a model's is read."""
    yield from _known("forget", control.forget, allowed, lambda model: model.forget)
    n, held, kept = (len(rows.losses) for rows in (control.forget, control.heldout, control.retain))
    chance = 2 * auc_error(n, held)
    yield _Measure("membership.auc_loss", allowed.auc, n + held, _UNDER, _TELLS, chance), lambda m: m.auc_loss
    if not control.forget.single:
        yield _Measure("membership.auc_min_k", allowed.auc, n + held, _UNDER, _TELLS, chance), lambda m: m.auc_min_k
    if control.paraphrases is not None:
        yield from _known("paraphrases", control.paraphrases, allowed, lambda model: model.paraphrases)
    if count := len(control.exposures):
        chance = 2 * math.sqrt(2 / count) * math.log2(math.e)  # the exposure of a row never seen is exponential
        seen = count + control.references
        yield (
            _Measure("canaries.exposure", allowed.exposure, seen, _LESS, _KNOWS, chance, " bits"),
            lambda m: m.exposure,
        )
    yield (
        _Measure("retain.loss", _nats(control.retain, allowed), kept, None, _FELL, unit=" nats"),
        lambda m: m.retain.loss,
    )
    yield _Measure("retain.accuracy", allowed.retain, kept, _FELL, None), lambda m: m.retain.accuracy


def _known(
    name: str, control: RowScores, allowed: Tolerances, rows: Callable[[Any], RowScores]
) -> Iterator[tuple[_Measure, _Reader]]:
    """Loss and accuracy of rows that nothing is to be known of."""
    n = len(control.losses)
    yield _Measure(f"{name}.loss", _nats(control, allowed), n, _KNOWS, _LESS, unit=" nats"), lambda m: rows(m).loss
    chance = 2 * share_error(sum(control.correct), n)
    yield _Measure(f"{name}.accuracy", allowed.accuracy, n, _LESS, _KNOWS, chance), lambda m: rows(m).accuracy


def _nats(control: RowScores, allowed: Tolerances) -> float:
    return allowed.loss * max(1.0, control.loss)


def _check(measure: _Measure, value: float, control: float, second: float, allowed: Tolerances) -> Check:
    """One number against two controls."""
    if not (math.isfinite(control) and math.isfinite(second)):
        raise VerificationError(
            f"{measure.name}: the controls give {control} and {second}; a control must be a model that works, and its"
            " labels must be among those that compete"
        )
    noise, most = abs(control - second), allowed.widest * measure.tolerance
    margin = min(most, max(measure.tolerance, measure.chance, allowed.factor * noise))
    beside = f"the control's {control:.3g}{measure.unit} (margin {margin:.3g}, n = {measure.n})"
    passed = False
    if noise > most:
        reason = (
            f"nothing can be told: the two controls differ by {noise:.3g}{measure.unit}, more than the {most:.3g} that"
            f" any margin may be (n = {measure.n}); measure more rows, or train the controls longer"
        )
    elif measure.low is not None and not value >= control - margin:
        reason = f"{value:.3g}{measure.unit} is too far below {beside}: {measure.low}"
    elif measure.high is not None and not value <= control + margin:
        reason = f"{value:.3g}{measure.unit} is too far above {beside}: {measure.high}"
    else:
        passed, reason = True, f"{value:.3g}{measure.unit} passes beside {beside}"
    return Check(measure.name, value, control, noise, margin, measure.n, passed, reason)


def _spread(
    name: str, candidate: RowScores, control: RowScores, second: RowScores, allowed: Tolerances, prefix: str
) -> Check:
    """Kolmogorov-Smirnov distance of the forget rows' scores to the control's, whose own is 0."""
    test, other = (kolmogorov_smirnov(getattr(one, name), getattr(control, name)) for one in (candidate, second))
    critical = ks_critical(test.n, test.m)
    measure = _Measure(f"{prefix}forget.ks_{name}", allowed.ks, test.n + test.m, None, _SPREAD, critical)
    check = _check(measure, test.statistic, 0.0, other.statistic, allowed)
    return replace(check, reason=f"{check.reason}; p = {test.p:.2g} with {test.n} and {test.m} rows")


def _relearning(candidate: Measured, control: Measured, second: Measured, allowed: Tolerances) -> Check:
    """Steps until the rows are known again; a model that needs more than the control is no worse for it."""
    found = [model.relearned for model in (candidate, control, second)]
    mine, theirs, other = (float(one.steps) for one in found if one is not None)
    tolerance = max(1.0, allowed.relearning * theirs)
    measure = _Measure("relearning.steps", tolerance, len(control.forget.losses), _FAST, None, unit=" steps")
    check = _check(measure, mine, theirs, other, allowed)
    if theirs > check.margin:
        return check
    reason = (
        f"nothing can be told: the control itself needs {theirs:.0f} steps (margin {check.margin:.3g}, n ="
        f" {check.n}), so none can be too fast; lower the lesson's level or its learning_rate"
    )
    return replace(check, passed=False, reason=reason)


def _power(rejecting: Sequence[str], count: int) -> Check:
    """Whether the gate rejects the model as it was before anything was taken out."""
    if rejecting:
        reason = f"{len(rejecting)} of {count} checks reject the model as it was before: {', '.join(rejecting)}"
    else:
        reason = (
            f"none of {count} checks rejects the model as it was before: the rows left no trace in it that can be"
            " seen, so passing proves nothing"
        )
    return Check("power", float(len(rejecting)), 1.0, 0.0, 0.0, count, bool(rejecting), reason)


_NUMBERS = ("value", "control", "noise", "margin")


def _check_comparable(models: Mapping[str, Measured]) -> None:
    control = models["control"]
    for name, model in models.items():
        if model.subject != control.subject:
            raise VerificationError(
                f"{name} and control were measured on different rows, labels or k; measure both on the same"
            )
        if _manner(model) != _manner(control):
            raise VerificationError(
                f"{name} and control were not measured in the same way: {_manner(model)} and {_manner(control)}"
            )


def _manner(model: Measured) -> tuple[Any, ...]:
    """What must be equal in two measurements for their numbers to be compared."""
    lesson = model.relearned and replace(model.relearned, steps=0, reached=False)
    sizes = tuple(len(rows.losses) for rows in (model.forget, model.heldout, model.retain))
    return sizes, tuple(sorted(model.quantised)), lesson, len(model.exposures), model.references


def _check_sizes(measured: Measured, allowed: Tolerances) -> None:
    sets = {"forget": measured.forget, "held-out": measured.heldout, "retain": measured.retain}
    if measured.paraphrases is not None:
        sets["paraphrase"] = measured.paraphrases
    small = {name: len(rows.losses) for name, rows in sets.items() if len(rows.losses) < allowed.rows}
    if small:
        raise VerificationError(
            f"too few rows to tell anything: {', '.join(f'{count} {name}' for name, count in small.items())}, and at"
            f" least {allowed.rows} of each are needed; fewer rows can be erased by replay, which needs no statistics"
        )
    if measured.exposures and (len(measured.exposures) < CANARIES or measured.references < REFERENCES):
        raise VerificationError(
            f"{len(measured.exposures)} canaries among {measured.references} references tell nothing; at least"
            f" {CANARIES} among {REFERENCES} are needed"
        )


def _to_json(check: Check) -> dict[str, Any]:
    return {**asdict(check), **{name: plain(getattr(check, name)) for name in _NUMBERS}}
