"""Many clients in one pass: what ``loop.train`` does for one, for a whole cohort that shares a base.

Rows of all clients stand in one batch; base layers run once, each client's factors by batched matrix products over the
clients, and one optimizer works on the stacks. Equal to training each client alone up to rounding, but for dropout,
whose draws are those of the cohort.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import train_mode
from fedlora.config import TrainingConfig
from fedlora.data.text import Example
from fedlora.errors import FedLoRAError
from fedlora.seeds import derive_seed
from fedlora.training.batches import collate, steps_of
from fedlora.training.loop import LocalResult, endless, targets_of
from fedlora.training.methods import Memory, MethodStack, Tensors
from fedlora.training.objective import among, targets_and_logits
from fedlora.training.stacked import Rows, stacked
from fedlora.training.steps import StackedOptimizer, schedule


@dataclass(frozen=True, eq=False)
class Member:
    """One client of a cohort.

    Attributes:
        tensors: its whole adapter as it starts, frozen components included, by tensor name, in PEFT's units.
        examples: at least one row.
        seed: of batch order.
        methods, memory: local methods that need no model of their own, and what they begin with.
        labels: that compete in a classifier's loss; all where empty.
    """

    tensors: Tensors
    examples: Sequence[Example]
    seed: int
    methods: MethodStack = field(default_factory=MethodStack)
    memory: Memory = field(default_factory=dict)
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Trained:
    """What a member came to: its tensors in PEFT's units and its numbers; or why it failed, which costs it alone."""

    tensors: Tensors
    result: LocalResult | None
    error: FedLoRAError | None = None


def train_cohort(
    model: Any,
    adapter: str,
    members: Sequence[Member],
    trained: frozenset[str],
    options: TrainingConfig,
    pad_token_id: int,
) -> list[Trained]:
    """Train every member, from its own tensors, on its own rows.

    Args:
        model: with any adapter whose modules are those of the members; its own values play no part and stay.
        trained: names of the tensors that get gradients, the same for all members.

    Returns:
        One answer per member, in their order.
    """
    steps = [_steps(member, options) for member in members]
    order = sorted(range(len(members)), key=lambda k: -steps[k])  # whoever is done first stands last
    run = _Run(model, adapter, [members[k] for k in order], [steps[k] for k in order], trained, options, pad_token_id)
    answers = dict(zip(order, run.play(), strict=True))
    return [answers[k] for k in range(len(members))]


def _steps(member: Member, options: TrainingConfig) -> int:
    if not member.examples:
        raise FedLoRAError("there are no rows to train on")
    how = options.per_device_train_batch_size, options.gradient_accumulation_steps
    return steps_of(len(member.examples), *how, options.max_steps, options.num_train_epochs)


class _Run:
    """One cohort, longest members first: at every step those that still train stand at the front of the stacks."""

    def __init__(
        self,
        model: Any,
        adapter: str,
        members: Sequence[Member],
        steps: Sequence[int],
        trained: frozenset[str],
        options: TrainingConfig,
        pad_token_id: int,
    ):
        self.model, self.adapter, self.members, self.steps = model, adapter, members, steps
        self.options, self.pad_token_id = options, pad_token_id
        names = dict.fromkeys(name for member in members for name in member.tensors)
        self.stacks = {name: _stack([member.tensors.get(name) for member in members]) for name in names}
        self.trained = {name: self.stacks[name].requires_grad_() for name in sorted(trained)}
        self.device = next(iter(self.stacks.values())).device
        self.memories = [member.memory for member in members]
        self.losses: list[list[float]] = [[] for _ in members]
        self.tokens, self.rows = [0] * len(members), [0] * len(members)
        self.failed: dict[int, FedLoRAError] = {}

    def play(self) -> list[Trained]:
        options, where = self.options, Rows()
        rates = [schedule(options, steps) for steps in self.steps]
        optimizer = StackedOptimizer(self.trained, options)
        streams = [endless(member.examples, options, member.seed) for member in self.members]
        train_mode(self.model, options.base_dropout)
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            stacked(self.model, self.adapter, self.stacks, where),
        ):
            torch.manual_seed(derive_seed(self.members[0].seed, len(self.members), "", "dropout"))
            for step in range(max(self.steps)):
                count = sum(steps > step for steps in self.steps)
                parts = [
                    list(itertools.islice(stream, options.gradient_accumulation_steps)) for stream in streams[:count]
                ]
                self._backward(parts, where)
                gradients = {name: _gradient(tensor)[:count] for name, tensor in self.trained.items()}
                self._correct(gradients, count)
                with torch.no_grad():
                    rate = torch.tensor([rates[k][step] for k in range(count)], dtype=torch.float64, device=self.device)
                    optimizer.step(gradients, rate)
                    self._constrain(count)
                for tensor in self.trained.values():
                    tensor.grad = None
        return [self._answer(k) for k in range(len(self.members))]

    def _backward(self, parts: Sequence[Sequence[Sequence[Example]]], where: Rows) -> None:
        """Gradients of one step of those who still train; ``parts`` are the micro-batches of each."""
        totals = [sum(targets_of(example) for part in own for example in part) for own in parts]
        sums: Tensor | float = 0.0
        for batches in zip(*parts, strict=True):
            counts = [len(batch) for batch in batches]
            where.set(counts, self.device)
            batch = collate([example for own in batches for example in own], self.pad_token_id, self.device)
            logits, targets, rows = targets_and_logits(self.model, batch)
            owner = torch.repeat_interleave(torch.tensor(counts, device=self.device))[rows]
            costs = self._costs(logits, targets, owner)
            scale = 1 / torch.tensor(totals, dtype=costs.dtype, device=self.device)
            own = costs.new_zeros(len(parts)).index_add(0, owner, costs)
            sums = sums + own.detach() * scale
            alive = [k for k in range(len(parts)) if k not in self.failed]
            weights = costs.new_tensor([member.methods.data_weight for member in self.members[: len(parts)]])
            loss = (own * scale * weights)[alive].sum() + self._distilled(batch, logits, rows, owner, counts, totals)
            if loss.requires_grad:
                loss.backward()
            mask = batch["attention_mask"].sum(1).split(counts)
            for k, seen in enumerate(mask):
                self.tokens[k] += int(seen.sum())
                self.rows[k] += counts[k]
        assert isinstance(sums, Tensor)
        for k, value in enumerate(sums.tolist()):
            self.losses[k].append(value)
            if not math.isfinite(value) and k not in self.failed:
                at = f"step {len(self.losses[k])} of {self.steps[k]}"
                self.failed[k] = FedLoRAError(f"the loss became {value} at {at}; lower training.learning_rate")

    def _costs(self, logits: Tensor, targets: Tensor, owner: Tensor) -> Tensor:
        """The loss of every target [N]."""
        if not any(member.labels for member in self.members):
            return cross_entropy(logits, targets, reduction="none")
        costs = logits.new_zeros(len(targets))
        for k in owner.unique().tolist():
            mine = (owner == k).nonzero().squeeze(1)
            own = cross_entropy(among(logits[mine], self.members[k].labels), targets[mine], reduction="none")
            costs = costs.index_add(0, mine, own)
        return costs

    def _distilled(
        self, batch: Tensors, logits: Tensor, rows: Tensor, owner: Tensor, counts: Sequence[int], totals: Sequence[int]
    ) -> Tensor | float:
        """What local methods add to the loss."""
        added: Tensor | float = 0.0
        for k, (first, count) in enumerate(zip(itertools.accumulate(counts, initial=0), counts, strict=False)):
            if self.members[k].methods and k not in self.failed:
                own = {name: tensor[first : first + count] for name, tensor in batch.items()}
                value = self.members[k].methods.distil(own, logits[owner == k], self.memories[k])
                added = added if value is None else added + value / totals[k]
        return added

    def _correct(self, gradients: Mapping[str, Tensor], count: int) -> None:
        """Local methods, then clipping, in place."""
        for k in range(count):
            if self.members[k].methods and k not in self.failed:
                raw, own = self._own(gradients, k), self._own(self.trained, k)
                changed, self.memories[k] = self.members[k].methods.correct(
                    _copies(raw), _detached(own), self.memories[k]
                )
                for name, gradient in changed.items():
                    raw[name].copy_(gradient)
        for k in self.failed:
            for gradient in gradients.values():
                gradient[k : k + 1] = 0.0
        if limit := self.options.max_grad_norm:
            squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
            factor = (limit / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
            for gradient in gradients.values():
                gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))

    def _constrain(self, count: int) -> None:
        for k in range(count):
            if self.members[k].methods and k not in self.failed:
                own = _detached(self._own(self.trained, k))
                moved, self.memories[k] = self.members[k].methods.constrain(own, self.memories[k])
                for name, tensor in moved.items():
                    own[name].copy_(tensor)

    def _own(self, stacks: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """One member's part of some stacks, without the padding: views."""
        mine = {name: tensor.shape for name, tensor in self.members[k].tensors.items() if name in stacks}
        return {name: stacks[name][k][tuple(map(slice, shape))] for name, shape in mine.items()}

    def _answer(self, k: int) -> Trained:
        tensors = _copies(_detached(self._own(self.stacks, k)))
        if k in self.failed:
            return Trained(tensors, None, self.failed[k])
        losses = self.losses[k]
        told = self.steps[k], self.tokens[k], self.rows[k], sum(losses) / len(losses), losses[0], self.memories[k]
        return Trained(tensors, LocalResult(*told))


def _stack(tensors: Sequence[Tensor | None]) -> Tensor:
    """[K, ...] of tensors that may differ in rank, or be missing, padded with zeros."""
    present = {k: tensor.detach() for k, tensor in enumerate(tensors) if tensor is not None}
    like = next(iter(present.values()))
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in present.values()), strict=True)]
    whole = like.new_zeros(len(tensors), *shape)
    for k, tensor in present.items():
        whole[k][tuple(map(slice, tensor.shape))] = tensor
    return whole


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
