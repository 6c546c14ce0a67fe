"""A run from configuration to finished folder: open, resume or start, rounds, results."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fedlora
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError, FedLoRAError, LeaseLost, RunFolderError, RunInterrupted
from fedlora.plugins import Plugin, line_in, load_plugins, read_plugin
from fedlora.protocol import BaseInfo, ClientInfo
from orchestrator.announce import Announcer
from orchestrator.checkpoint import commit, load_latest
from orchestrator.contributions import keep_round
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.lease import Lease, hold, refuse_if_held
from orchestrator.live import await_rows, scored_at_the_end
from orchestrator.opening import check_base, describe_members, first_state, open_federation, rounds_of
from orchestrator.pools import open_pool
from orchestrator.report import write_report
from orchestrator.results import finish
from orchestrator.rounds import play_round
from orchestrator.soundness import check_names
from orchestrator.state import RunState
from orchestrator.stores.files import (
    JsonLines,
    check_output,
    home_of,
    open_folder,
    read_config,
    read_json,
    read_lines,
    write_json,
)
from orchestrator.stores.remote import Mirror, is_url
from orchestrator.unlearning.requests import LOG, pending

Listener = Callable[[str, Mapping[str, Any]], None]


def run(config: RunConfig, listen: Listener, overwrite: bool = False) -> dict[str, Any]:
    """Start a run, or go on with it if its folder already holds this very one.

    Args:
        config: what to run.
        listen: called with every event's name and fields.
        overwrite: delete a run that is in the way.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        FedLoRAError: see ``errors`` for what each kind means.
    """
    check_names(config)  # a misspelt one touches no folder
    if is_url(config.output_dir):
        return _run_elsewhere(config, Mirror(config.output_dir), listen, overwrite)
    folder = Path(config.output_dir)
    try:
        present = check_output(config, overwrite)
    except RunFolderError:
        refuse_if_held(folder)  # somebody is just preparing it, or replaces it
        raise
    if present:
        return _go_on(config, folder, listen)
    with hold_run(config, folder) as lease:
        if open_folder(config, overwrite):
            return _go_on(config, folder, listen, lease)
        return _play(config, folder, None, listen, lease)


def _run_elsewhere(
    config: RunConfig, mirror: Mirror, listen: Listener, overwrite: bool = False, present: bool = False
) -> dict[str, Any]:
    """A run whose folder belongs to another file system."""
    config = config.model_copy(update={"output_dir": str(mirror.folder)})
    with hold_run(config, mirror.folder, mirror) as lease:
        mirror.fetch()  # not before the lease: whoever plays the run here is ahead of the copy
        if present or open_folder(config, overwrite):
            return _go_on(config, mirror.folder, listen, lease, mirror)
        return _play(config, mirror.folder, None, listen, lease, mirror)


def resume(place: Path | str, listen: Listener) -> dict[str, Any]:
    """Go on from the last commit; a finished run just gives its summary again.

    Args:
        place: a run folder, or the URL of one.

    Raises:
        RunFolderError: not a run folder, or no usable checkpoint.
        LeaseHeld: another process plays it.
    """
    if not is_url(str(place)):
        return _go_on(read_config(Path(place)), Path(place), listen)
    mirror = Mirror(str(place))
    return _run_elsewhere(parse_config(mirror.config()), mirror, listen, present=True)


def _go_on(
    config: RunConfig, folder: Path, listen: Listener, lease: Lease | None = None, mirror: Mirror | None = None
) -> dict[str, Any]:
    if summary := _finished_summary(config, folder):  # takes no lease and writes nothing
        if edited := _edited_plugins(config, folder):
            listen("plugins_changed", {"files": edited, "round": config.rounds})
        listen("already_finished", {"folder": str(folder)})
        return summary
    if lease is None:
        with hold_run(config, folder, mirror) as lease:
            return _go_on(config, folder, listen, lease, mirror)
    state, problems = load_latest(folder)
    for problem in problems:
        listen("checkpoint_damaged", {"reason": problem, "round": state.round if state else 0})
    if state is not None and state.config_sha256 != config.sha256():
        raise RunFolderError(f"{folder}: config.yaml was changed since the run started; restore it, or start a new run")
    return _play(config, folder, state, listen, lease, mirror)


def _finished_summary(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished and whose last checkpoint is sound."""
    path = folder / "summary.json"
    summary: dict[str, Any] = read_json(path) if path.exists() else {}
    if summary.get("status") != "finished":
        return None
    state, problems = load_latest(folder)
    if state is None or problems or state.config_sha256 != config.sha256():
        return None
    fits = (summary.get("privacy") or {}).get("fits", config.rounds)  # a budget may have ended it early
    return summary if state.round >= min(rounds_of(config, state), fits) else None


def _play(
    config: RunConfig,
    folder: Path,
    state: RunState | None,
    listen: Listener,
    lease: Lease,
    mirror: Mirror | None = None,
) -> dict[str, Any]:
    """One session. However it ends, what is in the folder is copied to where it belongs."""
    try:
        summary = _session(config, folder, state, listen, lease, mirror)
    except LeaseLost:
        raise
    except FedLoRAError:
        if mirror:
            with contextlib.suppress(RunFolderError):
                mirror.publish(everything=True)
        raise
    if mirror:
        mirror.publish(everything=True)
    return summary


def _session(
    config: RunConfig, folder: Path, state: RunState | None, listen: Listener, lease: Lease, mirror: Mirror | None
) -> dict[str, Any]:
    # before anything is written: a request may be half carried out
    _give_way(config, folder, state.round if state else 0)
    plugins, edited = load_plugins(config.plugins), _edited_plugins(config, folder)
    journal, metrics = JsonLines(folder / "journal.jsonl"), JsonLines(folder / "metrics.jsonl")

    announce = Announcer(lease, config, mirror.url if mirror else str(folder.resolve()))
    mark = partial(_mark, folder, lease, announce)

    def emit(event: str, fields: Mapping[str, Any]) -> None:
        record = stamped(event, fields)
        journal.append(record)
        announce(record)
        listen(event, fields)

    def store(state: RunState) -> None:
        for event, fields in lease.news():
            emit(event, fields)
        commit(folder, state, config.keep_checkpoints, lease.check)
        if mirror:
            try:
                mirror.publish()
            except RunFolderError as error:  # the next commit tries again
                emit("copy_failed", {"round": state.round, "reason": str(error)})

    began = time.perf_counter() - (state.totals.wall_s if state else 0.0)
    try:
        with closing(journal), closing(metrics), _terminate_as_interrupt():
            emit("run_opened" if state is None else "run_resumed", facts(config, state, plugins))
            if state is not None and edited:
                emit("plugins_changed", {"files": edited, "round": state.round})
            if config.pool != "local":
                emit("pool_starting", {"pool": config.pool})
            sharded = state is None and config.federation.shards > 1
            if sharded:
                from orchestrator.shards import combined, play_shards  # deals by rows, which nobody else here reads

                play_shards(config, folder, emit, partial(_play_shard, lease, listen))
            with closing(open_pool(config)) as pool:
                fed, base = open_federation(config, pool, emit)
                if config.contributions:
                    fed = replace(fed, keep=partial(keep_round, folder, config.contributions, lease.check))
                _write_members(folder, fed.taking_part, base)
                if sharded:
                    state, rows = combined(config, folder, fed, base)
                    began = time.perf_counter() - state.totals.wall_s
                    metrics.keep(lambda row: False)
                    for row in rows:  # before the commit: what is resumed after it has the last one only
                        metrics.append(row)
                    store(state)
                elif state is None:
                    state = first_state(config, fed, base)
                    store(state)
                check_base(state, base, folder)
                _catch_up_metrics(metrics, state)
                begun = {"round": state.round, "rounds": fed.rounds, "initial": state.initial}
                fed.emit("run_started", begun | {"clients": describe_members(fed.taking_part)})
                look = partial(_give_way, config, folder)
                while state.round < fed.now(state).rounds and await_rows(fed, state, _patience_s(config), look):
                    look(state.round)
                    state = _commit_round(fed, state, store, metrics, began)
                lease.check()
                return finish(config, folder, scored_at_the_end(fed, state), fed, base, began)
    except KeyboardInterrupt:
        with contextlib.suppress(FedLoRAError):
            state = load_latest(folder)[0]  # a stop may fall between a commit and our hearing of it
        done = state.round if state else 0
        mark("interrupted", f"stopped by the user after round {done}", RunInterrupted.exit_code)
        raise RunInterrupted(
            f"stopped; {done} of {config.rounds} rounds are committed. Go on with: fedlora resume {folder}"
        ) from None
    except RunInterrupted as error:
        mark("interrupted", str(error), error.exit_code)
        raise
    except FedLoRAError as error:
        mark("failed", str(error), error.exit_code)
        raise
    except Exception as error:
        found = [(plugin.path, where) for plugin in plugins if (where := line_in(error, plugin.path))]
        if not found:
            mark("failed", f"{type(error).__name__}: {error}", 1)
            raise
        path, where = found[0]
        told = f"plugins: {path}, {where} raised {type(error).__name__}: {error}; try fedlora strategies check {path}"
        mark("failed", told, ConfigError.exit_code)
        raise ConfigError(told) from error


def _play_shard(lease: Lease, listen: Listener, number: int, part: RunConfig) -> dict[str, Any] | None:
    """The summary of a shard once it has been played; None where it had finished before."""

    def told(event: str, fields: Mapping[str, Any]) -> None:
        lease.check()
        listen(event, {**fields, "shard": number})

    return None if _finished_summary(part, Path(part.output_dir)) else run(part, told)


def _give_way(config: RunConfig, folder: Path, done: int) -> None:
    """Stop between two rounds where somebody has asked to take something out.

    A run of shards is played to its end first: only then is there something to play again.

    Raises:
        RunInterrupted: what is learned from here on would have to be unlearned too.
    """
    home = home_of(folder)
    waiting = pending(home or folder) if ((home or folder) / LOG).exists() else []
    if home or config.federation.shards > 1:
        waiting = [standing for standing in waiting if standing.phase != "received"]
    if waiting:
        raise RunInterrupted(
            f"stopped after round {done}: {waiting[0].id} asks to take out {waiting[0].request} and is"
            f" {waiting[0].phase}. Let fedlora unlearn run finish it, then go on with: fedlora resume {folder}"
        )


def _patience_s(config: RunConfig) -> float:
    return config.continual.live.patience_s if config.continual and config.continual.live else 0.0


def _commit_round(
    fed: Federation, state: RunState, store: Callable[[RunState], None], metrics: JsonLines, began: float
) -> RunState:
    """One round, made durable before anybody hears of it."""
    state = play_round(fed, state)
    start = time.perf_counter()
    state = replace(state, totals=replace(state.totals, wall_s=start - began))
    store(state)
    assert state.row is not None
    metrics.append(dict(state.row))
    reach("commit.logged", state.round)
    fed.emit("round_committed", {**state.row, "commit_s": time.perf_counter() - start})
    reach("commit.told", state.round)
    return state


def _catch_up_metrics(metrics: JsonLines, state: RunState) -> None:
    """Exactly one line per committed round, wherever a crash fell."""
    metrics.keep(lambda row: row["round"] < state.round)
    if state.row is not None:
        metrics.append(dict(state.row))


def _edited_plugins(config: RunConfig, folder: Path) -> list[str]:
    """Plug-in files that are not what the run's last session imported. A run goes on with them, and says so."""
    if not config.plugins:
        return []
    sessions = [line["plugins"] for line in read_lines(folder / "journal.jsonl") if "plugins" in line]
    before = sessions[-1] if sessions else {}
    edited = []
    for path in config.plugins:
        with contextlib.suppress(ConfigError):  # a finished run does not need its files any more
            if path in before and read_plugin(path).sha256 != before[path]:
                edited.append(path)
    return edited


def facts(config: RunConfig, state: RunState | None, plugins: Sequence[Plugin]) -> dict[str, Any]:
    """What a later reader needs to judge whether two runs may be compared bit for bit."""
    packages = ("torch", "transformers", "peft", "numpy", "safetensors")
    return {
        "round": state.round if state else 0,
        "config_sha256": config.sha256(),
        "fedlora": fedlora.__version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "plugins": {path: plugin.sha256 for path, plugin in zip(config.plugins, plugins, strict=True)},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "pid": os.getpid(),
    }


def _write_members(folder: Path, members: Sequence[ClientInfo], base: BaseInfo) -> None:
    rows = [
        {
            "client": member.id,
            "rank": member.rank,
            "num_examples": member.num_examples,
            "num_heldout": member.num_heldout,
            "label_counts": dict(member.label_counts),
        }
        for member in members
    ]
    write_json(folder / "partition.json", rows)
    write_json(folder / "labels.json", list(base.labels))


def hold_run(config: RunConfig, folder: Path, mirror: Mirror | None = None) -> contextlib.AbstractContextManager[Lease]:
    redis = config.store.redis or os.environ.get("FEDLORA_REDIS")
    return hold(folder, redis, config.store.lease_s, mirror.url if mirror else None)


def _mark(folder: Path, lease: Lease, announce: Announcer, status: str, reason: str, exit_code: int) -> None:
    """Say in the run folder how the session ended; the reason for it must not be hidden by a full disk.

    Whoever lost the lease says nothing: the folder is somebody else's.
    """
    event = "run_interrupted" if status == "interrupted" else "run_failed"
    with contextlib.suppress(FedLoRAError):
        lease.check()
        record = stamped(event, {"reason": reason, "exit_code": exit_code})
        with closing(JsonLines(folder / "journal.jsonl")) as journal:
            journal.append(record)
        announce(record)
        write_json(folder / "summary.json", {"status": status, "reason": reason})
        write_report(folder)


def stamped(event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """An event as the journal has it."""
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: abandon the round, keep what is committed, end with a sentence."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
