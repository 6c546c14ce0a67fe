"""Putting the base ledger's patches onto a loaded model.

A float32 base takes them into its weights, one after another, so that they cost nothing afterwards. Merging a
small patch into NF4 or bfloat16 weights would lose most of it, so there all patches together stay beside the
weights as one frozen update that is added to each layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter.state import LowRank
from fedlora.adapter.wire import decode_adapter
from fedlora.protocol import Patch


def takes_patches(model: nn.Module, sites: Sequence[str]) -> bool:
    """Whether every adapted layer is an ordinary float32 one, whose weights patches can be merged into."""
    return all(_plain(base_layer(model, path)) for path in sites)


@torch.no_grad()
def merge(model: nn.Module, patches: Sequence[Patch]) -> None:
    """Add patches to the weights, in order: the same order gives the same bytes."""
    for patch in patches:
        for path, update in decode_adapter(patch.payload).modules.items():
            layer = base_layer(model, path)
            weight: Any = layer.weight
            B, A = update.B.to(weight.device), update.A.to(weight.device)
            weight.add_((B @ A).T if isinstance(layer, Conv1D) else B @ A)


class SideUpdates:
    """Frozen low-rank updates beside the weights of some layers, each added to its layer's output."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._hooks: list[Any] = []

    def put(self, modules: Mapping[str, LowRank]) -> None:
        """Replace whatever is there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for path, update in modules.items():
            layer = base_layer(self._model, path)
            device = next(layer.parameters()).device
            folded = update.folded()
            self._hooks.append(layer.register_forward_hook(_add(folded.B.to(device), folded.A.to(device))))


def _add(B: Tensor, A: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # in float32 whatever the base computes in: a patch may be smaller than what bfloat16 resolves
        side = (inputs[0].to(A.dtype) @ A.T) @ B.T
        return (output.to(side.dtype) + side).to(output.dtype)

    return hook


def base_layer(model: nn.Module, path: str) -> Any:
    """The base's own layer, whether or not PEFT has wrapped it."""
    layer = model.get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _plain(layer: nn.Module) -> bool:
    # bitsandbytes' layers are subclasses of Linear with other weights
    return type(layer) in (nn.Linear, Conv1D) and layer.weight.dtype == torch.float32
