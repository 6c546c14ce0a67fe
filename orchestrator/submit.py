"""A run as a job of a Ray cluster: submitted once, followed, and submitted again when it dies.

Nothing of the run is kept by Ray. The job's id is derived from the configuration and the run folder, so that whoever
submits the same run finds the job that plays it; a job that starts on a folder with commits goes on from the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_fixed,
)

from fedlora.config import load_config
from fedlora.errors import ConfigError, DataError, FedLoRAError, ModelError, RoundError, RunFolderError, RunInterrupted
from orchestrator.soundness import check_names

HEAD_BACK_S = 300.0  # how long a cluster that stops answering may take to come back
STOP_S = 30  # what Ray grants a stopped job before it kills it; its own 3 s are short for a round under way
BYTES_PER_S = 1_000_000  # Ray sends a log as a whole every time: the longer it is, the less often it is asked for

_FINAL = (ConfigError, DataError, ModelError, RunFolderError, RoundError, RunInterrupted)  # the same would come again
_LOST = (OSError, RuntimeError)  # of requests and of Ray's client: no connection, or an answer that is none


@dataclass(frozen=True)
class Order:
    """A run as a job, the same at every attempt.

    Attributes:
        key: id of its first job; later ones are ``<key>-2``, ``<key>-3``.
        command: what the job runs, in a copy of ``working_dir``.
        working_dir: what is uploaded, without what ``.gitignore`` and ``.rayignore`` name.
        output_dir: of the run, absolute or a URL.
        pause_s: before another attempt, so that what the last one held is free again.
    """

    key: str
    command: str
    working_dir: Path
    output_dir: str
    pause_s: float


class _JobDied(FedLoRAError):
    """A job ended in a way that another attempt may mend."""


class _Client(JobSubmissionClient):
    """Ray's client, which would wait for ever for the answer of a machine that has lost power."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": 60, **options})


def prepare(config: Path, overrides: Sequence[str], working_dir: Path) -> Order:
    """Read a configuration as the job will.

    Raises:
        ConfigError: with every problem of it, or if it is not in ``working_dir``.
    """
    settings = load_config(config, overrides)
    check_names(settings)
    working_dir = working_dir.resolve()
    if not config.resolve().is_relative_to(working_dir):
        raise ConfigError(
            f"config: {config} is not in {working_dir}, and a job sees a copy of this folder only; copy it here"
        )
    relative = str(config.resolve().relative_to(working_dir))
    # the job runs in a copy of the folder that is deleted with it
    output_dir = settings.output_dir if "://" in settings.output_dir else str(Path(settings.output_dir).absolute())
    changes = [one for one in overrides if one.partition("=")[0].strip() != "output_dir"]
    changes.append(f"output_dir={json.dumps(output_dir)}")
    command = ["python", "-m", "orchestrator", "run", relative, *(part for one in changes for part in ("--set", one))]
    identity = hashlib.sha256(f"{settings.sha256()} {output_dir}".encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", (settings.name or "run").lower()).strip("-")
    return Order(f"fedlora-{name}-{identity}", shlex.join(command), working_dir, output_dir, settings.store.lease_s)


def submit(
    order: Order,
    address: str,
    say: Callable[[str], None],
    show: Callable[[str], None],
    follow: bool = True,
    retries: int = 3,
) -> int:
    """Run an order as a job, or follow the one that already does.

    Args:
        order: see ``prepare``.
        address: of the cluster's dashboard, such as ``http://127.0.0.1:8265``.
        say: takes a line about the job.
        show: takes a piece of the job's log.
        follow: stay until it ends, and submit it again when it dies.
        retries: how often it is submitted again.

    Returns:
        The exit code of the job; 0 if it is not followed.

    Raises:
        FedLoRAError: no cluster at the address, or the job died more than ``retries`` times.
        RunInterrupted: Ctrl-C; the job goes on.
    """
    client = _connect(address)
    stop = f"ray job stop --address {client.get_address()}"
    if not follow:
        try:
            job = _find_or_start(client, order, say)
        except _LOST as error:
            raise FedLoRAError(f"{address} did not take the job: {_first_line(error)}") from error
        say(f"follow it: the same command without --no-follow; stop it: {stop} {job}")
        return 0
    attempts = Retrying(
        retry=retry_if_exception_type(_JobDied),
        stop=stop_after_attempt(retries + 1),
        wait=wait_fixed(order.pause_s) + wait_exponential(max=60),
        before_sleep=lambda state: say(f"{_reason(state)}; submitting it again: it goes on from the last commit"),
        reraise=True,
    )
    try:
        return attempts(_attempt, client, order, say, show)
    except _JobDied as error:
        raise FedLoRAError(
            f"{error}; gave up after submitting it again {retries} times. Committed rounds are safe in"
            f" {order.output_dir}: once the cause is mended, the same command goes on from there"
        ) from error
    except KeyboardInterrupt:
        if going := _under_way(client, order):
            told = f"no longer following; the job goes on. Follow it again: the same command. Stop it: {stop} {going}"
        else:
            told = "stopped while no job was under way; the same command submits it"
        raise RunInterrupted(told) from None


def _attempt(client: Any, order: Order, say: Callable[[str], None], show: Callable[[str], None]) -> int:
    """One job to its end; its exit code.

    Raises:
        _JobDied: if it did not come to an end of its own.
    """
    patient = Retrying(
        retry=retry_if_exception_type(_LOST),
        stop=stop_after_delay(HEAD_BACK_S),
        wait=wait_exponential(max=10),
        before_sleep=lambda state: say(f"no answer ({_reason(state)}); waiting") if state.attempt_number == 1 else None,
        reraise=True,
    )
    try:
        job = patient(_find_or_start, client, order, say)
        log = _Log(show)
        watch = Retrying(retry=retry_if_result(_goes_on), wait=log.pause)
        ended = watch(partial(patient, _look), client, job, log)
    except _LOST as error:
        raise FedLoRAError(
            f"no cluster has answered for {HEAD_BACK_S:.0f} s ({_first_line(error)}). Committed rounds are safe in"
            f" {order.output_dir}: start the cluster again, and the same command goes on from there"
        ) from error
    if ended is None:
        raise _JobDied(f"the cluster was started anew and does not know job {job}")
    if ended.status == JobStatus.SUCCEEDED:
        say(f"job {job} finished; results in {order.output_dir}")
        return 0
    if ended.status == JobStatus.STOPPED:
        say(f"job {job} was stopped; the same command goes on from the last commit")
        return RunInterrupted.exit_code
    code = ended.driver_exit_code
    if code in {kind.exit_code for kind in _FINAL}:
        say(f"job {job} ended with exit code {code}; its last lines say why")
        return int(code)
    if code is None:
        raise _JobDied(f"job {job} died ({_first_line(ended.message or 'no reason given')})")
    signal = -code if code < 0 else code - 128
    raise _JobDied(
        f"job {job} " + (f"was killed by signal {signal}" if signal > 0 else f"failed with exit code {code}")
    )


def _connect(address: str) -> Any:
    if address.startswith("ray://"):
        raise ConfigError(f"--address {address}: give the dashboard's, such as http://127.0.0.1:8265")
    if "://" not in address:
        address = f"http://{address}"
    # Ray prefers its own variables to what it is told; what the user asked for must win
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # its loggers tell about every package and ignored file
    try:
        return _Client(address)
    except (*_LOST, ValueError, RayError) as error:
        raise FedLoRAError(
            f"no Ray cluster answers at {address} ({_first_line(error)}); start one with ray start --head, or give the"
            " address of its dashboard with --address"
        ) from error


def _find_or_start(client: Any, order: Order, say: Callable[[str], None]) -> str:
    """The job of this order that has not ended, or a new one."""
    jobs = _jobs(client, order)
    latest = max(jobs, default=0)
    if latest and not jobs[latest].status.is_terminal():
        say(f"job {_name(order, latest)} is already under way")
        return _name(order, latest)
    job = _name(order, latest + 1)
    environment = {
        "working_dir": str(order.working_dir),
        "excludes": ["/runs/"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
    }
    try:
        client.submit_job(entrypoint=order.command, submission_id=job, runtime_env=environment)
    except ValueError as error:
        raise FedLoRAError(
            f"{order.working_dir} cannot be uploaded: {_first_line(error)}; name what a run does not need in .rayignore"
        ) from error
    except RuntimeError:
        if latest + 1 not in _jobs(client, order):
            raise
        say(f"job {job} is already under way")  # somebody else submitted the same run just now
        return job
    say(f"submitted job {job}; results go to {order.output_dir}, which the head node has to see")
    return job


def _jobs(client: Any, order: Order) -> dict[int, Any]:
    """Every job of this order that the cluster remembers, by attempt."""
    found = {}
    for job in client.list_jobs():
        match = re.fullmatch(re.escape(order.key) + r"(?:-(\d+))?", job.submission_id or "")
        if match:
            found[int(match[1] or 1)] = job
    return found


def _name(order: Order, attempt: int) -> str:
    return order.key if attempt == 1 else f"{order.key}-{attempt}"


def _under_way(client: Any, order: Order) -> str | None:
    """The job of this order that has not ended; its first id if the cluster does not answer."""
    try:
        jobs = _jobs(client, order)
    except _LOST:
        return order.key
    latest = max(jobs, default=0)
    return _name(order, latest) if latest and not jobs[latest].status.is_terminal() else None


def _look(client: Any, job: str, log: _Log) -> Any:
    """What the cluster says of a job, or None if it does not know it; shows what is new in its log."""
    try:
        details = client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise
    try:
        log.show_new(client.get_job_logs(job))
    except RuntimeError:
        if not details.status.is_terminal():
            raise  # of a job that has ended, the log may have gone with its node
    return details


def _goes_on(details: Any) -> bool:
    return details is not None and not details.status.is_terminal()


class _Log:
    """A job's log, as far as it was shown."""

    def __init__(self, show: Callable[[str], None]):
        self._show, self._shown = show, 0

    def show_new(self, whole: str) -> None:
        if len(whole) > self._shown:
            self._show(whole[self._shown :])
            self._shown = len(whole)

    def pause(self, state: RetryCallState) -> float:
        return max(1.0, self._shown / BYTES_PER_S)


def _reason(state: RetryCallState) -> str:
    return _first_line(state.outcome.exception()) if state.outcome else ""


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
