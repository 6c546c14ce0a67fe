"""A language model before and after its run, on a task of lm-evaluation-harness whose rows are on this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from fedlora.data.sources import quiet
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.training.model import Base, quiet_transformers
from orchestrator.artifacts import Run, load, with_adapter
from orchestrator.harness_task import HarnessTask, read_task

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm_eval bootstraps in forks of a process that holds torch's threads

BOOTSTRAP_ITERS = 200  # only of metrics whose standard error has no closed form
FEWSHOT_SEED = 1234  # lm_eval's default, so that its own command line finds the same numbers


@dataclass(frozen=True)
class HarnessScore:
    """One metric, of the bare base and of the run's model; ``*_stderr`` where lm_eval has one."""

    metric: str
    higher_is_better: bool
    before: float
    after: float
    before_stderr: float | None
    after_stderr: float | None


@dataclass(frozen=True)
class HarnessReport:
    """What a task came to."""

    task: str
    rows: int
    fewshot: int
    scores: tuple[HarnessScore, ...]


def score_task(run: Run, file: Path, limit: int | None = None, allow_code: bool = False) -> HarnessReport:
    """Score the bare base, and then the run's model: the base with the ledger and the adapter.

    Args:
        file: as ``read_task`` reads it; whatever is wrong with it is said before a model is loaded.
        limit: so many rows of the task, from its start; default all.
        allow_code: as in ``read_task``.

    Raises:
        ConfigError: the run is of a classifier, or lm_eval is not installed.
        DataError: as ``read_task``; a task that lm_eval cannot make sense of, or a metric it does not know.
    """
    _check(run)
    task = read_task(file, allow_code)
    with _quiet(), _sandboxed(task):
        prepared = _prepare(task)
        base = load(run)
        size = run.config.training.per_device_eval_batch_size
        before = _evaluate(base.model, base, prepared, task, size, limit)
        after = _evaluate(with_adapter(run, base), base, prepared, task, size, limit)
    return HarnessReport(
        task=task.name,
        rows=before["n-samples"][task.name]["effective"],
        fewshot=before["n-shot"][task.name],
        scores=tuple(_scores(before, after, task.name)),
    )


def as_text(report: HarnessReport) -> str:
    """A line of what was scored and one per metric."""
    width = 2 + max(len(name) for name in ("metric", *(score.metric for score in report.scores)))
    lines = [
        f"{report.task}: {report.rows} rows, {report.fewshot} examples before each",
        f"{'metric':<{width}}{'before':<18}{'after':<18}{'change':<10}better",
    ]
    for score in report.scores:
        before = _with_error(score.before, score.before_stderr)
        after = _with_error(score.after, score.after_stderr)
        better = "higher" if score.higher_is_better else "lower"
        lines.append(f"{score.metric:<{width}}{before:<18}{after:<18}{score.after - score.before:<+10.4f}{better}")
    return "\n".join(lines)


def _check(run: Run) -> None:
    if run.labels:
        raise ConfigError(
            f"lm-eval: {run.folder} trained a classifier, and lm_eval scores language models; use --data with rows of"
            " text and label"
        )
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("lm-eval: the package lm_eval is not installed; pip install 'fedlora[lm-eval]'") from error


def _prepare(task: HarnessTask) -> Any:
    """The task with its rows, before a model is loaded for it."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import TaskManager

    for entry in task.content.get("metric_list") or []:
        metric = entry.get("metric")
        if not callable(metric) and str(metric) not in metric_registry and "process_results" not in task.content:
            # lm_eval would look for it on the hub, and run what it finds
            close = nearest(str(metric), metric_registry.keys())
            raise DataError(f"lm-eval: {task.file} has the metric {metric}, unknown to lm_eval{close}")
    try:
        # a dict and no folder: what was checked is what is scored, whatever else is called by the same name
        manager = TaskManager(include_defaults=False)
        prepared = manager.load([task.content])["tasks"][task.name]
    except Exception as error:
        raise DataError(f"lm-eval: {task.file} is not a task for lm_eval: {_cause(error)}") from error
    if prepared.get_config("num_fewshot") is None:
        prepared.set_config(key="num_fewshot", value=0)
    return prepared


def _evaluate(model: Any, base: Base, prepared: Any, task: HarnessTask, size: int, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    prepared.set_fewshot_seed(seed=FEWSHOT_SEED)
    with torch.random.fork_rng():
        torch.manual_seed(FEWSHOT_SEED)  # a task may sample what the model generates
        scored = HFLM(pretrained=model, tokenizer=base.tokenizer, backend="causal", batch_size=size)
        try:
            # not simple_evaluate: that asks git and pip about this machine, and prints what they say
            return evaluate(
                scored,
                {"tasks": {task.name: prepared}},
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=False,
                confirm_run_unsafe_code=task.allow_code,
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError) as error:
            raise DataError(f"lm-eval: {task.file} cannot be scored: {_cause(error)}") from error


def _scores(before: dict[str, Any], after: dict[str, Any], name: str) -> Iterator[HarnessScore]:
    first, second, better = before["results"][name], after["results"][name], before["higher_is_better"][name]
    for key, value in first.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        yield HarnessScore(
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            higher_is_better=bool(better.get(metric, True)),
            before=value,
            after=second[key],
            before_stderr=_number(first.get(f"{metric}_stderr,{filtered}")),
            after_stderr=_number(second.get(f"{metric}_stderr,{filtered}")),
        )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None  # lm_eval writes N/A


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _sandboxed(task: HarnessTask) -> Iterator[None]:
    """Templates of a task file are Jinja, which reaches all of Python unless it is kept in a sandbox."""
    import lm_eval.utils

    free = lm_eval.utils.env
    if not task.allow_code:
        lm_eval.utils.env = SandboxedEnvironment(undefined=free.undefined, keep_trailing_newline=True)
        lm_eval.utils.env.filters.update(free.filters)
    try:
        yield
    finally:
        lm_eval.utils.env = free


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output belongs to the scores, and nobody asked for lm_eval's advice."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with warnings.catch_warnings(), quiet(), quiet_transformers():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(bars), contextlib.redirect_stderr(bars):
                yield
    finally:
        log.setLevel(level)
