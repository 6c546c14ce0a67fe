"""What a round means to a stream of tasks: whether the adapter is frozen, and the scores where a task ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlora.continual.plateau import Decision
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.inbox import Used
from orchestrator.patches import freeze
from orchestrator.scoring import Evaluation
from orchestrator.state import RunState


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
    losses = {u.flight.client: (u.metrics["first_loss"], u.update.weight) for u in used if "first_loss" in u.metrics}
    decision = fed.freezer.observe(state.stream.policy, number, losses, boundary=fed.course.ends(number))
    if decision.shift:
        fed.emit("shift", {"round": number, "evidence": decision.evidence})
    if fed.merging and number == fed.rounds and not decision.merge:
        return replace(decision, merge=True, evidence={**decision.evidence, "end": True})
    return decision


def merge_tasks(fed: Federation, state: RunState, decision: Decision | None) -> RunState:
    """The state that a round is scored on: frozen already where that changes the function, else as it is."""
    return _frozen(fed, state, decision) if decision and decision.merge and fed.merging else state


def advance(fed: Federation, state: RunState, decision: Decision | None, found: Evaluation | None) -> RunState:
    """The state after a round of a stream; without a stream, as it is.

    Args:
        decision: of ``decide``.
        found: scores of the model as it is now, if this round looked.
    """
    if fed.course is None or decision is None or state.stream is None:
        return state
    number, stream = state.round, state.stream
    if fed.course.ends(number) and found and found.tasks:
        stream = stream.after_task(found.tasks)
    told = {"task": fed.course.names[fed.course.at(number)], "evidence": decision.evidence}
    if found and found.tasks:
        told["accuracy"] = dict(zip(fed.course.names, found.tasks.row(), strict=True))
    row = {**(state.row or {}), "stream": told}
    state = replace(state, row=row, stream=replace(stream, policy=decision.state))
    done = not decision.merge or fed.merging or number == fed.rounds
    return state if done else _frozen(fed, state, decision)


def _frozen(fed: Federation, state: RunState, decision: Decision) -> RunState:
    state = freeze(fed, state, decision.evidence)
    reach("round.frozen", state.round)
    return state
