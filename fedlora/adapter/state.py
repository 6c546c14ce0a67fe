"""The two central values: one module's low-rank update, and a whole adapter.

Everything here is in effective units: ``alpha / r`` is already inside ``B``, so ``B @ A`` is
exactly what is added to the base weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.errors import AdapterError


@dataclass(frozen=True, eq=False)
class LowRank:
    """One module's update ``B @ A``, kept as factors.

    Attributes:
        B: [out, R].
        A: [R, in].
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterError(
                f"factors do not fit: B {list(self.B.shape)}, A {list(self.A.shape)}; expected B [out, R] and A [R, in]"
            )

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module this updates."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter: module path -> update, and the tensors that are trained in full.

    Attributes:
        modules: low-rank updates by module path, such as ``bert.encoder.layer.0.attention.self.query``.
        dense: tensors without a low-rank form by parameter path: a classifier head, DoRA magnitudes.
    """

    modules: Mapping[str, LowRank] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 for an adapter without modules."""
        return max((update.rank for update in self.modules.values()), default=0)

    def map(self, function: Callable[[LowRank], LowRank]) -> AdapterState:
        """A new state with ``function`` applied to every module; ``dense`` is kept."""
        return AdapterState({path: function(update) for path, update in self.modules.items()}, self.dense)

    def tensors(self) -> dict[str, Tensor]:
        """Flat view ``{"path:B": ..., "path:A": ..., ":name": ...}``, sorted by name."""
        flat = {f":{name}": tensor for name, tensor in self.dense.items()}
        for path, update in self.modules.items():
            flat[f"{path}:B"] = update.B
            flat[f"{path}:A"] = update.A
        return dict(sorted(flat.items()))

    @staticmethod
    def from_tensors(flat: Mapping[str, Tensor]) -> AdapterState:
        """Inverse of ``tensors``.

        Raises:
            AdapterError: for a module with only one factor, or a name of another form.
        """
        dense: dict[str, Tensor] = {}
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            path, separator, part = name.rpartition(":")
            if not separator or (path and part not in ("A", "B")):
                raise AdapterError(f"{name}: not an adapter tensor; expected path:A, path:B or :name")
            if path:
                factors.setdefault(path, {})[part] = tensor
            else:
                dense[part] = tensor
        for path, pair in factors.items():
            if len(pair) != 2:
                raise AdapterError(f"{path}: has {next(iter(pair))} but not its partner factor")
        return AdapterState({path: LowRank(pair["B"], pair["A"]) for path, pair in factors.items()}, dense)

    def to(self, dtype: torch.dtype) -> AdapterState:
        """A new state in another precision."""
        return AdapterState.from_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def check_like(self, other: AdapterState, whose: str) -> None:
        """Raise ``AdapterError`` unless both have the same modules, module shapes and dense tensors.

        Ranks may differ. ``whose`` names ``self`` in the message.
        """
        for kind, mine, theirs in (
            ("module", self.modules, other.modules),
            ("dense tensor", self.dense, other.dense),
        ):
            for name in sorted(set(mine) ^ set(theirs)):
                problem = "is missing" if name in theirs else "is not part of this adapter"
                raise AdapterError(f"{name}: {kind} of {whose} {problem}")
            for name in mine:
                came, expected = tuple(mine[name].shape), tuple(theirs[name].shape)
                if came != expected:
                    raise AdapterError(f"{name}: {whose} sent {came}, expected {expected}")
