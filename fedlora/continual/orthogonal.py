"""Local methods that keep a new task's adapter out of the directions of earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.adapter.state import LowRank
from fedlora.training.methods import LOCAL_METHODS, LocalMethod, Memory, Start, Tensors


@LOCAL_METHODS.register("o_lora")
class OLoRA(LocalMethod):
    """Adds ``weight * sum over modules ||A Q||_F^2``, where Q spans the rows of A that were frozen into the base.

    The published penalty is ``sum |A_frozen A^T|``. It depends on how a frozen product is split into factors, which an
    aggregation rule or a compaction of the ledger may change at will; an orthonormal basis of its rows does not.

    Source: O-LoRA (Wang et al., 2023, arXiv 2310.14152), eq. 6.
    """

    def __init__(self, weight: float):
        self.weight = weight

    def begin(self, start: Start) -> Memory:
        frozen = start.frozen().modules if self.weight else {}
        bases = {
            name: row_space(frozen[name[:-2]]).to(start.tensors[name])
            for name in sorted(start.trained)
            if name.endswith(":A") and name[:-2] in frozen
        }
        return {"bases": bases}

    def penalty(self, tensors: Tensors, memory: Memory) -> Tensor | None:
        overlaps = [(tensors[name] @ basis).square().sum() for name, basis in memory["bases"].items()]
        return self.weight * torch.stack(overlaps).sum() if overlaps else None


def row_space(update: LowRank) -> Tensor:
    """An orthonormal basis [in, k] of the rows of ``B @ A`` that carry more than rounding."""
    left = torch.linalg.qr(update.folded().B.double()).R
    _, sizes, rows = torch.linalg.svd(left @ update.folded().A.double(), full_matrices=False)
    return rows[sizes > 1e-6 * sizes[:1]].T
