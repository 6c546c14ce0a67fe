"""Cohorts of real models: clients that share a pass send what each of them sends alone."""

from pathlib import Path
from typing import Any

import pytest

from clients.attempt import attempt_together
from clients.runtime import ClientRuntime
from fedlora.adapter.wire import decode_update
from fedlora.config import RunConfig
from fedlora.protocol import TrainTask
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from tests.conftest import quiet, toy_config

REAL: dict[str, dict[str, Any]] = {
    "minilm": {"model__name": "builtin:minilm", "training__per_device_train_batch_size": 4},
    "smollm2": {
        "model__name": "builtin:smollm2-135m",
        "data__name": "builtin:chatterbot",
        "data__max_train_rows": 60,
        "data__partition": {"method": "iid"},
        "lora__target_modules": ["q_proj", "v_proj"],
        "training__per_device_train_batch_size": 1,
    },
}


class Asked(LocalPool):
    """Keeps the tasks of the last call."""

    def __init__(self, config: RunConfig):
        self.runtime, self.tasks = ClientRuntime(config, 1), list[TrainTask]()
        super().__init__(config, lambda *_: self.runtime)

    def train(self, tasks: Any, timeout_s: float | None = None) -> Any:
        self.tasks = list(tasks)
        return super().train(tasks, timeout_s)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
# AdamW's first steps divide a gradient by its own size, so where it is but rounding, the step is not
@pytest.mark.parametrize(("optim", "allowed"), [("sgd", 1e-5), ("adamw_torch", 1e-3)])
def test_a_cohort_of_mixed_ranks_is_its_clients_one_by_one(
    name: str, optim: str, allowed: float, tmp_path: Path
) -> None:
    still: dict[str, Any] = {"training__base_dropout": False, "evaluation__at_start": False, "evaluation__every": 1000}
    still |= {"training__optim": optim, "training__learning_rate": 0.5 if optim == "sgd" else 0.003}
    config = toy_config(tmp_path, rounds=2, clients__count=3, data__max_length=48, **still, **REAL[name])
    pool = Asked(config)
    federation, base = open_federation(config, pool, quiet)
    play_round(federation, first_state(config, federation, base))
    together = attempt_together(pool.runtime, pool.tasks)
    for task, reply in zip(pool.tasks, together, strict=True):
        assert not reply.alone
        assert reply.payload is not None
        alone = decode_update(pool.runtime.train(task))
        shared = decode_update(reply.payload)
        assert shared.metrics["tokens"] == alone.metrics["tokens"]
        change = sum(float((shared.delta[n] - alone.delta[n]).square().sum()) for n in alone.delta) ** 0.5
        assert change < allowed * alone.norm
