"""InfLoRA: every task of a stream gets rows of A that earlier tasks' inputs do not reach.

Clients answer the first round of a task with sketches of their inputs, see ``fedlora.continual.subspace``; the
equations are in ``fedlora.adapter.subspace``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.subspace import design, grown, outside, probes, root_of
from fedlora.aggregation.alternating import FFA
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.extras import require_watched, tensors_of
from fedlora.aggregation.local import Scaffold
from fedlora.aggregation.server_opt import ServerOptimizer
from fedlora.aggregation.staleness import Staleness
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan
from fedlora.seeds import derive_seed


@WRAPPERS.register("inflora")
class InfLoRA(Wrapper):
    """Each task's adapter reads from directions that the inputs of earlier tasks do not have.

    The first round of a run, and the first after each freeze, measures: on a random A, clients train B and sketch what
    their layers take in. From that follows the task's A, inside the complement of what was remembered, and the round's
    update goes on as far as it lies there. At a freeze the task's own directions are remembered too. A freeze in the
    middle of a task therefore keeps the rest of that task out of its own inputs. What is trained in full, such as a
    head or DoRA's magnitudes, is not protected.

    Args:
        energy: share of a task's inputs, by squared length, that is remembered; the rest may be interfered with.
        width: columns of a sketch, at most the inputs of a layer. The directions one task adds are no more than these.
        rows: of each client that are looked at.
        refresh: whether every round measures, and memory holds what a task's last round saw. Otherwise it holds what
            the first one saw, and what layers take in changes as those below them learn.
    """

    name = "inflora"
    equation = (
        "A = leading eigenvectors of (I - M M^T) C (I - M M^T), B <- B A_old A^T, then A fixed; "
        " M <- [M, leading eigenvectors of C outside M] at a freeze"
    )
    source = "InfLoRA (Liang and Li, 2024, arXiv 2404.00228), with C = sum_k w_k C_k from sketches"

    def __init__(self, inner: Strategy, energy: float = 0.95, width: int = 64, rows: int = 64, refresh: bool = True):
        super().__init__(inner)
        layers = inner.layers()
        rule = layers[-1]
        if not isinstance(rule, FFA):
            raise ConfigError(
                f"strategy: inflora chooses A and has clients train B alone, and {rule.name} does not keep one A for"
                " everyone; use [inflora, ffa], or o_lora over this rule"
            )
        require_watched(self.name, inner, "sketches of inputs", "use clip, or o_lora over zero_pad")
        for layer in layers:
            if isinstance(layer, ServerOptimizer | Scaffold | Staleness):
                raise ConfigError(
                    f"strategy: {layer.name} carries B from round to round, and inflora gives B other rows of A in the"
                    " first round of a task; use fedprox, or o_lora over zero_pad"
                )
        if not 0 < energy <= 1 or width < 1 or rows < 1:
            raise ConfigError(
                f"strategy: inflora needs 0 < energy <= 1, width >= 1 and rows >= 1, not {energy}, {width} and {rows}"
            )
        self.energy, self.width, self.rows, self.refresh = energy, width, rows, refresh
        self.traits = replace(
            inner.traits, exact=False, linear=False, fixed_gauge=False, idempotent=False, outermost=True
        )
        size = f"n*min({width}, n) + 1"
        self.traffic = inner.traffic.with_extras(size if refresh else f"first*({size})")

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        plan = super().plan(ctx, client, state)
        return plan.adding("input_sketch", rows=self.rows) if self._measures(state) else plan

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        extras = dict(super().broadcast(client, ctx, state))
        if self._measures(state):
            for path, update in ctx.adapter.modules.items():
                size = update.shape[1]
                extras[f"inputs/{path}:Y"] = torch.zeros(size, min(self.width, size))
                extras[f"inputs/{path}:trace"] = torch.zeros(1)
        return extras

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        outcome = super().aggregate(updates, ctx, state)
        memory = tensors_of(state, "memory")
        inputs = _mean_inputs(updates) if self._measures(state) else tensors_of(state, "inputs")
        outcome = replace(outcome, state={**outcome.state, "inputs": inputs, "memory": memory})
        return outcome if "inputs" in state else self._designed(outcome, inputs, memory, ctx)

    def freeze(self, adapter: AdapterState, ctx: RoundContext, state: State) -> State:
        memory, inputs = dict(tensors_of(state, "memory")), tensors_of(state, "inputs")
        for path, update in adapter.modules.items():
            M, (F, trace) = _remembered(memory, path, update), self._root(path, update, inputs)
            # the next pair needs a row of its own for each of its components
            room = len(M) - M.shape[1] - ctx.rank
            M = grown(F, trace, M, self.energy, max(room, 0))
            if M.shape[1]:
                memory[path] = M.float()
        return {**super().freeze(adapter, ctx, state), "memory": memory}

    def _measures(self, state: State) -> bool:
        """Whether clients sketch their inputs in this round."""
        return self.refresh or "inputs" not in state

    def _designed(
        self, outcome: Aggregate, inputs: Mapping[str, Tensor], memory: Mapping[str, Tensor], ctx: RoundContext
    ) -> Aggregate:
        """The outcome on the new task's rows, and how much of its inputs, on average over modules, they get.

        ``inputs_seen`` is the sketch's share of all energy; of what it saw, ``inputs_free`` is outside of memory, and
        ``inputs_read`` reaches B.
        """
        modules: dict[str, LowRank] = {}
        shares = {"inputs_seen": 0.0, "inputs_free": 0.0, "inputs_read": 0.0}
        for path, update in outcome.adapter.modules.items():
            M, (F, trace) = _remembered(memory, path, update), self._root(path, update, inputs)
            A = design(F, M, update.rank, derive_seed(ctx.seed, 0, "", f"inflora:{path}"))
            B = update.B.double() @ (update.A.double() @ A.T)
            modules[path] = LowRank(B.to(update.B.dtype), A.to(update.A.dtype))
            energies = float(F.square().sum()), float(outside(F, M).square().sum()), float((A @ F).square().sum())
            for name, energy, whole in zip(shares, energies, (trace, energies[0], energies[0]), strict=True):
                shares[name] += (energy / whole if whole > 0 else 0.0) / len(outcome.adapter.modules)
        adapter = AdapterState(modules, outcome.adapter.dense, outcome.adapter.frozen)
        return replace(outcome, adapter=adapter, metrics={**outcome.metrics, **shares})

    def _root(self, path: str, update: LowRank, inputs: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """F [in, p] with ``C ~ F F^T``, and the trace of C, at least that of ``F F^T``."""
        size = update.shape[1]
        if f"{path}:Y" not in inputs:
            return torch.zeros(size, 0, dtype=torch.float64), 0.0
        F = root_of(inputs[f"{path}:Y"], probes(path, size, self.width))
        return F, max(float(inputs[f"{path}:trace"]), float(F.square().sum()))


def _mean_inputs(updates: Sequence[Contribution]) -> dict[str, Tensor]:
    """Weighted means of the sketches, without their channel."""
    total: dict[str, Tensor] = {}
    for update in updates:
        for name, tensor in update.extras.items():
            channel, _, name = name.partition("/")
            if channel == "inputs" and update.weight > 0:
                total[name] = total.get(name, torch.zeros_like(tensor)) + update.weight * tensor
    return total


def _remembered(memory: Mapping[str, Tensor], path: str, update: LowRank) -> Tensor:
    """M [in, c] of a module in float64; no columns before the first freeze."""
    return memory[path].double() if path in memory else torch.zeros(update.shape[1], 0, dtype=torch.float64)
