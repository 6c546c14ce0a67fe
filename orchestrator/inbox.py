"""What comes back in a round: every answer is admitted, refused or a failure. A bad one costs itself only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Contribution
from fedlora.aggregation.cohort import Pending
from fedlora.aggregation.combine import apply_delta
from fedlora.errors import UpdateRefused
from fedlora.protocol import ClientUpdate, Reply
from orchestrator.admission import Expectation, admit
from orchestrator.failpoints import reach
from orchestrator.federation import Federation
from orchestrator.flights import Flight
from orchestrator.spool import Spool


@dataclass(frozen=True, eq=False)
class Used:
    """An admitted update, waiting in the round's spool, and what its client measured."""

    update: Pending
    metrics: Mapping[str, float]
    flight: Flight
    seconds: float


class Inbox:
    """Answers of one round."""

    def __init__(self, fed: Federation, number: int):
        self._fed, self.number = fed, number
        self._used: dict[str, Used] = {}
        self._spool = Spool()
        self.refused: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.late: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        self.bytes_up = 0
        self.bytes_up_fp32 = 0  # headers aside

    @property
    def admitted(self) -> KeysView[str]:
        """Clients whose update can be used."""
        return self._used.keys()

    @property
    def answered(self) -> set[str]:
        """Clients that need not be waited for any more."""
        return {*self._used, *self.refused, *self.failed}

    def take(self, reply: Reply, expected: Expectation | None, flight: Flight | None) -> None:
        """Sort one reply in.

        Args:
            expected, flight: what the client was asked; None where it was not.
        """
        reach("round.answered", self.number)
        if reply.alone:
            self.alone[reply.client] = reply.alone
            self._emit("trained_alone", reply.client, {"reason": reply.alone})
        if reply.payload is None:
            self.fail(reply.client, reply.error or "no answer", reply.traceback)
            return
        sent_bytes = reply.sent_bytes or len(reply.payload)
        self.bytes_up += sent_bytes
        self.bytes_up_fp32 += expected.form.plain_bytes if expected else len(reply.payload)
        try:
            if reply.client in self._used or reply.client in self.refused:
                raise UpdateRefused("answered twice; the first answer stands")
            if expected is None or flight is None:
                raise UpdateRefused("was not asked in this round")
            update = admit(reply.payload, expected)
        except UpdateRefused as error:
            self.refused.setdefault(reply.client, str(error))
            self._emit("update_refused", reply.client, {"reason": str(error)})
            return
        weight = float(update.num_examples) if self._fed.weighting == "examples" else 1.0
        staleness = self.number - flight.round
        read = self._spool.put(reply.payload, update)
        load, change = partial(_contribution, expected, weight, staleness, read), partial(_change, expected, read)
        seconds = reply.seconds if flight.due_s is None else flight.due_s - flight.given_s
        self._used[reply.client] = Used(Pending(expected.client, weight, load, change), update.metrics, flight, seconds)
        facts = {"bytes": sent_bytes, "seconds": seconds, "metrics": dict(update.metrics)}
        self._emit("update_admitted", reply.client, facts | ({"staleness": staleness} if staleness else {}))

    def fail(self, client: str, reason: str, traceback: str | None = None) -> None:
        """A client that will not answer."""
        self.failed[client] = reason
        self._emit("client_failed", client, {"reason": reason, "traceback": traceback})

    def miss(self, client: str, reason: str) -> None:
        """A client whose answer comes too late for this round."""
        self.late[client] = reason
        self._emit("update_late", client, {"reason": reason})

    def used(self) -> list[Used]:
        """What was admitted, in member order, whatever the order of arrival."""
        return [self._used[client] for client in sorted(self._used, key=self._fed.places.__getitem__)]

    def _emit(self, event: str, client: str, facts: Mapping[str, Any]) -> None:
        self._fed.emit(event, {"round": self.number, "client": client, **facts})


def describe(inbox: Inbox, packed: bool) -> dict[str, Any]:
    """The part of a round's metrics row that tells how the answers came in.

    Args:
        packed: whether to tell what the same answers would have taken in float32.
    """
    used = inbox.used()
    tokens, dropped = (int(sum(u.metrics.get(name, 0) for u in used)) for name in ("tokens", "dropped_rows"))
    ages = Counter(inbox.number - u.flight.round for u in used)
    return {
        "admitted": [u.update.client.id for u in used],
        "refused": inbox.refused,
        "failed": inbox.failed,
        "late": inbox.late,
        **({"alone": inbox.alone} if inbox.alone else {}),
        "bytes_up": inbox.bytes_up,
        **({"bytes_up_fp32": inbox.bytes_up_fp32} if packed else {}),
        "train_tokens": tokens,
        "dropped_rows": dropped,
        "train": weighted_metrics(used),
        "staleness": {str(age): ages[age] for age in sorted(ages)},
    }


def weighted_metrics(used: Sequence[Used]) -> dict[str, float] | None:
    """Mean training losses, by the weight of the updates; none where clients keep theirs."""
    if not any("loss" in u.metrics for u in used):
        return None
    total = sum(u.update.weight for u in used)
    names = ("loss", "first_loss")
    return {name: sum(u.update.weight * u.metrics.get(name, 0.0) for u in used) / total for name in names}


def _contribution(
    expected: Expectation, weight: float, staleness: int, read: Callable[[], ClientUpdate]
) -> Contribution:
    """An update that was admitted and has waited in the spool, as the strategy sees it."""
    update, received = read(), expected.form.received
    trained = apply_delta(received, update.delta)
    return Contribution(expected.client, weight, trained, received, update.metrics, update.extras, staleness=staleness)


def _change(expected: Expectation, read: Callable[[], ClientUpdate]) -> tuple[AdapterState, Mapping[str, Tensor]]:
    return expected.form.received, read().delta
