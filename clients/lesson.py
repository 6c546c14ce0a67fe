"""One client between the task it was given and the message it sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.private_state import Private
from fedlora.adapter.peft import extract, insert
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.combine import make_delta, part_of
from fedlora.config import TrainingConfig
from fedlora.protocol import TrainTask
from fedlora.training.cohort import Member
from fedlora.training.loop import LocalResult, LocalWork
from fedlora.training.methods import (
    Answer,
    Local,
    Memory,
    MethodStack,
    Start,
    Tensors,
    fitted,
    name_parameters,
)
from fedlora.training.model import AdaptedModel, adapter_name


@dataclass(frozen=True, eq=False)
class Learned:
    """What training comes to, before anything is sent.

    Attributes:
        delta: trained minus received, of the parts that travel.
        extras: the answer to the strategy's extra tensors.
        private: what the client keeps to itself.
        rows: that can be learned from.
        metrics: as sent.
    """

    delta: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    private: Private
    rows: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A client before its first step, with its adapter in the model.

    Attributes:
        start: what it received, with its own parts in it.
        begun: the same as the local methods see it.
        local: its model, trained parameters and rows.
        options: of this round.
        memory: of the methods.
        private: as the last round left it.
        rows, dropped: of its own that can be learned from, and that cannot.
        fresh_loss: of what it received on rows of the present task, where a buffer is among what it trains on.
    """

    task: TrainTask
    start: AdapterState
    begun: Start
    local: Local
    options: TrainingConfig
    methods: MethodStack
    memory: Memory
    private: Private
    rows: int
    dropped: int
    fresh_loss: float | None = None

    @property
    def adapter(self) -> str:
        """Its name in the model."""
        return adapter_name(self.task.plan.rank)

    def work(self) -> LocalWork:
        """For the plain loop, which trains what is in the model."""
        local = self.local
        how = self.options, self.task.seed, local.pad_token_id, self.methods, self.memory, local.labels
        return LocalWork(local.model, local.parameters, local.examples, *how)

    def member(self) -> Member:
        """For a cohort."""
        local = self.local
        return Member(
            self.begun.tensors, local.examples, self.task.seed, self.methods, self.memory, labels=local.labels
        )

    def put_back(self, adapted: AdaptedModel, tensors: Tensors) -> None:
        """Bring the model to where this client is after training [PEFT's units]."""
        model = adapted.at_rank(self.task.plan.rank)
        adapted.patch_base(self.task.ledger, self.start.frozen)
        insert(model, self.adapter, self.start)
        name_parameters(model, self.adapter, self.task.plan.train)
        with torch.no_grad():
            for name, parameter in self.local.parameters.items():
                parameter.copy_(tensors[name])

    def learned(self, result: LocalResult, answer: Answer | None = None) -> Learned:
        """What it came to; the trained adapter is in the model.

        Args:
            answer: default that of the local methods.
        """
        if answer is None:
            trained = {name: parameter.detach() for name, parameter in self.local.parameters.items()}
            answer = self.methods.finish(trained, result.memory)
        metrics = {
            "loss": result.loss,
            "first_loss": result.first_loss if self.fresh_loss is None else self.fresh_loss,
            "steps": result.steps,
            "tokens": result.tokens,
            "rows": result.rows,
            "dropped_rows": self.dropped,
        }
        plan, state = self.task.plan, extract(self.local.model, self.adapter)
        delta = make_delta(self.start, state, plan.send)
        private = self.private.updated(personal(state, plan.keep), answer.kept)
        return Learned(delta, answer.extras, private, self.rows, metrics)


def personal(state: AdapterState, keep: frozenset[str]) -> dict[str, Tensor]:
    """The tensors of the parts a client keeps, by name."""
    return {name: tensor for name, tensor in state.tensors().items() if part_of(name) in keep}


def with_personal(received: AdapterState, kept: Mapping[str, Tensor], keep: frozenset[str]) -> AdapterState:
    """What a client starts from: its own parts where it has them, else what it received.

    Its own are cut or padded with zeros where its rank has changed since.
    """
    flat = received.tensors()
    for name, tensor in kept.items():
        if part_of(name) in keep and name in flat:
            flat[name] = fitted(tensor, flat[name])
    return AdapterState.from_tensors(flat)
