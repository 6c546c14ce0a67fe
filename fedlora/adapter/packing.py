"""Fewer bytes for the values of an update: fewer bits for each, and only the largest of them.

Values are quantised symmetrically, ``x ~ scale * code``, with one scale per slice of a tensor. Codes are rounded to the
nearest (half to even), not stochastically: the error is at most ``scale / 2`` rather than ``scale``, nothing is drawn,
and a round that is played again sends the same bytes. What that biases, error feedback sends later.

A slice is a row of a matrix or a column, whichever is longer, so that there are as few scales as possible: for A
[r, in] the rows, for B [out, r] the columns, for both the rank components, whose sizes differ. Rows of B are too short:
a scale for every 8 values makes int8 at rank 8 as large as 12 bits a value, 2.7 times smaller than float32 rather than
3.96 times (384 columns).

Source: QSGD (Alistarh et al., 2017, arXiv 1610.02132) for scaled codes; DGC (Lin et al., 2018, arXiv 1712.01887) for
the largest values of each tensor; EF-SGD (Karimireddy et al., 2019, arXiv 1901.09847) for feeding back what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import WireError

CODES, SCALES, MASK = PACKED = ("codes", "scales", "mask")  # tensors of an adapter have a colon in their names
_BITS = {"fp32": 32, "int8": 8, "int4": 4}
_LEVELS = {"int8": 127, "int4": 7}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Packing:
    """How the values of an update travel.

    Attributes:
        values: ``fp32``, ``int8`` or ``int4``.
        top_k: share of the values of each tensor that travel, the largest, 0 < top_k < 1; None for all.
    """

    values: str = "fp32"
    top_k: float | None = None

    @property
    def plain(self) -> bool:
        """Whether everything travels as it is."""
        return self.values == "fp32" and self.top_k is None

    @property
    def form(self) -> str:
        """What a reader of a message has to know, such as ``int8`` or ``int4 top-k``."""
        return self.values if self.top_k is None else f"{self.values} top-k"

    def num_kept(self, numel: int) -> int:
        """Values of a tensor of this size that travel: at least one, where it has any."""
        return numel if self.top_k is None else min(numel, max(1, math.ceil(self.top_k * numel - 1e-9)))

    def num_bytes(self, shapes: Shapes) -> int:
        """Size of the packed values of these tensors, headers aside."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        scales = sum(math.prod(_scale_shape(shape)) for shape in shapes.values()) if self.values in _LEVELS else 0
        return self._num_bytes(sum(sizes), sum(map(self.num_kept, sizes))) + 4 * scales

    def about_bytes(self, numel: int) -> int:
        """Size of so many packed values without their scales, as if they were one tensor."""
        return self._num_bytes(numel, self.num_kept(numel))

    def _num_bytes(self, numel: int, kept: int) -> int:
        mask = 0 if self.top_k is None else -(-numel // 8)
        return -(-kept * _BITS[self.values] // 8) + mask


PLAIN = Packing()


def pack(tensors: Mapping[str, Tensor], packing: Packing) -> dict[str, Tensor]:
    """All values as flat tensors: ``codes``, ``scales`` unless they are fp32, ``mask`` if only the largest travel.

    Tensors follow each other by name. Where a slice has a value that is not finite, neither is its scale.

    Args:
        tensors: by name, of any shape.

    Returns:
        ``codes`` float32 or int8 [values that travel], or uint8 with two int4 codes to a byte, the first in the low
        half; ``scales`` float32 [slices]; ``mask`` uint8 with a bit for every value, the lowest first.
    """
    codes, scales, masks = [], [], []
    for _, tensor in sorted(tensors.items()):
        values = tensor.detach().to("cpu", torch.float32)
        if packing.top_k is not None:
            kept = _largest(values, packing.num_kept(values.numel()))
            values = torch.where(kept, values, 0.0)
            masks.append(kept)
        if packing.values in _LEVELS:
            matrix, levels = values.reshape(_matrix(tensor.shape)), _LEVELS[packing.values]
            scale = _amax(matrix) / levels
            # a slice of zeros has the scale 0; what a value that is not finite becomes is no matter, see above
            levelled = torch.where(scale > 0, matrix / scale, 0.0).nan_to_num(0.0).round()
            values = levelled.clamp(-levels, levels).reshape(tensor.shape)  # a subnormal scale may be rounded down
            scales.append(scale)
        codes.append(values if packing.top_k is None else values[kept])
    packed = {CODES: _joined(codes, torch.int8 if packing.values in _LEVELS else torch.float32)}
    if packing.values == "int4":
        packed[CODES] = _paired(packed[CODES])
    if packing.values in _LEVELS:
        packed[SCALES] = _joined(scales, torch.float32)
    if packing.top_k is not None:
        bits = np.packbits(_joined(masks, torch.bool).numpy(), bitorder="little")
        packed[MASK] = torch.from_numpy(bits)
    return packed


def unpack(packed: Mapping[str, Tensor], shapes: Shapes, form: str) -> dict[str, Tensor]:
    """Inverse of ``pack`` up to what it loses. ``packed`` is hostile: every size is checked before it is used.

    Args:
        packed: the flat tensors, of any type and size.
        shapes: of the tensors that they say they are, in the order of their names; sizes are not negative.
        form: see ``Packing.form``.

    Returns:
        float32 tensors by name. Memory is at most 32 times that of ``packed``.

    Raises:
        WireError: parts that are missing, too many, of another type or size, or scales that are not finite.
    """
    values, _, sparse = form.partition(" ")
    if values not in _BITS or sparse not in ("", "top-k"):
        raise WireError(f"values are packed as {form!r:.80}; expected fp32, int8 or int4, with or without top-k")
    total = sum(math.prod(shape) for shape in shapes.values())
    kept = _bits(packed, total) if sparse else None
    codes = _codes(packed, values, total if kept is None else int(kept.sum()))
    sizes = [math.prod(shape) for shape in shapes.values()]
    scales = None
    if values in _LEVELS:
        slices = [math.prod(_scale_shape(shape)) for shape in shapes.values()]
        scales = torch.split(_part(packed, SCALES, torch.float32, sum(slices)), slices)
    if extra := set(packed) - {CODES} - ({SCALES} if scales is not None else set()) - ({MASK} if sparse else set()):
        raise WireError(f"{min(extra)!r:.80} has no place in values packed as {form}")
    if kept is not None:
        codes = torch.zeros(total, dtype=codes.dtype).masked_scatter_(kept, codes)
    found = {}
    for place, (name, part) in enumerate(zip(shapes, torch.split(codes, sizes), strict=True)):
        found[name] = part.to(torch.float32).view(shapes[name])
        if scales is not None and sizes[place]:
            if not bool(scales[place].isfinite().all()):
                raise WireError(f"{name!r:.80} has values that are not finite")
            scale = scales[place].view(_scale_shape(shapes[name]))
            found[name] = (found[name].view(_matrix(shapes[name])) * scale).view(shapes[name])
    return found


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as rows and columns; one of fewer than two dimensions is a row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Of the scales of a tensor, so that they broadcast over it as a matrix."""
    rows, columns = _matrix(shape)
    return (rows, min(columns, 1)) if rows <= columns else (min(rows, 1), columns)


def _amax(matrix: Tensor) -> Tensor:
    """Largest size of a value per slice, in the shape of the scales."""
    if not matrix.numel():
        return torch.zeros(_scale_shape(matrix.shape))
    return matrix.abs().amax(dim=1 if len(matrix) <= matrix.shape[1] else 0, keepdim=True)


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the largest values are, so many of them; of equal ones the first."""
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[values.flatten().abs().sort(descending=True, stable=True).indices[:count]] = True
    return kept.view(values.shape)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.flatten().to(dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype)


def _paired(codes: Tensor) -> Tensor:
    """Two codes of -7 to 7 to a byte; an odd last one is followed by 0."""
    halves = torch.cat([codes + 8, torch.full((len(codes) % 2,), 8)]).to(torch.uint8)
    return halves[::2] | (halves[1::2] << 4)


def _codes(packed: Mapping[str, Tensor], values: str, count: int) -> Tensor:
    if values != "int4":
        return _part(packed, CODES, torch.int8 if values == "int8" else torch.float32, count)
    pairs = _part(packed, CODES, torch.uint8, -(-count // 2))
    return (torch.stack([pairs & 15, pairs >> 4], dim=1).flatten()[:count].to(torch.int8)) - 8


def _bits(packed: Mapping[str, Tensor], count: int) -> Tensor:
    mask = _part(packed, MASK, torch.uint8, -(-count // 8))
    return torch.from_numpy(np.unpackbits(mask.numpy(), count=count, bitorder="little").astype(bool))


def _part(packed: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int) -> Tensor:
    """One of the flat tensors, of exactly this type and size."""
    part = packed.get(name)
    if part is None:
        raise WireError(f"the packed values lack their {name}")
    if part.dtype != dtype or tuple(part.shape) != (count,):
        came, wanted = (str(one).removeprefix("torch.") for one in (part.dtype, dtype))
        raise WireError(f"{name} of the packed values are {came} {list(part.shape)!s:.80}; expected {wanted} [{count}]")
    return part
