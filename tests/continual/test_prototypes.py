"""Heads made of class means, the client's half: what is measured, and what is left alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import insert
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.config import RunConfig, TrainingConfig
from fedlora.data.text import Example
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.protocol import Method, TrainPlan, TrainTask
from fedlora.training.batches import collate
from fedlora.training.loop import LocalWork, train
from fedlora.training.methods import Answer, Local, MethodStack, Start, name_parameters, start_from
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.rounds import play_round
from orchestrator.validate import validate
from tests.conftest import quiet

ROWS = [Example([2 + i, 9, 3 + i % 4][: 1 + i % 3], i % 2) for i in range(10)]  # nobody has label 2
PARTS = frozenset({"A", "B", "dense"})


def adapted(name: str = "builtin:tiny-bert") -> AdaptedModel:
    base = load_base(BaseSpec(name, "sequence-classification", ("a", "b", "c")))
    targets = ("query", "value") if "bert" in name else ("q_proj", "v_proj")
    return AdaptedModel(base, AdapterSpec(targets, 2.0))


def begun(client: AdaptedModel, layer: str, rows: list[Example], seed: int = 0) -> Start:
    """A client about to train, at rank 2."""
    info = client.info()
    model = client.at_rank(2)
    state = initial_adapter(info.sites, info.dense, 2, 0)
    insert(model, "r2", state)
    parameters = name_parameters(model, "r2", PARTS)
    local = Local(model, parameters, rows, client.base.tokenizer.pad_token_id, seed=seed)
    weight = info.dense.get(f"{layer}.weight", torch.zeros(3, 1))
    extras = {f"prototypes/{layer}/means": torch.zeros(weight.shape), f"prototypes/{layer}/shares": torch.zeros(3)}
    return replace(start_from(state, parameters, 2.0, PARTS), extras=extras, local=local)


def asked(start: Start, steps: int = 0, rows: int = 0, **options: Any) -> Answer:
    """The answer after so many steps."""
    methods = MethodStack([Method.of("prototypes", rows=rows)])
    memory = methods.begin(start)
    local = start.local
    assert local is not None
    if steps:
        settings = TrainingConfig(learning_rate=0.1, max_steps=steps, **options)
        work = LocalWork(
            local.model, local.parameters, local.examples, settings, 0, local.pad_token_id, methods, memory
        )
        memory = train(work).memory
    return methods.finish({name: p.detach() for name, p in local.parameters.items()}, memory)


def inputs_of_the_head(model: Any, rows: list[Example]) -> Tensor:
    """Row by row, so that nothing is padded."""
    model.eval()
    with torch.no_grad():
        pooled = [model.base_model.model.bert(torch.tensor([row.input_ids])).pooler_output[0] for row in rows]
    return torch.stack(pooled)


def test_the_means_are_those_of_what_the_head_sees_of_each_label() -> None:
    start = begun(adapted(), "classifier", ROWS)
    answer = asked(start).extras
    features = inputs_of_the_head(start.local.model, ROWS)
    means = answer["prototypes/classifier/means"]
    assert_close(means[0], features[0::2].mean(dim=0))
    assert_close(means[1], features[1::2].mean(dim=0))
    assert not means[2].any()
    assert answer["prototypes/classifier/shares"].tolist() == [0.5, 0.5, 0.0]


def test_where_it_is_asked_for_the_covariance_is_that_around_the_means_of_labels() -> None:
    start = begun(adapted(), "classifier", ROWS)
    room = {"prototypes/classifier/covariance": torch.zeros(32, 32)}
    answer = asked(replace(start, extras={**start.extras, **room})).extras
    features = inputs_of_the_head(start.local.model, ROWS)
    apart = torch.cat([part - part.mean(dim=0) for part in (features[0::2], features[1::2])])
    assert_close(answer["prototypes/classifier/covariance"], apart.T @ apart / 10)
    assert "prototypes/classifier/covariance" not in asked(start).extras


def test_a_head_that_runs_at_every_position_is_looked_at_where_it_is_read() -> None:
    client = adapted("builtin:tiny-llama")
    start = begun(client, "score", ROWS)
    means = asked(start).extras["prototypes/score/means"]
    model = client.at_rank(2).eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in collate(ROWS, 0, client.base.device).items() if k != "labels"}).logits
        expected = torch.stack([logits[0::2].mean(0), logits[1::2].mean(0)])
        # the head is linear and has no bias: the mean of its outputs is its output of the mean
        assert_close(means[:2] @ start.local.parameters[":score.weight"].T, expected, atol=1e-6, rtol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    start = begun(adapted(), "classifier", ROWS)
    model = start.local.model
    model.train()
    model.base_model.model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    asked(start)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_training_moves_the_adapter_and_not_the_head_even_under_weight_decay(optim: str) -> None:
    start = begun(adapted(), "classifier", ROWS)
    asked(start, steps=3, optim=optim, weight_decay=0.5)
    moved = {name for name, p in start.local.parameters.items() if not torch.equal(p.detach(), start.tensors[name])}
    assert not {name for name in moved if name.startswith(":classifier")}
    assert {name for name in start.local.parameters if name.endswith(":B")} <= moved


def test_so_many_rows_are_drawn_from_the_seed_of_the_task() -> None:
    client = adapted()
    answers = [asked(begun(client, "classifier", ROWS, seed), rows=4).extras for seed in (1, 1, 2)]
    first, again, other = (answer["prototypes/classifier/means"] for answer in answers)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(float(4 * share) in (0, 1, 2, 3, 4) for share in answers[0]["prototypes/classifier/shares"])


def test_a_layer_that_is_not_the_head_is_refused() -> None:
    with pytest.raises(FedLoRAError, match="bert.pooler.dense is not among what this client trains in full"):
        asked(begun(adapted(), "bert.pooler.dense", ROWS))
    pooled = AdaptedModel(adapted().base, AdapterSpec(("query",), 2.0, modules_to_save=("pooler", "classifier")))
    with pytest.raises(FedLoRAError, match="the layer has 32 outputs, and the model tells 3 labels apart"):
        asked(begun(pooled, "bert.pooler.dense", ROWS))


# In a run ---------------------------------------------------------------------------------------------------

Toy = Callable[..., RunConfig]


@pytest.fixture
def rounds(toy: Toy) -> Callable[..., Iterator[Any]]:
    """States of a run, from the one before the first round on."""

    def play(**changes: Any) -> Iterator[Any]:
        config = toy(**changes)
        fed, base = open_federation(config, LocalPool(config), quiet)
        state = first_state(config, fed, base)
        while True:
            yield state
            state = play_round(fed, state)

    return play


def whole_means(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the base's own features over all clients' training rows, which labels have any, and the covariance."""
    runtime = ClientRuntime(config)
    rows = [row for member in runtime.members() for row in runtime.rows.examples("train", member.id).examples]
    info = runtime._model().info()
    model = runtime._model().at_rank(1)
    insert(model, "r1", initial_adapter(info.sites, info.dense, 1, 0))
    features = inputs_of_the_head(model, rows)
    labels = torch.tensor([row.labels for row in rows])
    count = len(runtime.corpus.labels)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(count)])
    apart = features - means[labels]
    return means, torch.isfinite(means).all(dim=1), apart.T @ apart / len(apart)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "mahalanobis"])
def test_over_head_only_the_run_is_the_nearest_mean_over_everybodys_rows(
    toy: Toy, rounds: Callable[..., Iterator[Any]], metric: str
) -> None:
    strategy = [{"prototypes": {"metric": metric}}, "head_only"]
    states = rounds(strategy=strategy)
    initial, first, second = (next(states) for _ in range(3))
    means, seen, covariance = whole_means(toy(strategy=strategy))
    assert seen.all()
    if metric == "mahalanobis":
        assert_close(first.strategy["covariance"], covariance, atol=1e-5, rtol=1e-4)
        assert_close(second.strategy["covariance"], covariance, atol=1e-5, rtol=1e-4)
    assert_close(first.strategy["means"], means, atol=1e-5, rtol=1e-4)
    # features do not drift, so the next round finds the same
    assert_close(second.strategy["means"], first.strategy["means"], atol=1e-5, rtol=1e-4)
    assert first.last["accuracy"] > initial.initial["accuracy"]
    assert not any(pair.B.any() for pair in second.adapter.modules.values())


def test_over_a_rule_that_trains_adapters_the_first_round_makes_means_and_the_next_ones_learn(
    rounds: Callable[..., Iterator[Any]],
) -> None:
    states = rounds(strategy=["prototypes", "flexlora"])
    _, first, second = (next(states) for _ in range(3))
    assert not any(pair.B.any() for pair in first.adapter.modules.values())
    assert all(pair.B.any() for pair in second.adapter.modules.values())
    weight, means = second.adapter.dense["classifier.weight"], second.strategy["means"]
    assert_close(weight, torch.nn.functional.normalize(means, dim=1))


def test_an_answer_is_as_small_as_a_row_however_many_there_are(toy: Toy) -> None:
    runtime = ClientRuntime(toy())
    client = runtime.members()[0]
    base = runtime.base()
    fresh = initial_adapter(base.sites, base.dense, 2, 0)
    room = {f"prototypes/classifier/{n}": torch.zeros(s) for n, s in (("means", (4, 32)), ("shares", (4,)))}
    payload = encode_adapter(fresh, room)
    methods = (Method.of("prototypes", rows=0),)
    plan = TrainPlan(2, frozenset({"dense"}), frozenset({"dense"}), methods=methods)
    update = decode_update(runtime.train(TrainTask(1, client.id, plan, payload, digest(payload), 0)))
    assert not any(tensor.any() for tensor in update.delta.values())  # nothing but the head trains, and it is held
    assert float(update.extras["prototypes/classifier/shares"].sum()) == pytest.approx(1)
    assert update.norm <= (4 * 32) ** 0.5 + 1  # a pooled feature has entries of at most 1


LANGUAGE: Mapping[str, Any] = {
    "model": {"name": "builtin:tiny-llama"},
    "data": {"name": "builtin:chatterbot", "max_train_rows": 60, "max_test_rows": 8, "max_length": 64},
    "lora": {"r": 8, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "head_only", **LANGUAGE}, "head_only trains what is trained in full alone, and nothing of this"),
        ({"strategy": ["clip", "head_only"], **LANGUAGE}, r"clip\(head_only\) trains what is trained in full alone"),
        ({"strategy": ["prototypes", "flexlora"], **LANGUAGE}, "prototypes makes the head of a classifier, and"),
        ({"strategy": "head_only", "lora__use_dora": True}, "DoRA's magnitudes would be too; set lora.use_dora: false"),
        (
            {"strategy": [{"prototypes": {"metric": "euclidean"}}, "ffa"], "model__head": "cosine"},
            "euclidean needs a bias, and classifier has none",
        ),
    ],
)
def test_a_head_that_is_not_there_is_missed_before_anything_is_trained(
    toy: Toy, changes: dict[str, Any], message: str
) -> None:
    config = toy(**changes)
    with pytest.raises(ConfigError, match=message):
        open_federation(config, LocalPool(config), quiet)
    _, problems = validate(config)
    assert len(problems) == 1
    assert problems[0].args[0].startswith("strategy: ")
