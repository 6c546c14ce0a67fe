"""Clients on Ray actors: on this machine, or on a cluster.

Ray holds nothing that matters. A task travels as a few numbers and a reference to its adapter, short tasks several in
one call; replies are taken as they arrive. A cohort goes to one worker. The work of a worker that dies is given to
others, each cohort in a call of its own, and the clients of one that dies too often each alone: a client that kills its
workers takes no other down. What a client comes to depends on none of this.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from typing import Any

from clients.attempt import OpenRuntime, open_runtime
from fedlora.config import RunConfig
from fedlora.errors import FedLoRAError
from fedlora.plugins import load_plugins
from fedlora.protocol import BaseInfo, ClientInfo, EvalResult, EvalTask, Reply, TrainTask, WorkerStats
from orchestrator.pools import check_one_each
from orchestrator.pools.balance import Pace, call_size, training_flops
from orchestrator.pools.cohorts import Division
from orchestrator.pools.crew import EXAMINE_S, Crew, Worker, connect, first_line
from orchestrator.pools.letters import deliver
from orchestrator.pools.shelf import Shelf, ledger_of

import ray  # isort: skip - after crew, which sets what Ray reads when it is imported
from ray.exceptions import RayError, RayTaskError  # isort: skip

_POLL_S = 0.005  # between looks for idle workers while somebody else works on the replies
_LOOK_AHEAD = 1000  # cohorts of the queue that are looked at for one call
HELD_UP_S = 60.0  # that scores wait for workers which all train for rounds gone by


@dataclass(eq=False)
class _Job:
    """A task and how far it has come.

    Attributes:
        cost: estimated, in whatever unit its kind of task has.
        cohort: which of the queue's cohorts it belongs to; they stay together.
        alone: its cohort shares its call with no other.
        split: why its cohort was taken apart.
        tries: workers that died over it.
        wanted: false once it has been abandoned.
        result: of a task of evaluation.
    """

    task: TrainTask | EvalTask
    cost: float
    cohort: int
    alone: bool = False
    split: str = ""
    tries: int = 0
    wanted: bool = True
    result: EvalResult | None = None

    @property
    def trains(self) -> str | None:
        """The client whose training this is."""
        return self.task.client if isinstance(self.task, TrainTask) else None


@dataclass(eq=False)
class _Call:
    """Jobs on their way through one worker; ``until`` is when it is stopped if it has not answered."""

    worker: Worker
    jobs: list[_Job]
    until: float = float("inf")


@dataclass
class _Out:
    """Everything between a task that was given out and its answer."""

    queue: deque[_Job] = field(default_factory=deque)
    calls: dict[Any, _Call] = field(default_factory=dict)
    arrived: deque[tuple[Reply, Any]] = field(default_factory=deque)

    def clients(self) -> set[str]:
        """Who still owes an answer, or has given one that nobody has seen."""
        jobs = [*self.queue, *(job for call in self.calls.values() for job in call.jobs if job.wanted)]
        return {job.trains for job in jobs if job.trains} | {reply.client for reply, _ in self.arrived}

    def owed(self) -> bool:
        """Whether ``clients`` names anybody."""
        under_way = (job.trains and job.wanted for call in self.calls.values() for job in call.jobs)
        return bool(self.arrived) or any(job.trains for job in self.queue) or any(under_way)


class RayPool:
    """Actors that each hold one copy of the base."""

    def __init__(self, config: RunConfig, runtime: OpenRuntime = open_runtime):
        self._config = config
        self._out, self._shelf = _Out(), Shelf()
        self._pace = {TrainTask: Pace(), EvalTask: Pace()}
        plugins = load_plugins(config.plugins)
        self._started_here = connect(config)
        self._crew = Crew(config, plugins, runtime)
        try:
            self._crew.open()
            self._members: list[ClientInfo] = self._ask_any("members")
            self._base: BaseInfo = self._ask_any("base")
        except BaseException:
            self.close()
            raise
        self._by_id = {member.id: member for member in self._members}
        self._division, self._numbers = Division(config, self._members, self._base), count()

    @property
    def workers(self) -> int:
        return max(1, len(self._crew.live))

    def members(self) -> list[ClientInfo]:
        return self._members

    def base(self) -> BaseInfo:
        return self._base

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        check_one_each(tasks, self._out.clients() if tasks else ())
        again = {task.client for task in tasks}
        for reference, call in list(self._out.calls.items()):
            if any(job.trains in again for job in call.jobs):
                self._evict(reference)  # given up before, and still at it: a client does one thing at a time
        cohorts = self._division.cohorts(tasks) if timeout_s is None else [(task,) for task in tasks]
        jobs = list(self._out.queue)
        for cohort in cohorts:
            number = next(self._numbers)
            jobs += [_Job(task, self._cost(task), number) for task in cohort]
        for task in tasks:
            self._shelf.put(task)
        costs: dict[int, float] = {}
        for job in jobs:
            costs[job.cohort] = costs.get(job.cohort, 0.0) + job.cost
        self._out.queue = deque(sorted(jobs, key=lambda job: (not job.alone, -costs[job.cohort], job.cohort)))
        return self._replies(timeout_s)

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        return deliver(self._crew, self._free, messages, self._config.ray.task_retries, timeout_s)

    def abandon(self, clients: Collection[str]) -> None:
        gone = [job for job in self._out.queue if job.trains in clients]
        self._out.queue = deque(job for job in self._out.queue if job.trains not in clients)
        self._out.arrived = deque(item for item in self._out.arrived if item[0].client not in clients)
        for job in gone:
            self._shelf.drop(job.task)
        # a worker that is stopped has to load the base again: it may finish if that takes no longer
        until = time.monotonic() + self._crew.start_s
        for call in self._out.calls.values():
            for job in call.jobs:
                if job.trains in clients:
                    job.wanted, call.until = False, min(call.until, until)

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        jobs = []
        for task in tasks:
            client = self._by_id.get(task.subject)
            cost = 1.0 + (client.num_heldout if client else 0)
            jobs.append(_Job(task, cost, next(self._numbers), alone=not client))
            self._shelf.put(task)
        # nobody can go on without the scores; the server's shards are the longest of them
        self._out.queue.extendleft(sorted(jobs, key=lambda job: (not job.alone, -job.cost), reverse=True))
        waiting = deque(jobs)
        patient_until = time.monotonic() + HELD_UP_S
        while waiting:
            if waiting[0].result is not None:
                waiting.popleft()
                patient_until = time.monotonic() + HELD_UP_S
                continue
            self._advance(None, False)
            if time.monotonic() > patient_until and (late := self._held_up()):
                self._evict(late, anew=True)  # its client may never answer; it is tried again after the scores
                patient_until = time.monotonic() + HELD_UP_S
        return [job.result for job in jobs if job.result]

    def stats(self) -> list[WorkerStats]:
        return self._crew.stats([call.worker for call in self._out.calls.values()])

    def close(self) -> None:
        self._out, self._shelf = _Out(), Shelf()
        if ray.is_initialized():
            self._crew.close()
            if self._started_here:
                ray.shutdown()
        self._started_here = False

    def _replies(self, timeout_s: float | None) -> Iterator[Reply]:
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        looked = -1.0
        while True:
            while self._out.arrived:
                reply, payload = self._out.arrived.popleft()
                yield reply if payload is None else replace(reply, payload=payload.data)
                now = time.monotonic()
                if now - looked > _POLL_S and (ends is None or now < ends):
                    looked = now
                    self._advance(0, ends is None)
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not self._out.owed() or (left == 0 and looked >= 0):
                return
            self._advance(left, ends is None)
            looked = time.monotonic()

    def _advance(self, wait_s: float | None, together: bool) -> None:
        """Keep the workers busy, and take in one call's results or one worker; wait at most so long for either.

        Args:
            together: tasks may share calls. Not before a deadline: nobody's answer must wait behind a client that
                never answers.
        """
        now = time.monotonic()
        for reference, call in list(self._out.calls.items()):
            if call.until <= now:
                self._evict(reference)
        for worker in self._crew.tend():
            for reference in [reference for reference, call in self._out.calls.items() if call.worker is worker]:
                self._try_again(self._out.calls.pop(reference), "its node was lost")
        self._hand_out(together)
        references = [*self._out.calls, *self._crew.starting]
        patience = min([EXAMINE_S, *(call.until - now for call in self._out.calls.values())])
        patience = max(0.0, patience if wait_s is None else min(patience, wait_s))
        if not references:
            time.sleep(min(patience, 0.1))  # there is nothing to wait for until a node joins
            return
        for reference in ray.wait(references, num_returns=1, timeout=patience)[0]:
            if reference in self._out.calls:
                self._take(reference)
            else:
                self._crew.greet([reference])
        self._hand_out(together)

    def _free(self, wait_s: float) -> list[Worker]:
        """Workers that have nothing to do; waits so long for one where there is none."""
        if not self._idle():
            self._advance(wait_s, False)
        for worker in filter(self._crew.is_dead, self._idle()):
            self._crew.lose(worker)
        return self._idle()

    def _idle(self) -> list[Worker]:
        busy = {call.worker for call in self._out.calls.values()}
        return [worker for worker in self._crew.live if worker not in busy]

    def _hand_out(self, together: bool) -> None:
        for worker in self._idle():
            if not self._out.queue:
                return
            if self._crew.is_dead(worker):
                self._crew.lose(worker)  # while it had nothing to do: no task has to pay for it
                continue
            jobs = self._next_jobs(together or not self._out.queue[0].trains)
            adapters = {job.task.adapter: self._shelf.adapter(job.task) for job in jobs}
            places = {adapter: place for place, adapter in enumerate(adapters)}
            tasks = [(replace(job.task, adapter=b"", ledger=()), places[job.task.adapter]) for job in jobs]
            more: Any = tasks, self._shelf.patches(jobs[0].task)
            if jobs[0].trains:
                sizes = [len(list(own)) for _, own in groupby(job.cohort for job in jobs)]
                reference = worker.actor.train.remote(sizes, *more, *adapters.values())
            else:
                reference = worker.actor.evaluate.remote(*more, *adapters.values())
            self._out.calls[reference] = _Call(worker, jobs)

    def _next_jobs(self, share: bool) -> list[_Job]:
        """The first cohort of the queue, and with it what can share its call."""
        queue, first = self._out.queue, self._out.queue[0]
        together: list[list[_Job]] = []
        for _, group in islice(groupby(queue, lambda job: job.cohort), _LOOK_AHEAD):
            cohort = list(group)
            job = cohort[0]
            alike = type(job.task) is type(first.task) and ledger_of(job.task) == ledger_of(first.task)
            if together and (job.alone or not alike):
                break
            together.append(cohort)
            if job.alone or not share:
                break
        size = sum(len(job.task.adapter) for job in together[0]) if first.trains else 0
        costs = [sum(job.cost for job in cohort) for cohort in together]
        count = call_size(costs, size, self._pace[type(first.task)], self.workers)
        return [queue.popleft() for cohort in together[:count] for _ in cohort]

    def _take(self, reference: Any) -> None:
        """The results of a call, or what became of it."""
        call = self._out.calls.pop(reference)
        try:
            results = ray.get(reference)
        except RayTaskError as error:
            reason = f"{type(error.cause).__name__}: {error.cause}"
            for job in call.jobs:
                self._finish(job, _failed(job.task, reason, str(error)))
        except RayError as error:
            # the worker or its node is gone, and what it had finished is not known
            self._crew.lose(call.worker)
            self._try_again(call, first_line(error))
        else:
            trained = bool(call.jobs[0].trains)
            seconds = sum(result[0].seconds if trained else result[1] for result in results)
            if not call.jobs[0].alone:
                self._pace[type(call.jobs[0].task)].learn(sum(job.cost for job in call.jobs), seconds)
            for job, result in zip(call.jobs, results, strict=True):
                self._finish(job, result)

    def _finish(self, job: _Job, result: tuple[Any, Any]) -> None:
        self._shelf.drop(job.task)
        if not job.trains:
            job.result = result[0]
        elif job.wanted:
            self._out.arrived.append((replace(result[0], alone=job.split or result[0].alone), result[1]))

    def _try_again(self, call: _Call, reason: str) -> None:
        """The jobs of a worker that died."""
        sizes = Counter(job.cohort for job in call.jobs if job.wanted)
        for job in reversed(call.jobs):
            job.tries, job.alone = job.tries + 1, True
            if not job.wanted:
                self._shelf.drop(job.task)
            elif job.tries <= self._config.ray.task_retries:
                self._out.queue.appendleft(job)
            elif sizes[job.cohort] > 1:
                job.cohort = next(self._numbers)  # one of them may be at fault: each once more, alone
                job.split = f"its cohort's worker died {job.tries} times ({reason})"
                self._out.queue.appendleft(job)
            else:
                times = "once" if job.tries == 1 else f"{job.tries} times"
                self._finish(job, _failed(job.task, f"its worker died {times} ({reason})"))

    def _held_up(self) -> Any:
        """The oldest call of late training, if such calls have all the workers."""
        calls = list(self._out.calls.items())
        training = [reference for reference, call in calls if call.jobs[0].trains]
        return training[0] if training and len(training) == len(calls) >= len(self._crew.live) else None

    def _evict(self, reference: Any, anew: bool = False) -> None:
        """Stop a worker over a task that was given up. Others in its call are done again, and it is not their fault.

        Args:
            anew: nothing was given up; all of the call is done again, after everything else.
        """
        call = self._out.calls.pop(reference)
        self._crew.lose(call.worker)
        again = [job for job in call.jobs if job.wanted]
        for job in call.jobs:
            job.alone = True
            if not job.wanted:
                self._shelf.drop(job.task)
        if anew:
            self._out.queue.extend(again)
        else:
            self._out.queue.extendleft(reversed(again))

    def _cost(self, task: TrainTask) -> float:
        client = self._by_id.get(task.client) or ClientInfo(task.client, task.plan.rank, 1)
        return training_flops(client, task.plan, self._config.training, self._base, self._config.data.max_length)

    def _ask_any(self, method: str) -> Any:
        for worker in list(self._crew.live):
            try:
                return ray.get(getattr(worker.actor, method).remote())
            except RayTaskError as error:
                if isinstance(error.cause, FedLoRAError):
                    raise error.cause from None  # it already says what to do
                raise
            except RayError:
                self._crew.lose(worker)
        raise FedLoRAError("every Ray worker died while the run was opened; see Ray's logs for the reason")


def _failed(task: TrainTask | EvalTask, reason: str, trace: str | None = None) -> tuple[Any, Any]:
    if isinstance(task, TrainTask):
        where = f"client {task.client}, round {task.round}\n{trace}" if trace else None
        return Reply(task.client, error=reason, traceback=where), None
    return EvalResult(task.subject, 0.0, 0, 0, 0, error=reason), 0.0
