"""What noisy rounds cost, by the privacy loss distributions of ``dp-accounting``, which is imported here alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from fedlora.errors import ConfigError


@dataclass(frozen=True)
class Accountant:
    """Counts rounds of one Gaussian mechanism.

    Attributes:
        noise_multiplier: standard deviation of the noise over the most that one client can change the sum.
        sampling: chance with which a Poisson draw takes a client; 1 where nothing hides who was drawn.
        delta: the chance for which epsilon makes no promise.
    """

    noise_multiplier: float
    sampling: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """The smallest epsilon for which so many rounds together are (epsilon, delta) private, to within the library's
        discretisation, which errs to the safe side; 0 for no round.

        Raises:
            ConfigError: if dp-accounting is not installed.

        Source: connect-the-dots discretisation (Doroshenko et al., 2022, arXiv 2207.04380).
        """
        return _epsilon(self, rounds)

    def rounds_within(self, budget: float, most: int) -> int:
        """How many rounds, ``most`` at the most, cost no more than an epsilon of ``budget``."""
        if self.epsilon(most) <= budget:
            return most
        fits, exceeds = 0, most
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.epsilon(middle) <= budget:
                fits = middle
            else:
                exceeds = middle
        return fits


@functools.cache
def _epsilon(accountant: Accountant, rounds: int) -> float:
    if rounds == 0:
        return 0.0
    total = _one_round(accountant.noise_multiplier, accountant.sampling).self_compose(rounds)
    return float(total.get_epsilon_for_delta(accountant.delta))


@functools.lru_cache(8)
def _one_round(noise_multiplier: float, sampling: float) -> Any:
    """The privacy loss of a round; making it takes longer than composing it."""
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise ConfigError(
            "dp and privacy.local count epsilon with the package dp-accounting, which is not installed;"
            " pip install 'fedlora[privacy]'"
        ) from error
    return privacy_loss_distribution.from_gaussian_mechanism(noise_multiplier, sampling_prob=sampling)
