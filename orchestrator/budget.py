"""What each rank costs a client, and a round costs everyone, before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.adapter.packing import Packing
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation.base import RoundContext, Strategy
from fedlora.config import RunConfig
from fedlora.protocol import ClientInfo, TrainPlan
from orchestrator.selection import how_many
from orchestrator.units import human_bytes

_FLOAT = 4  # adapters train, wait in memory and travel down as float32
_OPTIMIZER = {"adamw_torch": 2, "sgd": 0}  # numbers kept per trained number


@dataclass(frozen=True)
class Outline:
    """The global adapter without its numbers.

    Attributes:
        rank: of the global adapter.
        sites: (out, in) of every adapted module by path.
        dense: numbers in tensors trained in full.
    """

    rank: int
    sites: Mapping[str, tuple[int, int]]
    dense: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of every adapted module."""
        return list(self.sites.values())

    def state(self) -> AdapterState:
        """Shapes for a strategy whose plan looks at the adapter."""
        meta = torch.device("meta")
        modules = {
            path: LowRank(torch.empty(out, self.rank, device=meta), torch.empty(self.rank, inner, device=meta))
            for path, (out, inner) in self.sites.items()
        }
        return AdapterState(modules)


def budget(strategy: Strategy, ranks: Mapping[str, int], outline: Outline, config: RunConfig) -> dict[str, Any]:
    """Sizes by arithmetic; where rounds differ (a rule that trains the factors in turn), the larger of two.

    Args:
        strategy: of which nothing but its plans and its declared traffic is used.
        ranks: of every client, as the strategy serves them.
        outline: of the global adapter.
        config: how many are asked, and with what optimizer they train.

    Returns:
        ``ranks``, a row per rank: ``clients``, ``parameters`` of the adapter, ``trained`` of these,
        ``memory_bytes`` of adapter, gradients and optimizer, ``down_bytes`` and ``up_bytes`` of one client and round.
        ``round``: ``clients`` asked, and the bytes of all of them, on average over draws. ``patch_bytes``: the most a
        round adds to the base, which every client receives once. Headers of messages, a few kB, come on top, and scales
        of values that travel as int8 or int4: 4 bytes for each rank component and row.
    """
    cohort = sorted(ranks.values(), reverse=True)[: how_many(config.clients.per_round, len(ranks))]
    rows = []
    for at, count in sorted(Counter(ranks.values()).items()):
        both = [_one(strategy, at, outline, number, config) for number in (1, 2)]
        rows.append({"rank": at, "clients": count, **{key: max(one[key] for one in both) for key in both[0]}})
    asked = _asked(config, len(ranks))
    total = {
        key: round(asked / len(ranks) * sum(row["clients"] * row[key] for row in rows))
        for key in ("down_bytes", "up_bytes")
    }
    patch = max(_patch(strategy, outline, cohort, number) for number in (1, 2))
    return {"ranks": rows, "round": {"clients": asked, **total}, "patch_bytes": _FLOAT * patch}


def budget_lines(found: Mapping[str, Any]) -> list[str]:
    """The budget as a table."""
    table = [["rank", "clients", "parameters", "trained", "memory", "down", "up"]]
    for row in found["ranks"]:
        sizes = [human_bytes(row[key]) for key in ("memory_bytes", "down_bytes", "up_bytes")]
        numbers = [str(row["rank"]), str(row["clients"]), f"{row['parameters']:,}", f"{row['trained']:,}"]
        table.append([*numbers, *sizes])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    whole = found["round"]
    clients = f"{whole['clients']} client" + ("s" if whole["clients"] > 1 else "")
    told = f"a round of {clients}: {human_bytes(whole['down_bytes'])} down, {human_bytes(whole['up_bytes'])} up"
    if found["patch_bytes"]:
        told += f", and a patch of the base of at most {human_bytes(found['patch_bytes'])}, once to every client"
    return [*lines, told]


def _one(strategy: Strategy, at: int, outline: Outline, number: int, config: RunConfig) -> dict[str, int]:
    """What a client at this rank needs in round ``number``."""
    ctx = RoundContext(number, outline.rank, 0, outline.state())
    plan, traffic, dense = strategy.plan(ctx, ClientInfo("", at, 1), {}), strategy.traffic, outline.dense
    up, down, extras = (
        traffic.count(formula, outline.shapes, plan.rank, outline.rank, [plan.rank], number)
        for formula in (traffic.up, traffic.down, traffic.extras)
    )
    head = dense if "dense" in plan.send else 0
    extras += traffic.dense_extras * head
    trained = _trained(plan, outline)
    held, packing = down + dense, Packing(config.wire.up, config.wire.top_k)
    # masked values are integers of 64 bits, whatever they were
    sent = 2 * _FLOAT * (up + head) if config.privacy.secure_sum else packing.about_bytes(up + head)
    return {
        "parameters": held,
        "trained": trained,
        "memory_bytes": _FLOAT * (held + trained * (1 + _OPTIMIZER[config.training.optim])),
        "down_bytes": _FLOAT * (down + dense + extras),
        "up_bytes": sent + _FLOAT * extras,
    }


def _patch(strategy: Strategy, outline: Outline, cohort: Sequence[int], number: int) -> int:
    """The most numbers that a round with these ranks adds to the base."""
    traffic, rank = strategy.traffic, outline.rank
    return traffic.count(traffic.patch, outline.shapes, rank, rank, cohort, number)


def _trained(plan: TrainPlan, outline: Outline) -> int:
    """Numbers that get gradients."""
    size = {"A": lambda out, inner: inner, "B": lambda out, inner: out, "C": lambda out, inner: plan.rank}
    factors = sum(size[part](out, inner) for part in plan.train & size.keys() for out, inner in outline.shapes)
    return plan.rank * factors + (outline.dense if "dense" in plan.train else 0)


def _asked(config: RunConfig, registered: int) -> int:
    """Clients that a round sends a task to."""
    wanted = how_many(config.clients.per_round, registered)
    if config.schedule.mode == "async":
        return min(config.schedule.buffer, wanted)
    return min(math.ceil(wanted * config.schedule.over_selection - 1e-9), registered)
