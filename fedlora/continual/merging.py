"""Several tasks' updates of a module made into one, in product space: what is combined is ``B @ A``, not its factors.

    merged, error = merge("orthogonal", [task.modules for task in tasks], rank=16)

``build_merging`` is the same for a rule that a configuration names.

A rule sees one module of all tasks at a time. Sums, means, projections and scalings work on stacks of factors. ``ties``
and ``dare`` decide entry by entry, so they multiply that module out. What comes of it has full rank, and the error of
bringing it back to a low one is rarely small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter.algebra import norm, scaled, stack
from fedlora.adapter.rank import truncate
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.svd import NULL, factored_svd, norm_of_parts
from fedlora.errors import AdapterError, ConfigError, RankError
from fedlora.registry import Registry
from fedlora.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Site:
    """One module as a rule sees it.

    Attributes:
        path: of the module.
        tasks: its update by each task, in order, without cores and in float64.
        paths: of all modules, for rules that go by depth.
        seed: of the merge.
    """

    path: str
    tasks: Sequence[LowRank]
    paths: Sequence[str]
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.tasks[0].shape


MergeRule = Callable[[Site], LowRank | Tensor]  # a stack, or the merged update multiplied out in float32
MERGE_RULES: Registry[MergeRule] = Registry("merge rule")


@dataclass(frozen=True)
class Merging:
    """A rule with its options."""

    rule: str
    options: Mapping[str, Any]

    def merge(self, updates: Sequence[Mapping[str, LowRank]], rank: int, seed: int) -> tuple[dict[str, LowRank], float]:
        """See ``merge``."""
        return merge(self.rule, updates, rank, seed, **self.options)

    def check(self, paths: Iterable[str]) -> None:
        """Raise ``ConfigError`` or ``AdapterError`` if the rule cannot be applied to modules of these names."""
        nothing = LowRank(torch.zeros(1, 1), torch.zeros(1, 1))
        self.merge([dict.fromkeys(paths, nothing)], rank=1, seed=0)


def build_merging(choice: str | Mapping[str, Mapping[str, Any] | None]) -> Merging | None:
    """The rule of a configuration: a name, or ``{name: {option: value}}``.

    Returns:
        None for the plain sum, which the base plus all patches is anyway.

    Raises:
        ConfigError: an unknown name, or options it does not take.
    """
    if not isinstance(choice, str) and len(choice) != 1:
        raise ConfigError(f"continual.merge is one rule with its options, not {len(choice)}: {', '.join(choice)}")
    name, options = (choice, None) if isinstance(choice, str) else next(iter(choice.items()))
    MERGE_RULES.create(name, **(options or {}))
    return None if name == "sum" else Merging(name, dict(options or {}))


def merge(
    rule: str, updates: Sequence[Mapping[str, LowRank]], rank: int, seed: int = 0, **options: object
) -> tuple[dict[str, LowRank], float]:
    """One update out of several tasks' updates.

    Args:
        rule: a name in ``MERGE_RULES``.
        updates: module path -> update, one mapping per task in the order of the stream. Ranks may differ.
        rank: the most a merged module may have, at least 1.
        seed: for rules that draw.
        options: of the rule.

    Returns:
        Module path -> balanced B [out, r], A [r, in] with r <= rank, in the precision of the first task, and the
        relative Frobenius error of bringing what the rule says to that rank, over all modules.

    Raises:
        ConfigError: for an unknown rule, or options it does not take.
        RankError: if rank is below 1.
        AdapterError: if there are no updates, or their modules or shapes differ.
    """
    combine = MERGE_RULES.create(rule, **options)
    _check(updates, rank)
    paths = list(updates[0])
    merged: dict[str, LowRank] = {}
    lost = size = 0.0
    for path in paths:
        tasks = [_double(update[path]) for update in updates]
        found = combine(Site(path, tasks, paths, seed))
        merged[path] = _recompressed(found, rank, updates[0][path].A.dtype)
        lost = math.hypot(lost, _distance(found, merged[path]))
        size = math.hypot(size, _norm(found))
    return merged, lost / size if lost else 0.0


@MERGE_RULES.register("sum")
def add_up() -> MergeRule:
    """``sum_t B_t A_t``.

    Source: task arithmetic (Ilharco et al., 2023, arXiv 2212.04089).
    """
    return lambda site: _stacked(site.tasks)


@MERGE_RULES.register("mean")
def average() -> MergeRule:
    """``1/T sum_t B_t A_t``."""
    return lambda site: scaled(_stacked(site.tasks), 1 / len(site.tasks))


@MERGE_RULES.register("ties")
def ties(density: float = 0.2) -> MergeRule:
    """Of every task the largest entries; of those at one place the sign with more mass; of that sign the mean.

    An entry is zero where no task kept it or both signs weigh the same. Every module is multiplied out in float32, one
    at a time. Entries are trimmed per module, as in PEFT; the paper trims the whole update of a task.

    Args:
        density: share of a task's entries to keep, above 0 and up to 1.

    Source: TIES-Merging (Yadav et al., 2023, arXiv 2306.01708), algorithm 1, with its factor lambda 1.
    """
    _require(0 < density <= 1, "ties.density is a share above 0 and up to 1", density)

    def one(site: Site) -> Tensor:
        above, below, ups, downs = torch.zeros(4, *site.shape, device=site.tasks[0].A.device)
        for task in site.tasks:
            kept = _trimmed(_product(task), density)
            above += kept.clamp(min=0)
            below -= kept.clamp(max=0)
            ups += kept > 0
            downs += kept < 0
        positive, negative = above / ups.clamp(min=1), -below / downs.clamp(min=1)
        return torch.where(above > below, positive, 0.0) + torch.where(below > above, negative, 0.0)

    return one


@MERGE_RULES.register("dare")
def dare(p: float = 0.5, mean: bool = False) -> MergeRule:
    """Drop every entry of a task with probability p, multiply the others by ``1 / (1 - p)``, then add up the tasks.

    The expectation is the sum; the noise around each task has ``sqrt(p / (1 - p))`` times its norm, and a low rank
    keeps little of both where p is near 1. Every module is multiplied out in float32, one at a time. What is drawn
    depends on the seed, the module and the place of the task only.

    Args:
        p: share to drop, from 0 to below 1.
        mean: take the mean of the tasks instead of their sum.

    Source: DARE (Yu et al., 2024, arXiv 2311.03099).
    """
    _require(0 <= p < 1, "dare.p is a share from 0 to below 1", p)
    _require(isinstance(mean, bool), "dare.mean is true or false", mean)

    def one(site: Site) -> Tensor:
        total = torch.zeros(site.shape, device=site.tasks[0].A.device)
        for place, task in enumerate(site.tasks):
            generator = torch.Generator().manual_seed(derive_seed(site.seed, place, site.path, "dare"))
            drawn = torch.rand(site.shape, generator=generator).to(total.device)
            total += torch.where(drawn >= p, _product(task) / (1 - p), 0.0)
        return total / len(site.tasks) if mean else total

    return one


@MERGE_RULES.register("orthogonal")
def orthogonal() -> MergeRule:
    """Sum of the tasks, each cleared of the directions of those before: ``(I - U U^T) B_t A_t (I - V V^T)``.

    U and V are orthonormal bases of the column and row spaces of the earlier tasks as they went into the sum. The
    first task stays whole; one without new rows, or without new columns, is gone.
    """

    def one(site: Site) -> LowRank:
        first = site.tasks[0]
        U, V = first.B[:, :0], first.A[:0].T
        parts = []
        for task in site.tasks:
            part = LowRank(task.B - U @ (U.T @ task.B), task.A - (task.A @ V) @ V.T)
            found = factored_svd(part)
            # what rounding left of a direction is none, and would take another one from later tasks
            real = found.S.gt(NULL * norm_of_parts(task.B, task.A))
            U, V = torch.cat([U, found.U[:, real]], dim=1), torch.cat([V, found.Vh[real].T], dim=1)
            parts.append(part)
        return _stacked(parts)

    return one


@MERGE_RULES.register("lines")
def lines(
    alpha: float, beta: float = 1.0, layers: int | None = None, over: str = "sum", **options: object
) -> MergeRule:
    """What another rule merges, times a factor that grows linearly with depth: see ``depth_factors``.

    Args:
        alpha: factor of the first layer.
        beta: factor of the last layer. The paper's beta is the difference of the two.
        layers: how many the model has; by default as many as the module paths show.
        over: the other rule; ``options`` are its options.

    Source: LiNeS (Wang et al., 2024, arXiv 2410.17146).
    """
    for name, value in {"alpha": alpha, "beta": beta}.items():
        _require(math.isfinite(value), f"lines.{name} is a number", value)
    _require(layers is None or (type(layers) is int and layers > 0), "lines.layers is a whole number", layers)
    combine = MERGE_RULES.create(over, **options)

    def one(site: Site) -> LowRank | Tensor:
        factor = depth_factors(site.paths, alpha, beta, layers)[site.path]
        found = combine(site)
        return found * factor if isinstance(found, Tensor) else scaled(found, factor)

    return one


def depth_factors(paths: Iterable[str], alpha: float, beta: float, layers: int | None = None) -> dict[str, float]:
    """Factor by module path: alpha in the first layer, beta in the last, linear in between.

    The layer is the first number in a path: 3 in ``model.layers.3.mlp.experts.5.up_proj``. Modules without one get
    alpha, as in the authors' code. A single layer is the last.

    Raises:
        ConfigError: if a path has a layer that the model does not.
        AdapterError: if no path has a number.
    """
    found = {path: next((int(part) for part in path.split(".") if part.isdecimal()), None) for path in paths}
    deepest = max((layer for layer in found.values() if layer is not None), default=None)
    if deepest is None:
        raise AdapterError(f"no module path has a layer number: {', '.join(found)}; scaling by depth needs one")
    last = deepest if layers is None else layers - 1
    _require(deepest <= last, f"lines.layers is at least {deepest + 1}, as the module paths show", layers)

    def factor(layer: int | None) -> float:
        return alpha if layer is None else alpha + (beta - alpha) * (layer / last if last else 1.0)

    return {path: factor(layer) for path, layer in found.items()}


def _check(updates: Sequence[Mapping[str, LowRank]], rank: int) -> None:
    if rank < 1:
        raise RankError(f"cannot merge updates to rank {rank}; expected at least 1")
    if not updates:
        raise AdapterError("there are no updates to merge; give the modules of at least one task")
    for place, update in enumerate(updates):
        for path in sorted(update.keys() | updates[0].keys()):
            first, other = (str(u[path].shape) if path in u else "absent" for u in (updates[0], update))
            if first != other:
                raise AdapterError(
                    f"{path}: {first} in task 0 but {other} in task {place}; "
                    "merge adapters of one base model with the same target_modules"
                )


def _require(holds: bool, expected: str, came: object) -> None:
    if not holds:
        raise ConfigError(f"merge rule: {expected}, not {came!r}")


def _double(update: LowRank) -> LowRank:
    return LowRank(update.B.double(), update.A.double(), None if update.C is None else update.C.double()).folded()


def _stacked(updates: Sequence[LowRank]) -> LowRank:
    return stack([{"module": update} for update in updates])["module"]


def _product(update: LowRank) -> Tensor:
    return update.B.float() @ update.A.float()


def _trimmed(S: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, at least one; zero elsewhere."""
    flat = S.flatten()
    top = flat.abs().topk(max(1, round(density * flat.numel())), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, top, flat[top]).view_as(S)


def _recompressed(found: LowRank | Tensor, rank: int, dtype: torch.dtype) -> LowRank:
    if isinstance(found, Tensor):  # S = S I = I S
        eye = torch.eye(min(found.shape), device=found.device)
        found = LowRank(found, eye) if found.shape[1] == len(eye) else LowRank(eye, found)
    kept = truncate(found, min(rank, *found.shape, found.rank))
    return LowRank(kept.B.to(dtype), kept.A.to(dtype))


def _norm(found: LowRank | Tensor) -> float:
    return float(torch.linalg.norm(found)) if isinstance(found, Tensor) else norm(AdapterState({"module": found}))


def _distance(found: LowRank | Tensor, kept: LowRank) -> float:
    return _norm(found - _product(kept) if isinstance(found, Tensor) else _stacked([found, scaled(_double(kept), -1)]))
