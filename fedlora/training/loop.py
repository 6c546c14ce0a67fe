"""Local training of one client: a plain PyTorch loop under the Trainer's option names."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from fedlora.adapter.peft import train_mode
from fedlora.config import TrainingConfig
from fedlora.data.text import IGNORE, Example
from fedlora.errors import FedLoRAError
from fedlora.seeds import derive_seed
from fedlora.training.batches import batch_indices, collate, steps_of
from fedlora.training.methods import Memory, MethodStack
from fedlora.training.objective import among, targets_and_logits


@dataclass(frozen=True, eq=False)
class LocalWork:
    """What one client does in one round.

    Attributes:
        model: runs the batch; only ``parameters`` may need gradients.
        parameters: what the optimizer owns, by name.
        examples: at least one row. Fewer rows than a batch make one smaller batch.
        options: learning rate, steps or epochs, clipping and so on.
        seed: of batch order and dropout; equal seeds give equal results on equal hardware.
        pad_token_id: of the tokenizer.
        methods: change the gradients of every step, before clipping, and the parameters after it.
        memory: theirs before the first step.
        labels: indices of the labels that compete in a classifier's loss; all where empty.
    """

    model: Any
    parameters: Mapping[str, nn.Parameter]
    examples: Sequence[Example]
    options: TrainingConfig
    seed: int
    pad_token_id: int
    methods: MethodStack = field(default_factory=MethodStack)
    memory: Memory = field(default_factory=dict)
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What a client did.

    Attributes:
        steps: of the optimizer.
        tokens, rows: seen, padding left out.
        loss: of the data, mean over the steps; nothing that local methods do is part of it.
        first_loss: of the first step.
        memory: of the local methods after the last step.
    """

    steps: int
    tokens: int
    rows: int
    loss: float
    first_loss: float
    memory: Memory = field(default_factory=dict)


def train(work: LocalWork) -> LocalResult:
    """Train ``work.parameters`` in place on one client's rows.

    Raises:
        FedLoRAError: if the loss stops being a number.
    """
    model, examples, options, memory = work.model, work.examples, work.options, work.memory
    parameters = list(work.parameters.values())
    device = parameters[0].device
    accumulation = options.gradient_accumulation_steps
    steps = steps_of(
        len(examples),
        options.per_device_train_batch_size,
        accumulation,
        options.max_steps,
        options.num_train_epochs,
    )
    optimizer = _optimizer(parameters, options)
    optimizer.zero_grad(set_to_none=True)  # clients of one rank share parameters: a failed one may leave gradients
    scheduler = get_scheduler(options.lr_scheduler_type, optimizer, options.warmup_steps, steps)
    stream = endless(examples, options, work.seed)
    losses, tokens, rows = [], 0, 0
    train_mode(model, options.base_dropout)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(work.seed, 0, "", "dropout"))
        for step in range(steps):
            parts = list(itertools.islice(stream, accumulation))
            # the mean over all targets of the step, however they fall into micro-batches
            total = sum(targets_of(example) for part in parts for example in part)
            loss_sum = torch.zeros((), device=device)
            for part in parts:
                batch = collate(part, work.pad_token_id, device)
                logits, targets, _ = targets_and_logits(model, batch)
                loss = cross_entropy(among(logits, work.labels), targets, reduction="sum")
                distilled = work.methods.distil(batch, logits, memory)
                weighted = loss * work.methods.data_weight
                ((weighted if distilled is None else weighted + distilled) / total).backward()
                loss_sum += loss.detach() / total
                tokens += int(batch["attention_mask"].sum())
                rows += len(part)
            losses.append(float(loss_sum))
            if not math.isfinite(losses[-1]):
                raise FedLoRAError(
                    f"the loss became {losses[-1]} at step {step + 1} of {steps}; lower training.learning_rate"
                )
            memory = _correct(work, memory)
            if options.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            memory = _constrain(work, memory)
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    return LocalResult(steps, tokens, rows, sum(losses) / len(losses), losses[0], memory)


def _correct(work: LocalWork, memory: Memory) -> Memory:
    """Put the local methods' gradients in place of those of the data; their memory after this step."""
    raw = {name: p.grad for name, p in work.parameters.items() if p.grad is not None}
    tensors = {name: p.detach() for name, p in work.parameters.items()}
    gradients, memory = work.methods.correct(raw, tensors, memory)
    for name, gradient in gradients.items():
        work.parameters[name].grad = gradient
    return memory


@torch.no_grad()
def _constrain(work: LocalWork, memory: Memory) -> Memory:
    """Bring the parameters to where the local methods want them after a step; their memory then."""
    tensors = {name: p.detach() for name, p in work.parameters.items()}
    moved, memory = work.methods.constrain(tensors, memory)
    for name, tensor in moved.items():
        work.parameters[name].copy_(tensor)
    return memory


def targets_of(example: Example) -> int:
    """How many targets a row is scored on."""
    if isinstance(example.labels, int):
        return 1
    return sum(label != IGNORE for label in example.labels[1:])


def endless(examples: Sequence[Example], options: TrainingConfig, seed: int) -> Iterator[list[Example]]:
    """A client's batches, epoch after epoch."""
    if not examples:
        raise FedLoRAError("there are no rows to train on")
    lengths = [len(example.input_ids) for example in examples]
    for epoch in itertools.count():
        order = derive_seed(seed, epoch, "", "batches")
        for rows in batch_indices(lengths, options.per_device_train_batch_size, order, options.group_by_length):
            yield [examples[row] for row in rows]


def _optimizer(parameters: Sequence[nn.Parameter], options: TrainingConfig) -> torch.optim.Optimizer:
    if options.optim == "sgd":
        return torch.optim.SGD(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
    )
