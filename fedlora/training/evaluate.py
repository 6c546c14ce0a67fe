"""Scoring a model on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedlora.data.text import Example
from fedlora.protocol import EvalResult
from fedlora.training.batches import collate
from fedlora.training.objective import among, targets_and_logits


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
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    loss_sum, num_targets, num_correct = 0.0, 0, 0
    for start in range(0, len(order), batch_size):
        chosen = [examples[row] for row in order[start : start + batch_size]]
        logits, targets, rows = targets_and_logits(model, collate(chosen, pad_token_id, device))
        logits = among(logits, labels)
        loss_sum += float(cross_entropy(logits, targets, reduction="sum"))
        num_targets += len(targets)
        wrong = torch.zeros(len(chosen), dtype=torch.int64, device=rows.device)
        wrong.index_add_(0, rows, (logits.argmax(dim=-1) != targets).long())
        num_correct += int((wrong == 0).sum())
    return EvalResult(subject, loss_sum, num_targets, num_correct, len(examples))
