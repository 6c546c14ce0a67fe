"""FedLoRA's strategies in a Flower ServerApp of one's own: mixed ranks where Flower's own would raise.

    from orchestrator.flower.strategy import FedLoRAStrategy

    strategy = FedLoRAStrategy("flexlora", rank=16, lora_alpha=32, ranks={node_a: 4, node_b: 8})
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)), num_rounds=5)

The ClientApp is one as Flower's templates have it: it puts the arrays into its PEFT model with
``set_peft_model_state_dict``, trains, and answers with ``get_peft_model_state_dict`` under ``arrays`` and
``num-examples`` under ``metrics``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora.adapter.directory import from_peft_names, to_peft_names
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState
from fedlora.aggregation import Contribution, RoundContext, State, compose
from fedlora.aggregation.combine import combine, hand_out
from fedlora.aggregation.compose import Spec
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.protocol import PARTS, ClientInfo
from fedlora.seeds import derive_seed

_LOG = logging.getLogger(__name__)


class FedLoRAStrategy(FedAvg):
    """Flower's FedAvg in whom it asks and how it evaluates, with one of our rules for the adapters.

    Args:
        spec: as under ``strategy`` in a configuration: a name, one with options, or a stack.
        rank: of the global adapter; what ``initial_arrays`` have.
        lora_alpha, use_rslora: PEFT's, alike on every node and at every rank.
        ranks: of the nodes by node id, as a mapping or a function; the global rank for those it does not name.
        seed: of whatever the rule draws.
        options: Flower's own, such as ``fraction_train`` and ``min_available_nodes``.

    Raises:
        ConfigError: for a rule that asks more of its clients than to train an adapter and send it.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        rank: int,
        lora_alpha: float,
        use_rslora: bool = False,
        ranks: Mapping[int, int] | Callable[[int], int] | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        self.rule, self.rank, self.seed = compose(spec), rank, seed
        self._units = lora_alpha, use_rslora
        self._ranks = ranks if callable(ranks) else lambda node: (ranks or {}).get(node, rank)
        self._state: State = {}
        self._ctx: RoundContext | None = None
        self._sent: dict[int, tuple[ClientInfo, AdapterState]] = {}
        self._check()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of FedAvg, with the adapter as each node's rank has it."""
        asked = list(super().configure_train(server_round, arrays, config, grid))
        members = [ClientInfo(str(node), self._rank_of(node), 1) for node in map(_node, asked)]
        adapter = self._read(arrays)
        if adapter.rank != self.rank:
            raise ConfigError(f"the arrays have rank {adapter.rank}, and {self.rule.name} was given rank={self.rank}")
        if server_round == 1:
            adapter = self.rule.start(adapter, self.seed)
        sites = {path: update.shape for path, update in adapter.modules.items()}
        fresh = initial_adapter(sites, adapter.dense, self.rank, derive_seed(self.seed, server_round, "", "fresh"))
        adapter, seed = revive(adapter, fresh), derive_seed(self.seed, server_round, "", "strategy")
        self._ctx = RoundContext(server_round, self.rank, seed, adapter, members, len(members))
        self._sent = {}
        for message, member in zip(asked, members, strict=True):
            mine = hand_out(self.rule, member, self._ctx, self._state, fresh)
            self._sent[_node(message)] = member, mine
            message.content = RecordDict({self.arrayrecord_key: self._written(mine), self.configrecord_key: config})
        return asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rule's answer to what the nodes trained; a reply that is not an adapter like the one sent is left out."""
        assert self._ctx is not None, "configure_train comes first"
        updates, contents = [], []
        for reply in replies:
            try:
                updates.append(self._contribution(reply))
            except (FedLoRAError, LookupError, TypeError, ValueError) as error:
                _LOG.warning("round %d: node %d is left out: %s", server_round, reply.metadata.src_node_id, error)
            else:
                contents.append(reply.content)
        if not updates:
            return None, None
        outcome = combine(self.rule, updates, self._ctx, self._state)
        self._state = outcome.state
        return self._written(outcome.adapter), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _contribution(self, reply: Message) -> Contribution:
        if reply.has_error():
            raise FedLoRAError(reply.error.reason)
        member, received = self._sent[reply.metadata.src_node_id]
        trained = self._read(reply.content.array_records[self.arrayrecord_key])
        trained.check_like(received, f"the adapter of node {member.id}")
        shapes = {name: tensor.shape for name, tensor in received.tensors().items()}
        for name, tensor in trained.tensors().items():
            if tensor.shape != shapes[name] or not torch.isfinite(tensor).all():
                raise FedLoRAError(f"{name} is not finite, or not of shape {list(shapes[name])}")
        (numbers,) = reply.content.metric_records.values()
        weight = numbers[self.weighted_by_key]
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise FedLoRAError(f"{self.weighted_by_key} is {weight!r}")
        return Contribution(member, float(weight), trained, received)

    def _check(self) -> None:
        """Refuse what a ClientApp that only trains an adapter cannot do."""
        name, traits = self.rule.name, self.rule.traits
        ctx = RoundContext(1, self.rank, self.seed)
        plan = self.rule.plan(ctx, ClientInfo("node", self.rank, 1), {})
        asks = [
            (traits.personal, "keeps parts on the clients"),
            (traits.patches_base, "changes the base model"),
            (traits.freezes, "hands out components beside the adapter"),
            (traits.core, "trains a core between two factors"),
            (traits.private, "counts on a run that keeps the books of its noise"),
            (bool(plan.methods), "needs a local method on the clients"),
            (plan.train != PARTS or plan.send != PARTS, "trains a part of the adapter only"),
        ]
        if reason := next((reason for holds, reason in asks if holds), None):
            raise ConfigError(f"{name} {reason}, which a ClientApp of one's own does not; let FedLoRA drive the nodes")

    def _rank_of(self, node: int) -> int:
        rank = self._ranks(node)
        if rank > self.rank or (rank < self.rank and not self.rule.traits.mixed_ranks):
            raise ConfigError(f"node {node} has rank {rank}, and {self.rule.name} was given rank={self.rank}")
        return rank

    def _read(self, arrays: ArrayRecord) -> AdapterState:
        tensors = {name: tensor.float() for name, tensor in arrays.to_torch_state_dict().items()}
        return from_peft_names(tensors, *self._units)

    def _written(self, adapter: AdapterState) -> ArrayRecord:
        return ArrayRecord(to_peft_names(adapter.whole(), *self._units))


def _node(message: Message) -> int:
    return message.metadata.dst_node_id
