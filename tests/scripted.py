"""A federation whose clients answer at once with seeded deltas: for tests of rounds, not of training."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.wire import decode_adapter, encode_update
from fedlora.aggregation import compose
from fedlora.config import ScheduleConfig, TrainingConfig
from fedlora.protocol import ClientInfo, EvalResult, EvalTask, Reply, TrainTask
from orchestrator.federation import Federation
from orchestrator.selection import build_selector
from orchestrator.state import RunState

SITES = {"layer": (20, 8)}
DENSE = {"head": torch.zeros(3)}
MEMBERS = [ClientInfo(f"c{i}", 4, 100 + i) for i in range(5)]


class ScriptedPool:
    """Answers tasks with seeded deltas; one client's answer goes through ``tamper`` first."""

    workers = 1

    def __init__(
        self,
        tamper: Callable[[TrainTask, dict[str, Any]], bytes | None] | None = None,
        members: Sequence[ClientInfo] = MEMBERS,
    ):
        self._tamper = tamper
        self._rows = {member.id: member.num_examples for member in members}
        self.asked: list[str] = []
        self._queue: list[TrainTask] = []
        self.sent: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        self._queue += tasks
        while self._queue:
            task = self._queue.pop(0)
            honest = answer(task, self._rows.get(task.client, 1))
            self.asked.append(task.client)
            self.sent[task.round, task.client] = honest["delta"]
            payload = encode_update(**honest)
            if task.client == "c2" and self._tamper:
                payload = self._tamper(task, honest) or payload
            yield Reply(task.client, payload)

    def abandon(self, clients: Collection[str]) -> None:
        pass

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        return [EvalResult(task.subject, 1.0, 1, 1, 1) for task in tasks]


def answer(task: TrainTask, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(task.seed)
    received = decode_adapter(task.adapter).tensors()
    delta = {name: torch.randn(t.shape, generator=generator) for name, t in received.items()}
    return {
        "client": task.client,
        "round": task.round,
        "received": task.received,
        "delta": delta,
        "num_examples": rows,
        "metrics": {"loss": 1.0, "tokens": 10},
    }


def federation(
    pool: Any,
    members: Sequence[ClientInfo] = MEMBERS,
    events: list[Any] | None = None,
    strategy: Any = "flexlora",
    **fields: Any,
) -> Federation:
    settings: dict[str, Any] = {
        "pool": pool,
        "strategy": compose(strategy),
        "members": members,
        "fresh": initial_adapter(SITES, DENSE, 4, 0),
        "seed": 0,
        "rounds": 9,
        "rank": 4,
        "per_round": 1.0,
        "weighting": "examples",
        "max_update_norm": 1e3,
        "evaluate_every": 1,
        "evaluate_clients": False,
        "ledger_rank": None,
        "selector": build_selector("uniform"),
        "schedule": ScheduleConfig(),
        "training": TrainingConfig(),
        "emit": lambda event, content: (events if events is not None else []).append((event, dict(content))),
    }
    return Federation(**{**settings, **fields})


def first_state(fed: Federation) -> RunState:
    return RunState(0, fed.fresh, {}, "config", "base")
