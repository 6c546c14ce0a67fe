"""What is measured on a model, against the model's own numbers; and that measuring leaves no trace."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlora.data.text import Example
from fedlora.errors import VerificationError
from fedlora.training.batches import collate
from fedlora.training.evaluate import evaluate, row_losses
from fedlora.training.objective import targets_and_logits
from fedlora.unlearning.measures import Measured, RowScores, Scoring, Sets, measure, score_rows
from fedlora.unlearning.relearning import Lesson, relearn
from tests.unlearning.worlds import CPU, Trained, World, blank, classifier_world, language_world


@pytest.fixture(scope="module")
def words() -> World:
    return language_world()


@pytest.fixture(scope="module")
def language(words: World) -> Trained:
    return blank(words.spec, seed=0)


@pytest.fixture(scope="module")
def classes() -> World:
    return classifier_world()


@pytest.fixture(scope="module")
def classifier(classes: World) -> Trained:
    return blank(classes.spec, seed=0)


def trace(model: Trained) -> tuple[dict[str, torch.Tensor], list[bool], list[bool], list[object]]:
    """Everything that measuring could leave behind."""
    tensors = {name: tensor.clone() for name, tensor in model.peft.state_dict().items()}
    modes = [module.training for module in model.peft.modules()]
    parameters = list(model.peft.parameters())
    return tensors, modes, [p.requires_grad for p in parameters], [p.grad for p in parameters]


def assert_untouched(model: Trained, before) -> None:
    after = trace(model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert after[1:3] == before[1:3]
    assert all(one is other for one, other in zip(after[3], before[3], strict=True))


def test_rows_are_scored_as_evaluation_scores_them(words: World, language: Trained) -> None:
    rows = words.sets.forget
    scores = score_rows(language.peft, rows, words.scoring)
    assert scores.losses == pytest.approx(row_losses(language.peft, rows, 128, 0, CPU), abs=1e-5)
    assert sum(scores.correct) == evaluate(language.peft, rows, 128, 0, CPU).num_correct
    assert scores.loss == pytest.approx(sum(scores.losses) / 24)


@pytest.mark.parametrize(("k", "kept"), [(0.2, 1), (0.5, 2), (1.0, 4)])
def test_min_k_is_the_mean_of_the_least_likely_answer_tokens(words: World, language: Trained, k, kept) -> None:
    row = words.sets.forget[0]
    with torch.no_grad():
        logits, targets, _ = targets_and_logits(language.peft.eval(), collate([row], 0, CPU))
    log_p = sorted(logits.log_softmax(-1)[torch.arange(4), targets].tolist())
    found = score_rows(language.peft, [row], replace(words.scoring, k=k))
    assert found.min_k[0] == pytest.approx(sum(log_p[:kept]) / kept, rel=1e-5)


def test_min_k_of_a_classifier_is_its_loss(
    classes: World, classifier: Trained, words: World, language: Trained
) -> None:
    scores = score_rows(classifier.peft, classes.sets.forget, classes.scoring)
    assert scores.min_k == tuple(-loss for loss in scores.losses)
    assert scores.single
    assert not score_rows(language.peft, words.sets.forget, words.scoring).single


def test_a_row_whose_loss_is_no_number_is_known_to_nobody(classes: World) -> None:
    broken = blank(classes.spec, seed=0)
    with torch.no_grad():
        broken.parameters[":classifier.bias"].fill_(math.nan)
    scores = score_rows(broken.peft, classes.sets.forget, classes.scoring)
    assert set(scores.losses) == {math.inf}
    assert set(scores.min_k) == {-math.inf}


def test_labels_that_do_not_compete_change_the_scores(classes: World, classifier: Trained) -> None:
    rows = [Example(row.input_ids, 0) for row in classes.sets.forget]
    scores = score_rows(classifier.peft, rows, replace(classes.scoring, labels=(0,)))
    assert set(scores.losses) == {0.0}
    assert scores.accuracy == 1


def test_measuring_leaves_the_model_as_it_was(classes: World, classifier: Trained) -> None:
    classifier.peft.train()
    wanted = next(iter(classifier.parameters.values()))
    wanted.grad = torch.ones_like(wanted)
    before = trace(classifier)
    found = measure(classifier.peft, classes.sets, classes.scoring, Lesson(classifier.parameters, 0.0, max_steps=2))
    assert_untouched(classifier, before)
    assert (found.relearned.steps, found.relearned.reached) == (2, False)
    assert set(found.quantised) == {"int8", "nf4"}
    assert found.quantised["nf4"].relearned is None
    wanted.grad = None


def test_relearning_counts_steps_until_the_level_and_repeats(classes: World, classifier: Trained) -> None:
    rows = classes.sets.forget
    start = score_rows(classifier.peft, rows, classes.scoring).loss
    lesson = Lesson(classifier.parameters, start, learning_rate=0.005, batch_size=48)

    def steps(level: float) -> int:
        return relearn(classifier.peft, rows, replace(lesson, level=level), 0).steps

    before = trace(classifier)
    assert steps(start + 0.01) == 0
    few, many = steps(start - 0.05), steps(start - 0.3)
    assert 0 < few < many < lesson.max_steps
    assert steps(start - 0.3) == many
    assert_untouched(classifier, before)


def test_relearning_counts_the_steps_that_plain_training_takes(classes: World) -> None:
    model, rows = blank(classes.spec, seed=0), classes.sets.forget
    lesson = Lesson(model.parameters, 1.0, learning_rate=0.005, batch_size=48)
    counted = relearn(model.peft, rows, lesson, 0)
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=0.005, weight_decay=0.0)
    losses = []
    for _ in range(counted.steps + 1):
        logits, targets, _ = targets_and_logits(model.peft.eval(), collate(rows, 0, CPU))
        loss = cross_entropy(logits, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counted.reached
    assert losses[-1] <= 1.0 < min(losses[:-1])


def test_paraphrases_and_canaries_are_measured_where_there_are_some(classes: World, classifier: Trained) -> None:
    rows = classes.sets.heldout
    sets = replace(classes.sets, paraphrases=rows[:5], canaries=rows[:2], references=rows[2:17])
    found = measure(classifier.peft, sets, classes.scoring, precisions=())
    assert len(found.paraphrases.losses) == 5
    assert (len(found.exposures), found.references) == (2, 15)
    assert all(0 <= bits <= 4 for bits in found.exposures)
    assert found.subject != measure(classifier.peft, classes.sets, classes.scoring, precisions=()).subject


def test_measurements_survive_json_with_infinities(classes: World, classifier: Trained) -> None:
    sets = replace(classes.sets, paraphrases=classes.sets.heldout)
    found = measure(classifier.peft, sets, classes.scoring, Lesson(classifier.parameters, 0.0, max_steps=1), ["int8"])
    found = replace(found, retain=RowScores((math.inf, 1.0), (-math.inf, -1.0), (False, True)))
    assert Measured.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_empty_sets_are_refused(classes: World, classifier: Trained) -> None:
    rows, scoring = classes.sets.forget, Scoring(8, 0, CPU)
    with pytest.raises(VerificationError, match="heldout: no rows"):
        measure(classifier.peft, Sets(rows, [], rows), scoring)
    with pytest.raises(VerificationError, match="canaries and references go together"):
        measure(classifier.peft, Sets(rows, rows, rows, canaries=rows), scoring)
    with pytest.raises(VerificationError, match="relearning needs parameters and rows; there are 0 and 30"):
        relearn(classifier.peft, rows, Lesson({}, 0.0), 0)
