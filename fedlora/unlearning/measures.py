"""What a model still shows of some rows: the numbers that a candidate and its controls are compared by.

    sets = Sets(forget, heldout, retain)
    candidate = measure(model, sets, scoring, Lesson(parameters, level=0.5))

The same sets are measured on every model. Held-out rows are rows like the forget rows that no model has seen; where
they are of another kind, membership inference tells kinds apart, not members.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting
from fedlora.data.text import Example
from fedlora.errors import VerificationError
from fedlora.training.evaluate import scored
from fedlora.unlearning.quantised import quantised
from fedlora.unlearning.relearning import Lesson, Relearned, relearn
from fedlora.unlearning.separation import auc, exposure


@dataclass(frozen=True)
class Scoring:
    """How rows are run through a model.

    Attributes:
        pad_token_id: of the tokenizer.
        labels: those that compete in a classifier; all where empty.
        k: share of a row's answer tokens that Min-K% looks at, 0 < k <= 1.
    """

    batch_size: int
    pad_token_id: int
    device: torch.device
    labels: tuple[int, ...] = ()
    k: float = 0.2


@dataclass(frozen=True)
class RowScores:
    """One model on one set of rows, in the order of the rows.

    Attributes:
        losses: mean loss of each row's targets, in nats; infinite where the model gives no finite one.
        min_k: mean log-probability of each row's least likely targets. A classifier's row has one target, so there
            it is the loss with the other sign and tells nothing more.
        correct: whether every target of the row was the most likely one.
    """

    losses: tuple[float, ...]
    min_k: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """Mean over the rows."""
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of correct rows: accuracy of a classifier, exact match of a language model's answer."""
        return sum(self.correct) / len(self.correct)

    @property
    def single(self) -> bool:
        """Whether Min-K% is nothing but the loss."""
        return all(low == -loss for low, loss in zip(self.min_k, self.losses, strict=True))


@dataclass(frozen=True, eq=False)
class Sets:
    """The rows that models are measured on.

    Attributes:
        forget: those that were to be taken out.
        heldout: like them, and never seen by any model.
        retain: those that the model is to know as before.
        paraphrases: the forget rows in other words.
        canaries, references: made-up rows that were among those to forget, and rows drawn like them that no model
            has seen.
    """

    forget: Sequence[Example]
    heldout: Sequence[Example]
    retain: Sequence[Example]
    paraphrases: Sequence[Example] = ()
    canaries: Sequence[Example] = ()
    references: Sequence[Example] = ()


@dataclass(frozen=True)
class Measured:
    """Everything measured on one model.

    Attributes:
        subject: hash of all rows in their order, the labels that compete, and k: equal where numbers may be compared.
        exposures: of the canaries among the references, in bits.
        references: how many there were.
        relearned: how fast the forget rows came back.
        quantised: the same after rounding the weights, by precision; without relearning.
    """

    subject: str
    forget: RowScores
    heldout: RowScores
    retain: RowScores
    paraphrases: RowScores | None = None
    exposures: tuple[float, ...] = ()
    references: int = 0
    relearned: Relearned | None = None
    quantised: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def auc_loss(self) -> float:
        """Membership inference by the loss: forget rows against held-out rows."""
        return auc([-loss for loss in self.forget.losses], [-loss for loss in self.heldout.losses])

    @property
    def auc_min_k(self) -> float:
        """Membership inference by Min-K%."""
        return auc(self.forget.min_k, self.heldout.min_k)

    @property
    def exposure(self) -> float:
        """Mean over the canaries, in bits."""
        return sum(self.exposures) / len(self.exposures)

    def to_json(self) -> dict[str, Any]:
        """The same as plain lists and numbers; infinities as text, which JSON has no number for."""
        return {
            "subject": self.subject,
            "forget": _scores_to_json(self.forget),
            "heldout": _scores_to_json(self.heldout),
            "retain": _scores_to_json(self.retain),
            "paraphrases": self.paraphrases and _scores_to_json(self.paraphrases),
            "exposures": list(self.exposures),
            "references": self.references,
            "relearned": self.relearned and self.relearned.to_json(),
            "quantised": {precision: one.to_json() for precision, one in self.quantised.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measured:
        """Inverse of ``to_json``."""
        return Measured(
            data["subject"],
            _scores_from_json(data["forget"]),
            _scores_from_json(data["heldout"]),
            _scores_from_json(data["retain"]),
            None if data["paraphrases"] is None else _scores_from_json(data["paraphrases"]),
            tuple(data["exposures"]),
            data["references"],
            None if data["relearned"] is None else Relearned.from_json(data["relearned"]),
            {precision: Measured.from_json(one) for precision, one in data["quantised"].items()},
        )


def measure(
    model: Any,
    sets: Sets,
    scoring: Scoring,
    lesson: Lesson | None = None,
    precisions: Sequence[str] = ("int8", "nf4"),
) -> Measured:
    """Measure a model; it is left as it was found.

    Args:
        lesson: how the forget rows are taught again; not at all for None.
        precisions: that the weights are rounded to for a second and third look, see ``quantised``.

    Raises:
        VerificationError: if a set that is needed is empty.
    """
    for name in ("forget", "heldout", "retain"):
        if not getattr(sets, name):
            raise VerificationError(f"{name}: no rows; the gate needs forget, held-out and retain rows")
    if bool(sets.canaries) != bool(sets.references):
        raise VerificationError("canaries and references go together: a canary is ranked among references")
    relearned = None
    if lesson is not None:
        relearned = relearn(model, sets.forget, lesson, scoring.pad_token_id, scoring.labels)
    after = {}
    for precision in precisions:
        with quantised(model, precision):
            after[precision] = _look(model, sets, scoring, None, {})
    return _look(model, sets, scoring, relearned, after)


@torch.no_grad()
def score_rows(model: Any, examples: Sequence[Example], scoring: Scoring) -> RowScores:
    """Loss, Min-K% and correctness of every row; every module's mode stays as it was.

    Min-K% is the mean of the ``k`` least likely share of a row's targets, at least one of them.

    Source: Detecting Pretraining Data from Large Language Models (Shi et al., 2024), eq. 1.
    """
    losses, low, correct = [math.inf] * len(examples), [-math.inf] * len(examples), [False] * len(examples)
    with inspecting(model):
        batches = scored(model, examples, scoring.batch_size, scoring.pad_token_id, scoring.device, scoring.labels)
        for chosen, logits, targets, rows in batches:
            costs = cross_entropy(logits, targets, reduction="none").cpu()
            hits, owner = (logits.argmax(dim=-1) == targets).cpu(), rows.cpu()
            for number, place in enumerate(chosen):
                own = owner == number
                losses[place], low[place] = _row(costs[own], scoring.k)
                correct[place] = bool(hits[own].all())
    return RowScores(tuple(losses), tuple(low), tuple(correct))


def _row(costs: Tensor, k: float) -> tuple[float, float]:
    """Mean loss and Min-K% of one row's targets [n]."""
    if costs.isnan().any():  # a model that diverged; it gives the row no probability at all
        return math.inf, -math.inf
    least = costs.topk(max(1, int(k * len(costs)))).values
    return float(costs.mean()), -float(least.mean())


def _look(
    model: Any, sets: Sets, scoring: Scoring, relearned: Relearned | None, after: Mapping[str, Measured]
) -> Measured:
    references = score_rows(model, sets.references, scoring).losses if sets.references else ()
    canaries = score_rows(model, sets.canaries, scoring).losses if sets.canaries else ()
    return Measured(
        _digest(sets, scoring),
        score_rows(model, sets.forget, scoring),
        score_rows(model, sets.heldout, scoring),
        score_rows(model, sets.retain, scoring),
        score_rows(model, sets.paraphrases, scoring) if sets.paraphrases else None,
        tuple(exposure(loss, references) for loss in canaries),
        len(references),
        relearned,
        after,
    )


def _digest(sets: Sets, scoring: Scoring) -> str:
    all_rows = (sets.forget, sets.heldout, sets.retain, sets.paraphrases, sets.canaries, sets.references)
    content = [[[row.input_ids, row.labels] for row in rows] for rows in all_rows]
    return hashlib.sha256(json.dumps([content, scoring.labels, scoring.k]).encode()).hexdigest()


def _scores_to_json(scores: RowScores) -> dict[str, Any]:
    return {
        "losses": [plain(x) for x in scores.losses],
        "min_k": [plain(x) for x in scores.min_k],
        "correct": list(scores.correct),
    }


def _scores_from_json(data: Mapping[str, Any]) -> RowScores:
    return RowScores(tuple(map(float, data["losses"])), tuple(map(float, data["min_k"])), tuple(data["correct"]))


def plain(number: float) -> float | str:
    """A number for JSON; ``float`` gives it back."""
    return number if math.isfinite(number) else str(number)
