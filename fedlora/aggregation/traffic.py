"""What a strategy sends, as a formula a person can read and a law can check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Traffic:
    """Numbers per module and client, as arithmetic over these names.

    ``m`` and ``n`` are the rows and columns of the module, ``r`` the client's rank, ``g`` the global rank,
    ``R`` the sum of the cohort's ranks, ``K`` its size, ``odd`` is 1 in odd rounds and 0 in even ones, and ``first`` is
    1 in the first round of a run and after a freeze, 0 in others.

    Attributes:
        up: what a client sends.
        down: what a client receives with the adapter.
        patch: the most that a round adds to the base ledger; every client receives it once.
        extras: what travels beside the factors, both ways, such as control variates.
        dense: whether tensors trained in full travel up too.
        dense_extras: how many times as many numbers as these have travel beside them, about, both ways.
    """

    up: str = "r*(m + n)"
    down: str = "r*(m + n)"
    patch: str = "0"
    extras: str = "0"
    dense: bool = True
    dense_extras: int = 0

    def with_extras(self, formula: str = "0", dense: bool = False) -> Traffic:
        """The same with more beside the factors, and beside what is trained in full if ``dense``."""
        both = " + ".join(part for part in (self.extras, formula) if part != "0") or "0"
        return replace(self, extras=both, dense_extras=self.dense_extras + int(dense))

    def count(
        self,
        formula: str,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        global_rank: int,
        cohort: Sequence[int],
        round: int,
    ) -> int:
        """Numbers a formula comes to over all modules.

        Args:
            formula: ``up``, ``down``, ``patch`` or ``extras`` of this object.
            shapes: (m, n) of every module.
            rank: of the client.
            global_rank: of the global adapter.
            cohort: ranks of everyone in the round.
            round: 1-based, of a run without freezes.
        """
        common = {"r": rank, "g": global_rank, "R": sum(cohort), "K": len(cohort)}
        common |= {"odd": round % 2, "first": int(round == 1)}
        code = compile(formula, "traffic", "eval")
        # a formula is part of a strategy's source, which the user chose to run; it still gets nothing but numbers
        functions = {"min": min, "max": max}
        return sum(int(eval(code, {"__builtins__": {}}, {**common, **functions, "m": m, "n": n})) for m, n in shapes)
