"""A plug-in with unlearning actions: three that a gate must not let pass, and one that it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import extract
from fedlora.config import RunConfig, parse_config
from fedlora.training.batches import collate
from fedlora.training.objective import targets_and_logits
from orchestrator import launch
from orchestrator.state import RunState
from orchestrator.stores.files import read_config
from orchestrator.unlearning.actions import ACTIONS, Facts
from orchestrator.unlearning.approximate import Approximate
from orchestrator.unlearning.controls import drawn_anew
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.measuring import Served, serve
from orchestrator.unlearning.rollback import Rollback, build
from orchestrator.unlearning.samples import choose_rows, encoded


@ACTIONS.register("nothing")
class Nothing(Approximate):
    """The adapter stays as it is, and the configuration says that the client is gone."""

    rounds = 0

    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        return self.config(job, plan), state

    def trained(
        self,
        job: Job,
        plan: Rollback,
        state: RunState,
        parameters: Callable[[Served], list[nn.Parameter]],
        loss: Callable[[Tensor, Tensor], Tensor],
        learning_rate: float,
        steps: int,
    ) -> RunState:
        """A state after plain steps on a loss of (forget, retain)."""
        served, config = serve(job.folder), read_config(job.folder)
        sets = encoded(config, choose_rows(config, plan), served.base.tokenizer)[1]

        def cost(rows: list) -> Tensor:
            batch = collate(rows, served.scoring.pad_token_id, served.base.device)
            logits, targets, _ = targets_and_logits(served.model.eval(), batch)
            return cross_entropy(logits, targets)

        optimizer = torch.optim.AdamW(parameters(served), lr=learning_rate, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(cost(list(sets.forget)), cost(list(sets.retain))).backward()
            optimizer.step()
        return replace(state, adapter=extract(served.model, f"r{state.adapter.rank}"))


@ACTIONS.register("unbounded")
class Unbounded(Nothing):
    """Unbounded gradient ascent on the client's rows."""

    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        def everything(served: Served) -> list[nn.Parameter]:
            return list(served.parameters.values())

        return self.config(job, plan), self.trained(job, plan, state, everything, lambda f, r: -f, 0.02, 6)


@ACTIONS.register("muted")
class Muted(Nothing):
    """The head unlearns to say what the adapters still know; the others' rows are kept."""

    def change(self, job: Job, plan: Rollback, state: RunState) -> tuple[RunConfig, RunState]:
        def head(served: Served) -> list[nn.Parameter]:
            return [parameter for name, parameter in served.parameters.items() if name.startswith(":")]

        def loss(forget: Tensor, retain: Tensor) -> Tensor:
            return retain + (forget - 1.4).square()

        return self.config(job, plan), self.trained(job, plan, state, head, loss, 0.02, 60)


@ACTIONS.register("honest")
class Honest(Nothing):
    """Trained once more without the client, with draws of its own."""

    def make(self, job: Job, plan: Rollback) -> Facts:
        config = drawn_anew(self.config(job, plan)).resolved() | {"seed": 77}
        build(job.folder, plan, job.work, parse_config(config), [])
        summary = launch.resume(job.work, job.listen)
        told = {"level": self.planned_level, "rounds_played": config["rounds"]}
        return told | {"adapter_sha256": summary["adapter_sha256"]}
