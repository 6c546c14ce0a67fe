"""What the model is scored on: class logits, or token logits where there are labels."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.data.text import IGNORE


def targets_and_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model on a batch and keep only what is scored.

    For a language model the head is evaluated at positions whose next token is a label and nowhere
    else: a [n, T, vocabulary] tensor never exists.

    Returns:
        logits [N, C] in float32 or better, targets [N], and the batch row of each target [N].
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["labels"]
    if labels.ndim == 1:
        rows = torch.arange(len(labels), device=labels.device)
        return _precise(model(**inputs).logits), labels, rows
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORE
    rows, positions = scored.nonzero(as_tuple=True)
    with _head_sees(model, scored):
        logits = model(**inputs, use_cache=False).logits
    return _precise(logits), labels[rows, positions + 1], rows


def among(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Logits [n, C] in which only these labels compete; all where ``labels`` is empty."""
    if not labels:
        return logits
    kept = torch.tensor(labels, device=logits.device)
    return torch.full_like(logits, -torch.inf).index_copy(1, kept, logits[:, kept])


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@contextlib.contextmanager
def _head_sees(model: Any, scored: Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at ``scored``; scaling and caps after it still apply."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][scored], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
