"""What rounds cost is what dp-accounting says they cost."""

import sys

import dp_accounting
import pytest
from dp_accounting import pld

from fedlora.errors import ConfigError
from fedlora.privacy import accountant
from fedlora.privacy.accountant import Accountant


@pytest.mark.parametrize(("noise", "sampling"), [(0.8, 0.25), (1.0, 0.01), (2.0, 1.0)])
@pytest.mark.parametrize("rounds", [1, 30])
def test_epsilon_is_that_of_dp_accounting_called_directly(noise: float, sampling: float, rounds: int) -> None:
    gaussian = dp_accounting.GaussianDpEvent(noise)
    event = gaussian if sampling == 1 else dp_accounting.PoissonSampledDpEvent(sampling, gaussian)
    expected = pld.PLDAccountant().compose(event, rounds).get_epsilon(1e-5)
    # the same library in another order of compositions, which rounds otherwise
    assert Accountant(noise, sampling, 1e-5).epsilon(rounds) == pytest.approx(expected, rel=1e-6)


def test_one_gaussian_round_has_the_closed_form() -> None:
    # Balle & Wang, 2018: delta = Phi(1 / 2z - eps z) - e^eps Phi(-1 / 2z - eps z)
    import math

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    epsilon, z = Accountant(2.0, 1.0, 1e-5).epsilon(1), 2.0
    delta = phi(1 / (2 * z) - epsilon * z) - math.exp(epsilon) * phi(-1 / (2 * z) - epsilon * z)
    assert delta == pytest.approx(1e-5, rel=1e-3)
    assert delta <= 1e-5  # the discretisation errs to the safe side


def test_no_round_costs_nothing() -> None:
    assert Accountant(1.0, 0.5, 1e-5).epsilon(0) == 0


@pytest.mark.parametrize("budget", [0.5, 3.0, 5.0])
def test_the_rounds_of_a_budget_fit_and_one_more_does_not(budget: float) -> None:
    cost = Accountant(1.0, 0.2, 1e-5)
    fits = cost.rounds_within(budget, 20)
    assert cost.epsilon(fits) <= budget < cost.epsilon(fits + 1)


def test_a_budget_for_more_rounds_than_there_are_allows_them_all() -> None:
    assert Accountant(2.0, 1.0, 1e-5).rounds_within(1000.0, 7) == 7


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    accountant._one_round.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[privacy\]'"):
        Accountant(1.5, 0.5, 1e-6).epsilon(3)
