"""Adapters of many clients in one model: the base's layers run once over everybody's rows, the clients' own by bmm.

Every tensor of an adapter is a stack with the clients in front: A [K, r, in], B [K, out, r], C [K, r, r], frozen
components and what is trained in full [K, ...]. A client of a smaller rank has zeros in the rest of its factors, whose
gradients are zero.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora.adapter.directory import PREFIX
from fedlora.errors import FedLoRAError


class Rows:
    """Whose the rows of a pass are: those of each client stand together, in the order of the stacks."""

    def __init__(self) -> None:
        self.counts: tuple[int, ...] = ()
        self._places: Tensor | None = None

    def set(self, counts: Sequence[int], device: torch.device) -> None:
        """The clients at the front of the stacks have so many rows each, at least one."""
        self.counts, self._places = tuple(counts), None
        most = max(counts)
        if min(counts) < most:
            # [K, most]: the row of each place, and the row after the last one where a client has no more
            first = torch.tensor([0, *counts]).cumsum(0)[:-1]
            offsets = torch.arange(most).expand(len(counts), most)
            missing = offsets >= torch.tensor(counts)[:, None]
            self._places = (first[:, None] + offsets).masked_fill(missing, sum(counts)).to(device)

    @property
    def even(self) -> bool:
        """Whether all have equally many rows, so that ``split`` is but another view."""
        return self._places is None

    def split(self, x: Tensor) -> Tensor:
        """[rows, ..., d] to [K, n, d], padded with zeros where clients have unequally many rows."""
        if len(x) != sum(self.counts):
            raise FedLoRAError(f"a layer saw {len(x)} rows of {sum(self.counts)}; it cannot be trained in a cohort")
        if self._places is not None:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self._places]
        return x.reshape(len(self.counts), -1, x.shape[-1])

    def join(self, y: Tensor, like: Tensor) -> Tensor:
        """Inverse of ``split`` for an output [K, n, d] of an input ``like`` [rows, ..., d']."""
        y = y.reshape(len(self.counts), -1, *like.shape[1:-1], y.shape[-1])
        if self._places is None:
            return y.flatten(0, 1)
        return y[self._places < sum(self.counts)]


class StackedLora(nn.Module):
    """A layer of the base, and beside it ``scaling * B C A x`` with the factors of each row's client."""

    def __init__(self, layer: LoraLayer, adapter: str, stacks: Mapping[str, Tensor], path: str, rows: Rows):
        super().__init__()
        self.base_layer, self.dropout = layer.get_base_layer(), layer.lora_dropout[adapter]
        self._stacks, self._path, self._rows = stacks, path, rows
        self._scaling = float(layer.scaling[adapter])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        count = len(self._rows.counts)
        A, B = (self._stacks[f"{self._path}:{part}"] for part in "AB")
        C = self._stacks.get(f"{self._path}:C")
        inner = torch.bmm(self._rows.split(self.dropout(x.to(A.dtype))), A[:count].transpose(1, 2))
        if C is not None:
            inner = torch.bmm(inner, C[:count].transpose(1, 2))
        pairs = [(inner, B[:count].transpose(1, 2), self._scaling)]
        if f"{self._path}:frozen.A" in self._stacks:
            down, up = (self._stacks[f"{self._path}:frozen.{part}"][:count].transpose(1, 2) for part in "AB")
            pairs.append((torch.bmm(self._rows.split(x.to(A.dtype)), down), up, 1.0))
        if self._rows.even and y.dtype == A.dtype:
            whole = self._rows.split(y)
            for left, right, alpha in pairs:  # added where it is multiplied: no tensor of this size in between
                whole = torch.baddbmm(whole, left, right, alpha=alpha)
            return whole.reshape(y.shape)
        own, *beside = (torch.bmm(left, right) * alpha for left, right, alpha in pairs)
        own = own + beside[0] if beside else own
        return (y + self._rows.join(own, x)).to(y.dtype)


class StackedLinear(nn.Module):
    """A linear layer that every client has its own of."""

    def __init__(self, stacks: Mapping[str, Tensor], name: str, rows: Rows):
        super().__init__()
        self._stacks, self._name, self._rows = stacks, name, rows

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._stacks[f":{self._name}.weight"], self._stacks.get(f":{self._name}.bias")
        count = len(self._rows.counts)
        y = torch.bmm(self._rows.split(x.to(weight.dtype)), weight[:count].transpose(1, 2))
        y = y if bias is None else y + bias[:count, None]
        return self._rows.join(y, x)


@dataclass(frozen=True)
class Place:
    """A module of the model that a stack stands in for."""

    parent: nn.Module
    name: str
    module: nn.Module
    path: str


def places(model: nn.Module, adapter: str) -> list[Place]:
    """Every module that holds a part of an adapter."""
    found = []
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            holds = isinstance(child, LoraLayer) and adapter in child.lora_A
            if holds or (isinstance(child, ModulesToSaveWrapper) and adapter in child.modules_to_save):
                found.append(Place(parent, name, child, f"{path}.{name}".removeprefix(PREFIX)))
    return found


def why_not(model: nn.Module, adapter: str) -> str | None:
    """Why this adapter cannot be one of a stack; None where it can."""
    for place in places(model, adapter):
        if isinstance(place.module, LoraLayer):
            if adapter in place.module.lora_variant:
                return f"{place.path} has an adapter of another kind than A and B, such as DoRA"
            continue
        assert isinstance(place.module, ModulesToSaveWrapper)
        for name, module in place.module.modules_to_save[adapter].named_modules():
            if next(module.parameters(recurse=False), None) is not None and type(module) is not nn.Linear:
                return f"{place.path}{name and '.'}{name} is trained in full and is a {type(module).__name__}"
    return None


@contextlib.contextmanager
def stacked(model: nn.Module, adapter: str, stacks: Mapping[str, Tensor], rows: Rows) -> Iterator[None]:
    """The model with the stacks in the place of one adapter; afterwards the very modules that were there are back.

    Args:
        stacks: by tensor name, see ``AdapterState.tensors``, in PEFT's units.
        rows: set before every pass.
    """
    found = places(model, adapter)
    try:
        for place in found:
            setattr(place.parent, place.name, _stand_in(place, adapter, stacks, rows))
        yield
    finally:
        for place in found:
            setattr(place.parent, place.name, place.module)


def _stand_in(place: Place, adapter: str, stacks: Mapping[str, Tensor], rows: Rows) -> nn.Module:
    if isinstance(place.module, LoraLayer):
        return StackedLora(place.module, adapter, stacks, place.path, rows)
    assert isinstance(place.module, ModulesToSaveWrapper)
    return _with_stacks(place.module.modules_to_save[adapter], place.path, stacks, rows)


def _with_stacks(module: nn.Module, path: str, stacks: Mapping[str, Tensor], rows: Rows) -> nn.Module:
    """A copy of a module whose linear layers are the clients' own."""
    if isinstance(module, nn.Linear):
        return StackedLinear(stacks, path, rows)
    shallow = copy.copy(module)
    shallow._modules = {
        name: child and _with_stacks(child, f"{path}.{name}", stacks, rows) for name, child in module._modules.items()
    }
    return shallow
