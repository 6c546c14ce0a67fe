"""Flower's strategies as our rules, and our rules in a Flower ServerApp."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedYogi

from fedlora.adapter.directory import from_peft_names
from fedlora.adapter.state import AdapterState
from fedlora.aggregation import Contribution, RoundContext, compose
from fedlora.aggregation.combine import apply_delta, combine
from fedlora.aggregation.conformance import check_all
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, QuorumError
from fedlora.protocol import ClientInfo
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.flower.rules import FlowerRule, Nodes, in_a_task
from orchestrator.flower.strategy import FedLoRAStrategy
from tests.aggregation.test_strategies import run, sent


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


def one(B: float, A: float, head: float, client: str = "c1", weight: float = 1.0) -> Contribution:
    return sent(client, [[B]], [[A]], weight, head)


# theirs in ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["flwr.FedAvg", {"flwr.FedAvgM": {"server_momentum": 0.9}}, "flwr.FedYogi", "flwr.FedMedian"]
)
def test_a_strategy_of_flower_passes_the_laws_of_ours(spec: Any) -> None:
    assert check_all(compose(spec)) == []


def test_fedavg_is_fedit() -> None:
    updates = [one(1.0, 2.0, 3.0, "c1", 1), one(5.0, 6.0, 7.0, "c2", 3)]
    theirs = combine(compose("flwr.FedAvg"), updates, RoundContext(1, 1, 0, adapter=updates[0].received), {}).adapter
    ours = run("fedit", updates, rank=1)
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(theirs.tensors()[name], tensor)


@pytest.mark.parametrize("make", [FedYogi, FedAvgM])
def test_what_a_strategy_remembers_is_in_the_state(make: Any) -> None:
    """Three rounds of an object of Flower's that lives on, and three of ours that are made anew."""
    options = {"server_momentum": 0.5} if make is FedAvgM else {"eta": 0.5}
    rule, theirs = FlowerRule(make, **options), make(min_train_nodes=1, min_available_nodes=1, **options)
    adapter, state = one(0.5, 0.5, 0.5).received, {}
    arrays = ArrayRecord(dict(adapter.tensors()))
    for number in (1, 2, 3):
        ctx = RoundContext(number, 1, seed=number, adapter=adapter)
        replies, updates = [], []
        asked = sorted(theirs.configure_train(number, arrays, ConfigRecord(), Nodes(2)), key=node)
        for place, message in enumerate(asked):
            delta = {name: torch.full_like(t, number + place) for name, t in adapter.tensors().items()}
            trained = apply_delta(adapter, delta)
            updates.append(Contribution(ClientInfo(f"c{place}", 1, 1), place + 1.0, trained, adapter))
            told = {"arrays": ArrayRecord(dict(trained.tensors())), "m": MetricRecord({"num-examples": place + 1.0})}
            replies.append(Message(content=RecordDict(told), reply_to=message))
        arrays, _ = theirs.aggregate_train(number, replies)
        outcome = combine(rule, updates, ctx, state)
        adapter, state = outcome.adapter, outcome.state
        for name, tensor in arrays.to_torch_state_dict().items():
            torch.testing.assert_close(adapter.tensors()[name], tensor.float())
    assert state  # there was something to remember


def node(message: Message) -> int:
    return message.metadata.dst_node_id


def test_a_run_goes_on_with_what_a_strategy_of_flower_remembers(toy: Callable[..., RunConfig]) -> None:
    config = toy(strategy={"flwr.FedYogi": {"eta": 0.02}}, clients__per_round=3)
    whole = launch.run(config, silent)
    stopped = config.model_copy(update={"output_dir": config.output_dir + "-stopped"})

    def stop(event: str, fields: Any) -> None:
        if event == "round_committed" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="2 of 3 rounds are committed"):
        launch.run(stopped, stop)
    assert launch.resume(stopped.output_dir, silent)["adapter_sha256"] == whole["adapter_sha256"]
    state, _ = load_latest(Path(stopped.output_dir))
    assert state is not None
    assert {"m_t", "v_t"} <= set(state.strategy)


class Diary(FedAvg):
    """Hides Flower's options in its keywords, and changes what it keeps in place."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.rounds: list[int] = []
        self.odd = False

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.rounds.append(server_round)
        self.odd = not self.odd
        return super().aggregate_train(server_round, replies)


def test_what_is_changed_in_place_is_kept_and_so_is_a_value_that_is_as_at_first_again() -> None:
    state: Any = {}
    for number in (1, 2, 3):
        ctx = RoundContext(number, 1, 0, adapter=one(0, 0, 0).received)
        state = combine(FlowerRule(Diary), [one(1, 1, 1)], ctx, state).state
        assert state["odd"] is (number % 2 == 1)
    assert sorted(value for name, value in state["rounds"].items() if name != "is") == [1, 2, 3]


def test_a_client_that_measures_more_than_others_costs_nobody() -> None:
    updates = [one(1.0, 1.0, 1.0, "c1"), replace(one(1.0, 1.0, 1.0, "c2"), metrics={"loss": 1.0, "mine": 2.0})]
    updates[0] = replace(updates[0], metrics={"loss": 1.0})
    ctx = RoundContext(1, 1, 0, adapter=one(0.0, 0.0, 0.0).received)
    assert combine(compose("flwr.FedAvg"), updates, ctx, {}).metrics == {"loss": pytest.approx(1.0)}
    fair = compose({"flwr.QFedAvg": {"client_learning_rate": 0.1}})
    assert torch.isfinite(combine(fair, updates, ctx, {}).adapter.modules["q"].B).all()


def silent(event: str, fields: Any) -> None:
    """Hears nothing."""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("flwr.FedYoga", "Flower has no FedYoga; did you mean FedYogi"),
        ("flwr.FedProx", "put the wrapper fedprox over a rule"),
        ({"flwr.FedYogi": {"etta": 1.0}}, "does not take these options"),
        ({"flwr.FedAvg": {"fraction_train": 0.5}}, "is set by clients.per_round here"),
        (["adam", "flwr.FedYogi", "fedit"], "flwr.FedYogi is a rule, and a stack has one"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(spec)


def test_a_round_that_a_strategy_cannot_use_is_an_empty_one() -> None:
    class Picky(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return None, None

    with pytest.raises(QuorumError, match=r"flwr\.Picky gave no arrays"):
        combine(FlowerRule(Picky), [one(1, 1, 1)], RoundContext(1, 1, 0, adapter=one(0, 0, 0).received), {})


def test_a_wrapper_of_ours_goes_over_a_rule_of_theirs() -> None:
    start = one(0.0, 1.0, 0.0).received
    clipped = compose([{"clip": {"max_norm": 0.1}}, "flwr.FedAvg"])
    moved = combine(clipped, [replace(one(3.0, 1.0, 0.0), received=start)], RoundContext(1, 1, 0, adapter=start), {})
    assert moved.adapter.modules["q"].B.item() < 0.2


# ours in theirs -------------------------------------------------------------------------------------------------


class Federation:
    """A Grid of nodes that train at once: every one pushes what it was sent by its id."""

    def __init__(self, count: int, spoil: Callable[[int, dict[str, Any]], None] = lambda node, tensors: None):
        self._ids, self._spoil = range(1, count + 1), spoil
        self.ranks: dict[int, int] = {}

    def get_node_ids(self) -> Sequence[int]:
        return self._ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        tensors = message.content.array_records["arrays"].to_torch_state_dict()
        self.ranks[number] = next(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
        draw = torch.Generator().manual_seed(number)
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
        self._spoil(number, tensors)
        told = {"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": 10 * number, "loss": 1.0})}
        return Message(content=RecordDict(told), reply_to=message)


def model() -> Any:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **size))
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"))


def start(spec: Any, grid: Federation, **options: Any) -> ArrayRecord:
    ranks = {1: 2, 2: 4}
    strategy = FedLoRAStrategy(spec, rank=8, lora_alpha=16, ranks=ranks, fraction_evaluate=0.0, **options)
    first = ArrayRecord(get_peft_model_state_dict(model()))
    return strategy.start(grid=grid, initial_arrays=first, num_rounds=2).arrays  # type: ignore[arg-type]


def test_a_server_app_federates_peft_models_of_different_ranks() -> None:
    grid = Federation(3)
    arrays = start("flexlora", grid)
    assert grid.ranks == {1: 2, 2: 4, 3: 8}
    whole = model()
    set_peft_model_state_dict(whole, arrays.to_torch_state_dict())
    again = get_peft_model_state_dict(whole)
    assert all(torch.equal(tensor, again[name]) for name, tensor in arrays.to_torch_state_dict().items())


def test_flexlora_in_a_server_app_is_flexlora() -> None:
    grid = Federation(3)
    torch.manual_seed(0)
    strategy = FedLoRAStrategy("flexlora", rank=8, lora_alpha=16, ranks=lambda number: 2 * number)
    first = ArrayRecord(get_peft_model_state_dict(model()))
    asked = list(strategy.configure_train(1, first, ConfigRecord(), grid))  # type: ignore[arg-type]
    replies = grid.send_and_receive(asked)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert dict(metrics or {}) == {"loss": pytest.approx(1.0)}
    updates = []
    for message, reply in zip(asked, replies, strict=True):
        number = node(message)
        received, trained = read(message), read(reply)
        updates.append(Contribution(ClientInfo(str(number), 2 * number, 1), 10.0 * number, trained, received))
    expected = combine(compose("flexlora"), updates, RoundContext(1, 8, 0, adapter=read(first)), {}).adapter
    found = read(arrays)
    for path, update in expected.modules.items():
        torch.testing.assert_close(found.modules[path].B @ found.modules[path].A, update.B @ update.A)


def read(what: Message | ArrayRecord) -> AdapterState:
    arrays = what if isinstance(what, ArrayRecord) else what.content.array_records["arrays"]
    return from_peft_names(arrays.to_torch_state_dict(), 16, use_rslora=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop(next(iter(tensors))),
        lambda tensors: next(iter(tensors.values())).fill_(float("nan")),
        lambda tensors: tensors.update({name: tensor[:1] for name, tensor in tensors.items()}),
    ],
    ids=["a tensor is missing", "not finite", "another shape"],
)
def test_a_node_whose_reply_is_no_adapter_costs_only_itself(spoil: Any) -> None:
    whole = start("flexlora", Federation(2))
    spoiled = start("flexlora", Federation(3, lambda number, tensors: number == 3 and spoil(tensors)))
    assert all(torch.isfinite(tensor).all() for tensor in spoiled.to_torch_state_dict().values())
    assert list(whole) == list(spoiled)


@pytest.mark.parametrize("spec", ["fedex_het", ["fedprox", "flexlora"], "ffa", ["personal_head", "fedit"]])
def test_a_rule_that_asks_more_of_its_clients_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigError, match="let FedLoRA drive the nodes"):
        FedLoRAStrategy(spec, rank=8, lora_alpha=16)
