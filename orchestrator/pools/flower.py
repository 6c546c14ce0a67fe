"""Clients at organisations: every SuperNode is one client, reached over Flower's Grid.

A node is asked who it is before it is given anything; what it says, and every answer, is checked like any hostile
input. A node that is away, refuses, or answers nonsense costs itself only. Patches of the base travel once to each
node, which keeps them and says which it lacks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from clients.attempt import OpenRuntime, Runtime, open_runtime
from clients.recipe import recipe_of
from clients.records import Parcel, read, sha256, task_note
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedLoRAError, WireError
from fedlora.privacy.fixed_point import MOST_WEIGHT
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Patch, Reply, TrainTask, WorkerStats
from orchestrator.flower.keys import read_keys
from orchestrator.pools import check_one_each, cores
from orchestrator.pools.nodes import Nodes
from orchestrator.pools.post import Grid, Post, told

_NOT_TAKEN = "the SuperLink did not take the message: it is too large, or the node has been unregistered"
_SLACK_S = 60.0  # that clocks may differ before a message counts as late
GRID: ContextVar[Grid | None] = ContextVar("GRID", default=None)  # of the ServerApp that plays a run


@dataclass
class _Out:
    """A message on its way.

    Attributes:
        client, node: whom it went to.
        kind, note: of the message, for when a node lacks patches.
        adapters: payloads that are no patches.
        ledger: every patch it names.
    """

    client: str
    node: int
    kind: str
    note: dict[str, Any]
    adapters: Mapping[str, bytes]
    ledger: tuple[Patch, ...]
    ttl: float | None = None
    since: float = field(default_factory=time.monotonic)
    again: bool = False


class FlowerPool:
    """The SuperNodes of a SuperLink.

    Args:
        grid: where the nodes are; default what the configuration's ``flower.address`` leads to.
        runtime: what scores the server's own rows.
    """

    def __init__(self, config: RunConfig, grid: Grid | None = None, runtime: OpenRuntime = open_runtime):
        self._config, self._open = config, runtime
        self._server: Runtime | None = None
        self._close = lambda: None
        if grid is None:
            if config.flower.address is None:
                raise ConfigError(
                    "flower.address: say where the SuperLink is (host:port), or run the app that fedlora flower init"
                    " writes with flwr run"
                )
            from orchestrator.flower.link import connect

            grid, self._close = connect(config.flower)
        self._post = Post(grid, config.flower.poll_s)
        self._recipe = recipe_of(config).model_dump_json()
        keys = read_keys(config.flower.keys) if config.flower.keys else None
        alike = MOST_WEIGHT // config.flower.nodes if config.privacy.secure_sum else 0
        self._nodes = Nodes(self._post, self._recipe, lambda: self._base.fingerprint, config.lora.r, keys, alike)
        self._members: list[ClientInfo] = []
        self._out: dict[str, _Out] = {}
        self._arrived: deque[Reply] = deque()
        self._has: dict[int, set[str]] = {}  # patches that a node is known to keep
        self._stats: dict[str, WorkerStats] = {}

    @property
    def workers(self) -> int:
        return max(1, len(self._members))

    def members(self) -> list[ClientInfo]:
        if not self._members:
            self.base()  # before anybody is asked: a server without its model asks nobody
            self._members = self._nodes.wait_for(self._config.flower.nodes, self._config.flower.wait_s)
        return self._members

    def base(self) -> BaseInfo:
        return self._base

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        check_one_each(tasks, self._owing() if tasks else ())
        self._nodes.look()
        limit = timeout_s if self._config.schedule.late == "drop" else None
        for task in tasks:
            note = {"cohort": len(tasks), "task": task_note(task), "seconds": limit}
            self._send(task.client, "train", note, {sha256(task.adapter): task.adapter}, task.ledger, limit)
        return self._replies(timeout_s)

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        self._nodes.look()
        ends, before = math.inf if timeout_s is None else time.monotonic() + timeout_s, set(self._out)
        for client, letter in messages.items():
            note = {"client": client, "letter": sha256(letter)}
            self._send(client, "query.exchange", note, {note["letter"]: letter}, (), timeout_s)
        replies = {reply.client: reply for reply in self._arrived if reply.client in messages}  # whoever is not there
        self._arrived = deque(reply for reply in self._arrived if reply.client not in messages)
        for out, answer in self._awaited(set(self._out) - before, ends):
            if answer is not None:
                replies[out.client] = _reply(out, answer)
        return replies

    def abandon(self, clients: Collection[str]) -> None:
        self._out = {message: out for message, out in self._out.items() if out.client not in clients}
        self._arrived = deque(reply for reply in self._arrived if reply.client not in clients)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        results: dict[int, EvalResult] = {}
        asked: dict[str, list[int]] = {}
        for place, task in enumerate(tasks):
            if task.subject:
                asked.setdefault(task.subject, []).append(place)
            elif task.probe or self._config.data.test_file:
                results[place] = self._own().evaluate(task)
            elif task.shard:
                results[place] = EvalResult("", 0.0, 0, 0, 0)  # all of it is in the first shard
            else:
                for member in self.members():
                    asked.setdefault(member.id, []).append(place)
        found = self._ask_scores(tasks, asked)
        for client in sorted(found):  # sums in one order, whoever answers first
            for place, result in zip(asked[client], found[client], strict=True):
                before = results.get(place)
                if tasks[place].subject or before is None or before.error:
                    results[place] = result
                elif not result.error:
                    results[place] = before + result  # whoever is away is not among the rows
        return [results[place] for place in range(len(tasks))]

    def stats(self) -> list[WorkerStats]:
        return [self._stats[member.id] for member in self._members if member.id in self._stats]

    def close(self) -> None:
        self._out, self._arrived = {}, deque()
        close, self._close = self._close, lambda: None
        close()

    @functools.cached_property
    def _base(self) -> BaseInfo:
        return replace(self._own().base(), cohort=1)  # every node trains by itself

    def _own(self) -> Runtime:
        """The server's runtime, which has a base model and at most rows to test on."""
        if self._server is None:
            self._server = self._open(self._config, self._config.threads or cores())
        return self._server

    def _owing(self) -> set[str]:
        return {out.client for out in self._out.values()} | {reply.client for reply in self._arrived}

    def _send(
        self,
        client: str,
        kind: str,
        note: dict[str, Any],
        adapters: Mapping[str, bytes],
        ledger: tuple[Patch, ...],
        limit: float | None,
    ) -> None:
        node = self._nodes.node_of(client)
        if node is None:
            self._arrived.append(Reply(client, error=f"{client} is not connected to the SuperLink"))
            return
        pairs = [[patch.id, sha256(patch.payload)] for patch in ledger]
        note = {**note, "recipe": self._recipe, "base": self._base.fingerprint, "ledger": pairs}
        ttl = None if limit is None else limit + _SLACK_S
        out = _Out(client, node, kind, note, adapters, ledger, ttl)
        if not self._push(out, {key for _, key in pairs} - self._has.setdefault(node, set())):
            self._arrived.append(Reply(client, error=_NOT_TAKEN))

    def _push(self, out: _Out, patches: Collection[str]) -> bool:
        """Send a message with these patches beside its adapters; whether the SuperLink took it."""
        contents = {sha256(patch.payload): patch.payload for patch in out.ledger} if patches else {}
        payloads = {**out.adapters, **{key: contents[key] for key in contents if key in patches}}
        message = self._post.send(out.node, out.kind, Parcel(out.note, payloads), out.ttl)
        if message:
            self._out[message] = out
        return message is not None

    def _replies(self, timeout_s: float | None) -> Iterator[Reply]:
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        looked = False
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            left = math.inf if ends is None else ends - time.monotonic()
            if not self._out or (left <= 0 and looked):
                return
            self._nodes.look()
            for out, answer in self._answers(list(self._out)):
                self._arrived.append(_reply(out, answer))
            looked = True
            if not self._arrived and self._out:
                time.sleep(max(0.0, min(self._post.poll_s, left)))

    def _answers(self, messages: Sequence[str]) -> Iterator[tuple[_Out, Parcel]]:
        """Messages of these that were answered, with the answers; a node that lacks patches is sent them instead."""
        for message, answer in self._post.collect(messages).items():
            out = self._out.pop(message, None)
            if out is None:
                continue
            if answer is None:
                yield out, Parcel({"error": f"{out.client} has gone, or its ClientApp died"})
                continue
            if isinstance(answer.note.get("lacks"), list) and not out.again:
                out.again = True  # once: a node that lacks what it was just sent has no disk to keep it on
                self._has[out.node] = set()
                if not self._push(out, {key for key in answer.note["lacks"] if isinstance(key, str)}):
                    yield out, Parcel({"error": _NOT_TAKEN})
                continue
            if "error" not in answer.note:
                self._has.setdefault(out.node, set()).update(key for _, key in out.note["ledger"])
            with contextlib.suppress(KeyError, WireError):  # nothing depends on it
                self._stats[out.client] = read(WorkerStats, answer.note["stats"])
            yield out, answer

    def _ask_scores(self, tasks: Sequence[EvalTask], asked: Mapping[str, list[int]]) -> dict[str, list[EvalResult]]:
        """What each client says of its tasks, checked; an error for each where it says nothing of use."""
        found: dict[str, list[EvalResult]] = {}
        busy, sent = self._owing(), set[str]()
        for client, places in asked.items():
            own = [replace(tasks[place], shard=0, num_shards=1) for place in places]
            if client in busy:
                found[client] = _unscored(own, f"{client} is still at work on a round")
                continue
            before = set(self._out)
            note = {"tasks": [task_note(task) for task in own]}
            adapters = {sha256(task.adapter): task.adapter for task in own}
            self._send(client, "evaluate", note, adapters, own[0].ledger, None)
            sent |= set(self._out) - before
        for reply in [reply for reply in self._arrived if reply.client in asked and reply.client not in busy]:
            self._arrived.remove(reply)
            found[reply.client] = _unscored([tasks[place] for place in asked[reply.client]], reply.error or "")
        ends = time.monotonic() + (self._config.schedule.deadline_s or math.inf)
        for out, answer in self._awaited(sent, ends):
            own = [tasks[place] for place in asked[out.client]]
            late = f"{out.client} gave no score in time"
            found[out.client] = _unscored(own, late) if answer is None else _scores(out.client, own, answer)
        return found

    def _awaited(self, sent: set[str], ends: float) -> Iterator[tuple[_Out, Parcel | None]]:
        """Each of these messages with its answer, as they come; None for those without one when time is up."""
        while sent and time.monotonic() < ends:
            before = set(self._out)
            yield from self._answers(sorted(sent))
            sent = (sent & set(self._out)) | (set(self._out) - before)  # those with patches that were sent again
            if sent:
                time.sleep(self._post.poll_s)
        for message in sent:
            yield self._out.pop(message), None


def _reply(out: _Out, answer: Parcel) -> Reply:
    """A node's answer to a task, as the round loop takes it."""
    passed = time.monotonic() - out.since
    claimed = answer.note.get("seconds")
    seconds = min(float(claimed), passed) if isinstance(claimed, int | float) and claimed >= 0 else passed
    payload = answer.payloads.get(str(answer.note.get("payload")))
    if payload is not None:
        return Reply(out.client, payload, seconds=seconds)
    trace = answer.note.get("traceback")
    lines = [told(line) for line in trace[:20_000].splitlines()] if isinstance(trace, str) else []
    error = told(answer.note.get("error") or "its answer holds neither an update nor a reason")
    return Reply(out.client, error=error, traceback="\n".join(lines) + "\n" if lines else None, seconds=seconds)


def _scores(client: str, tasks: Sequence[EvalTask], answer: Parcel) -> list[EvalResult]:
    """What a node says of its rows, if it can be true."""
    try:
        if "error" in answer.note:
            raise FedLoRAError(str(answer.note["error"]))
        told_of = answer.note.get("results")
        if not isinstance(told_of, list) or len(told_of) != len(tasks):
            raise WireError("its scores are not as many as it was asked for")
        results = [read(EvalResult, content) for content in told_of]
        for result in results:
            counts = result.num_targets, result.num_correct, result.num_examples
            if not all(0 <= count <= 10**12 for count in counts) or result.num_correct > result.num_examples:
                raise WireError("its scores cannot be true")
            if not result.error and not (math.isfinite(result.loss_sum) and result.loss_sum >= 0):
                raise WireError(f"its loss is {result.loss_sum:g}")
    except FedLoRAError as error:
        return _unscored(tasks, f"{client}: {told(error)}")
    return [
        replace(result, subject=task.subject, features=(), error=told(result.error) if result.error else None)
        for task, result in zip(tasks, results, strict=True)
    ]


def _unscored(tasks: Sequence[EvalTask], reason: str) -> list[EvalResult]:
    return [EvalResult(task.subject, 0.0, 0, 0, 0, error=reason) for task in tasks]
