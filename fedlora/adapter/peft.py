"""In and out of a live PeftModel."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora.adapter.directory import PREFIX
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import AdapterError

_CORE, _HOOK = "fedlora_core", "fedlora_core_hook"


def extract(model: nn.Module, adapter: str) -> AdapterState:
    """Copy an adapter out of a PeftModel, in effective units.

    Args:
        model: a ``PeftModel`` with LoRA layers.
        adapter: name of the adapter in it.
    """
    modules = {}
    for path, layer in _layers(model, adapter):
        modules[path] = LowRank(
            layer.lora_B[adapter].weight.detach().float().cpu() * float(layer.scaling[adapter]),
            layer.lora_A[adapter].weight.detach().float().cpu().clone(),
            None if (core := _core(layer, adapter)) is None else core.detach().float().cpu().clone(),
        )
    dense = {name: tensor.detach().float().cpu().clone() for name, tensor in _dense(model, adapter)}
    return AdapterState(modules, dense)


@torch.no_grad()
def insert(model: nn.Module, adapter: str, state: AdapterState) -> None:
    """Write a state into an adapter of a PeftModel; ``extract`` gives it back.

    Raises:
        AdapterError: if modules, ranks or shapes differ from the adapter's.
    """
    layers = dict(_layers(model, adapter))
    dense = dict(_dense(model, adapter))
    pairs = {path: LowRank(x.lora_B[adapter].weight, x.lora_A[adapter].weight) for path, x in layers.items()}
    current = AdapterState(pairs, dense)
    state.check_like(current, "the state")
    for path, update in state.modules.items():
        if update.rank != current.modules[path].rank:
            raise AdapterError(
                f"{path}: state of rank {update.rank} for an adapter of rank {current.modules[path].rank}"
            )
    for path, update in state.modules.items():
        pairs[path].B.copy_(update.B / float(layers[path].scaling[adapter]))
        pairs[path].A.copy_(update.A)
        _set_core(layers[path], adapter, update.C)
    for name, tensor in state.dense.items():
        dense[name].copy_(tensor)


def set_trainable(model: nn.Module, adapter: str, parts: frozenset[str]) -> list[nn.Parameter]:
    """Give gradients to exactly these parts of one adapter, and to nothing else in the model.

    PEFT makes every activated adapter trainable, so this is done from our own table each time.

    Returns:
        The trainable parameters, in a fixed order.
    """
    model.requires_grad_(False)
    chosen = []
    for _, layer in _layers(model, adapter):
        A, B, C = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, _core(layer, adapter)
        chosen += [tensor for part, tensor in (("A", A), ("B", B), ("C", C)) if part in parts]
    if "dense" in parts:
        chosen += [tensor for _, tensor in _dense(model, adapter)]
    parameters = [tensor for tensor in chosen if isinstance(tensor, nn.Parameter)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def train_mode(model: nn.Module, base_dropout: bool) -> None:
    """Training mode for the whole model, or for the adapters' own dropout alone."""
    model.train(base_dropout)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


@contextlib.contextmanager
def inspecting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a look at a model; every module is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def lora_layers(model: nn.Module, paths: Collection[str]) -> dict[str, LoraLayer]:
    """The adapted layers at these module paths, in the model's order."""
    found = ((_path(name), module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {path: layer for path, layer in found if path in paths}


def second_factors(model: nn.Module) -> list[nn.Parameter]:
    """B of every active adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer.lora_B[name].weight for layer in layers for name in layer.active_adapters if name in layer.lora_B]


def _path(name: str) -> str:
    return name.removeprefix(PREFIX)


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield _path(name), module


def _core(layer: LoraLayer, adapter: str) -> Tensor | None:
    core: Tensor | None = getattr(layer.lora_A[adapter], _CORE, None)
    return core


def _set_core(layer: LoraLayer, adapter: str, C: Tensor | None) -> None:
    """Put a core between the factors, which PEFT has no place for: what leaves A is multiplied by it."""
    down = layer.lora_A[adapter]
    if C is None:
        if _core(layer, adapter) is not None:
            getattr(down, _HOOK).remove()
            delattr(down, _CORE)
        return
    if _core(layer, adapter) is None:
        down.register_parameter(_CORE, nn.Parameter(torch.empty_like(C, device=down.weight.device)))
        hook = down.register_forward_hook(lambda module, _, out: out @ getattr(module, _CORE).T.to(out.dtype))
        setattr(down, _HOOK, hook)
    getattr(down, _CORE).copy_(C)


def _dense(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for parameter, tensor in module.modules_to_save[adapter].named_parameters():
                yield f"{_path(name)}.{parameter}", tensor
        elif isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            yield f"{_path(name)}.lora_magnitude_vector", module.lora_magnitude_vector[adapter].weight
