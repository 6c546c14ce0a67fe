"""The directions a layer's inputs lie in: sketched, found again, and kept out of.

    Y, trace = sketch(X, probes(path, in, width))   # on a client; weighted means of both on the server
    F = root_of(Y, probes(path, in, width))         # C ~ F F^T
    A = design(F, M, rank, seed)                         # rows for a new task, outside of M
    M = grown(F, trace, M, energy, room)                 # once the task is over

C is the covariance of a layer's inputs about 0, scaled so that its trace is the mean square of a coordinate. An update
``B @ A`` whose rows of A are orthogonal to every column of M changes no output on inputs that M spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.seeds import derive_seed

ROUNDING = 1e-9  # of a sum of eigenvalues: what is missing to a share by less than this is not missing
NULL = 1e-5  # eigenvalues below this share of the largest are what float32 sketches leave of a zero


def probes(path: str, size: int, width: int) -> Tensor:
    """Omega [size, min(width, size)] in float64, Gaussian: the same for a module's path wherever it is drawn."""
    draw = torch.Generator().manual_seed(derive_seed(0, 0, "", f"input sketch:{path}"))
    return torch.randn(size, min(width, size), generator=draw, dtype=torch.float64)


def sketch(X: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """``C @ omega`` and the trace of C, with ``C = X^T X / (n in)``, which is never formed.

    Both are linear in C: means over clients, weighted alike, are those of the mean covariance.

    Args:
        X: [n, in] inputs, n >= 1.
        omega: [in, k].

    Returns:
        Y [in, k] and a number, in the dtype of ``X``.
    """
    scale = 1 / X.numel()
    return X.T @ (X @ omega) * scale, X.square().sum() * scale


def root_of(Y: Tensor, omega: Tensor) -> Tensor:
    """F [in, p] in float64 with ``C ~ F @ F^T``, exact where the rank of C is at most k.

    A sketch need not come from a covariance: what has no positive part is left out, and the rest is taken.

    Args:
        Y: [in, k], ``C @ omega``.
        omega: [in, k].

    Returns:
        p <= k columns; none where there is nothing.

    Source: the Nystrom approximation ``Y (omega^T Y)^-1 Y^T``, as in Tropp et al. (2017, arXiv 1706.05736), algorithm
    3, with a cut-off in place of the shift.
    """
    Y, omega = Y.double(), omega.double()
    core = omega.T @ Y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = (values > 0) & (values > NULL * values[-1])
    root: Tensor = Y @ (vectors[:, kept] / values[kept].sqrt())
    return root


def outside(F: Tensor, M: Tensor) -> Tensor:
    """The part of the columns of F [in, p] in the complement of M [in, c], whose columns are orthonormal."""
    F = F - M @ (M.T @ F)
    return F - M @ (M.T @ F)  # again: the first pass leaves rounding of the size of F, which may be all there is


def directions(F: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors of ``F @ F^T`` and their eigenvalues, largest first.

    Args:
        F: [in, p].
        total: against which an eigenvalue may be rounding.

    Returns:
        [in, q] with orthonormal columns, and [q] values above ``NULL * total``.
    """
    vectors, roots, _ = torch.linalg.svd(F, full_matrices=False)
    kept = roots.square() > NULL * total
    return vectors[:, kept], roots[kept].square()


def design(F: Tensor, M: Tensor, rank: int, seed: int) -> Tensor:
    """A [rank, in] with orthonormal rows outside of M: where most of the inputs' energy is first.

    Args:
        F: [in, p] with ``C = F @ F^T``.
        M: [in, c] with orthonormal columns, c + rank <= in.
        seed: of what fills up rows that the inputs do not ask for.

    Source: InfLoRA (Liang and Li, 2024, arXiv 2404.00228), eqs. 6 to 8; there it is called B_t.
    """
    found, _ = directions(outside(F, M), float(F.square().sum()))
    found = found[:, :rank]
    draw = torch.Generator().manual_seed(seed)
    spare = torch.randn(len(M), rank - found.shape[1], generator=draw, dtype=torch.float64)
    spare = outside(spare, torch.cat([M, found], dim=1))
    rows = torch.cat([found, torch.linalg.qr(spare).Q], dim=1)
    return outside(rows, M).T.contiguous()


def grown(F: Tensor, total: float, M: Tensor, energy: float, room: int) -> Tensor:
    """M with as many of the inputs' leading directions outside of it as bring its share of their energy to ``energy``.

    Args:
        F: [in, p] with ``C ~ F @ F^T``.
        total: trace of C, of which F may miss some.
        M: [in, c] with orthonormal columns.
        energy: 0 < energy <= 1.
        room: columns that may be added.

    Returns:
        [in, c + j] with orthonormal columns; j is the smallest number that is enough, or all there is room for.

    Source: Gradient Projection Memory (Saha et al., 2021, arXiv 2103.09762), eq. 9, on which InfLoRA's memory rests.
    """
    total = max(total, float(F.square().sum()))
    found, values = directions(outside(F, M), total)
    reached = float((M.T @ F).square().sum()) + torch.cat([values.new_zeros(1), values.cumsum(0)])
    needed = int((reached < energy * total * (1 - ROUNDING)).sum())
    return torch.cat([M, outside(found[:, : min(needed, room)], M)], dim=1)
