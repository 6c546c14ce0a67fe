"""Scoring a model on held-out rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting
from fedlora.data.text import Example
from fedlora.protocol import EvalResult
from fedlora.training.batches import collate
from fedlora.training.objective import among, targets_and_logits

HARD_POOL = 4  # rows that are looked at for each hard one


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    subject: str = "",
    labels: Sequence[int] = (),
) -> EvalResult:
    """Loss and correct rows, as sums.

    A row of a language model counts as correct when every answer token, the end marker included, is
    the most likely one given the answer so far, which is when greedy decoding would give the answer.

    Args:
        labels: those that compete in a classifier; all where empty.
    """
    loss_sum, num_targets, num_correct = 0.0, 0, 0
    for chosen, logits, targets, rows in scored(model, examples, batch_size, pad_token_id, device, labels):
        loss_sum += float(cross_entropy(logits, targets, reduction="sum"))
        num_targets += len(targets)
        wrong = torch.zeros(len(chosen), dtype=torch.int64, device=rows.device)
        wrong.index_add_(0, rows, (logits.argmax(dim=-1) != targets).long())
        num_correct += int((wrong == 0).sum())
    return EvalResult(subject, loss_sum, num_targets, num_correct, len(examples))


@torch.no_grad()
def row_losses(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    labels: Sequence[int] = (),
) -> list[float]:
    """Mean loss per target of every row, in the order of the rows; arguments as of ``evaluate``."""
    losses = [0.0] * len(examples)
    for chosen, logits, targets, rows in scored(model, examples, batch_size, pad_token_id, device, labels):
        sums = torch.zeros(len(chosen), device=rows.device)
        sums.index_add_(0, rows, cross_entropy(logits, targets, reduction="none"))
        counts = torch.bincount(rows, minlength=len(chosen)).clamp(min=1)
        for place, loss in zip(chosen, (sums / counts).tolist(), strict=True):
            losses[place] = loss
    return losses


def hardest(
    examples: Sequence[Example],
    count: int,
    model: Any,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    labels: Sequence[int] = (),
) -> list[Example]:
    """The ``count`` rows of the largest loss, in their order; every module's mode stays as it was."""
    with inspecting(model):
        losses = row_losses(model, examples, batch_size, pad_token_id, device, labels)
    found = sorted(range(len(examples)), key=lambda place: -losses[place])[:count]
    return [examples[place] for place in sorted(found)]


def scored(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    labels: Sequence[int],
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Rows of like length together: their places, and logits, targets and rows of the batch.

    The model is left in evaluation mode.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[row] for row in chosen], pad_token_id, device)
        logits, targets, rows = targets_and_logits(model, batch)
        yield chosen, among(logits, labels), targets, rows
