"""Which clients share a pass: decided from the tasks alone, so that every pool comes to the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from fedlora.config import RunConfig
from fedlora.protocol import BaseInfo, ClientInfo, TrainTask
from fedlora.training.batches import steps_of
from orchestrator.pools.balance import CALL_BYTES

Cohort: TypeAlias = tuple[TrainTask, ...]


class Division:
    """How a run divides the clients that are asked together."""

    def __init__(self, config: RunConfig, members: Sequence[ClientInfo], base: BaseInfo):
        self._training, self._members = config.training, {member.id: member for member in members}
        self.size = cohort_size(config, base)
        # what is said is done; otherwise every worker is to have its share of a round
        self._least = 1 if config.training.cohort_size else config.ray.workers or 2

    def cohorts(self, tasks: Sequence[TrainTask]) -> list[Cohort]:
        """Tasks in cohorts of up to ``size`` clients, as equal in number as can be.

        Those of a cohort are in one round, on one ledger, and train the same parts. Clients with alike many steps
        come together, since a cohort takes as many as its longest member.
        """
        if self.size == 1:
            return [(task,) for task in tasks]
        groups: dict[Any, list[TrainTask]] = {}
        for task in tasks:
            alike = task.round, task.plan.train, tuple(patch.id for patch in task.ledger)
            groups.setdefault(task.client if task.forget is not None else alike, []).append(task)
        cohorts: list[Cohort] = []
        for group in groups.values():
            group.sort(key=self._steps)
            size = sum(len(task.adapter) for task in group)  # answers of a call travel as one, about as large
            count = max(math.ceil(len(group) / self.size), math.ceil(size / CALL_BYTES), self._least)
            count = min(count, len(group))
            ends = [len(group) * part // count for part in range(count + 1)]
            cohorts += [tuple(group[first:end]) for first, end in pairwise(ends)]
        return cohorts

    def _steps(self, task: TrainTask) -> int:
        client, how = self._members.get(task.client), self._training
        rows = max(1, client.at(task.stage).num_examples) if client else 1
        batches = how.per_device_train_batch_size, how.gradient_accumulation_steps
        return -steps_of(rows, *batches, how.max_steps, how.num_train_epochs)


def cohort_size(config: RunConfig, base: BaseInfo) -> int:
    """How many clients may share a pass; 1 where an answer may be waited for, or given up, alone."""
    schedule = config.schedule
    if schedule.mode == "async" or schedule.over_selection > 1 or schedule.deadline_s or base.alone:
        return 1
    return config.training.cohort_size or base.cohort
