"""Simulated devices: how long a client takes, whether it answers, when it is there. Nothing here waits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from fedlora.config import Distribution, FleetConfig, TrainingConfig
from fedlora.protocol import ClientInfo
from fedlora.seeds import derive_seed
from fedlora.training.batches import steps_of

_NORMAL = NormalDist()


class Fleet:
    """Every client's device, the same for equal seeds.

    A device depends on the seed and the client's id alone, whoever else is registered; lists are dealt in member
    order. What happens to a task depends on the seed, the client and the round.

    Args:
        clients: ids in member order.
        seed: the run's root seed.
        examples_per_s, mbit_per_s: training speed, and bandwidth up and down alike, in the forms of ``FleetConfig``.
        jitter: sigma of a lognormal factor of median 1 on every task.
        dropout: chance that a client that was asked never answers.
        online: share of each period in which a client is there.
        period_s: seconds after which a client comes back, each at its own phase.
    """

    def __init__(
        self,
        clients: Sequence[str],
        seed: int,
        examples_per_s: Distribution,
        mbit_per_s: Distribution,
        *,
        jitter: float = 0.0,
        dropout: float = 0.0,
        online: float = 1.0,
        period_s: float = 3600.0,
    ):
        self._seed = seed
        self._speeds = _deal(clients, examples_per_s, seed, "fleet/speed")
        self._bandwidths = _deal(clients, mbit_per_s, seed, "fleet/bandwidth")
        self._jitter, self._dropout, self._online, self._period = jitter, dropout, online, period_s
        self._phases = {client: period_s * _uniform(seed, 0, client, "fleet/phase") for client in clients}

    @classmethod
    def of(cls, config: FleetConfig, members: Sequence[ClientInfo], seed: int) -> Fleet:
        """The devices of a configuration."""
        return cls([member.id for member in members], seed, **config.model_dump())

    def examples_per_s(self, client: str) -> float:
        """Training speed of a client's device."""
        return self._speeds[client]

    def mbit_per_s(self, client: str) -> float:
        """Bandwidth of a client's device."""
        return self._bandwidths[client]

    def seconds(self, client: str, round: int, examples: int, bytes_down: int, bytes_up: int) -> float:
        """How long a task takes from asking to answer: receive, train on ``examples`` rows, send."""
        transfer = 8 * (bytes_down + bytes_up) / (1e6 * self._bandwidths[client])
        factor = math.exp(self._jitter * _gauss(self._seed, round, client, "fleet/jitter")) if self._jitter else 1.0
        return factor * (examples / self._speeds[client] + transfer)

    def drops_out(self, client: str, round: int) -> bool:
        """Whether a client that is asked in this round never answers."""
        return self._dropout > 0 and _uniform(self._seed, round, client, "fleet/dropout") < self._dropout

    def is_online(self, client: str, now_s: float) -> bool:
        """Whether a client is there to be asked."""
        return self._online >= 1 or (now_s + self._phases[client]) % self._period < self._online * self._period

    def next_online_s(self, now_s: float, clients: Collection[str] | None = None) -> float:
        """The earliest time from ``now_s`` on at which one of these clients is there; infinity without clients."""
        phases = self._phases if clients is None else {client: self._phases[client] for client in clients}
        if not phases:
            return math.inf
        if any(self.is_online(client, now_s) for client in phases):
            return now_s
        client, wait = min(
            ((client, self._period - (now_s + phase) % self._period) for client, phase in phases.items()),
            key=lambda item: item[1],
        )
        then = now_s + wait
        while not self.is_online(client, then):  # rounding may leave it short of the period's end
            then += math.ulp(then + self._period)
        return then

    def describe(self) -> dict[str, Any]:
        """The devices in a few numbers."""
        return {
            "clients": len(self._phases),
            "examples_per_s": _spread(self._speeds),
            "mbit_per_s": _spread(self._bandwidths),
            "jitter": self._jitter,
            "dropout": self._dropout,
            "online": self._online,
        }


def examples_of(num_examples: int, training: TrainingConfig) -> int:
    """Rows a local task runs through the model, as the training loop deals them into batches."""
    size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    steps = steps_of(num_examples, size, accumulation, training.max_steps, training.num_train_epochs)
    # every epoch ends with a batch that may be short
    epochs, batches = divmod(steps * accumulation, math.ceil(num_examples / size))
    return epochs * num_examples + batches * size


def _deal(clients: Sequence[str], spec: Distribution, seed: int, purpose: str) -> dict[str, float]:
    """A number per client."""
    if not isinstance(spec, Mapping):
        return {client: spec[i % len(spec)] for i, client in enumerate(clients)}
    kind, options = next(iter(spec.items()))
    if kind == "uniform":
        low, high = options["low"], options["high"]
        return {client: low + (high - low) * _uniform(seed, 0, client, purpose) for client in clients}
    median, sigma = options["median"], options["sigma"]
    return {client: median * math.exp(sigma * _gauss(seed, 0, client, purpose)) for client in clients}


def _uniform(seed: int, round: int, client: str, purpose: str) -> float:
    """A number strictly between 0 and 1. A generator per client would cost ten times as much."""
    return ((derive_seed(seed, round, client, purpose) >> 11) + 0.5) / 2**52


def _gauss(seed: int, round: int, client: str, purpose: str) -> float:
    return _NORMAL.inv_cdf(_uniform(seed, round, client, purpose))


def _spread(values: Mapping[str, float]) -> dict[str, float]:
    numbers = values.values()
    return {"slowest": min(numbers), "median": statistics.median(numbers), "fastest": max(numbers)}
