"""A run that goes on from a changed state, without the target: what approximate actions end with.

The rounds that follow are ordinary ones of a run that excludes the target, so they can be stopped and resumed, and run
wherever the run runs. Whatever the server remembered between rounds goes: it was made with the target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fedlora.config import RunConfig, parse_config
from orchestrator import launch
from orchestrator.state import RunState
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.rollback import Rollback, build, clean_states, without


def amended(state: RunState, clients: Collection[str]) -> RunState:
    """A state that knows nothing of the clients, and nothing of what the strategy remembered."""

    def others(known: Mapping[str, Any]) -> dict[str, Any]:
        return {client: value for client, value in known.items() if client not in clients}

    return replace(
        state,
        strategy={},
        records=others(state.records),
        participation=others(state.participation),
        accepted=others(state.accepted),
        caught_up=others(state.caught_up),
        flights=(),
        payloads={},
    )


def longer(config: RunConfig, plan: Rollback, rounds: int, **changes: Any) -> RunConfig:
    """The configuration of the run without the target, and of ``rounds`` rounds more."""
    content = without(config, plan.clients, plan.records).resolved()
    return parse_config({**content, "rounds": config.rounds + rounds, **changes})


def play_on(job: Job, plan: Rollback, config: RunConfig, state: RunState) -> dict[str, Any]:
    """Make ``job.work``: the run as it was before the target, then ``state``, then the rounds that ``config`` has more.

    Returns:
        The summary. Stopped anywhere and called again, it goes on from the last committed round.
    """
    build(job.folder, plan, job.work, config, [*clean_states(job.folder, plan.start), amended(state, plan.clients)])
    return launch.resume(job.work, job.listen)
