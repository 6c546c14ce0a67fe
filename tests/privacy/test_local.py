"""A client's own noise: how large it is, that nobody foresees it, and that a repeated task has the same."""

import math

import numpy as np
import torch

from fedlora.privacy.local import gaussians, protected

SECRET = bytes(range(32))


def test_noise_has_the_standard_deviation_it_says_and_looks_normal() -> None:
    drawn = gaussians(SECRET, 200_001)
    assert len(drawn) == 200_001
    # of 200,000 normal numbers, mean and standard deviation are within 5 standard errors
    assert abs(drawn.mean()) < 5 / math.sqrt(200_000)
    assert abs(drawn.std() - 1) < 5 / math.sqrt(400_000)
    for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs(np.mean(np.abs(drawn) < bound) - share) < 5 * math.sqrt(share * (1 - share) / 200_000)
    # the two halves come from the same pairs of numbers, and are independent all the same
    first, second = drawn[:100_000], drawn[100_001:]
    assert abs(np.corrcoef(first, second[: len(first)])[0, 1]) < 5 / math.sqrt(100_000)


def test_a_change_is_clipped_and_then_noised() -> None:
    delta = {"b": torch.full((400, 100), 0.1), "a": torch.zeros(3)}  # of norm 20
    sent = protected(delta, clip=2.0, noise_multiplier=0.5, secret=SECRET)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in sent.items()} == {
        "a": (torch.Size([3]), torch.float32),
        "b": (torch.Size([400, 100]), torch.float32),
    }
    noise = sent["b"].double() - 0.01
    assert abs(float(noise.mean())) < 5 / 200  # a standard deviation of 1 over 40,000 values
    assert abs(float(noise.std()) - 1) < 5 / math.sqrt(80_000)


def test_the_same_change_gets_the_same_noise_and_another_one_or_another_client_other_noise() -> None:
    delta = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([[0.3]])}
    first, again = (protected(delta, 1.0, 1.0, SECRET) for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    other = protected(delta | {"b": torch.tensor([[0.30001]])}, 1.0, 1.0, SECRET)
    assert float((other["a"] - first["a"]).abs().min()) > 1e-4
    else_ = protected(delta, 1.0, 1.0, bytes(32))
    assert float((else_["a"] - first["a"]).abs().min()) > 1e-4


def test_noise_for_a_named_end_does_not_look_at_the_change() -> None:
    one, other = (protected({"a": torch.tensor([x])}, 1.0, 1.0, SECRET, b"round 1") for x in (0.25, 0.5))
    assert math.isclose(float(other["a"] - one["a"]), 0.25, rel_tol=1e-6)
    assert float(protected({"a": torch.tensor([0.25])}, 1.0, 1.0, SECRET, b"round 2")["a"] - one["a"]) != 0


def test_order_of_the_tensors_and_none_at_all_change_nothing() -> None:
    one = protected({"a": torch.ones(2), "b": torch.zeros(2)}, 1.0, 1.0, SECRET)
    other = protected({"b": torch.zeros(2), "a": torch.ones(2)}, 1.0, 1.0, SECRET)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert protected({}, 1.0, 1.0, SECRET) == {}
