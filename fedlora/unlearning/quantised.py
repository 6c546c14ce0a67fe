"""The same model with its weights rounded: what a small edit hid comes back when the edit is rounded away.

Source: Catastrophic Failure of LLM Unlearning via Quantization (Zhang et al., 2024, arXiv 2410.16454).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from fedlora.adapter.directory import PREFIX
from fedlora.adapter.peft import inspecting
from fedlora.errors import VerificationError, nearest
from fedlora.training.heads import HEADS

_BLOCK = 64  # weights that share one scale in NF4
_CHUNK = 1024  # rows of the identity that are run through a layer at once


@contextlib.contextmanager
def quantised(model: nn.Module, precision: str) -> Iterator[None]:
    """Every linear layer computes with its merged weight, base plus adapter, rounded to ``precision``.

    Output heads keep their precision, as they do where a model is deployed. Inside, layers are stand-ins with
    weights of their own, so memory holds the linear layers twice and training there changes nothing; afterwards
    the very modules that were there are back.

    Args:
        precision: ``int8`` or ``nf4``.

    Raises:
        VerificationError: for another precision, or a model without a linear layer.
    """
    if precision not in PRECISIONS:
        raise VerificationError(f"precision: {precision} is not known{nearest(precision, PRECISIONS)} (int8, nf4)")
    found = _linear_layers(model)
    if not found:
        raise VerificationError(f"{type(model).__name__} has no linear layer whose weights could be rounded")
    with inspecting(model):
        made = {id(layer): _rounded(layer, PRECISIONS[precision]) for _, _, layer in found}
    try:
        for parent, name, layer in found:
            setattr(parent, name, made[id(layer)])
        yield
    finally:
        for parent, name, layer in found:
            setattr(parent, name, layer)


def to_int8(weight: Tensor) -> Tensor:
    """Round to 255 levels per output channel, symmetric around zero, to nearest.

    Args:
        weight: [out, in].

    Returns:
        [out, in], each row a multiple of its largest magnitude / 127.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(weight / scale) * scale, weight)


def to_nf4(weight: Tensor) -> Tensor:
    """Round to the 16 levels of NF4, one scale for each 64 weights in memory order.

    Source: QLoRA (Dettmers et al., 2023), section 3; the rounding of bitsandbytes.
    """
    # as one row of whole blocks: with rows that are not, bitsandbytes' CPU kernel takes scales of the wrong blocks
    flat = weight.flatten()
    row = pad(flat, (0, -len(flat) % _BLOCK)).reshape(1, -1).contiguous()
    packed, state = quantize_4bit(row, blocksize=_BLOCK, quant_type="nf4")
    levels: Tensor = dequantize_4bit(packed, state)
    return levels.reshape(-1)[: len(flat)].reshape(weight.shape)


PRECISIONS: dict[str, Callable[[Tensor], Tensor]] = {"int8": to_int8, "nf4": to_nf4}


@torch.no_grad()
def merged_weight(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of what a linear layer computes, in float32.

    Found by running the identity through it, so that whatever adds to its output counts: adapters of any kind,
    cores, patches and frozen components beside it. In evaluation mode.
    """
    own: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    width = own.nx if isinstance(own, Conv1D) else own.in_features
    kind = own.weight.dtype if own.weight.dtype.is_floating_point else torch.float32
    device = own.weight.device
    bias = layer(torch.zeros(1, width, dtype=kind, device=device))[0].float()
    columns = []
    for start in range(0, width, _CHUNK):
        rows = min(_CHUNK, width - start)
        unit = torch.zeros(rows, width, dtype=kind, device=device)
        unit[torch.arange(rows), torch.arange(start, start + rows)] = 1
        columns.append(layer(unit).float() - bias)
    return torch.cat(columns).T.contiguous(), bias


@torch.no_grad()
def _rounded(layer: nn.Module, rounding: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A stand-in for a layer, in the precision the layer computes in."""
    weight, bias = merged_weight(layer)
    own: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    kind = own.weight.dtype if own.weight.dtype.is_floating_point else torch.float32
    out, width = weight.shape
    made = nn.Linear(width, out, device="meta")
    made.weight = nn.Parameter(rounding(weight).to(kind), requires_grad=False)
    made.bias = nn.Parameter(bias.to(kind), requires_grad=False)
    return made.eval()


def _linear_layers(model: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every linear layer but the output heads; an adapted one with its adapter."""
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    found: list[tuple[nn.Module, str, nn.Module]] = []

    def walk(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            here = f"{path}{name}"
            base = child.get_base_layer() if isinstance(child, LoraLayer) else child
            if here.removeprefix(PREFIX).split(".")[0] in HEADS or heads in (child, base):
                continue
            if isinstance(base, nn.Linear | Conv1D):
                found.append((parent, name, child))
            else:
                walk(child, f"{here}.")

    walk(model, "")
    return found
