"""Which clients a round asks: pure rules over who is there and what is known of them.

A plug-in file may register its own::

    @SELECTORS.register("first_come")
    class FirstCome(Selector):
        def select(self, candidates, draw):
            return [client.id for client in candidates[: draw.count]]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from fedlora.registry import Registry


@dataclass(frozen=True)
class Record:
    """What the run remembers of one client: plain numbers, for the checkpoint.

    Attributes:
        asked, used: rounds in which it was asked, and in which its update counted.
        last_round: in which it was last asked; 0 for never.
        loss: that it last reported, of the model it received; None before its first report.
        seconds: that its last finished task took; None before that.
        failures: tasks it was asked for and did not finish.
    """

    asked: int = 0
    used: int = 0
    last_round: int = 0
    loss: float | None = None
    seconds: float | None = None
    failures: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``Record(**data)`` reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class Draw:
    """One round's draw.

    Attributes:
        round: 1-based.
        seed: of this draw alone.
        count: clients wanted.
        registered: clients of the federation, here or not.
        records: by client id; a client that is missing was never asked.
    """

    round: int
    seed: int
    count: int
    registered: int
    records: Mapping[str, Record] = field(default_factory=dict)

    def record(self, client: ClientInfo) -> Record:
        """What is known of a client."""
        return self.records.get(client.id, _UNKNOWN)


class Selector(ABC):
    """A rule of selection. Keeps nothing between draws: what it may know is in ``Draw``."""

    name: str

    @abstractmethod
    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        """Ids of the clients to ask, in the order of ``candidates``, each at most once.

        Args:
            candidates: who is there and has nothing to do, in member order; possibly nobody.
            draw: how many, with what seed, knowing what.
        """


SELECTORS: Registry[Selector] = Registry("selection")
_UNKNOWN = Record()


def build_selector(spec: str | Mapping[str, Mapping[str, Any] | None]) -> Selector:
    """The rule of ``clients.selection``: ``oort``, or ``{oort: {exploration: 0.5}}``.

    Raises:
        ConfigError: for an unknown name, or options the rule does not take.
    """
    if isinstance(spec, str):
        return SELECTORS.create(spec)
    if len(spec) != 1:
        raise ConfigError(f"selection is one name, or one name with its options, not {dict(spec)}")
    name, options = next(iter(spec.items()))
    return SELECTORS.create(name, **(options or {}))


def how_many(per_round: int | float, registered: int) -> int:
    """Clients a round asks: a whole number, or a share (a float up to 1) of those registered; at least 1."""
    share = isinstance(per_round, float) and per_round <= 1
    # 0.1 * 30 is 3.0000000000000004 in floats, and still three clients
    count = math.ceil(per_round * registered - 1e-9) if share else int(per_round)
    return min(max(count, 1), registered)
