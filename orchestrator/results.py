"""What a run leaves when it has ended: its adapter, its summary, its report."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.adapter.algebra import stack
from fedlora.adapter.directory import TASK_TYPES, save_directory
from fedlora.adapter.rank import truncate
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.protocol import BaseInfo, WorkerStats
from fedlora.training.builtin import resolve
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.progress import Progress
from orchestrator.report import write_report
from orchestrator.state import RunState
from orchestrator.stores.files import write_json, writing

WEIGHTS = "adapter_model.safetensors"  # of a PEFT directory

COSINE_README = """# An adapter with a cosine head

This adapter was trained with `model.head: cosine`: the last layer of its classifier computes `scale * cos(h, w_c)`.
PEFT loads it onto a plain model without a complaint, and every logit is then wrong. Put the head in first:

    from fedlora.training.heads import put_cosine_head

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=...)
    put_cosine_head(model)
    model = PeftModel.from_pretrained(model, this_folder)

`fedlora eval` and `fedlora export` do that by themselves.
"""


def finish(
    config: RunConfig, folder: Path, state: RunState, fed: Federation, base: BaseInfo, began: float
) -> dict[str, Any]:
    """Write the adapter, the summary and the report; returns the summary."""
    weights = export_adapter(state, config, base.task, folder / "adapter")
    if fed.course and fed.isolated:
        export_tasks(state, fed.course, config, base.task, folder / "adapter")
    reach("finish.exported", state.round)
    stats = fed.pool.stats()
    private = fed.spending.spent(state.strategy) if fed.spending else None
    if private and private["ended_by_budget"]:
        fed.emit("budget_spent", {"round": state.round, **private})
    summary = {
        "status": "finished",
        "name": config.name,
        "strategy": config.strategy_name,
        "model": config.model.name,
        "attack": config.attack.model_dump(mode="json") if config.attack else None,
        "metric": "accuracy" if base.labels else "exact match",
        "rounds": state.round,
        "initial": state.initial,
        "final": state.last,
        "best": state.best,
        "stream": describe_stream(state.stream, fed.course) if state.stream and fed.course else None,
        "shards": (state.row or {}).get("shards"),
        "privacy": private,
        "local_privacy": fed.local.spent(state.records) if fed.local else None,
        "bytes_up": state.totals.bytes_up,
        "bytes_down": state.totals.bytes_down,
        "wall_s": round(time.perf_counter() - began, 3),
        "clock_s": round(state.clock_s, 3) if fed.fleet else None,
        "seconds": {phase: round(value, 3) for phase, value in state.totals.seconds.items()},
        "train_tokens": state.totals.train_tokens,
        "peak_rss_mb": round(peak_rss_mb(stats), 1),
        "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "config_sha256": config.sha256(),
        "base": {
            "fingerprint": base.fingerprint,
            "parameters": base.num_parameters,
            "sites": len(base.sites),
        },
        "workers": [asdict(worker) for worker in stats],
    }
    write_json(folder / "summary.json", summary)
    reach("finish.summarised", state.round)
    fed.emit("run_finished", {"final": state.last, "adapter_sha256": summary["adapter_sha256"]})
    write_report(folder)
    return summary


def describe_stream(stream: Progress, course: Course) -> dict[str, Any]:
    """R[t, i] on the server's rows, what it comes to in total and per client, and when the adapter was frozen."""
    return {
        "tasks": list(course.names),
        **stream.scores.to_json(),
        "metrics": stream.scores.describe(),
        "clients": {client: scores.describe() for client, scores in stream.clients.items()},
        "freezes": list(stream.freezes),
    }


def export_adapter(state: RunState, config: RunConfig, task: str, target: Path) -> Path:
    """Write the global adapter as a PEFT directory.

    One that fits no plain model says so in a README.md beside it.

    Returns:
        Its weights file.
    """
    return _save(whole_adapter(state), config, task, target)


def export_tasks(state: RunState, course: Course, config: RunConfig, task: str, target: Path) -> None:
    """Write the adapter of every isolated task as a PEFT directory of its own, ``target/<task>``.

    The last task is the active adapter.
    """
    for entry in state.ledger.of_kind("task"):
        _save(entry.adapter(), config, task, target / course.names[entry.provenance["task"]])
    _save(whole_adapter(state), config, task, target / course.names[-1])


def _save(adapter: AdapterState, config: RunConfig, task: str, target: Path) -> Path:
    """Returns the weights file."""
    lora, base = config.lora, resolve(config.model.name)
    with writing(target):
        save_directory(adapter, target, base, TASK_TYPES[task], lora.lora_alpha, lora.use_rslora)
        if config.model.head == "cosine":
            (target / "README.md").write_text(COSINE_README, encoding="utf-8")
    return target / WEIGHTS


def whole_adapter(state: RunState) -> AdapterState:
    """The adapter that has the run's function on the base as it was loaded: the ledger's patches included.

    A stack larger than its matrix is recompressed to that size, which loses rounding only.
    """
    adapter = state.adapter.whole()
    patches = state.ledger.total()

    def one(path: str, update: LowRank) -> LowRank:
        total = update
        if path in patches:  # a fresh pair beside them adds nothing
            total = stack([{path: update}, {path: patches[path]}])[path] if update.B.any() else patches[path]
        return total if total.rank <= min(total.shape) else truncate(total, min(total.shape))

    return AdapterState({path: one(path, update) for path, update in adapter.modules.items()}, adapter.dense)


def peak_rss_mb(stats: Sequence[WorkerStats]) -> float:
    """Peak resident memory of this process and of the workers that are not this process."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return own + sum(worker.peak_rss_mb for worker in stats if worker.pid != os.getpid())
