"""The base ledger: an ordered, content-hashed list of low-rank patches to the frozen base.

One mechanism for residuals and restarts of an aggregation rule, for freezing finished tasks, and for
taking either out again. The checkpoint of the base itself is never rewritten: what a model computes is
the base plus every entry in ``active``. Entries are added, never edited; an entry may stand in for all
before it, and says what that cost.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.adapter import rank as ranks
from fedlora.adapter.algebra import distance, stack
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.wire import decode_adapter, encode_adapter
from fedlora.errors import AdapterError
from fedlora.protocol import Patch


@dataclass(frozen=True, eq=False)
class Entry:
    """One patch with its provenance.

    Attributes:
        index: 1-based place in the ledger.
        parent: id of the entry before, or ``""``.
        kind: ``patch`` of a round; ``merge``, what one freeze put in; ``compaction`` of all before it to a lower rank;
            ``merged``, several merges combined by a rule; ``task``, an adapter that is kept and is no part of the base.
        payload: wire bytes of the modules; but for a patch also of what was trained in full beside them, as it was
            then.
        replaces: this many entries before it, all of them or none, are stood in for.
        provenance: round, contributors with their ranks, strategy; plain JSON data.
    """

    index: int
    parent: str
    kind: str
    payload: bytes
    replaces: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """Hash over content, provenance and everything before: it names the state of the whole base."""
        return hashlib.sha256(json.dumps(self.note(), sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def payload_sha256(self) -> str:
        """SHA-256 of the payload: its name on disk."""
        return hashlib.sha256(self.payload).hexdigest()

    def note(self) -> dict[str, Any]:
        """Everything but the payload itself, as JSON data."""
        return {
            "index": self.index,
            "parent": self.parent,
            "kind": self.kind,
            "payload": self.payload_sha256,
            "replaces": self.replaces,
            "provenance": dict(self.provenance),
        }

    @functools.cached_property
    def ranks(self) -> Mapping[str, int]:
        """Rank of the patch by module path."""
        return {path: update.rank for path, update in self.modules().items()}

    def modules(self) -> Mapping[str, LowRank]:
        """What is added to the base, by module path."""
        return self.adapter().modules

    def adapter(self) -> AdapterState:
        """The modules, and what was trained in full beside them."""
        return decode_adapter(self.payload)


@dataclass(frozen=True, eq=False)
class BaseLedger:
    """All entries from the first one; an empty ledger is the base as it was loaded."""

    entries: tuple[Entry, ...] = ()

    @property
    def head(self) -> str:
        """Id of the last entry; ``""`` for an empty ledger."""
        return self.entries[-1].id if self.entries else ""

    @property
    def active(self) -> tuple[Entry, ...]:
        """The entries that make up the base now: those that no later one stands in for, tasks left out."""
        first = max((place for place, entry in enumerate(self.entries) if entry.replaces), default=0)
        return tuple(entry for entry in self.entries[first:] if entry.kind != "task")

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """All entries of a kind since the start, in order, whatever stands in for them now."""
        return tuple(entry for entry in self.entries if entry.kind == kind)

    def append(
        self,
        modules: Mapping[str, LowRank],
        kind: str,
        provenance: Mapping[str, Any],
        replaces: int = 0,
        dense: Mapping[str, Tensor] | None = None,
    ) -> BaseLedger:
        """A new ledger with one more patch."""
        payload = encode_adapter(AdapterState({path: update.folded() for path, update in modules.items()}, dense or {}))
        entry = Entry(len(self.entries) + 1, self.head, kind, payload, replaces, provenance)
        return BaseLedger((*self.entries, entry))

    def replaced(self, modules: Mapping[str, LowRank], kind: str, provenance: Mapping[str, Any]) -> BaseLedger:
        """One more entry that stands in for all before it; what was trained in full is as the last of them has it."""
        dense = frozen(self.patches()).dense
        return self.append(modules, kind, provenance, replaces=len(self.entries), dense=dense)

    def patches(self) -> tuple[Patch, ...]:
        """The active entries as they travel."""
        return tuple(Patch(entry.id, entry.payload) for entry in self.active)

    def missing(self, head: str) -> tuple[Patch, ...]:
        """What somebody who stopped at ``head`` lacks; where an entry stands in for others, it and what follows."""
        have = next((entry.index for entry in reversed(self.entries) if entry.id == head), 0)
        return tuple(Patch(entry.id, entry.payload) for entry in self.active if entry.index > have)

    def total(self) -> Mapping[str, LowRank]:
        """The whole change of the base as one stack per module; empty where nothing was patched."""
        return stack([entry.modules() for entry in self.active])

    def rank(self) -> int:
        """The largest total rank of any module over the active entries."""
        totals: dict[str, int] = {}
        for entry in self.active:
            for path, rank in entry.ranks.items():
                totals[path] = totals.get(path, 0) + rank
        return max(totals.values(), default=0)

    def compacted(self, max_rank: int, provenance: Mapping[str, Any]) -> tuple[BaseLedger, float]:
        """One more entry that stands in for all before it, at most ``max_rank`` per module.

        Where ``max_rank`` is at least the rank of the sum (at most min(out, in)), only rounding is lost.

        Returns:
            The new ledger, and the relative Frobenius error of the compaction over all modules.
        """
        total = self.total()
        kept = {
            path: ranks.truncate(update, min(max_rank, *update.shape, update.rank)) for path, update in total.items()
        }
        error = distance(AdapterState(total), AdapterState(kept))
        note = {**provenance, "max_rank": max_rank, "relative_error": error}
        return self.replaced(kept, "compaction", note), error


def frozen(patches: Sequence[Patch]) -> AdapterState:
    """What patches come to: the whole change of the base, and what was trained in full as the last of them has it."""
    states = [decode_adapter(patch.payload) for patch in patches]
    dense = next((state.dense for state in reversed(states) if state.dense), {})
    return AdapterState(stack([state.modules for state in states]), dense)


def restored(saved: Sequence[tuple[Mapping[str, Any], bytes]]) -> BaseLedger:
    """A ledger from the notes and payloads of its entries.

    Raises:
        AdapterError: if an entry is not the one its note describes, or does not follow from the one before.
    """
    ledger = BaseLedger()
    for note, payload in saved:
        entry = Entry(note["index"], note["parent"], note["kind"], payload, note["replaces"], note["provenance"])
        follows = entry.index == len(ledger.entries) + 1 and entry.parent == ledger.head
        if not follows or entry.note() != dict(note):
            raise AdapterError(f"ledger entry {note['index']} is altered or out of order; restore the folder ledger/")
        ledger = BaseLedger((*ledger.entries, entry))
    return ledger
