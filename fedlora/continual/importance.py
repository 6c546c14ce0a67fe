"""How much the model depends on each weight of its base, and a penalty on changing what it depends on.

The active update of a module, ``dW = B A``, starts at zero when the pair before it is frozen, so ``dW`` is what the
present task has changed so far, and a quadratic penalty in update space is

    weight / 2 * sum_ij Omega_ij dW_ij^2,    Omega = mean over rows of G * G,    G = D^T X

with X [tokens, in] the inputs of the module and D [tokens, out] the gradient of an objective in its outputs. Omega
itself is as large as the base. What is kept, sent and added up over tasks are its row sums R and column sums C, from
which the best non-negative approximation of rank one is ``R C^T / sum(R)``; neither Omega nor ``B A`` is ever formed.

Source: EWC (Kirkpatrick et al., 2017, arXiv 1612.00796), MAS (Aljundi et al., 2018, arXiv 1711.09601), Online-LoRA (Wei
et al., 2024, arXiv 2411.05663); sums of rows and columns as in Adafactor (Shazeer & Stern, 2018, arXiv 1804.04235).
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting, lora_layers
from fedlora.aggregation.combine import part_of
from fedlora.data.text import Example
from fedlora.seeds import derive_seed
from fedlora.training.batches import collate
from fedlora.training.evaluate import HARD_POOL, hardest
from fedlora.training.methods import LOCAL_METHODS, Answer, Local, LocalMethod, Memory, Start, Tensors
from fedlora.training.objective import among, targets_and_logits

_BATCH = 16


class Importance(LocalMethod):
    """Penalises changes of important weights, and measures importance once the client has trained.

    Args:
        weight: of the penalty.
        samples: rows that importance is measured on.
    """

    channel = "importance"

    def __init__(self, weight: float, samples: float):
        self.weight, self.samples = weight, int(samples)

    @abstractmethod
    def objective(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """What importance is the squared gradient of, for one row: logits [N, C], targets [N] to a number.

        A mean over the row's targets: long rows would otherwise count by the square of their length.
        """

    def choose(self, local: Local) -> Sequence[Example]:
        """The rows to measure on, drawn from the seed."""
        rows = list(local.examples)
        draw = random.Random(derive_seed(local.seed, 0, "", "importance"))
        return draw.sample(rows, min(self.samples, len(rows)))

    def begin(self, start: Start) -> Memory:
        found = start.extras
        paths = sorted({name.rpartition(":")[0] for name in found if part_of(name) in ("rows", "columns")})
        like = next(iter(start.tensors.values()))
        sums = {path: (found[f"{path}:rows"].to(like), found[f"{path}:columns"].to(like)) for path in paths}
        anchors = {f":{name}": tensor.to(like) for name, tensor in start.frozen().dense.items()}
        dense = {n: t.to(like) for n, t in found.items() if n in start.trained and n in anchors and t.any()}
        return {
            "sums": {path: (R, C) for path, (R, C) in sums.items() if R.any()},
            "dense": {name: (omega, anchors[name]) for name, omega in dense.items()},
            "fixed": {name: tensor for name, tensor in start.tensors.items() if name not in start.trained},
            "scaling": start.scaling,
            "asked": found,
            "local": start.local,
        }

    def penalty(self, tensors: Tensors, memory: Memory) -> Tensor | None:
        pairs = {**memory["fixed"], **tensors}
        found = []
        for path, (R, C) in memory["sums"].items():
            B, A = pairs[f"{path}:B"], pairs[f"{path}:A"]
            if f"{path}:C" in pairs:
                B = B @ pairs[f"{path}:C"]
            # sum_ij R_i C_j (B A)_ij^2 = <B^T diag(R) B, A diag(C) A^T>
            found.append(memory["scaling"] ** 2 * ((B.T * R) @ B * ((A * C) @ A.T)).sum() / R.sum())
        found += [
            (omega * (tensors[name] - anchor).square()).sum() for name, (omega, anchor) in memory["dense"].items()
        ]
        return self.weight / 2 * torch.stack(found).sum() if found else None

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        local: Local = memory["local"]
        rows = self.choose(local)
        asked: Tensors = memory["asked"]
        measured = measure(local, rows, self.objective, {name.rpartition(":")[0] for name in asked} - {""})
        return Answer({name: measured.get(name, torch.zeros_like(like)).cpu() for name, like in asked.items()})


@LOCAL_METHODS.register("ewc")
class EWC(Importance):
    """The diagonal of the Fisher information: labels are drawn from what the model itself predicts."""

    def objective(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator)[:, 0]
        return cross_entropy(logits, drawn.to(targets))


@LOCAL_METHODS.register("mas")
class MAS(Importance):
    """Sensitivity of the mean squared output, whatever the labels; squared gradients in the place of absolute ones."""

    def objective(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return logits[logits.isfinite()].square().mean()


@LOCAL_METHODS.register("online_lora")
class OnlineLoRA(Importance):
    """Squared gradients of the loss on a small buffer of the hardest rows, which stays on the client."""

    def objective(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(logits, targets)

    def choose(self, local: Local) -> Sequence[Example]:
        rows = list(local.examples)
        draw = random.Random(derive_seed(local.seed, 0, "", "importance"))
        pool = draw.sample(rows, min(HARD_POOL * self.samples, len(rows)))
        device = next(iter(local.parameters.values())).device
        return hardest(pool, self.samples, local.model, _BATCH, local.pad_token_id, device, local.labels)


def measure(local: Local, rows: Sequence[Example], objective: Any, paths: set[str]) -> dict[str, Tensor]:
    """Mean squared gradients of an objective over rows, one row at a time.

    Args:
        objective: logits [N, C], targets [N] and a generator to a number.
        paths: of the modules whose base weights are looked at.

    Returns:
        ``<path>:rows`` [out] and ``<path>:columns`` [in], the sums of Omega over a module's columns and rows, and
        ``:<name>``, Omega itself, for every tensor that is trained in full.
    """
    layers = lora_layers(local.model, paths)
    dense = {name: parameter for name, parameter in local.parameters.items() if part_of(name) == "dense"}
    device = next(iter(local.parameters.values())).device
    generator = torch.Generator().manual_seed(derive_seed(local.seed, 0, "", "sampled labels"))
    totals: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = inputs[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        with inspecting(local.model), torch.enable_grad():
            for row in rows:
                logits, targets, _ = targets_and_logits(local.model, collate([row], local.pad_token_id, device))
                value = objective(among(logits, local.labels), targets, generator)
                wanted = [*(output for _, output in seen.values()), *dense.values()]
                gradients = torch.autograd.grad(value, wanted, allow_unused=True)
                for (path, (X, _)), D in zip(seen.items(), gradients[: len(seen)], strict=True):
                    if D is not None:
                        _add(totals, path, X.flatten(0, -2).float(), D.flatten(0, -2).float())
                for name, gradient in zip(dense, gradients[len(seen) :], strict=True):
                    if gradient is not None:
                        totals[f"{name}"] = totals.get(name, 0.0) + gradient.float().square()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: total / len(rows) for name, total in totals.items()}
    return {**_nothing(layers, dense), **found}


def _add(totals: dict[str, Tensor], path: str, X: Tensor, D: Tensor) -> None:
    """Add the row and column sums of G * G for G = D^T X, from two [tokens, tokens] products."""
    rows = ((X @ X.T) @ D * D).sum(dim=0)
    columns = ((D @ D.T) @ X * X).sum(dim=0)
    totals[f"{path}:rows"] = totals.get(f"{path}:rows", 0.0) + rows.clamp(min=0)
    totals[f"{path}:columns"] = totals.get(f"{path}:columns", 0.0) + columns.clamp(min=0)


def _nothing(layers: Mapping[str, Any], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for whatever no gradient reached."""
    found = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in dense.items()}
    for path, layer in layers.items():
        found[f"{path}:rows"] = torch.zeros(layer.out_features)
        found[f"{path}:columns"] = torch.zeros(layer.in_features)
    return found
