"""A local method that tells the server which directions a client's inputs lie in, and nothing else of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter.peft import inspecting, lora_layers
from fedlora.adapter.subspace import probes, sketch
from fedlora.data.text import Example
from fedlora.errors import FedLoRAError
from fedlora.seeds import derive_seed
from fedlora.training.batches import collate
from fedlora.training.methods import LOCAL_METHODS, Answer, Local, LocalMethod, Memory, Start, Tensors
from fedlora.training.objective import targets_and_logits

BATCH = 16  # rows that are run together


@LOCAL_METHODS.register("input_sketch")
class InputSketch(LocalMethod):
    """Answers ``path:Y`` [in, k] and ``path:trace`` [1] with a sketch of what each module takes in.

    It looks once, after the last step, without dropout, at the positions that are not padding. See
    ``fedlora.adapter.subspace.sketch`` for the numbers.

    Args:
        rows: of the client's that are looked at, drawn from its seed; all where it has fewer.
    """

    channel = "inputs"

    def __init__(self, rows: float = 64):
        self.rows = int(rows)

    def begin(self, start: Start) -> Memory:
        if start.extras and start.local is None:
            raise FedLoRAError("input_sketch: looks at a client's model and rows, and the start has none")
        return {"asked": start.extras, "local": start.local}

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        asked, local = memory["asked"], memory["local"]
        forms = {name[:-2]: tensor for name, tensor in asked.items() if name.endswith(":Y")}
        if not forms:
            return Answer()
        found = look(local, drawn(local, self.rows), forms)
        answer = {f"{path}:Y": Y for path, (Y, _) in found.items()}
        return Answer(answer | {f"{path}:trace": trace for path, (_, trace) in found.items()})


def drawn(local: Local, rows: int) -> list[Example]:
    """At most so many of a client's rows, the same for the same seed."""
    draw = torch.Generator().manual_seed(derive_seed(local.seed, 0, "", "input sketch"))
    return [local.examples[row] for row in torch.randperm(len(local.examples), generator=draw)[:rows].tolist()]


@torch.no_grad()
def look(local: Local, rows: Sequence[Example], forms: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Sketches of the inputs that some adapted modules see on these rows.

    Args:
        rows: at least one.
        forms: a tensor [in, k] of any values by path of the module.

    Returns:
        Y [in, k] and trace [1] by path, in float32 on the CPU; zeros for a module that saw nothing.

    Raises:
        FedLoRAError: for a module that has no adapter.
    """
    device = next(local.model.parameters()).device
    sums = {path: _Sum(path, form, device) for path, form in forms.items()}
    layers = lora_layers(local.model, sums)
    if unknown := sorted(sums.keys() - layers.keys()):
        raise FedLoRAError(f"input_sketch: {unknown[0]} has no adapter on this client ({len(unknown)} such modules)")
    with inspecting(local.model), contextlib.ExitStack() as hooks:
        for path, total in sums.items():
            layer: Any = layers[path]
            hooks.callback(layer.register_forward_pre_hook(total.take).remove)
        for first in range(0, len(rows), BATCH):
            batch = collate(rows[first : first + BATCH], local.pad_token_id, device)
            for total in sums.values():
                total.mask = batch["attention_mask"].bool()
            targets_and_logits(local.model, batch)
    return {path: total.mean() for path, total in sums.items()}


class _Sum:
    """Sketches of batches, weighted by their positions."""

    def __init__(self, path: str, form: Tensor, device: torch.device):
        self._omega = probes(path, *form.shape).float().to(device)
        self._Y = torch.zeros_like(self._omega, dtype=torch.float64)
        self._trace = torch.zeros(1, dtype=torch.float64, device=device)
        self._positions = 0
        self.mask = torch.empty(0)

    def take(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        X = inputs[0]
        # a layer behind the pooling sees rows, not positions
        X = X[self.mask] if X.shape[:-1] == self.mask.shape else X.reshape(-1, X.shape[-1])
        if len(X):
            Y, trace = sketch(X.float(), self._omega)
            self._Y += len(X) * Y
            self._trace += len(X) * trace
            self._positions += len(X)

    def mean(self) -> tuple[Tensor, Tensor]:
        share = 1 / max(self._positions, 1)
        return (share * self._Y).float().cpu(), (share * self._trace).float().cpu()
