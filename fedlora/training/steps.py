"""One optimizer for a stack of clients: every client with its own learning rate, as many steps as it has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from fedlora.config import TrainingConfig


def schedule(options: TrainingConfig, steps: int) -> list[float]:
    """The learning rate of each step, as the plain loop's scheduler gives it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=options.learning_rate)
    scheduler = get_scheduler(options.lr_scheduler_type, optimizer, options.warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


class StackedOptimizer:
    """AdamW or SGD on stacks [K, ...]; the clients that step stand at the front.

    Source: AdamW (Loshchilov and Hutter, 2019), algorithm 2, in the order of operations of ``torch.optim.AdamW``.
    """

    def __init__(self, stacks: Mapping[str, Tensor], options: TrainingConfig):
        self._stacks, self._options, self._steps = stacks, options, 0
        adam = options.optim == "adamw_torch"
        self._first = {name: torch.zeros_like(tensor) for name, tensor in stacks.items()} if adam else {}
        self._second = {name: torch.zeros_like(tensor) for name, tensor in stacks.items()} if adam else {}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rates: Tensor) -> None:
        """One step of the first ``len(rates)`` clients; gradients are theirs and are used up."""
        self._steps += 1
        count, options = len(rates), self._options
        for name, gradient in gradients.items():
            parameter = self._stacks[name][:count]
            rate = rates.to(parameter.dtype).view(-1, *[1] * (gradient.ndim - 1))
            if not self._first:
                parameter.sub_(rate * gradient.add_(parameter, alpha=options.weight_decay))
                continue
            if options.weight_decay:
                parameter.mul_(1 - rate * options.weight_decay)
            first, second = self._first[name][:count], self._second[name][:count]
            first.lerp_(gradient, 1 - options.adam_beta1)
            second.mul_(options.adam_beta2).addcmul_(gradient, gradient, value=1 - options.adam_beta2)
            root = second.sqrt().div_((1 - options.adam_beta2**self._steps) ** 0.5).add_(options.adam_epsilon)
            parameter.sub_(first.div(root).mul_(rate / (1 - options.adam_beta1**self._steps)))
