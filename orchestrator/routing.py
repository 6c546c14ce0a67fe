"""Which isolated adapter a row is scored with: that of its own task, or that of the task whose prototype is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedlora.adapter.wire import encode_adapter
from fedlora.errors import RoundError
from fedlora.protocol import EvalTask
from orchestrator.federation import Federation
from orchestrator.state import RunState


def routed(fed: Federation, state: RunState, asked: Sequence[EvalTask]) -> list[EvalTask]:
    """The same looks, each with the adapter its rows get, or one per adapter where rows of one look part ways.

    Results of the latter add up to that of the look. Without isolated tasks there is one adapter, and looks stay.

    Args:
        asked: with the active adapter and a task each.
    """
    if not fed.isolated or not asked or state.stream is None:
        return list(asked)
    own = {entry.provenance["task"]: entry.payload for entry in state.ledger.of_kind("task")}
    known = sorted(state.stream.prototypes)
    if not known:
        return [replace(look, adapter=own.get(look.stage, look.adapter)) for look in asked]
    prototypes = tuple(state.stream.prototypes[task] for task in known)
    return [
        replace(look, adapter=own.get(task, look.adapter), prototypes=prototypes, route=place)
        for look in asked
        for place, task in enumerate(known)
    ]


def with_prototype(fed: Federation, state: RunState) -> RunState:
    """The state with a prototype of the present task: the mean feature of the bare base over its training rows.

    Every client with rows of the task is asked once, in the first round of the task, for the sum over its rows.

    Raises:
        RoundError: if not one client could answer.
    """
    if not fed.prototypes or fed.course is None or state.stream is None:
        return state
    task = fed.course.at(state.round)
    if task in state.stream.prototypes:
        return state
    payload, patches = encode_adapter(state.adapter), state.ledger.patches()
    asked = [member.id for member in fed.taking_part if member.stages[task][0]]
    looks = [EvalTask(client, payload, ledger=patches, stage=task, features=True) for client in asked]
    found = fed.pool.evaluate(looks)
    for result in found:
        if result.error:
            fed.emit("client_not_measured", {"client": result.subject, "reason": result.error})
    sums = [torch.tensor(result.features, dtype=torch.float64) for result in found if not result.error]
    if not sums:
        raise RoundError(f"no client could measure its rows of task {fed.course.names[task]}: {found[0].error}")
    rows = sum(result.num_examples for result in found if not result.error)
    mean = tuple((torch.stack(sums).sum(dim=0) / rows).tolist())
    fed.emit("prototype", {"round": state.round, "task": task, "clients": len(sums), "rows": rows})
    prototypes = {**state.stream.prototypes, task: mean}
    return replace(state, stream=replace(state.stream, prototypes=prototypes))
