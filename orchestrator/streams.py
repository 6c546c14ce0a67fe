"""What a round means to a stream of tasks: the scores where a task ends, and whether the adapter is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.inbox import Used
from orchestrator.patches import freeze
from orchestrator.scoring import Evaluation
from orchestrator.state import RunState


def advance(fed: Federation, state: RunState, used: Sequence[Used], found: Evaluation | None) -> RunState:
    """The state after a round of a stream; without a stream, as it is.

    Args:
        used: the round's updates; their losses before training are what the policy sees.
        found: scores of the model as it is now, if this round looked.
    """
    if fed.course is None or fed.freezer is None or state.stream is None:
        return state
    number, stream, ends = state.round, state.stream, fed.course.ends(state.round)
    if ends and found and found.tasks:
        stream = stream.after_task(found.tasks)
    losses = {u.flight.client: (u.metrics["first_loss"], u.update.weight) for u in used if "first_loss" in u.metrics}
    decision = fed.freezer.observe(stream.policy, number, losses, boundary=ends)
    if decision.shift:
        fed.emit("shift", {"round": number, "evidence": decision.evidence})
    told = {"task": fed.course.names[fed.course.at(number)], "evidence": decision.evidence}
    if found and found.tasks:
        told["accuracy"] = dict(zip(fed.course.names, found.tasks.row(), strict=True))
    row = {**(state.row or {}), "stream": told}
    state = replace(state, row=row, stream=replace(stream, policy=decision.state))
    if not decision.merge or number == fed.rounds:
        return state
    state = freeze(fed, state, decision.evidence)
    reach("round.frozen", number)
    return state
