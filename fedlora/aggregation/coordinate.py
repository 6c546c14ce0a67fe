"""Coordinate-wise rules: median and trimmed mean. Only where all clients share one basis.

The cohort is reduced to one robust update, which the rule inside then takes as if it had come from one client.
A coordinate is looked at over the clients that have it, so ranks may differ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Contribution, RoundContext, Strategy
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, require_whole_cohort
from fedlora.errors import ConfigError


class Coordinatewise(Wrapper):
    """Replaces the cohort by one update of the global rank."""

    def __init__(self, inner: Strategy):
        super().__init__(inner)
        require_fixed_gauge(self.name, inner, "multi_krum or geometric_median")
        require_whole_cohort(self.name, inner)
        if not inner.traits.weighted:
            raise ConfigError(
                f"strategy: {self.name} makes one update of all, and {inner.name} weighs each; put {self.name} directly"
                " over a rule such as zero_pad"
            )
        self.traits = replace(inner.traits, exact=False, linear=False, weighted=False)

    def prepare(self, updates: Sequence[Contribution], ctx: RoundContext) -> Sequence[Contribution]:
        present = [update for update in updates if update.weight > 0]
        widest = max(present, key=lambda update: update.trained.rank)
        rows = [_by_component(update.trained, widest.trained.rank) for update in present]
        flat = {name: by_holders([row[name] for row in rows], lambda x: self.centre(x, ctx)) for name in rows[0]}
        extras = {
            name: self.centre(torch.stack([update.extras[name] for update in present]), ctx)
            for name in widest.extras
            if all(name in u.extras and u.extras[name].shape == widest.extras[name].shape for u in present)
        }
        return [replace(widest, weight=1.0, trained=_restored(flat, widest.trained), extras=extras)]

    @abstractmethod
    def centre(self, stack: Tensor, ctx: RoundContext) -> Tensor:
        """One value per coordinate from [K, ...]."""


@WRAPPERS.register("coordinate_median")
class CoordinateMedian(Coordinatewise):
    """The median of every coordinate; the mean of the two middle values for an even number of clients."""

    name = "coordinate_median"
    equation = "x[i] = median_k x_k[i]"
    source = "Yin et al., 2018 (arXiv 1803.01498)"

    def centre(self, stack: Tensor, ctx: RoundContext) -> Tensor:
        ordered = stack.sort(dim=0).values
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@WRAPPERS.register("trimmed_mean")
class TrimmedMean(Coordinatewise):
    """The mean of every coordinate without its largest and smallest values.

    Args:
        trim: share of the clients that is left out at each end, below one half.
    """

    name = "trimmed_mean"
    equation = "x[i] = mean of x_k[i] without the trim * K smallest and largest"
    source = "Yin et al., 2018 (arXiv 1803.01498)"

    def __init__(self, inner: Strategy, trim: float = 0.2):
        super().__init__(inner)
        if not 0 <= trim < 0.5:
            raise ConfigError(f"strategy: trimmed_mean needs 0 <= trim < 0.5, not {trim}")
        self.trim = trim

    def centre(self, stack: Tensor, ctx: RoundContext) -> Tensor:
        cut = int(self.trim * len(stack) + 1e-9)
        return stack.sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def require_fixed_gauge(name: str, inner: Strategy, instead: str) -> None:
    """Raise ``ConfigError`` unless factor coordinates mean the same for every client and round."""
    if not inner.traits.fixed_gauge:
        raise ConfigError(
            f"strategy: {name} works on factor coordinates, and {inner.name} changes their basis every round;"
            f" use {instead}, or {name} over ffa, rolora, zero_pad or rbla"
        )


def by_holders(found: Sequence[Tensor], centre: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``centre`` to tensors that may differ in the number of leading components.

    Args:
        found: [r_k, ...] each.

    Returns:
        [max r_k, ...]; component i comes from the clients with r_k > i.
    """
    edges = sorted({len(tensor) for tensor in found})
    pieces, start = [], 0
    for end in edges:
        pieces.append(centre(torch.stack([t[start:end] for t in found if len(t) >= end])))
        start = end
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _by_component(state: AdapterState, widest: int) -> dict[str, Tensor]:
    """Tensors with one row per component (B transposed, cores as wide as the widest); others with one row in all."""
    flat = {}
    for path, update in state.modules.items():
        flat[f"{path}:A"], flat[f"{path}:B"] = update.A, update.B.T
        if update.C is not None:
            flat[f"{path}:C"] = torch.nn.functional.pad(update.C, (0, widest - update.rank))
    return {**flat, **{f":{name}": tensor[None] for name, tensor in state.dense.items()}}


def _restored(flat: dict[str, Tensor], like: AdapterState) -> AdapterState:
    tensors = {}
    for name in like.tensors():
        if name.endswith(":B"):
            tensors[name] = flat[name].T.contiguous()
        elif name.startswith(":"):
            tensors[name] = flat[name][0]
        else:
            tensors[name] = flat[name]
    return AdapterState.from_tensors(tensors)
