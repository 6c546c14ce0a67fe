"""Local methods: what changes a client's gradients between the backward pass and the step.

A hook is a pure function of named tensors: parameters go by their names in ``AdapterState.tensors`` and are in
PEFT's units, where a module's update is ``scaling * B @ A``. What a method must remember goes in and comes out as
its ``memory``. So the same hooks serve a loop over one client and a trainer that maps them over many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from fedlora.adapter.peft import extract, set_trainable
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.combine import part_of
from fedlora.data.text import Example
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.protocol import Method
from fedlora.registry import Registry

Tensors: TypeAlias = Mapping[str, Tensor]
Memory: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Local:
    """A client's model and rows, for methods that look at them. The model is left as it was found.

    Attributes:
        model: with the client's adapter active.
        parameters: the trained ones, by tensor name.
        examples: what it trains on, buffered rows included.
        pad_token_id: of the tokenizer.
        labels: those that compete in a classifier's loss; all where empty.
        earlier: those of tasks before the present one; None where every task has the same, or rows have none.
        seed: of the client's task.
    """

    model: Any
    parameters: Mapping[str, nn.Parameter]
    examples: Sequence[Example]
    pad_token_id: int
    labels: tuple[int, ...] = ()
    earlier: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Start:
    """What a method may know before the first step.

    Attributes:
        tensors: the whole adapter as the client starts, by name, in PEFT's units.
        trained: names of the tensors that get gradients.
        shared: names of those that are trained and travel to the server.
        scaling: ``scaling * B`` is B in effective units; everything else is in effective units already.
        extras: what the strategy sent this method, by tensor name, in effective units.
        kept: what this method kept after the client's last round; empty before the first.
        frozen: gives what has gone into the base so far, and what was trained in full as it was the last time.
        local: the client's model and rows.
    """

    tensors: Tensors
    trained: frozenset[str]
    shared: frozenset[str]
    scaling: float = 1.0
    extras: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    frozen: Callable[[], AdapterState] = AdapterState
    local: Local | None = None

    def unit(self, name: str) -> float:
        """Effective units per PEFT unit of a tensor. Its gradient in effective units is that in PEFT's over this."""
        return unit(name, self.scaling)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method leaves after the last step.

    Attributes:
        extras: the answer to ``Start.extras``, with the same names and shapes.
        kept: what the client keeps for its next round; names that are absent stay as they were.
    """

    extras: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)


class LocalMethod(Protocol):
    """Hooks of local training; a method overrides those it needs.

    Attributes:
        channel: prefix of the strategy's extra tensors that are for this method; empty if there are none.
        keeps: whether it keeps tensors on the client from round to round.
        data_weight: of the data's loss beside what methods add to it; those of several are multiplied.
        alone: whether it runs the client's model between ``begin`` and ``finish``; its client then trains alone.
    """

    channel: str = ""
    keeps: bool = False
    data_weight: float = 1.0
    alone: bool = False

    def begin(self, start: Start) -> Memory:
        """The memory before the first step."""
        return {}

    def penalty(self, tensors: Tensors, memory: Memory) -> Tensor | None:
        """A number to be minimised beside the loss, differentiable in ``tensors``, the trained ones.

        Its gradient joins that of the loss; the reported loss stays that of the data.
        """
        return None

    def distil(self, batch: Tensors, logits: Tensor, memory: Memory) -> Tensor | None:
        """A sum over a batch's targets to be minimised beside that of the data, differentiable in ``logits``.

        Args:
            batch: input_ids, attention_mask and labels, see ``collate``.
            logits: of every target [N, C], before any label is masked.
        """
        return None

    def project(self, gradients: Tensors, raw: Tensors, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        """The gradients to go on with, before clipping, and the memory after this step.

        Args:
            gradients: as penalties and the methods before this one left them.
            raw: of the data loss, weighted, with what is distilled, alone.
            tensors: the trained parameters.
        """
        return gradients, memory

    def constrain(self, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        """The parameters to go on with after a step, by name - what is left out stays -, and the memory then.

        Args:
            tensors: the trained parameters as the step and the methods before this one left them.
        """
        return {}, memory

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        """What is sent and kept, given the trained parameters."""
        return Answer()


LOCAL_METHODS: Registry[LocalMethod] = Registry("local method")


@LOCAL_METHODS.register("fedprox")
class FedProx(LocalMethod):
    """Adds the gradient of ``mu / 2 ||x - start||^2``, in effective units.

    With plain SGD, steps overshoot where ``learning_rate * mu * scaling^2`` is above 2.

    Source: FedProx (Li et al., 2020, arXiv 1812.06127), eq. 2.
    """

    def __init__(self, mu: float):
        self.mu = mu

    def begin(self, start: Start) -> Memory:
        own = {name: start.tensors[name] for name in start.trained}
        return {"start": own, "pull": {name: self.mu * start.unit(name) ** 2 for name in own}}

    def project(self, gradients: Tensors, raw: Tensors, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        start, pull = memory["start"], memory["pull"]
        return {name: g + pull[name] * (tensors[name] - start[name]) for name, g in gradients.items()}, memory


@LOCAL_METHODS.register("scaffold")
class Scaffold(LocalMethod):
    """Corrects every gradient by ``c - c_k``: the server's control variate less the client's own.

    The new ``c_k`` is the mean over the round's steps of the gradient of the data loss; what travels is its change.
    Only tensors that are trained and sent have control variates.

    Source: SCAFFOLD (Karimireddy et al., 2020, arXiv 1910.06378), algorithm 1; under plain SGD this is its option II.
    """

    channel = "control"
    keeps = True

    def begin(self, start: Start) -> Memory:
        if odd := sorted(start.shared ^ set(start.extras)):
            what = "was not sent" if odd[0] in start.shared else "was sent for a tensor that is not trained and sent on"
            raise FedLoRAError(f"scaffold: control/{odd[0]} {what} ({len(odd)} such tensors)")
        units = {name: start.unit(name) for name in sorted(start.shared)}
        like = {name: start.tensors[name].float() for name in units}
        own = {name: fitted(start.kept.get(name), like[name]) for name in units}
        control = {name: start.extras[name].to(like[name]) for name in units}
        return {
            "own": own,
            "correction": {name: units[name] * (control[name] - own[name]) for name in units},
            "sum": {name: torch.zeros_like(tensor) for name, tensor in like.items()},
            "steps": 0,
            "units": units,
        }

    def project(self, gradients: Tensors, raw: Tensors, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        correction, total = memory["correction"], memory["sum"]
        summed = {name: sum_ + raw[name] if name in raw else sum_ for name, sum_ in total.items()}
        corrected = {name: g + correction[name].to(g) if name in correction else g for name, g in gradients.items()}
        return corrected, {**memory, "sum": summed, "steps": memory["steps"] + 1}

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        own, units, steps = memory["own"], memory["units"], memory["steps"]
        new = {name: total / (steps * units[name]) for name, total in memory["sum"].items()}
        return Answer({name: (new[name] - own[name]).cpu() for name in new}, {n: t.cpu() for n, t in new.items()})


@LOCAL_METHODS.register("tail_penalty")
class TailPenalty(LocalMethod):
    """``weight * sum over modules ||B[:, k:]|| ||A[k:, :]||`` with ``k = max(1, int(gamma * rank))``, effective units.

    Source: HetLoRA (Cho et al., 2024, arXiv 2401.06432), eq. 4.
    """

    def __init__(self, gamma: float, weight: float):
        self.gamma, self.weight = gamma, weight

    def begin(self, start: Start) -> Memory:
        ranks = {name[:-2]: A.shape[0] for name, A in start.tensors.items() if part_of(name) == "A"}
        kept = {path: max(1, int(self.gamma * rank)) for path, rank in ranks.items()}
        fixed = {name: tensor for name, tensor in start.tensors.items() if name not in start.trained}
        tails = {path: kept[path] for path, rank in ranks.items() if kept[path] < rank}
        return {"tails": tails, "fixed": fixed, "weight": self.weight * start.scaling}

    def penalty(self, tensors: Tensors, memory: Memory) -> Tensor | None:
        pairs = {**memory["fixed"], **tensors}
        # vector_norm has the gradient 0 at 0, where every run starts
        norms = [
            vector_norm(pairs[f"{path}:B"][:, kept:]) * vector_norm(pairs[f"{path}:A"][kept:])
            for path, kept in memory["tails"].items()
        ]
        return memory["weight"] * torch.stack(norms).sum() if norms else None


class MethodStack:
    """The methods of a plan as one, with one memory. Empty, it changes nothing.

    Args:
        methods: by name, as a plan has them.
        also: methods that no plan can name, such as one that holds rows; they come after those of the plan.

    Raises:
        ConfigError: an unknown method, options it does not take, or the same method twice.
    """

    def __init__(self, methods: Sequence[Method] = (), also: Mapping[str, LocalMethod] | None = None):
        names = [*(m.name for m in methods), *(also or {})]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"local method: {twice[0]} is asked for twice; name it once in the strategy")
        self._methods = {m.name: LOCAL_METHODS.create(m.name, **dict(m.options)) for m in methods} | dict(also or {})

    def __bool__(self) -> bool:
        return bool(self._methods)

    @property
    def keeps(self) -> bool:
        """Whether any of them keeps tensors from round to round."""
        return any(method.keeps for method in self._methods.values())

    @property
    def alone(self) -> bool:
        """Whether any of them wants the model to itself while the client trains."""
        return any(method.alone for method in self._methods.values())

    @property
    def data_weight(self) -> float:
        """Of the data's loss beside what methods add to it."""
        return math.prod(method.data_weight for method in self._methods.values())

    def begin(self, start: Start) -> Memory:
        """The memory before the first step. Names in ``start.extras`` and ``start.kept`` say whose they are.

        Raises:
            FedLoRAError: for an extra tensor that is for none of them.
        """
        channels = tuple(f"{method.channel}/" for method in self._methods.values() if method.channel)
        if unread := sorted(name for name in start.extras if not name.startswith(channels)):
            raise FedLoRAError(
                f"the strategy sent extra tensors that no local method of the plan answers: {', '.join(unread[:3])}"
                f" ({len(unread)} in all; methods: {', '.join(self._methods) or 'none'}); add the method to the plan"
            )
        return {
            name: method.begin(
                replace(start, extras=_below(method.channel, start.extras), kept=_below(name, start.kept))
            )
            for name, method in self._methods.items()
        }

    def distil(self, batch: Tensors, logits: Tensor, memory: Memory) -> Tensor | None:
        """What all of them add to a batch's loss; None where nothing is."""
        found = [method.distil(batch, logits, memory[key]) for key, method in self._methods.items()]
        values = [value for value in found if value is not None]
        return torch.stack(values).sum() if values else None

    def correct(self, raw: Tensors, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        """Gradients of the data loss to the gradients to step with, and the memory after this step."""
        gradients = dict(raw)
        for key, method in self._methods.items():
            for name, extra in _gradient(method, tensors, memory[key]).items():
                gradients[name] = gradients[name] + extra if name in gradients else extra
        after: dict[str, Memory] = {}
        changed: Tensors = gradients
        for key, method in self._methods.items():
            changed, after[key] = method.project(changed, raw, tensors, memory[key])
        return changed, after

    def constrain(self, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        """The parameters that all of them together move after a step, by name, and the memory then."""
        moved: Tensors = {}
        after: dict[str, Memory] = {}
        for key, method in self._methods.items():
            own, after[key] = method.constrain({**tensors, **moved}, memory[key])
            moved = {**moved, **own}
        return moved, after

    def finish(self, tensors: Tensors, memory: Memory) -> Answer:
        """What is sent and kept by all of them, under the names they came with."""
        extras: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for key, method in self._methods.items():
            answer = method.finish(tensors, memory[key])
            extras |= {f"{method.channel}/{name}": tensor for name, tensor in answer.extras.items()}
            kept |= {f"{key}/{name}": tensor for name, tensor in answer.kept.items()}
        return Answer(extras, kept)


def name_parameters(model: nn.Module, adapter: str, parts: frozenset[str]) -> dict[str, nn.Parameter]:
    """Give gradients to exactly these parts, see ``set_trainable``; the parameters by adapter tensor name."""
    parameters = set_trainable(model, adapter, parts)
    # both walk the model in the same order: A, B and C of each layer, then what is trained in full
    present = extract(model, adapter)
    names = []
    for path, update in present.modules.items():
        names += [f"{path}:{part}" for part in ("A", "B", "C") if part in parts and getattr(update, part) is not None]
    if "dense" in parts:
        names += [f":{name}" for name in present.dense]
    return dict(zip(names, parameters, strict=True))


def start_from(
    adapter: AdapterState, parameters: Mapping[str, nn.Parameter], scaling: float, send: frozenset[str]
) -> Start:
    """The start of a client that has ``adapter`` [effective units] in its model and trains ``parameters`` of it."""
    device = next(iter(parameters.values())).device
    fixed = {name: tensor.to(device) / unit(name, scaling) for name, tensor in adapter.tensors().items()}
    # the parameters themselves, not what was written into them: a difference to the start begins at exactly 0
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    shared = frozenset(name for name in own if part_of(name) in send)
    return Start({**fixed, **own}, frozenset(own), shared, scaling)


def unit(name: str, scaling: float) -> float:
    """Effective units per PEFT unit of a tensor: the scaling for B, else 1."""
    return scaling if part_of(name) == "B" else 1.0


def fitted(kept: Tensor | None, like: Tensor) -> Tensor:
    """What a client kept in the shape of ``like``: cut, or padded with zeros, where its rank has changed since."""
    own = torch.zeros_like(like)
    if kept is not None:
        overlap = tuple(slice(min(a, b)) for a, b in zip(kept.shape, like.shape, strict=True))
        own[overlap] = kept[overlap].to(own)
    return own


def _gradient(method: LocalMethod, tensors: Tensors, memory: Memory) -> Tensors:
    """Of a method's penalty, by tensor name; empty where it has none."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    value = method.penalty(leaves, memory)
    if value is None or not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _below(prefix: str, tensors: Tensors) -> Tensors:
    """Those named ``prefix/...``, without the prefix."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if prefix and n.startswith(f"{prefix}/")}
