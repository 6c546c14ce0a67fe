"""Bounds on what one client changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def shortened(delta: Mapping[str, Tensor], longest: float) -> dict[str, Tensor]:
    """The change in float64, at a Frobenius norm of ``longest`` over all tensors together where it was longer."""
    wide = {name: tensor.double() for name, tensor in delta.items()}
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in wide.values()))
    share = min(1.0, longest / norm) if norm else 1.0
    return {name: share * tensor for name, tensor in wide.items()}
