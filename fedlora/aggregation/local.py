"""Wrappers that change what clients do: FedProx, SCAFFOLD, a personal head.

The hooks themselves run in local training, see ``training.methods``; here is what the server adds to the plan
and, for SCAFFOLD, the control variate it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.combine import part_of
from fedlora.aggregation.coordinate import require_fixed_gauge
from fedlora.aggregation.extras import require_watched
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, described, part, require_free_head
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan


@WRAPPERS.register("fedprox")
class FedProx(Wrapper):
    """Clients are pulled back towards what they received.

    Args:
        mu: weight of the squared distance; 0 is plain local training.
    """

    name = "fedprox"
    equation = "local loss + mu / 2 ||x - received||^2"
    source = "FedProx (Li et al., 2020, arXiv 1812.06127)"

    def __init__(self, inner: Strategy, mu: float = 0.01):
        super().__init__(inner)
        if not mu >= 0:
            raise ConfigError(f"strategy: fedprox.mu must be at least 0, not {mu}")
        self.mu = mu

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("fedprox", mu=self.mu)


@WRAPPERS.register("scaffold")
class Scaffold(Wrapper):
    """Control variates: every client's steps are corrected by how its gradients differ from everyone's.

    The server's variate travels down and each client's change of its own travels up, beside the factors.
    """

    name = "scaffold"
    equation = "g <- g - c_k + c;  c_k <- mean gradient of the round,  c <- c + sum_k (new c_k - old c_k) / N"
    source = "SCAFFOLD (Karimireddy et al., 2020, arXiv 1910.06378), option II"

    def __init__(self, inner: Strategy):
        super().__init__(inner)
        require_fixed_gauge(self.name, inner, "fedprox")
        require_watched(self.name, inner, "control variates", "use fedprox")
        require_free_head(self.name, inner)
        self.traits = replace(inner.traits, whole_cohort=True)
        self.traffic = inner.traffic.with_extras(inner.traffic.up, dense=inner.traffic.dense)

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("scaffold")

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        plan = super().plan(ctx, client, state)
        shared = plan.train & plan.send
        sent = self.redistribute(ctx.adapter, replace(client, rank=plan.rank), ctx, state).tensors()
        control = part(state, "control")
        extras = {f"control/{n}": _cut(control.get(n), t) for n, t in sent.items() if part_of(n) in shared}
        return {**super().broadcast(client, ctx, state), **extras}

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        updates = list(updates)  # every tensor looks at all of them: loaded once, not once per tensor
        outcome = super().aggregate(updates, ctx, state)
        control: dict[str, Tensor] = {}
        for name, tensor in ctx.adapter.tensors().items():
            old = part(state, "control").get(name)
            total = torch.zeros_like(tensor)
            for update in updates:
                change = update.extras.get(f"control/{name}")
                if change is not None and update.weight > 0:
                    total[tuple(slice(size) for size in change.shape)] += change
            control[name] = _cut(old, tensor) + total / self._holders(name, tensor, ctx)
        return replace(outcome, state={**outcome.state, "control": control})

    def _holders(self, name: str, tensor: Tensor, ctx: RoundContext) -> Tensor:
        """How many registered clients have each coordinate, at least 1, in a shape that divides ``tensor``."""
        if part_of(name) == "dense":
            return torch.tensor(float(max(len(ctx.members), 1)))
        counts = torch.tensor([float(max(sum(m.rank > i for m in ctx.members), 1)) for i in range(ctx.rank)])
        if part_of(name) == "C":
            index = torch.arange(ctx.rank)
            return counts[torch.maximum(index[:, None], index[None, :])]
        return counts[:, None] if part_of(name) == "A" else counts[None, :]


@WRAPPERS.register("personal_head")
class PersonalHead(Wrapper):
    """Clients keep their classifier head, and whatever else is trained in full, to themselves."""

    name = "personal_head"
    equation = "the head h_k stays with client k"
    source = "FedPer (Arivazhagan et al., 2019, arXiv 1912.00818)"

    def __init__(self, inner: Strategy):
        super().__init__(inner)
        if inner.traits.whole_cohort:
            raise ConfigError("strategy: scaffold shares what it corrects; put it before personal_head, not inside it")
        if inner.traits.head_only:
            raise ConfigError(
                f"strategy: {described(inner)} shares nothing but the head, which personal_head keeps on the clients;"
                " put personal_head over a rule such as flexlora"
            )
        if inner.traits.writes_head:
            raise ConfigError(
                f"strategy: the head of {described(inner)} is made on the server, and personal_head keeps heads on the"
                " clients; leave one of them out"
            )
        if inner.traits.protects:
            raise ConfigError(
                f"strategy: {described(inner)} protects what a stream has frozen, and a stream has no personal parts;"
                " leave one of them out"
            )
        self.traits = replace(inner.traits, personal=True)
        self.traffic = replace(inner.traffic, dense=False)

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        plan = super().plan(ctx, client, state)
        return replace(plan, send=plan.send - {"dense"}, keep=plan.keep | {"dense"})


def _cut(kept: object, like: Tensor) -> Tensor:
    """The leading block of what is kept, in the shape of ``like``; zeros where nothing is."""
    if not isinstance(kept, Tensor):
        return torch.zeros_like(like)
    return kept[tuple(slice(size) for size in like.shape)].clone()
