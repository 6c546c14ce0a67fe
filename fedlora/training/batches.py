"""Examples into padded batches, of rows of similar length where that is asked for."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.data.text import IGNORE, Example

_WINDOW = 50  # batches among which rows are sorted by length, the Trainer's value


def batch_indices(lengths: Sequence[int], size: int, seed: int, group_by_length: bool) -> Iterator[list[int]]:
    """One shuffled epoch of index lists; the last ones may be short.

    With ``group_by_length``, rows are sorted inside windows of the shuffled order and the batches are
    shuffled again, so that batches differ from epoch to epoch but need little padding.
    """
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths))
    if not group_by_length:
        yield from (order[i : i + size].tolist() for i in range(0, len(order), size))
        return
    batches = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW].tolist(), key=lambda row: (lengths[row], row))
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    yield from (batches[i] for i in draw.permutation(len(batches)))


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad to the longest row.

    Returns:
        input_ids and attention_mask [n, T]; labels [n] for classes, [n, T] for tokens.
    """
    longest = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    per_token = isinstance(examples[0].labels, list)
    labels = np.full((len(examples), longest) if per_token else len(examples), IGNORE, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        mask[row, :length] = 1
        if per_token:
            labels[row, :length] = example.labels
        else:
            labels[row] = example.labels
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def steps_of(rows: int, batch_size: int, accumulation: int, max_steps: int, epochs: float) -> int:
    """Optimizer steps of one round: ``max_steps`` if given, else what ``epochs`` come to (at least 1)."""
    if max_steps > 0:
        return max_steps
    return max(1, math.ceil(math.ceil(rows / batch_size) * epochs / accumulation))
