"""The run's side of the base ledger: appending, recompressing, merging, and what catching up costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter.ledger import BaseLedger
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import Aggregate
from fedlora.continual.merging import Merging
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
    ledger, error = within_budget(ledger, fed.ledger_rank, number)
    if error is None:
        return ledger, {"ledger_rank": ledger.rank()}
    facts = {"round": number, "id": ledger.head, "rank": ledger.rank(), "relative_error": error}
    fed.emit("ledger_compacted", facts)
    return ledger, {"ledger_rank": ledger.rank(), "ledger_error": error}


def within_budget(ledger: BaseLedger, max_rank: int | None, number: int) -> tuple[BaseLedger, float | None]:
    """The ledger recompressed if its last entry made it too large.

    Args:
        max_rank: rank per module; None where nothing may be lost.
        number: of the round.

    Returns:
        The ledger, and the relative error of the compaction; None where there was none.
    """
    # a stack beyond the size of the matrix says nothing more: recompressing it to that size loses rounding only
    lossless = max(min(update.shape) for update in ledger.entries[-1].modules().values())
    budget = min(max_rank or lossless, lossless)
    if ledger.rank() <= (budget if max_rank else 2 * lossless):
        return ledger, None
    return ledger.compacted(budget, {"round": number})


def freeze(fed: Federation, state: RunState, why: Mapping[str, Any]) -> RunState:
    """The state with its adapter in the base, as a product, and a fresh pair in its place: the function is the same.

    Adding factors instead would add cross terms. What is trained in full stays; whatever is out was trained beside
    the old pair and is given up. Under a rule that merges tasks otherwise than by their sum the function changes.
    Isolated tasks leave the base bare, and begin with fresh tensors in full too.

    Args:
        why: the policy's evidence.
    """
    assert state.stream is not None
    assert fed.course is not None
    number = state.round
    provenance = {"round": number, "strategy": fed.strategy.name, "task": fed.course.at(number), "why": dict(why)}
    ledger, folded = _with_adapter(fed, state, provenance)
    fed.abandon(state.flights)
    fed.emit("frozen", {"round": number, "id": ledger.head, "evidence": dict(why), **folded})
    freezes = (*state.stream.freezes, number)
    fresh = fed.fresh_pair(len(freezes), number)
    dense = fresh.dense if fed.isolated else state.adapter.dense
    before = fed.following(number) - 1 if fed.isolated else number  # a task's own start, whichever others are left out
    started = fed.strategy.start(AdapterState(fresh.modules, dense), derive_seed(fed.seed, before, "", "start"))
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


def _with_adapter(
    fed: Federation, state: RunState, provenance: Mapping[str, Any]
) -> tuple[BaseLedger, dict[str, float]]:
    """The ledger with the active adapter in it, and numbers for the log."""
    whole, dense = state.adapter.whole().modules, state.adapter.dense
    if fed.isolated:
        return state.ledger.append(whole, "task", provenance, dense=dense), {}
    learned = {path: update for path, update in whole.items() if update.B.any()}
    if not learned:
        return state.ledger, {}
    if fed.merging is None:
        return _append(fed, state, learned, "merge", provenance, dense)
    return _merged(fed, fed.merging, state.ledger.append(learned, "merge", provenance, dense=dense))


def _merged(fed: Federation, merging: Merging, ledger: BaseLedger) -> tuple[BaseLedger, dict[str, float]]:
    """The ledger with one more entry that holds every merge since the start as a rule combines them.

    A module that a task has not changed counts as a change of zero.
    """
    entries = ledger.of_kind("merge")
    number = entries[-1].provenance["round"]
    tasks = [_over(fed.fresh.modules, entry.modules()) for entry in entries]
    # as many components as the tasks have together hold a sum of them without loss
    rank = fed.ledger_rank or sum(max(entry.ranks.values()) for entry in entries)
    # one seed for all freezes: what a rule that draws takes from a task stays the same
    modules, error = merging.merge(tasks, rank, derive_seed(fed.seed, 0, "", "merge"))
    facts = {"round": number, "rule": merging.rule, "max_rank": rank, "relative_error": error}
    combined = [entry.id for entry in entries]
    ledger = ledger.replaced(modules, "merged", {**facts, "options": dict(merging.options), "combines": combined})
    fed.emit("tasks_merged", {**facts, "id": ledger.head, "tasks": len(combined)})
    return ledger, {"ledger_rank": ledger.rank(), "ledger_error": error}


def _over(sites: Mapping[str, LowRank], modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """One update per site, zero where there is none."""
    return {
        path: modules.get(path) or LowRank(torch.zeros(site.shape[0], 1), torch.zeros(1, site.shape[1]))
        for path, site in sites.items()
    }


def catch_up_bytes(state: RunState, clients: Iterable[str]) -> int:
    """Bytes of the patches these clients have not been sent before."""
    return sum(len(p.payload) for c in clients for p in state.ledger.missing(state.caught_up.get(c, "")))
