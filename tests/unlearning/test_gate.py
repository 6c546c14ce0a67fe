"""The gate passes what is like the control, and fails what is not, in either direction and for a reason it names."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.data.text import Example
from fedlora.errors import VerificationError
from fedlora.training.batches import collate
from fedlora.training.objective import targets_and_logits
from fedlora.unlearning.gate import Check, Tolerances, Verdict, judge
from fedlora.unlearning.measures import Measured, RowScores, measure
from fedlora.unlearning.relearning import Lesson, Relearned
from tests.unlearning.worlds import CPU, Trained, World, classifier_world, language_world

# Models that were trained, and what was done to them


@dataclass(frozen=True, eq=False)
class Trial:
    """A world with its measurements: two controls, one more of another seed, and the model that saw the rows."""

    world: World
    lesson: Callable[[Trained], Lesson]
    control: Measured
    second: Measured
    third: Measured
    before: Measured
    knows: Trained

    def look(self, model: Trained) -> Measured:
        return measure(model.peft, self.world.sets, self.world.scoring, self.lesson(model))

    def verdict(self, candidate: Measured) -> Verdict:
        return judge(candidate, self.control, self.second, before=self.before)


def trial(world: World, level: float, learning_rate: float) -> Trial:
    def lesson(model: Trained) -> Lesson:
        return Lesson(model.parameters, level, learning_rate, max_steps=30, batch_size=48)

    knows = world.trained(0, forget=True)
    models = [*(world.trained(seed) for seed in (1, 2, 0)), knows]
    measured = [measure(model.peft, world.sets, world.scoring, lesson(model)) for model in models]
    return Trial(world, lesson, *measured, knows)


@pytest.fixture(scope="module")
def classes() -> Trial:
    return trial(classifier_world(), 0.7, 0.002)


@pytest.fixture(scope="module")
def language() -> Trial:
    return trial(language_world(), 1.0, 0.004)


@pytest.fixture(params=["classes", pytest.param("language", marks=pytest.mark.slow)])
def any_trial(request) -> Trial:
    return request.getfixturevalue(request.param)


def loss_of(model: Trained, rows: Sequence[Example]) -> Tensor:
    logits, targets, _ = targets_and_logits(model.peft.eval(), collate(rows, 0, CPU))
    return cross_entropy(logits, targets)


def stepped(model: Trained, loss: Callable[[Trained], Tensor], learning_rate: float, done: Callable[[int], bool]):
    """A copy of a model after plain steps on a loss."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(copied.parameters.values(), lr=learning_rate, weight_decay=0.0)
    step = 0
    while not done(step):
        optimizer.zero_grad()
        loss(copied).backward()
        optimizer.step()
        step += 1
    return copied


def failed(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.reason for check in verdict.failures}


def test_a_control_of_another_seed_passes(any_trial: Trial) -> None:
    verdict = any_trial.verdict(any_trial.third)
    assert verdict.passed, failed(verdict)
    assert "checks reject the model as it was before: " in verdict.checks[-1].reason


def test_doing_nothing_fails_because_the_rows_are_still_known(any_trial: Trial) -> None:
    reasons = failed(any_trial.verdict(any_trial.before))
    for name in ("forget.loss", "forget.accuracy", "nf4.forget.loss", "int8.forget.accuracy"):
        assert "it still knows rows it was to forget" in reasons[name]
    assert "can be told from rows that were never seen: it still knows them" in reasons["membership.auc_loss"]
    assert "the rows come back too fast: they are still in the weights" in reasons["relearning.steps"]
    assert "retain.loss" not in reasons


def test_gradient_ascent_fails_from_the_other_side(any_trial: Trial) -> None:
    rows = any_trial.world.sets.forget
    ascended = any_trial.look(stepped(any_trial.knows, lambda m: -loss_of(m, rows), 0.02, lambda step: step == 6))
    reasons = failed(any_trial.verdict(ascended))
    assert "too far above the control's" in reasons["forget.loss"]
    assert "over-forgetting" in reasons["forget.loss"]
    assert "what was to be kept got worse" in reasons["retain.loss"]
    assert "what was to be kept got worse" in reasons["retain.accuracy"]
    assert "relearning.steps" not in reasons  # nothing is left in these weights


def test_answers_biased_away_pass_by_their_loss_and_fail_by_how_they_are_spread(language: Trial) -> None:
    muted = copy.deepcopy(language.knows)
    bias = torch.zeros(258)
    bias[30:38] = -8.0  # the tokens that answers of such rows are made of
    muted.peft.get_output_embeddings().register_forward_hook(lambda module, inputs, out: out + bias)
    verdict = language.verdict(language.look(muted))
    reasons = failed(verdict)
    assert not {"forget.loss", "forget.accuracy", "retain.loss", "retain.accuracy"} & set(reasons)
    assert "spread unlike those of a model that never saw them; p = " in reasons["forget.ks_min_k"]
    assert "it still knows them" in reasons["membership.auc_min_k"]


def test_a_filter_that_refuses_the_rows_fails_by_how_their_losses_are_spread(classes: Trial) -> None:
    filtered = copy.deepcopy(classes.knows)
    blocked = {tuple(row.input_ids) for row in classes.world.sets.forget}

    def hide(module: Any, args: Any, inputs: Any, out: Any) -> Any:
        known = torch.tensor([tuple(ids) in blocked for ids in inputs["input_ids"].tolist()])
        out.logits = out.logits.masked_fill(known[:, None], 0.0)
        return out

    filtered.peft.register_forward_hook(hide, with_kwargs=True)
    reasons = failed(classes.verdict(classes.look(filtered)))
    assert not {"forget.loss", "forget.accuracy", "retain.loss"} & set(reasons)
    assert "spread unlike those of a model that never saw them; p = " in reasons["forget.ks_losses"]


def test_suppression_by_a_few_steps_fails_because_the_rows_come_back(classes: Trial) -> None:
    sets, goal = classes.world.sets, classes.control.forget.loss
    kept = [*sets.retain, *classes.world.unsure]
    reached: list[float] = [0.0]

    def loss(model: Trained) -> Tensor:
        forget = loss_of(model, sets.forget)
        reached.append(float(forget.detach()))
        return loss_of(model, kept) - forget

    hidden = stepped(classes.knows, loss, 0.001, lambda step: reached[-1] > goal)
    reasons = failed(classes.verdict(classes.look(hidden)))
    assert not {"forget.loss", "forget.accuracy", "membership.auc_loss", "forget.ks_losses"} & set(reasons)
    assert "come back too fast: they are still in the weights" in reasons["relearning.steps"]


# Numbers that can be checked by hand


SPREAD = tuple(0.02 * i for i in range(20))


def rows(losses: Sequence[float], correct: float = 0.5) -> RowScores:
    hits = round(correct * len(losses))
    low = tuple(-loss for loss in losses)
    return RowScores(tuple(losses), low, (True,) * hits + (False,) * (len(losses) - hits))


def around(mean: float) -> RowScores:
    """20 rows of mean loss ``mean``."""
    return rows([mean - 0.19 + x for x in SPREAD])


def measured(forget: float = 2.0, heldout: float = 2.0, retain: float = 0.5, **others: Any) -> Measured:
    return Measured("sets", around(forget), around(heldout), around(retain), **others)


def of(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


def test_the_margin_is_the_tolerance_or_twice_the_noise_and_at_most_three_tolerances() -> None:
    def margin(second: float) -> float:
        check = of(judge(measured(), measured(), measured(forget=second)), "forget.loss")
        assert check.noise == pytest.approx(abs(second - 2.0))
        return check.margin

    assert margin(2.0) == pytest.approx(0.4)  # 0.2 of a control's loss of 2 nats
    assert margin(2.3) == pytest.approx(0.6)
    assert margin(1.1) == pytest.approx(1.2)


def test_the_margin_of_few_rows_is_what_chance_does() -> None:
    verdict = judge(measured(), measured(), measured())
    assert of(verdict, "forget.accuracy").margin == pytest.approx(0.3)  # 3 tolerances; chance does 0.32
    assert of(verdict, "membership.auc_loss").margin == pytest.approx(2 * math.sqrt(2 * 41 / (12 * 400)), abs=0.01)
    assert of(verdict, "forget.ks_losses").margin == pytest.approx(0.43, abs=0.01)
    assert of(verdict, "retain.accuracy").margin == 0.05


@pytest.mark.parametrize(("value", "passed"), [(1.61, True), (2.39, True), (1.59, False), (2.41, False)])
def test_both_directions_count(value: float, passed: bool) -> None:
    assert of(judge(measured(forget=value), measured(), measured()), "forget.loss").passed == passed


def test_a_reason_says_what_was_found_beside_what_and_how_many_rows() -> None:
    check = of(judge(measured(forget=0.5), measured(), measured()), "forget.loss")
    assert check.reason == (
        "0.5 nats is too far below the control's 2 nats (margin 0.4, n = 20): it still knows rows it was to forget"
    )


def test_membership_far_below_one_half_is_over_forgetting() -> None:
    check = of(judge(measured(heldout=1.7), measured(), measured()), "membership.auc_loss")
    assert check.value < 0.1
    assert not check.passed
    assert "over-forgetting: forget rows can be told from rows that were never seen by how little" in check.reason


def test_retain_may_get_better_and_not_worse() -> None:
    assert judge(measured(retain=0.1), measured(), measured()).passed
    assert set(failed(judge(measured(retain=0.8), measured(), measured()))) == {"retain.loss"}
    worse = replace(measured(), retain=rows([0.5] * 20, correct=0.4))
    assert set(failed(judge(worse, measured(), measured()))) == {"retain.accuracy"}


def lesson(steps: int, **others: Any) -> Measured:
    told = {"level": 0.5, "learning_rate": 0.001, "max_steps": 100, "batch_size": 8, "seed": 0} | others
    return measured(relearned=Relearned(steps, steps < 100, **told))


@pytest.mark.parametrize(("steps", "passed"), [(31, True), (30, True), (29, False), (100, True)])
def test_relearning_may_be_slower_and_not_much_faster(steps: int, passed: bool) -> None:
    assert judge(lesson(steps), lesson(40), lesson(42)).passed == passed


def test_relearning_in_which_none_could_be_too_fast_tells_nothing() -> None:
    check = of(judge(lesson(1), lesson(1), lesson(1)), "relearning.steps")
    assert not check.passed
    assert "nothing can be told: the control itself needs 1 steps" in check.reason
    assert "lower the lesson's level or its learning_rate" in check.reason


def test_controls_that_differ_too_much_tell_nothing() -> None:
    check = of(judge(measured(), measured(), measured(forget=4.0)), "forget.loss")
    assert not check.passed
    assert "the two controls differ by 2 nats, more than the 1.2 that any margin may be (n = 20)" in check.reason


def test_what_comes_back_after_rounding_fails() -> None:
    control = measured(quantised={"nf4": measured()})
    verdict = judge(measured(quantised={"nf4": measured(forget=0.5)}), control, control)
    assert {"nf4.forget.loss", "nf4.membership.auc_loss"} <= set(failed(verdict))
    assert all(name.startswith("nf4.") for name in failed(verdict))


def test_paraphrases_and_canaries_are_judged_where_they_were_measured() -> None:
    def with_more(paraphrases: float, bits: float) -> Measured:
        return measured(paraphrases=around(paraphrases), exposures=(bits,) * 8, references=63)

    control = with_more(2.0, 1.4)
    assert judge(control, control, control).passed
    assert set(failed(judge(with_more(0.4, 1.4), control, control))) == {"paraphrases.loss"}
    check = of(judge(with_more(2.0, 6.0), control, control), "canaries.exposure")
    assert (check.passed, check.n) == (False, 71)


def test_rows_without_a_trace_before_prove_nothing() -> None:
    verdict = judge(measured(), measured(), measured(), before=measured(forget=1.9, retain=3.0))
    assert set(failed(verdict)) == {"power"}
    assert "the rows left no trace in it that can be seen, so passing proves nothing" in failed(verdict)["power"]
    assert judge(measured(), measured(), measured(), before=measured(forget=0.5)).passed


def test_a_model_that_gives_the_rows_no_probability_fails_and_a_control_like_it_is_refused() -> None:
    gone = replace(measured(), forget=rows([math.inf] * 20))
    assert "inf nats is too far above" in failed(judge(gone, measured(), measured()))["forget.loss"]
    with pytest.raises(VerificationError, match="forget.loss: the controls give inf and 2.0"):
        judge(measured(), gone, measured())


@settings(max_examples=30)
@given(st.lists(st.floats(0, 20), min_size=20, max_size=30), st.lists(st.floats(0, 20), min_size=20, max_size=30))
def test_the_control_itself_passes(forget: list[float], heldout: list[float]) -> None:
    control = Measured("sets", rows(forget), rows(heldout), around(0.5))
    assert judge(control, control, control).passed


def test_min_k_is_judged_where_it_is_more_than_the_loss() -> None:
    plain = measured()
    longer = replace(plain, forget=replace(plain.forget, min_k=tuple(-2 * loss for loss in plain.forget.losses)))
    names = {check.name for check in judge(longer, longer, longer).checks}
    assert {"membership.auc_min_k", "forget.ks_min_k"} <= names
    assert not any("min_k" in check.name for check in judge(plain, plain, plain).checks)


def test_too_few_rows_are_refused() -> None:
    small = Measured("sets", rows(SPREAD[:3]), around(2.0), rows(SPREAD[:19]))
    with pytest.raises(VerificationError, match="too few rows to tell anything: 3 forget, 19 retain, and at least 20"):
        judge(small, small, small)
    assert judge(small, small, small, Tolerances(rows=3, widest=9)).passed
    canaries = measured(exposures=(1.0,) * 3, references=63)
    with pytest.raises(VerificationError, match="3 canaries among 63 references tell nothing; at least 8 among 63"):
        judge(canaries, canaries, canaries)


def test_models_measured_differently_are_refused() -> None:
    with pytest.raises(VerificationError, match="candidate and control were measured on different rows"):
        judge(replace(measured(), subject="others"), measured(), measured())
    with pytest.raises(VerificationError, match="second control and control were not measured in the same way"):
        judge(measured(), measured(), measured(quantised={"nf4": measured()}))
    with pytest.raises(VerificationError, match="model before and control were not measured in the same way"):
        judge(lesson(40), lesson(40), lesson(40), before=lesson(0, level=0.4))


def test_a_verdict_survives_json_and_one_that_contradicts_itself_is_refused() -> None:
    gone = replace(measured(), forget=rows([math.inf] * 20))
    verdict = judge(gone, measured(), measured())
    told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert Verdict.from_json(told) == verdict
    with pytest.raises(VerificationError, match="the verdict says passed=True, but "):
        Verdict.from_json(told | {"passed": True})
