"""How many clients one pass can hold, so that a cohort is as large as memory allows and no larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.data.text import Example
from fedlora.training.batches import collate
from fedlora.training.objective import targets_and_logits

CPU_BYTES = 3 << 28  # of one pass
CPU_ROWS, GPU_ROWS = 64, 1024  # more rows bring nothing: the matrix products fill the machine
CPU_CLIENTS, GPU_CLIENTS = 8, 64  # more gain little, and fewer workers share a round
_OF_VALUE = 24  # bytes per value of an adapter: its stack, start, gradient, two moments and what a step makes


def clients_per_pass(row: int, batch: int, values: int, device: torch.device) -> int:
    """Clients that fit into 0.75 GiB, or into half the memory of a GPU; at least 1.

    Depends on shapes alone, so that every worker of a kind comes to the same.

    Args:
        row: bytes of the longest row, see ``longest``.
        batch: rows of each client in a pass.
        values: of the adapter of the largest rank.
    """
    gpu = device.type == "cuda"
    budget = torch.cuda.get_device_properties(device).total_memory // 2 if gpu else CPU_BYTES
    fits = budget // (batch * row + _OF_VALUE * values)
    return int(max(1, min(GPU_CLIENTS if gpu else CPU_CLIENTS, (GPU_ROWS if gpu else CPU_ROWS) // batch, fits)))


def longest(model: Any, length: int, writes: bool, dropout: bool, device: torch.device) -> int:
    """Bytes of a row of ``length`` tokens in a pass: what autograd keeps of it, and half as much for the way back.

    Args:
        model: with an adapter that gets gradients.
        writes: whether it is a language model, which has a target at every token.
        dropout: whether the base has its dropout in training.
    """
    ids = [1] * max(2, length)
    was_training = model.training
    model.train(dropout)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return int(1.5 * kept_bytes(model, Example(ids, ids if writes else 0), device)) + 1
    finally:
        model.train(was_training)


def kept_bytes(model: Any, row: Example, device: torch.device) -> int:
    """What autograd keeps of a row for its backward pass, beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits, targets, _ = targets_and_logits(model, collate([row], 0, device))
        loss = cross_entropy(logits, targets)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
