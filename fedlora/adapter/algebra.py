"""Sums, means and inner products of adapters. Never forms ``B @ A``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import RankError


def add(left: AdapterState, right: AdapterState) -> AdapterState:
    """Sum of the factors: ``(B + B', A + A')``. Both need the same ranks and names."""
    return _combine([left, right], [1.0, 1.0])


def subtract(left: AdapterState, right: AdapterState) -> AdapterState:
    """Difference of the factors, the inverse of ``add``."""
    return _combine([left, right], [1.0, -1.0])


def mean_factors(states: Iterable[AdapterState], weights: Iterable[float]) -> AdapterState:
    """Weighted sum of the factors themselves: ``sum_k w_k B_k`` and ``sum_k w_k A_k``.

    This is FedAvg on factors: not the mean of the updates (``mean_update`` is), and only meaningful
    where all states share one basis.

    Raises:
        RankError: if ranks differ.
    """
    return _combine(states, weights)


def mean_update(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """The exact weighted sum of the updates ``sum_k w_k B_k A_k``, as a stack of rank ``sum r_k``.

    Returns:
        Modules with B [out, R] = [w_1 B_1, ..., w_K B_K], A [R, in] = [A_1; ...; A_K]; dense averaged.

    Source: FLoRA (Wang et al., 2024, arXiv 2409.05976), eq. 5.
    """
    states = [state.whole() for state in states]
    modules = {
        path: LowRank(
            torch.cat([w * s.modules[path].B for s, w in zip(states, weights, strict=True)], dim=1),
            torch.cat([s.modules[path].A for s in states], dim=0),
        )
        for path in states[0].modules
    }
    return AdapterState(modules, mean_dense(states, weights))


def stack(patches: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """Sum of updates as one stack per module: B = [B_1, B_2, ...], A = [A_1; A_2; ...]. Modules may differ."""
    found: dict[str, list[LowRank]] = {}
    for patch in patches:
        for path, update in patch.items():
            found.setdefault(path, []).append(update.folded())
    return {
        path: LowRank(torch.cat([u.B for u in updates], dim=1), torch.cat([u.A for u in updates], dim=0))
        for path, updates in found.items()
    }


def scaled(update: LowRank, factor: float) -> LowRank:
    """The update times a number, which goes into B."""
    return LowRank(update.B * factor, update.A, update.C)


def distance(left: AdapterState, right: AdapterState) -> float:
    """Frobenius norm of the difference of two updates, as a share of the norm of the first; 0 for two zeros."""
    negative = {path: scaled(update, -1.0) for path, update in right.whole().modules.items()}
    apart = norm(AdapterState(stack([left.whole().modules, negative])))
    return apart / max(norm(AdapterState(left.whole().modules)), 1e-30) if apart else 0.0


def mean_dense(states: Iterable[AdapterState], weights: Iterable[float]) -> dict[str, Tensor]:
    """Weighted sum of the dense tensors. ``states`` is read once, one at a time."""
    total: dict[str, Tensor] = {}
    for state, weight in zip(states, weights, strict=True):
        accumulate(total, state.dense, weight)
    return total


def inner(left: LowRank, right: LowRank) -> Tensor:
    """Frobenius inner product ``<B A, B' A'>`` of two updates of any ranks, from [R, R'] products."""
    left, right = left.folded(), right.folded()
    return ((left.B.T @ right.B) * (left.A @ right.A.T)).sum()


def norm(state: AdapterState) -> float:
    """Frobenius norm of the whole update: low-rank products and dense tensors together."""
    doubled = state.whole().to(torch.float64)  # fp32 loses the small singular values of a cancelling pair
    squares = [inner(update, update) for update in doubled.modules.values()]
    squares += [tensor.square().sum() for tensor in doubled.dense.values()]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt()) if squares else 0.0


def _combine(states: Iterable[AdapterState], weights: Iterable[float]) -> AdapterState:
    total: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for state, weight in zip(states, weights, strict=True):
        for path, update in state.modules.items():
            if ranks.setdefault(path, update.rank) != update.rank:
                both = sorted({ranks[path], update.rank})
                raise RankError(f"{path}: factors of ranks {both} have no common basis to be added in")
        accumulate(total, replace(state, frozen={}).tensors(), weight)
    return AdapterState.from_tensors(total)


def accumulate(total: dict[str, Tensor], tensors: Mapping[str, Tensor], weight: float) -> None:
    """Add ``weight`` times every tensor to the one of its name, in place; a new name starts at zero."""
    for name, tensor in tensors.items():
        if name in total:
            total[name].add_(tensor, alpha=weight)
        else:
            total[name] = tensor * weight
