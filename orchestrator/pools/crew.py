"""The Ray actors of a pool: started where they fit, replaced when they die, more of them when nodes join."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone

import ray
from ray import cloudpickle
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.exceptions import RayError, RayTaskError

from clients.attempt import OpenRuntime
from clients.ray_actor import RayWorker
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedLoRAError, ModelError
from fedlora.plugins import Plugin
from fedlora.protocol import WorkerStats
from orchestrator.pools import cores
from orchestrator.pools.balance import fits

EXAMINE_S = 2.0  # between looks at the cluster
HOPE_S = 60.0  # how long a run waits for a place to put its only worker
STARTS = 3  # workers that may die while they start, in a row, when there is no other
LONGEST_PAUSE_S = 60.0  # between starts on a cluster where they fail
# a worker keeps what one update took for the next one: giving pages back and faulting them in again costs more
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
OPENING_S = 10.0  # a run opens with those workers that come at most this long after the first


@dataclass(frozen=True, eq=False)
class Worker:
    """An actor that has loaded the base.

    Attributes:
        node: where it is.
        stats: as it started, for when it is too busy to be asked.
    """

    actor: Any
    node: str
    stats: WorkerStats


class Crew:
    """Actors and what becomes of them. Nobody waits for one that starts while another one lives."""

    def __init__(self, config: RunConfig, plugins: Sequence[Plugin], open_runtime: OpenRuntime):
        self._settings = config.ray
        self._threads = config.threads or max(1, math.floor(self._settings.num_cpus))
        # a worker's folder is another one: what clients keep to themselves belongs to the run's
        told = {**config.resolved(), "output_dir": str(Path(config.output_dir).absolute())}
        self._arguments = (told, self._threads, list(plugins), cloudpickle.dumps(open_runtime))
        self.live: list[Worker] = []
        self._starting: dict[Any, tuple[Any, float]] = {}  # actors and when they were asked for, by their first call
        self._failed = 0  # starts in a row
        self._reason: BaseException | None = None  # of the last failed start
        self._examined = self._resume = -math.inf
        self._placed = time.monotonic()  # when a worker lived or was about to
        self.start_s = 1.0  # what a replacement costs, as the last one took

    def open(self) -> None:
        """Start as many workers as asked for, or as fit; return with the first one and those that come with it.

        Raises:
            ConfigError: if they do not fit the cluster.
            FedLoRAError: what kept a worker from starting.
        """
        self._check_room()
        began = time.monotonic()
        self.tend()
        while not self.live:
            self.tend()
            if self._starting:
                self.greet(ray.wait(self.starting, timeout=0.5)[0])
            else:
                time.sleep(0.1)  # a start has failed, and the next one is not due
        ends = time.monotonic() + min(time.monotonic() - began, OPENING_S)
        while self._starting and (left := ends - time.monotonic()) > 0:
            self.greet(ray.wait(self.starting, timeout=left)[0])

    def close(self) -> None:
        """Stop every actor."""
        for actor in [worker.actor for worker in self.live] + [actor for actor, _ in self._starting.values()]:
            ray.kill(actor)
        self.live, self._starting = [], {}

    @property
    def starting(self) -> list[Any]:
        """References that become ready when a worker has started; give them to ``greet``."""
        return list(self._starting)

    def tend(self) -> list[Worker]:
        """Start what is missing; look at the cluster if that was a while ago.

        Returns:
            Workers that were lost with their node.

        Raises:
            FedLoRAError: if no worker is left and none can be started.
        """
        now = time.monotonic()
        if self.live or any(_is_placed(actor) for actor, _ in self._starting.values()):
            self._placed = now
        elif now - self._placed > HOPE_S:
            raise FedLoRAError(
                f"ray: no worker is left, and none could be placed for {HOPE_S:g} s; start a node that has"
                f" {_described(self._needs)} free, then resume the run"
            )
        if now - self._examined < EXAMINE_S:
            return []
        self._examined = now
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        lost = [worker for worker in self.live if worker.node not in nodes]
        for worker in lost:
            self.lose(worker)
        wanted = self._settings.workers or fits(nodes.values(), self._needs)
        if now >= self._resume:
            for _ in range(wanted - len(self.live) - len(self._starting)):
                self._start()
        for reference in list(self._starting)[: max(0, len(self.live) + len(self._starting) - wanted)]:
            ray.kill(self._starting.pop(reference)[0])  # the place it was meant for is gone
        return lost

    def greet(self, references: Sequence[Any]) -> None:
        """Take in the workers whose first call has been answered.

        Raises:
            FedLoRAError: what kept a worker from starting, if there is no other.
        """
        for reference in references:
            actor, since = self._starting.pop(reference)
            try:
                node, stats = ray.get(reference)
            except RayError as error:
                self._failed += 1
                self._reason = error
                ray.kill(actor)
                self._resume = time.monotonic() + min(EXAMINE_S * 2 ** min(self._failed, 10), LONGEST_PAUSE_S)
                self._give_up_if_alone()
            else:
                # a worker may have waited for its place; what is asked is how long it takes to load
                self._failed, self.start_s = 0, min(time.monotonic() - since, LONGEST_PAUSE_S)
                self.live.append(Worker(actor, node, stats))

    def lose(self, worker: Worker) -> None:
        """Stop a worker, dead already or not; another one is started in its place."""
        if worker in self.live:
            self.live.remove(worker)
            ray.kill(worker.actor)
            self._examined = -math.inf

    def is_dead(self, worker: Worker) -> bool:
        """Whether Ray has told this process that the worker is gone; costs no message."""
        return worker.actor._get_local_state() == ActorTableData.DEAD

    def stats(self, busy: Sequence[Worker]) -> list[WorkerStats]:
        """What the workers say of themselves; of those that are busy or silent, what they said first."""
        asked = {worker.actor.stats.remote(): worker for worker in self.live if worker not in busy}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=10) if asked else ([], [])
        said = {}
        for reference in answered:
            try:
                said[asked[reference]] = ray.get(reference)
            except RayError:
                self.lose(asked[reference])  # it died while it had nothing to do
        return [said.get(worker, worker.stats) for worker in self.live]

    @property
    def _needs(self) -> dict[str, float]:
        """Resources of one worker."""
        return {"CPU": self._settings.num_cpus, "GPU": self._settings.num_gpus, **self._settings.resources}

    def _check_room(self) -> None:
        have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = self._settings.workers or 1
        if fits(have, self._needs) < count:
            found = _described({name: sum(node.get(name, 0) for node in have) for name in self._needs})
            keys = ", ".join(["ray.workers", "ray.num_cpus", *(["ray.resources"] if self._settings.resources else [])])
            raise ConfigError(
                f"ray: {count} workers of {_described(self._needs, ' and ')} do not fit this cluster"
                f" ({found} on {len(have)} {'node' if len(have) == 1 else 'nodes'}); lower {keys} or ray.num_gpus"
            )

    def _start(self) -> None:
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if name in os.environ}
        actor = RayWorker.options(  # type: ignore[attr-defined]
            num_cpus=self._settings.num_cpus,
            num_gpus=self._settings.num_gpus,
            resources=dict(self._settings.resources),
            runtime_env={"env_vars": threads | offline | _MALLOC},
        ).remote(*self._arguments)
        self._starting[actor.ready.remote()] = (actor, time.monotonic())

    def _give_up_if_alone(self) -> None:
        """End the run over a failed start, unless another worker lives or is about to."""
        if self.live or any(_is_placed(actor) for actor, _ in self._starting.values()):
            return
        error = self._reason
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, FedLoRAError):
                raise error.cause from None  # it already says what to do
            raise error
        if self._failed >= STARTS:
            raise ModelError(f"{self._failed} Ray workers died while they started: {first_line(error)}") from error


def _is_placed(actor: Any) -> bool:
    return actor._get_local_state() == ActorTableData.ALIVE


def _described(resources: dict[str, float], last: str = ", ") -> str:
    return last.join(f"{amount:g} {name}" for name, amount in resources.items())


def connect(config: RunConfig) -> bool:
    """Join a cluster, or start Ray on this machine; whether this call did either.

    Raises:
        FedLoRAError: if there is no cluster at the address, or Ray does not start.
    """
    if ray.is_initialized():
        return False
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    main = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM) if main else None
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            wanted = (config.ray.workers or 1) * config.ray.num_cpus
            ray.init(
                address="local",
                num_cpus=max(cores(), math.ceil(wanted)),
                resources={name: need * (config.ray.workers or 1) for name, need in config.ray.resources.items()},
                include_dashboard=False,
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no cluster answers at {address}" if address else "Ray does not start on this machine"
        raise FedLoRAError(f"ray: {where}: {first_line(error)}") from error
    finally:
        if terminate is not None:
            signal.signal(signal.SIGTERM, terminate)  # Ray puts its own handler in place of ours
    return True


def first_line(error: BaseException | None) -> str:
    """What an error of Ray comes to in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
