"""The run's side of the base ledger: appending, recompressing, and what catching up costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedlora.adapter.ledger import BaseLedger
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import Aggregate
from fedlora.protocol import ClientInfo
from fedlora.seeds import derive_seed
from orchestrator.federation import Federation
from orchestrator.state import RunState


def patch_base(
    fed: Federation, state: RunState, aggregate: Aggregate, contributors: Sequence[ClientInfo], number: int
) -> tuple[BaseLedger, dict[str, float]]:
    """The ledger with this round's patch, recompressed if it has grown beyond its budget; numbers for the log."""
    if not aggregate.patch:
        return state.ledger, {}
    who = {client.id: client.rank for client in contributors}
    provenance = {"round": number, "strategy": fed.strategy.name, "contributors": who}
    return _append(fed, state, aggregate.patch, "patch", provenance)


def _append(
    fed: Federation,
    state: RunState,
    patch: Mapping[str, LowRank],
    kind: str,
    provenance: Mapping[str, Any],
    dense: Mapping[str, Tensor] | None = None,
) -> tuple[BaseLedger, dict[str, float]]:
    """The ledger with one more entry, within its budget."""
    number = provenance["round"]
    ledger = state.ledger.append(patch, kind, provenance, dense=dense)
    who = sorted(provenance.get("contributors", ()))
    fed.emit("base_patched", {"round": number, "id": ledger.head, "rank": ledger.rank(), "contributors": who})
    # a stack beyond the size of the matrix says nothing more: recompressing it to that size loses rounding only
    lossless = max(min(update.shape) for update in patch.values())
    budget = min(fed.ledger_rank or lossless, lossless)
    if ledger.rank() <= (budget if fed.ledger_rank else 2 * lossless):
        return ledger, {"ledger_rank": ledger.rank()}
    ledger, error = ledger.compacted(budget, {"round": number})
    fed.emit("ledger_compacted", {"round": number, "id": ledger.head, "rank": budget, "relative_error": error})
    return ledger, {"ledger_rank": ledger.rank(), "ledger_error": error}


def freeze(fed: Federation, state: RunState, why: Mapping[str, Any]) -> RunState:
    """The state with its adapter in the base, as a product, and a fresh pair in its place: the function is the same.

    Adding factors instead would add cross terms. What is trained in full stays; whatever is out was trained beside
    the old pair and is given up.

    Args:
        why: the policy's evidence.
    """
    assert state.stream is not None
    assert fed.course is not None
    number = state.round
    provenance = {"round": number, "strategy": fed.strategy.name, "task": fed.course.at(number), "why": dict(why)}
    whole = {path: update for path, update in state.adapter.whole().modules.items() if update.B.any()}
    ledger, folded = state.ledger, dict[str, float]()
    if whole:
        ledger, folded = _append(fed, state, whole, "merge", provenance, state.adapter.dense)
    fed.abandon(state.flights)
    fed.emit("frozen", {"round": number, "id": ledger.head, "evidence": dict(why), **folded})
    freezes = (*state.stream.freezes, number)
    fresh = fed.fresh_pair(len(freezes))
    started = fed.strategy.start(
        AdapterState(fresh.modules, state.adapter.dense), derive_seed(fed.seed, number, "", "start")
    )
    return replace(
        state,
        adapter=started,
        ledger=ledger,
        strategy=fed.strategy.freeze(state.adapter, fed.context(number, state), state.strategy),
        flights=(),
        accepted={},  # what clients keep belongs to the old pair
        payloads={},
        stream=replace(state.stream, freezes=freezes),
    )


def catch_up_bytes(state: RunState, clients: Iterable[str]) -> int:
    """Bytes of the patches these clients have not been sent before."""
    return sum(len(p.payload) for c in clients for p in state.ledger.missing(state.caught_up.get(c, "")))
