"""What the bare base makes of rows: features that need no training, and which prototype each is nearest to."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.data.text import IGNORE, Example
from fedlora.training.batches import collate


@torch.no_grad()
def features(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    adapted: bool = False,
) -> Tensor:
    """The mean of the last hidden states over a row's tokens, without any adapter unless ``adapted``.

    Answers are left out where there is a question: a row that is to be answered comes without one.

    Args:
        model: a PeftModel; its adapter is active again afterwards.

    Returns:
        [rows, hidden] in float32 on the CPU, in the order of the examples.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    with contextlib.nullcontext() if adapted else model.disable_adapter():
        backbone = model.get_base_model().base_model
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[row] for row in chosen], pad_token_id, device)
            mask = batch["attention_mask"]
            states = backbone(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
            weights = _questions(mask, batch["labels"]).float().unsqueeze(-1)
            means = (states * weights).sum(dim=1) / weights.sum(dim=1)
            for row, mean in zip(chosen, means.cpu(), strict=True):
                found[row] = mean
    return torch.stack(found) if found else torch.empty(0, 0)


def nearest(rows: Tensor, prototypes: Sequence[Sequence[float]]) -> Tensor:
    """Place of the prototype [hidden] with the largest cosine for each row of [n, hidden]; the first where two tie."""
    if not len(rows):
        return torch.empty(0, dtype=torch.int64)
    towards = torch.nn.functional.normalize(torch.tensor(prototypes, dtype=torch.float64), dim=1)
    return (rows.double() @ towards.T).argmax(dim=1)


def _questions(mask: Tensor, labels: Tensor) -> Tensor:
    """The tokens [n, T] to look at: those of a language model's prompt, every one where there is none."""
    if labels.ndim == 1:
        return mask
    asked = mask * (labels == IGNORE)
    return torch.where(asked.any(dim=1, keepdim=True), asked, mask)
