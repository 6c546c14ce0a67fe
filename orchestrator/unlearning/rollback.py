"""Exact unlearning of clients, records and tasks: back to before they took part, and the rounds once more without them.

A run without a client is the same configuration with ``clients.exclude``: the client keeps its place in every draw and
is never asked. Up to the first round that would have asked it, both runs are the same, so a checkpoint from before that
round belongs to both, and what follows is played again. Nothing is undone, nothing is approximated. A run without a
record is the same configuration with ``data.forget``: its client leaves the row out, and keeps all others. For tasks
see ``tasks``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clients.private_state import PrivateState
from fedlora.config import RunConfig, parse_config
from fedlora.errors import CheckpointError, UnlearningError, nearest
from fedlora.unlearning.request import Request
from orchestrator import launch
from orchestrator.checkpoint import checkpoints, commit, load, load_latest
from orchestrator.contributions import copy_log
from orchestrator.state import RunState
from orchestrator.stores.files import UNFINISHED, read_config, read_json, read_lines, write_atomic
from orchestrator.unlearning.doubts import doubts_about
from orchestrator.unlearning.targets import as_learned, owners_of, rows_with_labels
from orchestrator.unlearning.tasks import course_of, parting, rows_without, unplayed_rounds, without_tasks

Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Rollback:
    """What it takes to have a run as if some clients, records or tasks had never been there.

    Attributes:
        clients: who is taken out.
        records: SHA-256 of the names of rows that are taken out.
        owners: the clients that have these rows.
        first: the first round that is another one without them; None if there is none.
        start: the committed round that the replay begins from; None where no checkpoint is old enough, and everything
            is played again.
        rounds: committed so far.
        level: E1 where the replay gives the bytes of a run that never had them, else E2.
        doubts: why it is not E1.
        tasks: of the stream that are taken out.
        unplayed: committed rounds that a run without them does not play.
    """

    clients: tuple[str, ...]
    records: tuple[str, ...]
    owners: tuple[str, ...]
    first: int | None
    start: int | None
    rounds: int
    level: str
    doubts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    unplayed: tuple[int, ...] = ()

    @property
    def clean(self) -> int:
        """The last round that they had no part in, nor any before it."""
        return self.rounds if self.first is None else self.first - 1

    @property
    def replayed(self) -> int:
        """Rounds to play again."""
        return 0 if self.first is None else self._played(self.start or 0)

    @property
    def cost(self) -> float:
        """Rounds to play again, as a share of all that are played without them."""
        return self.replayed / max(self._played(0), 1)

    def askable(self, excluded: Collection[str]) -> tuple[str, ...]:
        """Whose rows they are, of those who may be asked to forget them: clients that are taken out now, and owners of
        records who were not ``excluded`` before."""
        return tuple(client for client in self.owners if client not in excluded) if self.records else self.clients

    def _played(self, start: int) -> int:
        return self.rounds - start - sum(number > start for number in self.unplayed)


def plan_for(folder: Path, request: Request) -> Rollback:
    """``plan_rollback`` of what a request names."""
    if request.kind == "client":
        return plan_rollback(folder, clients=request.target)
    if request.kind == "task":
        return plan_rollback(folder, tasks=request.target)
    if request.kind == "class":
        return plan_rollback(folder, records=rows_with_labels(as_learned(folder), request.target))
    return plan_rollback(folder, records=request.target)


def plan_rollback(
    folder: Path, clients: Collection[str] = (), records: Collection[str] = (), tasks: Collection[str] = ()
) -> Rollback:
    """Where a replay without these clients, records or tasks begins, and what may be claimed of it. Changes nothing.

    Args:
        records: SHA-256 of the names of rows. The rows themselves are looked at where clients are simulated: here.
            Those that were only suppressed before count as there.

    Raises:
        UnlearningError: if nothing is committed yet, there is no such client or task, or no client has these records.
        ConfigError: if a run without the tasks cannot be.
    """
    config = read_config(folder)
    state, _ = load_latest(folder)
    sharded = config.federation.shards > 1
    if state is None and sharded:
        raise UnlearningError(UNFINISHED.format(folder))
    if state is None:
        raise UnlearningError(f"{folder} has no committed round, so there is nothing to unlearn; start it anew without")
    known = [*(row["client"] for row in read_json(folder / "partition.json")), *config.clients.exclude]
    if odd := next((client for client in clients if client not in known), None):
        raise UnlearningError(f"{folder} has no client {odd}{nearest(odd, known)}")
    rows = rounds_played(folder, state)
    owners, emptied = owners_of(as_learned(folder, records), without(config, records=records)) if records else ([], [])
    if tasks:
        first = parting(config, state, tasks)
        without(config, tasks=tasks)  # a stream that mixes its tasks says so
    else:
        first = _first_part(config, rows, {*clients, *owners}, bool(records), state)
    if first is None and knows(state, clients):
        first = 1  # the rows say nothing, and the state does
    start = _start(folder, first, clients) if first is not None else state.round
    first = 1 if first == 0 else first  # not even the start can be kept
    doubts = doubts_about(folder, config, rows, state.round if sharded else start or 0)  # other shards are kept
    gone = tuple(sorted({*clients, *emptied}))
    found = gone, tuple(sorted(records)), tuple(owners), first, start, state.round
    unplayed = tuple(unplayed_rounds(config, state, tasks))
    return Rollback(*found, "E2" if doubts else "E1", tuple(doubts), tuple(sorted(tasks)), unplayed)


def replay(folder: Path, plan: Rollback, work: Path, listen: Listener) -> dict[str, Any]:
    """Play the rounds again without the clients, in a folder of its own; the run itself stays as it is.

    A replay that was stopped anywhere goes on from its last committed round.

    Args:
        work: a folder that is not there yet, or one that a replay of this very plan left.

    Returns:
        The summary of the run without the clients.

    Raises:
        FedLoRAError: what a run may raise.
    """
    prepare(folder, plan, work)
    return launch.resume(work, listen)


def rounds_played(folder: Path, state: RunState) -> list[dict[str, Any]]:
    """A row for every committed round; the newest may be in the checkpoint alone where a crash came after it."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["round"] < state.round]
    return [*rows, dict(state.row)] if state.row else rows


def knows(state: RunState, clients: Collection[str]) -> bool:
    """Whether a state has heard of one of the clients."""
    heard = {*state.records, *state.participation, *state.accepted, *state.caught_up}
    return bool(set(clients) & (heard | {flight.client for flight in state.flights}))


def without(
    config: RunConfig, clients: Collection[str] = (), records: Collection[str] = (), tasks: Collection[str] = ()
) -> RunConfig:
    """The configuration of a run that never had these clients, records and tasks, and was not asked to forget them.

    Raises:
        ConfigError: if a run without the tasks cannot be.
    """
    content = config.resolved()
    content["clients"]["exclude"] = sorted({*config.clients.exclude, *clients})
    for one in content["forgetting"]:
        one["clients"] = [client for client in one["clients"] if client not in clients]
        if one["records"]:
            # an entry that names none is about all rows of its clients
            one["records"] = [name for name in one["records"] if name not in records]
            one["clients"] = one["clients"] if one["records"] else []
    content["forgetting"] = [one for one in content["forgetting"] if one["clients"]]
    forget = sorted({*config.data.forget, *records})
    for data in (content["data"], *(task["data"] for task in (content["continual"] or {}).get("tasks", []))):
        if data:
            data["forget"] = forget
    if config.continual and tasks:
        content["continual"]["without"] = sorted({*config.continual.without, *tasks})
    return parse_config(content)


def prepare(folder: Path, plan: Rollback, work: Path) -> None:
    """The folder of the run without the target, as it stood after round ``plan.start``; whole, or not at all."""
    config = without(read_config(folder), plan.clients, plan.records, plan.tasks)
    build(folder, plan, work, config, states_before(folder, plan))


def states_before(folder: Path, plan: Rollback) -> list[RunState]:
    """``clean_states`` of a plan, as the run without its tasks has them."""
    states = clean_states(folder, plan.start)
    if not (states and plan.tasks):
        return states
    course, rows = course_of(read_config(folder), states[-1]), rounds_played(folder, states[-1])
    return [without_tasks(state, course, plan.tasks, rows) for state in states]


def clean_states(folder: Path, last: int | None) -> list[RunState]:
    """The states that checkpoints hold up to round ``last``, oldest first; older ones are as clean as the last, and a
    later request may need one."""
    return _up_to(folder, last) if last is not None else []


def build(folder: Path, plan: Rollback, work: Path, config: RunConfig, states: Sequence[RunState]) -> None:
    """A folder in which ``launch.resume`` goes on from the last of these states; whole, or not at all.

    Args:
        work: left alone where it is there already.
        config: of the run without the target.
        states: oldest first; their private state comes from the run.
    """
    if work.exists():
        return
    scratch = work.with_name(f".{work.name}")
    if scratch.exists():
        shutil.rmtree(scratch)
    write_atomic(scratch / "config.yaml", config.model_copy(update={"output_dir": str(work)}).to_yaml())
    rows = rows_without(read_lines(folder / "metrics.jsonl"), plan.tasks)
    for state in states:
        commit(scratch, _forgetting(state, config, plan.clients), config.keep_checkpoints)
        PrivateState(folder / "private", config.keep_checkpoints).copy(scratch / "private", state.accepted)
    if states:
        write_atomic(scratch / "metrics.jsonl", _lines([row for row in rows if row["round"] <= states[-1].round]))
    copy_log(folder, scratch, plan.clean)
    scratch.rename(work)


def _forgetting(state: RunState, config: RunConfig, clients: Collection[str]) -> RunState:
    """A state of the run without the clients: nobody scores them any more, so their scores go too."""
    stream = state.stream
    if stream:
        scored = {client: scores for client, scores in stream.clients.items() if client not in clients}
        stream = replace(stream, clients=scored)
    return replace(state, config_sha256=config.sha256(), stream=stream)


def _first_part(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], clients: Collection[str], resized: bool, state: RunState
) -> int | None:
    """The first round in which one of the clients had any part, or was another than it will be."""
    everywhere = config.attack is not None or bool(config.continual and config.continual.routing == "prototype")
    if resized:
        # a draw may go by the number of rows
        everywhere |= config.clients.selection not in ("uniform", "round_robin", "poisson")
    if everywhere and state.round:
        return 1  # a colluder learns from the rows of its group, a prototype is over everybody's
    return next((row["round"] for row in rows if set(row["selected"]) & set(clients)), None)


def _start(folder: Path, first: int, clients: Collection[str]) -> int | None:
    """The newest checkpoint from before round ``first`` with which a replay can begin."""
    for path in reversed(checkpoints(folder)):
        with contextlib.suppress(CheckpointError):
            state = load(path)
            if (
                state.round < first
                and not knows(state, clients)
                and PrivateState(folder / "private", 1).holds(state.accepted)
            ):
                return state.round
    return None


def _up_to(folder: Path, last: int) -> list[RunState]:
    """The states that checkpoints hold up to round ``last``, oldest first."""
    states = []
    for path in checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            state = load(path)
            states += [state] if state.round <= last else []
    if not states or states[-1].round != last:
        raise UnlearningError(f"{folder}: the checkpoint of round {last} is not there any more; plan again")
    return states


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
