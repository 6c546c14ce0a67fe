"""The adapter a federation starts from."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import ModelError, RankError
from fedlora.seeds import derive_seed

INITS = ("kaiming", "gaussian", "orthogonal")


def initial_adapter(
    sites: Mapping[str, tuple[int, int]],
    dense: Mapping[str, Tensor],
    rank: int,
    seed: int,
    init: str = "kaiming",
) -> AdapterState:
    """B = 0 and a seeded A, the same for every client: a client of rank r holds the first r rows.

    Args:
        sites: (out, in) of every adapted module by path.
        dense: initial values of tensors trained in full.
        rank: number of components; at most min(out, in) of every site.
        seed: the run's root seed.
        init: ``kaiming`` is U(-1/sqrt(in), 1/sqrt(in)), what PEFT does by default; ``gaussian`` is
            N(0, 1/rank); ``orthogonal`` has orthonormal rows.

    Raises:
        RankError: for a rank below 1 or above the size of a site.
    """
    modules = {}
    for path, (rows, columns) in sorted(sites.items()):
        if not 1 <= rank <= min(rows, columns):
            raise RankError(
                f"{path}: rank {rank} does not fit a {rows} x {columns} layer; use 1 to {min(rows, columns)}"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "", f"init:{path}"))
        if init == "kaiming":
            A = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
        else:
            A = torch.randn(rank, columns, generator=generator)
            # the orthogonal factor of a Gaussian matrix is Haar distributed up to signs
            A = A / math.sqrt(rank) if init == "gaussian" else torch.linalg.qr(A.T.double()).Q.T.float()
        modules[path] = LowRank(torch.zeros(rows, rank), A.contiguous())
    return AdapterState(modules, {name: tensor.detach().clone() for name, tensor in dense.items()})


def check_rank(sites: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raise ``ModelError`` if a rank is larger than a layer it is meant for."""
    for path, size in sites.items():
        if rank > min(size):
            raise ModelError(
                f"{path}: rank {rank} is larger than the layer ({size[0]} x {size[1]}); use at most {min(size)}"
            )
