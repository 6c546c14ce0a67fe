"""Clients that train nothing: for measuring, and for tests of, everything around the training.

Messages are the real ones, with the shapes that were asked for; a pool opens it in the place of ``ClientRuntime``.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from typing import Any

import torch

from clients.ranks import assign_ranks
from fedlora.adapter.packing import Packing
from fedlora.adapter.wire import decode_parcel, encode_update
from fedlora.aggregation.combine import part_of
from fedlora.config import RunConfig
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, TrainTask, WorkerStats

ROWS = 16  # of every client, to train on and held out


class NoopRuntime:
    """As many clients as the configuration has, on a base that is nothing but ``modules`` squares.

    Args:
        side: rows and columns of every module; a message at rank r has ``8 * side * r * modules`` bytes.
        modules: how many there are.
    """

    def __init__(self, config: RunConfig, threads: int, side: int = 16, modules: int = 1):
        self._config, self._side, self._modules = config, side, modules
        self._decoded: tuple[str, Any] = ("", None)  # many clients receive the same
        torch.set_num_threads(threads)

    def members(self) -> Sequence[ClientInfo]:
        clients, settings = [f"c{i}" for i in range(self._config.clients.count)], self._config.clients
        ranks = assign_ranks(clients, settings.ranks, self._config.lora.r, settings.memory_gb, self._config.seed)
        return [ClientInfo(client, ranks[client], ROWS, ROWS) for client in clients]

    def base(self) -> BaseInfo:
        sites = {f"layers.{i}": (self._side, self._side) for i in range(self._modules)}
        return BaseInfo("causal-lm", (), "noop", sites, {}, self._modules * self._side**2)

    def train(self, task: TrainTask) -> bytes:
        if self._decoded[0] != task.received:
            self._decoded = task.received, decode_parcel(task.adapter)
        received, extras = self._decoded[1]
        sent = {name: tensor for name, tensor in received.tensors().items() if part_of(name) in task.plan.send}
        delta = {name: 1e-3 * tensor for name, tensor in sent.items()}
        packing = Packing(self._config.wire.up, self._config.wire.top_k)
        return encode_update(task.client, task.round, task.received, delta, ROWS, {"loss": 1.0}, extras, packing)

    def evaluate(self, task: EvalTask) -> EvalResult:
        return EvalResult(task.subject, float(ROWS), ROWS, ROWS // 2, ROWS)

    def stats(self) -> WorkerStats:
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return WorkerStats(os.getpid(), 1, torch.get_num_threads(), peak_kb / 1024)
