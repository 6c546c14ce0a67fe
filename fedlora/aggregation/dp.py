"""Client-level differential privacy: clipped changes, noise on their sum, and the share of a planned cohort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.averaging import RBLA, require_equal_ranks
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.combine import part_of
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, described, looks_at_single_updates, part
from fedlora.errors import ConfigError
from fedlora.privacy.accountant import Accountant
from fedlora.protocol import ClientInfo
from fedlora.seeds import derive_seed

LEAST_NOISE = 0.1  # below, one round costs an epsilon of 90 and more, and accounting for it takes gigabytes


@WRAPPERS.register("dp")
class DP(Wrapper):
    """Noise hides whether any one client took part.

    Each change is shortened to ``clip`` and their sum gets Gaussian noise; the model moves by that over the number of
    clients the round planned for, not of those that answered. The rule and the wrappers inside see one update, of
    nobody. A round that nobody answered moves by noise alone.

    Args:
        clip: the largest Frobenius norm of a client's change, over all tensors that travel together.
        noise_multiplier: standard deviation of the noise on every entry of the sum, in units of clip.
        delta: the chance for which epsilon makes no promise; far below one over the number of clients.
        budget: the epsilon that a run may spend; it ends before the round that would exceed it. Default no limit.
    """

    name = "dp"
    equation = "x <- x + (sum_k min(1, c / ||d_k||) d_k + N(0, (z c)^2)) / clients planned,  d_k = x_k - received"
    source = "DP-FedAvg (McMahan et al., 2018, arXiv 1710.06963), its estimator with a fixed denominator"

    def __init__(
        self,
        inner: Strategy,
        clip: float = 1.0,
        noise_multiplier: float = 1.0,
        delta: float = 1e-5,
        budget: float | None = None,
    ):
        super().__init__(inner)
        if not 0 < clip < math.inf or not LEAST_NOISE <= noise_multiplier < math.inf or not 1e-12 <= delta < 1:
            raise ConfigError(
                f"strategy: dp needs clip > 0, noise_multiplier >= {LEAST_NOISE:g} and 1e-12 <= delta < 1, not {clip},"
                f" {noise_multiplier} and {delta}"
            )
        if budget is not None and not 0 < budget < math.inf:
            raise ConfigError(f"strategy: dp.budget is an epsilon above 0, not {budget}; leave it out for no limit")
        _require_sound(inner)
        self.clip, self.noise_multiplier, self.delta, self.budget = clip, noise_multiplier, delta, budget
        self.traits = replace(inner.traits, exact=False, linear=False, idempotent=False, weighted=False, private=True)

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        if not self.traits.mixed_ranks:
            require_equal_ranks(self.layers()[-1].name, updates, ctx)
        total = clipped_sum(updates, self._noised(ctx, state), self.clip)
        draw = torch.Generator().manual_seed(derive_seed(ctx.seed, ctx.round, "", "dp noise"))
        after = ctx.adapter.tensors()
        for name, tensor in total.items():
            noise = torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
            mean = (tensor + self.noise_multiplier * self.clip * noise) / ctx.planned
            after[name] = (after[name].double() + mean).to(after[name].dtype)
        nobody = ClientInfo("", ctx.rank, num_examples=1)
        moved = Contribution(nobody, 1.0, AdapterState.from_tensors(after), ctx.adapter)
        outcome = self.inner.aggregate([moved], ctx, part(state, "inner"))
        rounds = noisy_rounds(state) + 1
        told = {**outcome.metrics, "epsilon": self.accountant(ctx.sampling).epsilon(rounds)}
        return replace(outcome, state={"inner": outcome.state, "rounds": rounds}, metrics=told)

    def accountant(self, sampling: float) -> Accountant:
        """What counts the rounds of this mechanism, whose draws take a client with this chance."""
        return Accountant(self.noise_multiplier, sampling, self.delta)

    def _noised(self, ctx: RoundContext, state: State) -> dict[str, Tensor]:
        """Zeros for every tensor of the global adapter that changes by what clients send."""
        send = self.plan(ctx, ClientInfo("", ctx.rank, num_examples=1), state).send
        found = sorted(ctx.adapter.tensors().items())
        return {name: torch.zeros_like(t, dtype=torch.float64) for name, t in found if part_of(name) in send}


def noisy_rounds(state: State) -> int:
    """Rounds that a state of ``dp`` has added noise in."""
    rounds = state.get("rounds", 0)
    assert isinstance(rounds, int)
    return rounds


def clipped_sum(updates: Sequence[Contribution], zeros: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Sum of the changes, each shortened to a Frobenius norm of ``clip`` over all tensors together, in float64.

    Args:
        zeros: the tensors that are summed, in the shapes of the global adapter; a client of a lower rank has their
            leading components.
    """
    total = {name: tensor.clone() for name, tensor in zeros.items()}
    for update in updates:
        if update.weight > 0:
            before, after = update.received.tensors(), update.trained.tensors()
            change = {name: after[name].double() - before[name].double() for name in zeros}
            norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
            share = min(1.0, clip / norm) if norm else 1.0
            for name, tensor in change.items():
                total[name][tuple(slice(size) for size in tensor.shape)] += share * tensor
    return total


def _require_sound(inner: Strategy) -> None:
    """Raise ``ConfigError`` where the noised sum would not be what the rule makes of the changes, or not all there is.

    One update of the whole cohort stands for the cohort only under a mean of factor changes; and what travels or stays
    beside the factors has no noise on it.
    """
    *wrappers, rule = inner.layers()
    use = "use fedit, zero_pad, ffa, rolora, fedsb or head_only"
    if isinstance(rule, RBLA):
        raise ConfigError(
            "strategy: rbla divides each component by the clients that have it, and dp by the planned number alone,"
            " which hides who answered; use zero_pad"
        )
    if not rule.traits.takes_means:
        raise ConfigError(
            f"strategy: dp adds noise to a sum of factor changes, and {rule.name} is no mean of those in a fixed basis;"
            f" {use}"
        )
    if inner.traits.personal:
        raise ConfigError(
            f"strategy: {described(inner)} keeps parts on the clients, and no noise is on what these do; {use}"
        )
    if inner.traits.protects:
        raise ConfigError(
            f"strategy: {described(inner)} protects what a stream has frozen, and dp does not count streams; leave one"
            " of them out"
        )
    for layer in (rule, *wrappers):
        if layer.traffic.extras != "0" or layer.traffic.dense_extras:
            raise ConfigError(
                f"strategy: with {layer.name} clients send tensors beside the factors, and dp has no noise for these;"
                " leave it out, or use fedprox"
            )
    if odd := [wrapper.name for wrapper in wrappers if looks_at_single_updates(wrapper)]:
        raise ConfigError(
            f"strategy: {odd[0]} looks at single updates, and behind dp there is their sum alone; leave {odd[0]} out"
        )
