"""Forget losses: their values and gradients by hand, and one of a user's own."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.errors import ConfigError
from fedlora.plugins import load_plugins, unload_plugins
from fedlora.unlearning import FORGET_LOSSES

LOGP = torch.tensor([-0.1, -2.0, -9.0])
REFERENCE = torch.tensor([-0.1, -1.0, -3.0])
LENGTHS = torch.tensor([1.0, 2.0, 3.0])


def value(name: str, logp: Tensor = LOGP, reference: Tensor = REFERENCE, **options: float) -> Tensor:
    return FORGET_LOSSES.create(name, **options).loss(logp, reference, LENGTHS)


def slope(name: str, logp: Tensor = LOGP, reference: Tensor = REFERENCE, **options: float) -> Tensor:
    leaf = logp.clone().requires_grad_()
    value(name, leaf, reference, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_every_loss_gives_a_finite_number_per_row_and_never_makes_a_row_more_likely(name: str) -> None:
    # a probability of exp(-1e4) is 0 in float32: logarithms of it must not be taken on the way
    logp = torch.tensor([0.0, -3.0, -1e4])
    assert value(name, logp).isfinite().all()
    assert value(name, logp).shape == (3,)
    assert slope(name, logp).isfinite().all()
    assert (slope(name, logp) >= 0).all()


def test_npo_is_its_equation() -> None:
    # ratios 0, -1 and -6 at beta 0.5: -4 log sigma(0), -4 log sigma(0.5), -4 log sigma(3)
    expected = [4 * math.log(1 + math.exp(x)) for x in (0.0, -0.5, -3.0)]
    assert value("npo", beta=0.5).tolist() == pytest.approx(expected, rel=1e-6)


def test_npo_starts_as_ascent_and_lets_go_of_rows_that_are_forgotten() -> None:
    # 2 sigma(beta * ratio): 1 where nothing has changed, 2 e^-60 after 60 nats at beta 1
    found = slope("npo", torch.tensor([-1.0, -2.0, -63.0]), torch.tensor([-1.0, -1.0, -3.0]), beta=1.0)
    assert found.tolist() == pytest.approx([1.0, 2 / (1 + math.e), 2 * math.exp(-60)], rel=1e-5)


def test_npo_tends_to_ascent_as_beta_vanishes() -> None:
    # the difference to 1 is beta * ratio / 2, of first order
    apart = [float((slope("npo", beta=beta) - slope("ascent")).abs().max()) for beta in (1e-1, 1e-2, 1e-3)]
    assert apart == pytest.approx([0.3, 0.03, 0.003], rel=0.05)


def test_simnpo_is_its_equation() -> None:
    # per target -0.1, -1 and -3; beta 2 and gamma 0.5: -log sigma(0.2 - 0.5), (2 - 0.5), (6 - 0.5)
    expected = [math.log(1 + math.exp(-x)) for x in (-0.3, 1.5, 5.5)]
    assert value("simnpo", beta=2.0, gamma=0.5).tolist() == pytest.approx(expected, rel=1e-6)


def test_simnpo_sees_no_length_and_no_reference() -> None:
    same_per_target = torch.tensor([-1.5, -3.0, -4.5])
    found = value("simnpo", same_per_target)
    assert_close(found, found[:1].expand(3))
    assert torch.equal(found, value("simnpo", same_per_target, REFERENCE - 7))


def test_a_margin_makes_simnpo_go_on_for_longer() -> None:
    assert (slope("simnpo", gamma=1.0) > slope("simnpo", gamma=0.0)).all()


def test_gradient_difference_stops_at_its_limit() -> None:
    # per target -0.1, -1 and -3, of which the last is beyond 2
    assert value("gradient_difference", limit=2.0).tolist() == pytest.approx([-0.1, -1.0, -2.0])
    assert slope("gradient_difference", limit=2.0).tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_ascent_never_stops() -> None:
    assert slope("ascent", torch.tensor([-1.0, -1e3, -1e6])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("npp", {}, "forget loss: npp is not known; did you mean npo?"),
        ("npo", {"beta": 0}, "forget loss: npo.beta must be above 0, not 0"),
        ("npo", {"beta": float("nan")}, "forget loss: npo.beta must be above 0, not nan"),
        ("npo", {"beta": "high"}, "forget loss: npo.beta must be a number, not 'high'"),
        ("simnpo", {"beta": -1}, "forget loss: simnpo.beta must be above 0, not -1"),
        ("gradient_difference", {"limit": 0.0}, "forget loss: gradient_difference.limit must be above 0, not 0.0"),
        ("ascent", {"beta": 1}, "forget loss: ascent does not take these options"),
    ],
)
def test_wrong_options_are_told(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FORGET_LOSSES.create(name, **options)


MINE = '''
from fedlora.unlearning import FORGET_LOSSES, ForgetLoss


@FORGET_LOSSES.register("settle")
class Settle(ForgetLoss):
    """Bring every target to a chosen loss, from either side.

    Args:
        nats: per target.
    """

    def __init__(self, nats: float = 2.0):
        self.nats = nats

    def loss(self, logp, reference, lengths):
        return (logp / lengths + self.nats) ** 2
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "settle.py"
    path.write_text(MINE)
    yield path
    unload_plugins()


def test_a_loss_of_your_own_is_a_plug_in_of_15_lines(plugin: Path) -> None:
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 15
    (loaded,) = load_plugins([str(plugin)])
    assert loaded.names() == {"forget loss": ["settle"]}
    assert value("settle", nats=1.0).tolist() == pytest.approx([0.81, 0.0, 4.0])
    assert FORGET_LOSSES.create("settle").name == "settle"
    unload_plugins()
    assert "settle" not in FORGET_LOSSES


def test_a_loss_without_its_method_is_told(plugin: Path) -> None:
    plugin.write_text(MINE.replace("def loss", "def lose"))
    load_plugins([str(plugin)])
    with pytest.raises(ConfigError, match="forget loss: settle lacks the method loss"):
        FORGET_LOSSES.create("settle")
