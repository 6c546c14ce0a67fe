"""What a round means to a stream of tasks: whether the adapter is frozen, and the scores where a task ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlora.continual.plateau import Decision
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.inbox import Used
from orchestrator.patches import freeze
from orchestrator.scoring import Evaluation
from orchestrator.state import RunState


def end_task(fed: Federation, state: RunState, used: Sequence[Used]) -> tuple[Federation, RunState, Decision | None]:
    """What a task's rule makes of a round: federation and state from here on, and the rule's decision if there is one.

    A task that its rule has not ended ends with its last round all the same.

    Args:
        state, used: as of ``decide``.
    """
    if fed.course is None or state.stream is None or not any(fed.stops):
        return fed, state, None
    number, task = state.round, fed.course.at(state.round)
    stop, due = fed.stops[task], fed.course.ends(number)
    decision = stop.observe(state.stream.stop, number, _losses(used)) if stop else None
    early = decision is not None and decision.merge
    if not (early or due):
        return fed, replace(state, stream=replace(state.stream, stop=decision.state if decision else {})), decision
    told = decision.evidence if decision else {}
    told = told if early else {**told, "reason": "bounded by rounds"}
    fed.emit("task_ended", {"round": number, "task": fed.course.names[task], "evidence": told})
    state = replace(state, stream=replace(state.stream, ended=(*state.stream.ended, number), stop={}))
    fed = fed.now(state)
    if number == fed.rounds:
        fed.abandon(state.flights)  # nobody will ask for them
        state = replace(state, flights=(), payloads={})
    return fed, state, decision


def decide(fed: Federation, state: RunState, used: Sequence[Used]) -> Decision | None:
    """What the policy makes of a round; None without a stream.

    Where tasks are merged otherwise than by their sum, the end of the run is a freeze too: the last task belongs to
    what comes out.

    Args:
        state: as the round leaves it.
        used: the round's updates; their losses before training are what the policy sees.
    """
    if fed.course is None or fed.freezer is None or state.stream is None:
        return None
    number = state.round
    boundary = fed.course.ends(number)
    decision = fed.freezer.observe(state.stream.policy, number, _losses(used), boundary=boundary)
    if decision.shift:
        fed.emit("shift", {"round": number, "evidence": decision.evidence})
    if fed.merging and number == fed.rounds and not decision.merge:
        return replace(decision, merge=True, evidence={**decision.evidence, "end": True})
    return decision


def merge_tasks(fed: Federation, state: RunState, decision: Decision | None) -> RunState:
    """The state that a round is scored on: frozen already where that changes the function, else as it is."""
    return _frozen(fed, state, decision) if decision and decision.merge and fed.merging else state


def advance(
    fed: Federation, state: RunState, decision: Decision | None, stop: Decision | None, found: Evaluation | None
) -> RunState:
    """The state after a round of a stream; without a stream, as it is.

    Args:
        decision: of ``decide``.
        stop: of ``end_task``.
        found: scores of the model as it is now, if this round looked.
    """
    if fed.course is None or decision is None or state.stream is None:
        return state
    number, stream = state.round, state.stream
    if fed.course.ends(number) and found and found.tasks:
        stream = stream.after_task(found.tasks)
    told: dict[str, Any] = {"task": fed.course.names[fed.course.at(number)], "evidence": decision.evidence}
    if stop:
        told["until"] = stop.evidence
    if found and found.tasks:
        told["accuracy"] = dict(zip(fed.course.names, found.tasks.row(), strict=True))
    row = {**(state.row or {}), "stream": told}
    if fed.live:
        stream = replace(stream, seen=fed.live.sha256(number))
    state = replace(state, row=row, stream=replace(stream, policy=decision.state))
    done = not decision.merge or fed.merging or number == fed.rounds
    return state if done else _frozen(fed, state, decision)


def _losses(used: Sequence[Used]) -> dict[str, tuple[float, float]]:
    """The loss of each client before it trained, and its weight."""
    return {u.flight.client: (u.metrics["first_loss"], u.update.weight) for u in used if "first_loss" in u.metrics}


def _frozen(fed: Federation, state: RunState, decision: Decision) -> RunState:
    state = freeze(fed, state, decision.evidence)
    reach("round.frozen", state.round)
    return state
