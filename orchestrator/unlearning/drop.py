"""Dropping a task that no later task builds on: the state of the run that never had it, without training.

The last task of a stream is dropped by going back to where the task before it ended. What that task had learned was
frozen into the ledger there, and a run that ends there freezes nothing: its entry becomes the active adapter again.
Isolated tasks share the bare base and nothing else, neither adapter nor head, so any of them goes by its ledger entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.adapter.ledger import BaseLedger
from fedlora.adapter.state import AdapterState
from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.continual.merging import build_merging
from fedlora.errors import CheckpointError, UnlearningError
from fedlora.plugins import load_plugins
from orchestrator import launch
from orchestrator.checkpoint import load, load_latest
from orchestrator.opening import open_federation
from orchestrator.pools import open_pool
from orchestrator.scoring import evaluate_global
from orchestrator.state import RunState, Totals
from orchestrator.stores.files import read_config
from orchestrator.unlearning.actions import ACTIONS, Facts
from orchestrator.unlearning.exact import RollBack
from orchestrator.unlearning.job import Job, finished_state
from orchestrator.unlearning.provenance import read_provenance
from orchestrator.unlearning.rollback import Listener, Rollback, build, rounds_played, states_before, without
from orchestrator.unlearning.tasks import course_of, rows_without, without_tasks


@ACTIONS.register("drop")
class Drop(RollBack):
    """Tasks that nothing builds on are taken out of the ledger; nothing is trained."""

    kinds = frozenset({"task"})
    by = "ledger"

    def check(self, folder: Path, plan: Rollback) -> None:
        state = finished_state(folder)
        graph, course = read_provenance(folder), course_of(read_config(folder), state)
        after = {other for task in plan.tasks for other in graph.dependents(graph.root("task", task))}
        if after := after - set(plan.tasks):
            told = ", ".join(sorted(after, key=course.names.index))
            raise UnlearningError(
                f"{told} {'build' if len(after) > 1 else 'builds'} on {', '.join(plan.tasks)}; use rollback, which"
                " replays what comes after it"
            )
        left(folder, plan)

    def cost(self, folder: Path, plan: Rollback) -> float:
        return 0.0

    def make(self, job: Job, plan: Rollback) -> Facts:
        folder, config = job.folder, read_config(job.folder)
        if not job.work.exists():
            smaller, state = without(config, tasks=plan.tasks), left(folder, plan)
            if state.round > (plan.first or 0):
                state = _scored(smaller, state, job.listen)
            build(folder, plan, job.work, smaller, [*states_before(folder, plan), state])
        summary = launch.resume(job.work, job.listen)  # no round is left to play: it writes the adapters
        doubts = _doubts(folder, plan)
        told = {"rounds_played": 0, "adapter_sha256": summary["adapter_sha256"], "doubts": doubts}
        return told | {"level": "E2" if doubts else plan.level}


def left(folder: Path, plan: Rollback) -> RunState:
    """The last state of a finished run as the run without these tasks has it. Deterministic, and changes nothing.

    Raises:
        UnlearningError: if what the tasks taught cannot be told apart from the rest.
    """
    config = read_config(folder)
    state, _ = load_latest(folder)
    assert state is not None
    assert config.continual is not None
    course = course_of(config, state)
    kept = [place for place, name in enumerate(course.names) if name not in plan.tasks]
    end = course.last_rounds[kept[-1]]
    assert state.stream is not None
    rows = [row for row in rounds_played(folder, state) if row["round"] <= end]
    frozen, summed = end in state.stream.freezes, build_merging(config.continual.merge) is None
    if config.continual.isolated:
        if end > (plan.first or 0) and config.fleet:
            raise UnlearningError("later rounds went by a clock that the task's rounds moved on; use rollback")
        state = _kept(state, course, kept)
    elif summed and frozen:
        state = _thawed(state, end)
    elif not summed and not frozen:
        raise UnlearningError(
            f"without the task, round {end} is the last, and merges what it did not merge; use rollback"
        )
    else:
        return without_tasks(_restored(folder, end), course, plan.tasks, rows)
    return _booked(without_tasks(state, course, plan.tasks, rows), rows_without(rows, plan.tasks))


def _kept(state: RunState, course: Course, kept: Sequence[int]) -> RunState:
    """Isolated tasks without the entries of the others; the adapter of the last one that is left becomes active."""
    assert state.stream is not None
    entries = {entry.provenance["task"]: entry for entry in state.ledger.of_kind("task")}
    ledger = BaseLedger()
    for place, task in enumerate(kept[:-1]):
        entry = entries[task]
        provenance = {**entry.provenance, "task": place}
        ledger = BaseLedger(
            (*ledger.entries, replace(entry, index=place + 1, parent=ledger.head, provenance=provenance))
        )
    last, ended = kept[-1], course.last_rounds
    adapter = entries[last].adapter() if last in entries else state.adapter
    stream = replace(state.stream, freezes=tuple(ended[task] for task in kept[:-1]))
    return replace(state, round=ended[last], adapter=adapter, ledger=ledger, stream=stream)


def _thawed(state: RunState, end: int) -> RunState:
    """The state after round ``end`` with what was frozen there active again: the last round freezes nothing."""
    assert state.stream is not None
    entries = state.ledger.entries
    place = next((n for n, e in enumerate(entries) if e.kind == "merge" and e.provenance["round"] == end), None)
    adapter = AdapterState() if place is None else entries[place].adapter()
    if adapter.modules.keys() != state.adapter.modules.keys():
        raise UnlearningError(f"the ledger does not hold every layer as it was after round {end}; use rollback")
    stream = replace(state.stream, freezes=tuple(number for number in state.stream.freezes if number < end))
    return replace(state, round=end, adapter=adapter, ledger=BaseLedger(entries[:place]), stream=stream)


def _restored(folder: Path, end: int) -> RunState:
    """The checkpoint of round ``end``, with which a run that ends there ends too."""
    try:
        state = load(folder / "checkpoints" / f"round-{end:04d}")
    except CheckpointError as error:
        raise UnlearningError(
            f"the checkpoint of round {end} is not there any more, and nothing else holds what was learned up to there"
            " (keep_checkpoints); use rollback"
        ) from error
    return replace(state, flights=(), payloads={})


def _booked(state: RunState, rows: Sequence[Mapping[str, Any]]) -> RunState:
    """With what is counted over rounds as it is over these; what was remembered from round to round goes."""
    assert state.stream is not None
    totals = Totals(wall_s=state.totals.wall_s)
    for row in rows:
        totals = totals.plus(row)
    numbers = {row["round"] for row in rows}
    scores = rows[-1]["eval"]
    return replace(
        state,
        strategy={},
        totals=totals,
        last={"round": state.round, **scores} if scores else None,
        row=rows[-1],
        participation=dict(sorted(Counter(client for row in rows for client in row["admitted"]).items())),
        records={client: record for client, record in state.records.items() if record.last_round in numbers},
        accepted={},
        caught_up={},
        flights=(),
        payloads={},
        clock_s=rows[-1]["clock_s"] or 0.0,
        stream=replace(state.stream, policy={}, stop={}),
    )


def _scored(config: RunConfig, state: RunState, listen: Listener) -> RunState:
    """Scored once more: the rounds after the tasks were scored on their rows too."""
    assert state.stream is not None
    load_plugins(config.plugins)
    with closing(open_pool(config)) as pool:
        fed, _ = open_federation(config, pool, listen)
        found = evaluate_global(fed.now(state), state)
    assert found.tasks is not None
    assert fed.course is not None
    earlier = replace(state.stream, scores=replace(state.stream.scores, rows=state.stream.scores.rows[:-1]))
    clients = {client: replace(scores, rows=scores.rows[:-1]) for client, scores in state.stream.clients.items()}
    last = {"round": state.round, **found.scores}
    row: dict[str, Any] = {**(state.row or {}), "eval": found.scores, "clients": found.spread}
    row["stream"] = {**row["stream"], "accuracy": dict(zip(fed.course.names, found.tasks.row(), strict=True))}
    stream = replace(earlier, clients=clients).after_task(found.tasks)
    return replace(state, stream=stream, last=last, best=last, row=row)


def _doubts(folder: Path, plan: Rollback) -> list[str]:
    """Why rounds that stay as they were played may differ from those of a run that never had the tasks."""
    state, _ = load_latest(folder)
    assert state is not None
    config, course = read_config(folder), course_of(read_config(folder), state)
    rows = rows_without(rounds_played(folder, state), plan.tasks)
    doubts = []
    lost = [row["round"] for row in rows if row["failed"] or row["late"]]
    if lost and config.fleet is None and not plan.doubts:
        doubts.append(f"clients failed or were late in round {lost[0]}, which another run need not repeat")
    rounds = Counter(course.at(number) for number in range(1, state.round + 1) if number not in course.skipped)
    for place, name in enumerate(course.names):
        if (
            name in plan.tasks
            and rounds[place] < course.rounds[place]
            and rows[-1]["round"] > course.last_rounds[place]
        ):
            doubts.append(f"{name} ended early, and a run without it leaves out all the rounds that it may take")
    return doubts
