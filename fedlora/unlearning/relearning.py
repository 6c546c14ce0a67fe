"""How fast rows that were taken out come back: what is still in the weights is relearned in fewer steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting
from fedlora.data.text import Example
from fedlora.errors import VerificationError
from fedlora.seeds import derive_seed
from fedlora.training.batches import batch_indices, collate
from fedlora.training.evaluate import row_losses
from fedlora.training.objective import among, targets_and_logits


@dataclass(frozen=True, eq=False)
class Lesson:
    """Plain training on the forget rows: AdamW at a constant rate, no dropout, no penalty.

    Attributes:
        parameters: what is trained, by name: the adapter's, and the head's of a classifier.
        level: mean loss of the rows, in nats, at which they count as known again. Between that of the model before
            anything was taken out and that of the control; the same for all models that are compared.
        learning_rate: small enough that the control takes many steps: of two a difference cannot be seen.
        max_steps: after which the attempt is given up.
        seed: of the order of the rows.
    """

    parameters: Mapping[str, nn.Parameter]
    level: float
    learning_rate: float = 1e-3
    max_steps: int = 200
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Relearned:
    """How an attempt ended.

    Attributes:
        steps: of the optimizer until the level was reached; ``max_steps`` where it was not.
        reached: whether it was.
        level, learning_rate, max_steps, batch_size, seed: of the lesson.
    """

    steps: int
    reached: bool
    level: float
    learning_rate: float
    max_steps: int
    batch_size: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The same as a plain dictionary."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Relearned:
        """Inverse of ``to_json``."""
        return Relearned(**data)


def relearn(
    model: Any, rows: Sequence[Example], lesson: Lesson, pad_token_id: int, labels: Sequence[int] = ()
) -> Relearned:
    """Train on the rows until their mean loss is at most the level; the model is left as it was found.

    The loss is looked at before the first step and after every one, over all rows. Training goes through the model
    as it is served: a filter behind it lets no gradient pass, and rows hidden by one seem never to come back.

    Raises:
        VerificationError: if there is nothing to train or to train on.
    """
    parameters = list(lesson.parameters.values())
    if not parameters or not rows:
        raise VerificationError(f"relearning needs parameters and rows; there are {len(parameters)} and {len(rows)}")
    device = parameters[0].device

    def known() -> bool:
        losses = row_losses(model, rows, lesson.batch_size, pad_token_id, device, labels)
        return sum(losses) / len(losses) <= lesson.level

    with inspecting(model), _borrowed(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=lesson.learning_rate, weight_decay=0.0)
        batches = _batches(rows, lesson)
        steps, reached = 0, known()
        while not reached and steps < lesson.max_steps:
            logits, targets, _ = targets_and_logits(model, collate(next(batches), pad_token_id, device))
            loss = cross_entropy(among(logits, labels), targets)
            # not backward(): other parameters of the model may want gradients, and theirs are not ours to change
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            steps, reached = steps + 1, known()
    told = (lesson.level, lesson.learning_rate, lesson.max_steps, lesson.batch_size, lesson.seed)
    return Relearned(steps, reached, *told)


def _batches(rows: Sequence[Example], lesson: Lesson) -> Iterator[list[Example]]:
    lengths = [len(row.input_ids) for row in rows]
    for epoch in itertools.count():
        order = derive_seed(lesson.seed, epoch, "", "relearning")
        for chosen in batch_indices(lengths, lesson.batch_size, order, group_by_length=False):
            yield [rows[row] for row in chosen]


@contextmanager
def _borrowed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that may be changed; their values, gradients and flags come back afterwards."""
    before = [(p, p.detach().clone(), p.grad, p.requires_grad) for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, value, gradient, wanted in before:
            parameter.data.copy_(value)
            parameter.grad = gradient
            parameter.requires_grad_(wanted)
