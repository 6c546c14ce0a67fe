"""Selection by use and speed, with exploration: Oort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from orchestrator.selection.base import SELECTORS, Draw, Selector
from orchestrator.selection.rules import race


@SELECTORS.register("oort")
class Oort(Selector):
    """Clients whose loss is high on many examples and who answer fast, and a share of unknown ones.

    A client that has reported is worth ``examples * loss``, clipped at the 95th percentile and in units of it, plus
    ``sqrt(0.1 log(round) / last_round)`` so that old reports are renewed; all of it times ``(T / t)^alpha`` where its
    task took t seconds, longer than T. Among those worth at least ``cutoff`` times the last place that would be given,
    places are drawn by worth. The other places, ``max(exploration * decay^(round - 1), least)`` of all, go to clients
    that never reported; those asked in vain are less likely to be asked again.

    Simpler than the paper in four points: the mean loss of a task stands for the root mean square over examples (a
    client reports no loss per example); T is a fixed percentile of known durations, where the paper moves it when
    progress stalls; unknown clients are drawn evenly, as nothing is known of their speed; nobody is barred for having
    been asked often.

    Source: Lai et al., 2021 (OSDI, arXiv 2010.06081), algorithm 1.

    Args:
        exploration: share of unknown clients in the first round.
        decay: factor on it after every round.
        least: share it does not fall below.
        alpha: how much slow clients are held back; 0 for not at all.
        percentile: of known durations, above which a client is slow.
        cutoff: share of the last place's worth that admits to the draw.
    """

    def __init__(
        self,
        exploration: float = 0.9,
        decay: float = 0.98,
        least: float = 0.2,
        alpha: float = 2.0,
        percentile: float = 50.0,
        cutoff: float = 0.95,
    ):
        options = {"exploration": exploration, "decay": decay, "least": least, "cutoff": cutoff}
        for name, value in options.items():
            _check(name, value, 1.0)
        _check("alpha", alpha, math.inf)
        _check("percentile", percentile, 100.0)
        self.exploration, self.decay, self.least = exploration, decay, least
        self.alpha, self.percentile, self.cutoff = alpha, percentile, cutoff

    def select(self, candidates: Sequence[ClientInfo], draw: Draw) -> list[str]:
        dice = np.random.default_rng(draw.seed)
        known = [i for i, client in enumerate(candidates) if draw.record(client).loss is not None]
        unknown = [i for i, client in enumerate(candidates) if draw.record(client).loss is None]
        share = max(self.exploration * self.decay ** (draw.round - 1), self.least)
        # a fraction of a place is a chance of a place, or one client per round would never be a known one
        places = math.floor(draw.count * (1 - share) + dice.random())
        exploit = min(max(places, draw.count - len(unknown)), draw.count, len(known))
        chosen = self._useful([candidates[i] for i in known], exploit, draw, dice)
        chances = np.array([1 / (1 + draw.record(candidates[i]).asked) for i in unknown])
        explored = race(chances, draw.count - exploit, dice)
        picked = {*(known[i] for i in chosen), *(unknown[i] for i in explored.tolist())}
        return [client.id for i, client in enumerate(candidates) if i in picked]

    def worth(self, clients: Sequence[ClientInfo], draw: Draw) -> np.ndarray:
        """What each of these clients, all of which have reported, is worth in this round."""
        records = [draw.record(client) for client in clients]
        rows = np.array([client.num_examples for client in clients], dtype=float)
        useful = rows * np.array([max(record.loss or 0.0, 0.0) for record in records])
        bound = max(float(np.quantile(useful, 0.95)), 1e-12)
        age = np.array([math.sqrt(0.1 * math.log(draw.round) / max(record.last_round, 1)) for record in records])
        return (np.minimum(useful, bound) / bound + age) * self._haste([record.seconds for record in records], draw)

    def _useful(self, clients: Sequence[ClientInfo], count: int, draw: Draw, dice: np.random.Generator) -> list[int]:
        if count < 1:
            return []
        worth = self.worth(clients, draw)
        last_place = np.sort(worth)[-count]
        admitted = np.flatnonzero(worth >= self.cutoff * last_place)
        return [int(admitted[i]) for i in race(worth[admitted], count, dice)]

    def _haste(self, seconds: Sequence[float | None], draw: Draw) -> np.ndarray:
        """Factor of each client: 1 up to the preferred duration, less beyond it."""
        durations = [record.seconds for record in draw.records.values() if record.seconds is not None]
        if not durations:
            return np.ones(len(seconds))
        preferred = float(np.percentile(durations, self.percentile))
        return np.array([(preferred / s) ** self.alpha if s is not None and s > preferred else 1.0 for s in seconds])


def _check(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
        wanted = f"a number from 0 to {most:g}" if most < math.inf else "a number of at least 0"
        raise ConfigError(f"selection: oort.{name} is {wanted}, not {value!r}")
