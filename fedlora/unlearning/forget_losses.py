"""What is minimised on rows that are to be forgotten.

Log-likelihoods are sums over a row's targets: one label of a classifier, every answer token of a language model. A
forget loss is never used alone: see ``forgetting``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlora.errors import ConfigError
from fedlora.registry import Registry


class ForgetLoss(ABC):
    """One number per forgotten row, smaller the less likely the row is. Pure: nothing is kept on ``self``."""

    name: str

    @abstractmethod
    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """The loss of every row [n], differentiable in ``logp``; what is minimised is their mean.

        Args:
            logp: log-likelihood of each row under the model [n], at most 0.
            reference: the same under the model as it was received [n]; no gradient.
            lengths: targets of each row [n], at least 1.
        """


FORGET_LOSSES: Registry[ForgetLoss] = Registry("forget loss")


@FORGET_LOSSES.register("npo")
class NPO(ForgetLoss):
    """``-(2 / beta) log sigma(-beta (logp - reference))``.

    Its gradient is that of ``ascent`` times ``2 sigma(beta (logp - reference))``: 1 at the start, and vanishing once a
    row is some ``1 / beta`` nats less likely than it was.

    Args:
        beta: the smaller, the later it lets go; at 0 it would be ``ascent``.

    Source: NPO (Zhang et al., 2024, arXiv 2404.05868), whose beta is 0.1.
    """

    def __init__(self, beta: float = 0.1):
        self.beta = _positive("npo", "beta", beta)

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * (logp - reference))


@FORGET_LOSSES.register("simnpo")
class SimNPO(ForgetLoss):
    """``-(2 / beta) log sigma(-beta logp / length - gamma)``: per target, and without a reference.

    Long rows count no more than short ones, and rows that were unlikely from the start are let alone.

    Args:
        beta: the larger, the earlier it lets go.
        gamma: margin; a larger one goes on for longer.

    Source: SimNPO (Fan et al., 2024, arXiv 2410.07163).
    """

    def __init__(self, beta: float = 2.5, gamma: float = 0.0):
        self.beta, self.gamma = _positive("simnpo", "beta", beta), gamma

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * logp / lengths - self.gamma)


@FORGET_LOSSES.register("gradient_difference")
class GradientDifference(ForgetLoss):
    """``max(logp / length, -limit)``: ascent per target, which stops at a loss of ``limit``.

    Args:
        limit: nats per target, beyond which a row has no gradient. A guess among C labels costs ``log C``: far above
            that, a row is not unknown but known to be wrong, which shows that it was there.

    Source: gradient difference (Liu et al., 2022, arXiv 2203.12817); the limit is ours.
    """

    def __init__(self, limit: float = 5.0):
        self.limit = _positive("gradient_difference", "limit", limit)

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return (logp / lengths).clamp(min=-self.limit)


@FORGET_LOSSES.register("ascent")
class Ascent(ForgetLoss):
    """``logp``: plain gradient ascent, which has no end and takes the rest of the model with it.

    Here to be measured against: verification must reject what it leaves behind.
    """

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return logp


def _positive(loss: str, option: str, value: float) -> float:
    # an option of another type is refused by the registry, after this
    if isinstance(value, int | float) and not value > 0:
        raise ConfigError(f"forget loss: {loss}.{option} must be above 0, not {value}")
    return value
