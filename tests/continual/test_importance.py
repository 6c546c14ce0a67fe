"""Importance of weights: measured exactly, added up over tasks, and held against changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import compose
from fedlora.aggregation.base import Contribution, RoundContext
from fedlora.config import RunConfig
from fedlora.continual.importance import EWC, MAS, OnlineLoRA, measure
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from fedlora.training.batches import collate
from fedlora.training.methods import Local, Start
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from tests.conftest import quiet

Toy = Callable[..., RunConfig]
STREAM: dict[str, Any] = {"continual": {"split": 2, "rounds": 2}, "rounds": 4}
METHODS = ["ewc", "mas", "online_lora"]


def test_the_sums_are_those_of_the_squared_gradient_of_every_row(local: Local) -> None:
    path = next(name[:-2] for name in local.parameters if name.endswith(":A"))
    found = measure(local, local.examples, OnlineLoRA(1.0, 3).objective, {path})
    layer = local.model.get_base_model().get_submodule(path)
    weight = layer.base_layer.weight.requires_grad_()
    local.model.eval()
    expected = torch.zeros_like(weight)
    for row in local.examples:
        batch = collate([row], local.pad_token_id, weight.device)
        logits = local.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        expected += torch.autograd.grad(loss, weight)[0].square() / len(local.examples)
    assert torch.allclose(found[f"{path}:rows"], expected.sum(1), rtol=1e-4, atol=1e-12)
    assert torch.allclose(found[f"{path}:columns"], expected.sum(0), rtol=1e-4, atol=1e-12)


def test_a_look_leaves_the_model_as_it_was(local: Local) -> None:
    local.model.train()
    modes = [module.training for module in local.model.modules()]
    measure(local, local.examples, EWC(1.0, 2).objective, {"encoder.layer.0.attention.self.query"})
    assert [module.training for module in local.model.modules()] == modes
    assert all(parameter.grad is None for parameter in local.model.parameters())
    assert not any(module._forward_hooks for name, module in local.model.named_modules() if name.endswith(".query"))


def test_the_hardest_rows_are_those_with_the_largest_losses(local: Local) -> None:
    chosen = OnlineLoRA(1.0, 1).choose(local)
    losses = [measure_loss(local, row) for row in local.examples]
    assert chosen == [local.examples[losses.index(max(losses))]]


def measure_loss(local: Local, row: Any) -> float:
    batch = collate([row], local.pad_token_id, torch.device("cpu"))
    local.model.eval()
    with torch.no_grad():
        logits = local.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(torch.nn.functional.cross_entropy(logits, batch["labels"]))


def test_the_penalty_weighs_every_entry_of_the_update() -> None:
    draw = torch.Generator().manual_seed(0)
    B, A = torch.randn(5, 2, generator=draw), torch.randn(2, 4, generator=draw)
    R, C = torch.rand(5, generator=draw), torch.rand(4, generator=draw)
    C = C * R.sum() / C.sum()
    tensors = {"m:A": A, "m:B": B}
    start = Start(tensors, frozenset(tensors), frozenset(), 3.0, extras={"m:rows": R, "m:columns": C})
    method = MAS(weight=0.5, samples=1)
    omega = R[:, None] * C[None, :] / R.sum()
    expected = 0.25 * (omega * (3.0 * B @ A).square()).sum()
    value = method.penalty(tensors, method.begin(start))
    assert value is not None
    assert torch.isclose(value, expected, rtol=1e-5)


def test_what_is_trained_in_full_is_held_to_where_it_was_frozen() -> None:
    tensors = {":head": torch.tensor([1.0, 2.0])}
    frozen = AdapterState({}, {"head": torch.tensor([0.0, 2.5])})
    extras = {":head": torch.tensor([3.0, 4.0])}
    start = Start(tensors, frozenset(tensors), frozenset(), extras=extras, frozen=lambda: frozen)
    method = EWC(weight=2.0, samples=1)
    assert method.penalty(tensors, method.begin(start)) == pytest.approx(3.0 * 1 + 4.0 * 0.25)


def test_nothing_is_held_before_something_was_important() -> None:
    tensors = {"m:A": torch.ones(1, 2), "m:B": torch.ones(3, 1)}
    start = Start(
        tensors, frozenset(tensors), frozenset(), extras={"m:rows": torch.zeros(3), "m:columns": torch.zeros(2)}
    )
    method = EWC(weight=1.0, samples=1)
    assert method.penalty(tensors, method.begin(start)) is None


def test_importance_of_tasks_adds_up_at_each_freeze() -> None:
    strategy = compose([{"ewc": {"decay": 0.5}}, "flexlora"])
    adapter = AdapterState({"m": LowRank(torch.zeros(3, 1), torch.ones(1, 2))})
    ctx = RoundContext(1, 1, 0, adapter)
    state: dict[str, Any] = {"now": {"m:rows": torch.tensor([1.0, 2, 3]), "m:columns": torch.tensor([2.0, 4])}}
    once = strategy.freeze(adapter, ctx, state)
    again = strategy.freeze(adapter, ctx, {**once, "now": state["now"]})
    told = strategy.broadcast(ClientInfo("c", 1, 5), ctx, again)
    assert told["importance/m:rows"].tolist() == [1.5, 3.0, 4.5]
    assert told["importance/m:columns"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_measures_importance_and_holds_on_to_it(toy: Toy, method: str) -> None:
    config = toy(strategy=[{method: {"weight": 10.0, "samples": 2}}, "flexlora"], **STREAM)
    summary = launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert summary["rounds"] == 4
    assert state is not None
    kept = state.strategy["importance"]
    assert isinstance(kept, dict)
    assert all(bool(kept[name].min() >= 0) for name in kept)
    assert sum(float(tensor.sum()) for name, tensor in kept.items() if name.endswith(":rows")) > 0


@pytest.mark.parametrize("strategy", [*METHODS, "lwf", "o_lora"])
def test_protecting_what_is_never_frozen_is_refused(toy: Toy, strategy: str) -> None:
    with pytest.raises(ConfigError, match="nothing is frozen here"):
        launch.run(toy(strategy=[strategy, "flexlora"]), quiet)


@pytest.mark.parametrize("strategy", [*METHODS, "lwf"])
def test_a_rule_that_patches_the_base_every_round_has_no_last_freeze(strategy: str) -> None:
    with pytest.raises(ConfigError, match="patches the base in every round"):
        compose([strategy, "flora"])


@pytest.mark.parametrize(
    "stack", [["ewc", "fedsa"], ["lwf", "personal_head", "flexlora"], ["personal_head", "mas", "ffa"]]
)
def test_a_stream_has_no_personal_parts_to_protect(stack: list[str]) -> None:
    with pytest.raises(ConfigError, match="protects what a stream has frozen"):
        compose(stack)


@pytest.mark.parametrize("method", [*METHODS, "lwf", "o_lora"])
def test_a_head_alone_has_no_adapter_to_hold_on_to(method: str) -> None:
    with pytest.raises(ConfigError, match="head_only"):
        compose([method, "head_only"])


def test_o_lora_has_nothing_to_push_where_no_A_is_trained() -> None:
    with pytest.raises(ConfigError, match="ffa trains no A"):
        compose(["o_lora", "clip", "ffa"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2.5}, "ewc.samples must be a whole number, not 2.5"),
        ({"weight": float("inf")}, "ewc.weight must be a number, not inf"),
        ({"weight": "high"}, "ewc.weight must be a number, not 'high'"),
    ],
)
def test_an_option_of_another_type_is_refused_by_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([{"ewc": options}, "flexlora"])


def test_no_client_says_more_than_the_median_of_what_is_important() -> None:
    strategy = compose(["ewc", "flexlora"])
    adapter = AdapterState({"m": LowRank(torch.zeros(2, 1), torch.ones(1, 2))})
    ctx = RoundContext(1, 1, 0, adapter)

    def sent(client: str, size: float) -> Contribution:
        extras = {"importance/m:rows": size * torch.ones(2), "importance/m:columns": size * torch.ones(2)}
        return Contribution(ClientInfo(client, 1, 5), 1 / 3, adapter, adapter, extras=extras)

    outcome = strategy.aggregate([sent("a", 1.0), sent("b", 2.0), sent("c", 1e4)], ctx, {})
    now = outcome.state["now"]
    assert isinstance(now, dict)
    assert now["m:rows"].tolist() == pytest.approx([5 / 3, 5 / 3])


def test_a_defence_inside_would_not_see_what_clients_call_important() -> None:
    with pytest.raises(ConfigError, match="multi_krum does not look at importance"):
        compose(["ewc", "multi_krum", "flexlora"])
    compose(["multi_krum", "ewc", "flexlora"])


def test_a_hostile_measurement_never_makes_the_penalty_negative(toy: Toy) -> None:
    strategy = compose(["ewc", "flexlora"])
    adapter = AdapterState({"m": LowRank(torch.zeros(3, 1), torch.ones(1, 2))})
    ctx = RoundContext(1, 1, 0, adapter)
    extras = {"importance/m:rows": -torch.ones(3), "importance/m:columns": -torch.ones(2)}
    sent = Contribution(ClientInfo("c", 1, 5), 1.0, adapter, adapter, extras=extras)
    outcome = strategy.aggregate([sent], ctx, {})
    now = outcome.state["now"]
    assert isinstance(now, dict)
    assert all(bool((tensor >= 0).all()) for tensor in now.values())
