"""A round's updates, loaded one at a time, so that a rule that reads them one by one holds one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Contribution
from fedlora.protocol import ClientInfo


@dataclass(frozen=True, eq=False)
class Pending:
    """An update that is loaded when it is looked at: who sent it, its weight, and how to get it.

    Attributes:
        change: what ``load`` adds up to ``trained``: what the client received, and its delta by tensor name.
    """

    client: ClientInfo
    weight: float
    load: Callable[[], Contribution]
    change: Callable[[], tuple[AdapterState, Mapping[str, Tensor]]] | None = None


class Cohort(Sequence[Contribution]):
    """Updates in a fixed order. Every look at one loads it anew; nothing is kept."""

    def __init__(self, pending: Sequence[Pending]):
        self.pending = tuple(pending)

    @staticmethod
    def of(updates: Sequence[Contribution]) -> Cohort:
        """The same updates; those in memory already stay there."""
        if isinstance(updates, Cohort):
            return updates
        return Cohort([Pending(u.client, u.weight, lambda u=u: u) for u in updates])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.pending)

    @overload
    def __getitem__(self, place: int) -> Contribution: ...

    @overload
    def __getitem__(self, place: slice) -> Cohort: ...

    def __getitem__(self, place: int | slice) -> Contribution | Cohort:
        if isinstance(place, slice):
            return Cohort(self.pending[place])
        return replace(self.pending[place].load(), weight=self.pending[place].weight)


def weights_of(updates: Sequence[Contribution]) -> list[float]:
    """The weight of every update, without loading those of a cohort."""
    return [update.weight for update in (updates.pending if isinstance(updates, Cohort) else updates)]


class Weighted:
    """(weight, trained adapter) per update; readable as often as wanted, one update at a time."""

    def __init__(self, updates: Sequence[Contribution]):
        self._updates = updates

    def __iter__(self) -> Iterator[tuple[float, AdapterState]]:
        return ((update.weight, update.trained) for update in self._updates)
