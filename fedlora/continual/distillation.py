"""Learning without forgetting: the model as it was frozen goes on teaching its answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from fedlora.adapter.peft import inspecting, second_factors
from fedlora.training.methods import LOCAL_METHODS, Local, LocalMethod, Memory, Start, Tensors
from fedlora.training.objective import targets_and_logits


@LOCAL_METHODS.register("lwf")
class LwF(LocalMethod):
    """Adds ``weight * T^2 KL(teacher || model)`` over the labels of earlier tasks, at temperature T.

    The teacher is the base with everything that was frozen into it, without the active pair and with what is trained in
    full as it was at the last freeze: the model at the end of the task before, on whatever round and client. Nothing
    of it travels but the ledger. Where tasks share their labels, and for a language model, all labels count. Before the
    first freeze there is no teacher.

    Source: LwF (Li & Hoiem, 2016, arXiv 1606.09282), eq. 2 and 3, whose temperature is 2.
    """

    alone = True

    def __init__(self, weight: float, temperature: float):
        self.weight, self.temperature = weight, temperature

    def begin(self, start: Start) -> Memory:
        frozen = start.frozen() if self.weight else None
        if frozen is None or not frozen.modules or start.local is None:
            return {}
        anchors = {f":{name}": tensor for name, tensor in frozen.dense.items()}
        return {"local": start.local, "anchors": anchors}

    def distil(self, batch: Tensors, logits: Tensor, memory: Memory) -> Tensor | None:
        local: Local | None = memory.get("local")
        if local is None or local.earlier == ():
            return None  # nothing was frozen, or nothing of what was is this client's past
        labels = range(logits.shape[1]) if local.earlier is None else local.earlier
        kept = torch.tensor(labels, device=logits.device)
        with torch.no_grad(), inspecting(local.model), _as_frozen(local, memory["anchors"]):
            told = targets_and_logits(local.model, batch)[0][:, kept] / self.temperature
        said = logits[:, kept] / self.temperature
        distance = kl_div(said.log_softmax(dim=1), told.log_softmax(dim=1), reduction="sum", log_target=True)
        return self.weight * self.temperature**2 * distance


@contextlib.contextmanager
def _as_frozen(local: Local, anchors: Tensors) -> Iterator[None]:
    """The model as it was frozen: B = 0, and what is trained in full as it was then."""
    old = [(B, torch.zeros_like(B)) for B in second_factors(local.model)]
    old += [(p, anchors[name].to(p)) for name, p in local.parameters.items() if name in anchors]
    with _holding(old):
        yield


@contextlib.contextmanager
def _holding(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Parameters with other values. Their own come back, and a graph that has them in it stays whole."""
    own = [parameter.data for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value
        yield
    finally:
        for (parameter, _), data in zip(values, own, strict=True):
            parameter.data = data
