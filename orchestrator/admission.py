"""Admission: a client's update is hostile input until it has passed here."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.adapter.packing import PLAIN, Packing
from fedlora.adapter.state import AdapterState
from fedlora.adapter.wire import decode_update
from fedlora.aggregation.combine import part_of
from fedlora.errors import UpdateRefused, WireError
from fedlora.protocol import ClientInfo, ClientUpdate, TrainTask

_SLACK = 64 << 10  # header, names and metrics of a message
_LARGEST_METRIC = 1e12  # anything above is not a measurement, and sums of it overflow


@dataclass(frozen=True, eq=False)
class Form:
    """What the tensors of an answer must look like; clients with equal plans share one.

    Attributes:
        received: the adapter that was sent, decoded.
        send: the parts that travel back.
        extras: the strategy's extra tensors that were sent.
        packing: of the values that travel back, without extras.
    """

    received: AdapterState
    send: frozenset[str]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    packing: Packing = PLAIN

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor that travels back, without extras."""
        flat = self.received.tensors()
        return {name: tuple(t.shape) for name, t in flat.items() if part_of(name) in self.send}

    @functools.cached_property
    def num_bytes(self) -> int:
        """About the size of an answer."""
        return self._with(self.packing)

    @functools.cached_property
    def plain_bytes(self) -> int:
        """About the size of an answer that is not packed."""
        return self._with(PLAIN)

    def _with(self, packing: Packing) -> int:
        return packing.num_bytes(self.shapes) + 4 * sum(t.numel() for t in self.extras.values())


@dataclass(frozen=True, eq=False)
class Expectation:
    """What the answer to one task must look like.

    Attributes:
        client: who was asked; ``num_examples`` it registered is the most it may claim.
        task: what was asked.
        form: of the tensors.
        max_norm: largest Frobenius norm of its change.
    """

    client: ClientInfo
    task: TrainTask
    form: Form
    max_norm: float


def admit(payload: bytes | memoryview, expected: Expectation) -> ClientUpdate:
    """Decode and check one answer.

    Raises:
        UpdateRefused: with the first reason found. It costs that client's update of this round, never more.
    """
    try:
        update = decode_update(payload, 2 * expected.form.num_bytes + _SLACK, expected.form.packing)
    except WireError as error:
        raise UpdateRefused(f"not a valid message: {error}") from error
    task = expected.task
    if update.client != task.client:
        raise UpdateRefused(f"signed {update.client[:80]!r}, but the task was for {task.client}")
    if update.round != task.round or update.received != task.received:
        raise UpdateRefused(f"belongs to round {update.round}, not to what was sent in round {task.round} (replayed?)")
    if not 0 < update.num_examples <= expected.client.num_examples:
        raise UpdateRefused(
            f"claims {update.num_examples} examples; the client registered {expected.client.num_examples}"
        )
    for name, value in update.metrics.items():
        if abs(value) > _LARGEST_METRIC:
            raise UpdateRefused(f"metric {name!r:.80} is {value:.3g}, above {_LARGEST_METRIC:g}")
    _check(update.delta, expected.form.shapes, "tensor")
    _check(update.extras, {name: tuple(t.shape) for name, t in expected.form.extras.items()}, "extra tensor")
    norm = update.norm if math.isfinite(update.norm) else _large_norm(update)
    if norm > expected.max_norm:
        raise UpdateRefused(f"norm of the change is {norm:.3g}, above admission.max_update_norm={expected.max_norm:g}")
    return update


def _large_norm(update: ClientUpdate) -> float:
    """Frobenius norm in float64, where it is finite exactly if all values are.

    Raises:
        UpdateRefused: naming the first tensor with one that is not.
    """
    norms = {name: float(torch.linalg.vector_norm(t, dtype=torch.float64)) for name, t in _sent(update)}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise UpdateRefused(f"{name} has values that are not finite")
    return math.hypot(*norms.values())


def _sent(update: ClientUpdate) -> Iterator[tuple[str, Tensor]]:
    yield from update.delta.items()
    yield from (("extra tensor " + name, tensor) for name, tensor in update.extras.items())


def _check(came: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Exactly these names and shapes."""
    for name in sorted(set(shapes) ^ set(came)):
        raise UpdateRefused(f"{what} {name!r:.120} " + ("is missing" if name in shapes else "was not asked for"))
    for name, shape in shapes.items():
        # exact, never broadcast: a [1, 8] would silently stretch over [16, 8]
        if tuple(came[name].shape) != shape:
            raise UpdateRefused(f"{name} has shape {list(came[name].shape)}, expected {list(shape)}")
