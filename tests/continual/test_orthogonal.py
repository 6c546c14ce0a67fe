"""O-LoRA: a new adapter stays out of the directions of what was frozen."""

import torch

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.continual.orthogonal import OLoRA, row_space
from fedlora.training.methods import Start


def random_update(rank: int, seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(12, rank, generator=draw), torch.randn(rank, 10, generator=draw))


def test_the_row_space_is_that_of_the_product_however_it_is_split() -> None:
    update = random_update(3, 0)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(9))
    turned = LowRank(update.B @ torch.linalg.inv(turn), turn @ update.A)
    padded = LowRank(torch.cat([update.B, torch.zeros(12, 2)], 1), torch.cat([update.A, torch.randn(2, 10)]))
    basis = row_space(update)
    assert basis.shape == (10, 3)
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64), atol=1e-10)
    for other in (turned, padded):
        assert torch.allclose(row_space(other) @ row_space(other).T, basis @ basis.T, atol=1e-5)


def test_the_penalty_is_the_share_of_A_in_the_frozen_rows() -> None:
    frozen = random_update(3, 0)
    A = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    start = Start(
        {"m:A": A, "m:B": torch.zeros(12, 2)},
        frozenset({"m:A", "m:B"}),
        frozenset(),
        frozen=lambda: AdapterState({"m": frozen}),
    )
    method = OLoRA(weight=2.0)
    memory = method.begin(start)
    projector = torch.linalg.pinv(frozen.A) @ frozen.A
    value = method.penalty({"m:A": A, "m:B": torch.zeros(12, 2)}, memory)
    assert value is not None
    assert torch.isclose(value, 2.0 * (A @ projector).square().sum(), rtol=1e-4)
    outside = A - A @ projector
    assert method.penalty({"m:A": outside}, memory) < 1e-9


def test_nothing_frozen_is_nothing_to_avoid() -> None:
    start = Start({"m:A": torch.ones(2, 10)}, frozenset({"m:A"}), frozenset())
    method = OLoRA(weight=1.0)
    assert method.penalty({"m:A": torch.ones(2, 10)}, method.begin(start)) is None
