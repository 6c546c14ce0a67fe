"""Bounds on what one client changes."""

import torch

from fedlora.privacy.clip import shortened


def test_a_long_change_keeps_its_direction_and_a_short_one_all_of_it() -> None:
    # a norm of 5 over both tensors becomes 1
    wide = shortened({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}, 1.0)
    assert torch.allclose(wide["a"], torch.tensor([0.6, 0.0], dtype=torch.float64))
    assert torch.allclose(wide["b"], torch.tensor([[0.8]], dtype=torch.float64))
    assert float(shortened({"a": torch.tensor([0.5])}, 1.0)["a"]) == 0.5
    assert float(shortened({"a": torch.tensor([0.0])}, 1.0)["a"]) == 0.0
