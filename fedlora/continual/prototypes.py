"""Class means of a client's features: the local half of heads that are made instead of trained."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedlora.adapter.peft import inspecting
from fedlora.data.text import Example
from fedlora.errors import FedLoRAError
from fedlora.seeds import derive_seed
from fedlora.training.batches import collate
from fedlora.training.methods import LOCAL_METHODS, Answer, Local, LocalMethod, Memory, Start, Tensors
from fedlora.training.objective import targets_and_logits

BATCH = 64


@LOCAL_METHODS.register("prototypes")
class Prototypes(LocalMethod):
    """Holds the last layer of the head still, and answers with the mean feature of every label.

    What the strategy sends, ``<path of the layer>/means`` [C, d] and ``/shares`` [C], comes back filled in: the mean
    input of that layer over the client's rows of each label, after training, and the label's share of the rows that
    were looked at. With ``/covariance`` [d, d], so does that of the inputs around these means. All of it stays as small
    as one row however many there are, which the limit on the norm of an update asks for.

    Args:
        rows: at most so many are looked at; 0 for all.
    """

    channel = "prototypes"

    def __init__(self, rows: float = 0):
        self.rows = int(rows)

    def begin(self, start: Start) -> Memory:
        paths = {name.rpartition("/")[0] for name in start.extras}
        if len(paths) != 1 or start.local is None:
            raise FedLoRAError(f"prototypes: expected means and shares of one layer and rows to look at, came {paths}")
        (path,) = paths
        if f":{path}.weight" not in start.trained:
            raise FedLoRAError(f"prototypes: {path} is not among what this client trains in full")
        head = {name: start.tensors[name] for name in (f":{path}.weight", f":{path}.bias") if name in start.trained}
        return {"path": path, "head": head, "local": start.local, "pooled": f"{path}/covariance" in start.extras}

    def project(self, gradients: Tensors, raw: Tensors, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        still = {name: torch.zeros_like(g) for name, g in gradients.items() if name in memory["head"]}
        return {**gradients, **still}, memory

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        local, path = memory["local"], memory["path"]
        with torch.no_grad():
            for name, tensor in memory["head"].items():
                local.parameters[name].copy_(tensor)  # weight decay moves a parameter whatever its gradient is
        layer = _layer(local.model, local.parameters[f":{path}.weight"], path)
        rows = _chosen(local, self.rows)
        found, targets = head_inputs(local, layer, rows)
        means, shares = class_means(found, targets, layer.out_features)
        told = {f"{path}/means": means.float(), f"{path}/shares": shares.float()}
        if memory["pooled"]:
            apart = found - means[targets]
            told[f"{path}/covariance"] = (apart.T @ apart / max(len(found), 1)).float()
        return Answer(told)


def class_means(inputs: Tensor, targets: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows [n, d] of every label [C, d], zeros where it has none, and each label's share of them [C]."""
    counts = torch.bincount(targets, minlength=labels).to(inputs)
    sums = torch.zeros(labels, inputs.shape[1], dtype=inputs.dtype).index_add_(0, targets, inputs)
    return sums / counts.clamp(min=1)[:, None], counts / max(len(inputs), 1)


@torch.no_grad()
def head_inputs(local: Local, layer: nn.Linear, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What ``layer`` takes in of every row [n, d] in float64, and the row's label [n], shortest rows first.

    Dropout is off; the model is left as it was.

    Raises:
        FedLoRAError: if the layer's outputs are not the model's logits.
    """
    found, labels = [torch.zeros(0, layer.in_features, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    with _inputs_of(layer) as caught, inspecting(local.model):
        for start in range(0, len(ordered), BATCH):
            batch = collate(ordered[start : start + BATCH], local.pad_token_id, layer.weight.device)
            logits, targets, _ = targets_and_logits(local.model, batch)
            if logits.shape[1] != layer.out_features:
                raise FedLoRAError(
                    f"prototypes: the layer has {layer.out_features} outputs, and the model tells {logits.shape[1]}"
                    " labels apart; name the head's last layer in the strategy: {prototypes: {head: ...}}"
                )
            features = caught.pop()
            if features.ndim == 3:  # a head that runs at every position, of which one is read
                features = features[torch.arange(len(features)), _read_at(local, batch["input_ids"])]
            found.append(features.double().cpu())
            labels.append(targets.cpu())
    return torch.cat(found), torch.cat(labels)


def _chosen(local: Local, rows: int) -> Sequence[Example]:
    """All rows, or so many drawn from the task's seed."""
    if not rows or rows >= len(local.examples):
        return local.examples
    draw = random.Random(derive_seed(local.seed, 0, "", "prototypes"))
    return [local.examples[row] for row in draw.sample(range(len(local.examples)), rows)]


def _layer(model: nn.Module, weight: nn.Parameter, path: str) -> nn.Linear:
    """The layer a parameter belongs to; PEFT keeps one copy of a head per adapter."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is weight:
            return module
    raise FedLoRAError(f"prototypes: {path} is not a linear layer")


def _read_at(local: Local, ids: Tensor) -> Tensor:
    """The position [n] whose logits count: the last that is no padding, as transformers has it."""
    padding = getattr(local.model.config, "pad_token_id", None)
    present = ids != (local.pad_token_id if padding is None else padding)
    return (torch.arange(ids.shape[1], device=ids.device) * present).argmax(dim=1)


@contextlib.contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()
