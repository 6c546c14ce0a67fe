"""How many clients one pass can hold, so that a cohort is as large as memory allows and no larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting
from fedlora.data.text import Example
from fedlora.training.batches import collate
from fedlora.training.objective import targets_and_logits

CPU_BYTES = 3 << 29  # of activations in one pass
CPU_ROWS, GPU_ROWS = 64, 1024  # more rows bring nothing: the matrix products fill the machine
CPU_CLIENTS, GPU_CLIENTS = 8, 64  # more gain little, and fewer workers share a round
_LOOK = 64  # tokens of the row that is measured


def clients_per_pass(model: Any, batch: int, length: int, writes: bool, device: torch.device) -> int:
    """Clients whose activations fit into 1.5 GiB, or into half the memory of a GPU; at least 1.

    Depends on shapes alone, so that every worker of a kind comes to the same: what autograd keeps of one row is
    counted, and a backward pass takes about half as much again.

    Args:
        model: with an adapter that gets gradients.
        batch: rows of each client in a pass.
        length: tokens of the longest row.
        writes: whether it is a language model, which has a target at every token.
    """
    gpu = device.type == "cuda"
    budget = torch.cuda.get_device_properties(device).total_memory // 2 if gpu else CPU_BYTES
    tokens = max(2, min(length, _LOOK))
    ids = [1] * tokens
    of_row = 1.5 * kept_bytes(model, Example(ids, ids if writes else 0), device) * length / tokens
    rows = min(GPU_ROWS if gpu else CPU_ROWS, budget / max(of_row, 1))
    return max(1, min(GPU_CLIENTS if gpu else CPU_CLIENTS, int(rows // batch)))


def kept_bytes(model: Any, row: Example, device: torch.device) -> int:
    """What autograd keeps of a row for its backward pass, beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with inspecting(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits, targets, _ = targets_and_logits(model, collate([row], 0, device))
        loss = cross_entropy(logits, targets)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
