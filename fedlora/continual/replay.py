"""Rows of earlier tasks that a client keeps and goes on training on. They never leave it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from fedlora.continual.stream import Task
from fedlora.seeds import derive_seed


def met_rows(tasks: Sequence[Task], earlier: Collection[int], client: str) -> list[int]:
    """A client's rows of earlier tasks, in the order of the tasks."""
    return [row for task in sorted(earlier) for row in tasks[task].shards.get(client, ())]


def kept_rows(mine: Sequence[int], client: str, size: int, labels: Mapping[int, str] | None, seed: int) -> list[int]:
    """A client's buffer: at most ``size`` of the rows that it has met.

    Every row draws a number from the seed once and for all and the smallest numbers stay, which is reservoir sampling
    (Vitter, 1985) without anything to remember: a row that has left never comes back, and a resumed run has the same
    buffer.

    Args:
        mine: the rows it has met before its present ones, as places in a table that does not change.
        labels: of these rows, to keep as many rows of each; None for plain reservoir.

    Returns:
        Places, sorted.
    """
    draw = {row: random.Random(derive_seed(seed, row, client, "replay")).random() for row in mine}
    ranked = sorted(mine, key=draw.__getitem__)
    if labels is not None:
        seen: dict[str, int] = {}
        turn = {}
        for row in ranked:
            turn[row] = seen[labels[row]] = seen.get(labels[row], -1) + 1
        ranked.sort(key=lambda row: (turn[row], draw[row]))
    return sorted(ranked[:size])
