"""Waiting for the rows of a live stream, and what is left to do where no more come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from fedlora.errors import DataError
from orchestrator.federation import Federation
from orchestrator.scoring import evaluate_global
from orchestrator.state import RunState

POLL_S = 0.5


def await_rows(fed: Federation, state: RunState, patience_s: float, look: Callable[[int], None]) -> bool:
    """Whether the next round can begin; False where its rows have not come in time. At once without a live stream.

    Args:
        look: called with the last round again and again while it waits; whatever that raises ends the waiting.

    Raises:
        DataError: if not even a first round can begin, or rows that earlier ones have learned from were altered.
    """
    live, number = fed.live, state.round + 1
    if live is None:
        return True
    given_up, told = time.monotonic() + patience_s, False
    while not live.has(number):
        if time.monotonic() >= given_up:
            if not state.round:
                raise DataError(
                    f"continual.live: {live.origin} has {live.come} rows, and round 1 needs {live.needs(1)}; nothing"
                    f" more came in {patience_s:g} s"
                )
            fed.emit("stream_ended", {"round": state.round, "rows": live.come, "needed": live.needs(number)})
            return False
        if not told:
            fed.emit("awaiting_rows", {"round": number, "rows": live.come, "needed": live.needs(number)})
            told = True
        look(state.round)
        time.sleep(min(POLL_S, max(given_up - time.monotonic(), 0)))
    if state.stream and state.stream.seen not in ("", live.sha256(state.round)):
        raise DataError(
            f"continual.live: the first {live.needs(state.round)} rows of {live.origin} are not those that this run has"
            " learned from; restore them, or start a new run"
        )
    return True


def scored_at_the_end(fed: Federation, state: RunState) -> RunState:
    """The state with the scores of its model, for a stream that ended before its rounds did."""
    if state.stream is None or state.stream.scores.rows:
        return state
    found = evaluate_global(fed, state)
    stream = state.stream.after_task(found.tasks) if found.tasks else state.stream
    return replace(state, last={"round": state.round, **found.scores}, stream=stream)
