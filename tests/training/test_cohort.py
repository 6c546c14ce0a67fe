"""A cohort in one pass comes to what each of its clients comes to alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import insert
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.config import TrainingConfig
from fedlora.data.text import IGNORE, Example
from fedlora.protocol import Method
from fedlora.training.cohort import Member, Trained, train_cohort
from fedlora.training.loop import LocalWork, train
from fedlora.training.methods import FedProx, MethodStack, name_parameters, start_from
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from fedlora.training.stacked import why_not

PARTS = frozenset({"A", "B", "dense"})
LABELS = ("a", "b", "c", "d")
SPECS = {
    "classifier": BaseSpec("builtin:tiny-bert", "sequence-classification", LABELS, device="cpu"),
    "writer": BaseSpec("builtin:tiny-llama", "causal-lm", device="cpu"),
}
TARGETS = {"classifier": ("query", "value"), "writer": ("q_proj", "v_proj", "down_proj")}
_models: dict[tuple[str, torch.dtype], AdaptedModel] = {}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    if (kind, dtype) not in _models:
        base = load_base(SPECS[kind])
        base.model.to(dtype)
        saved = ("classifier", "pooler") if kind == "classifier" else None
        _models[kind, dtype] = AdaptedModel(base, AdapterSpec(TARGETS[kind], scaling=2.0, modules_to_save=saved))
    return _models[kind, dtype]


def start_of(adapted: AdaptedModel, rank: int, seed: int) -> AdapterState:
    """A client's adapter, with a B that is not zero."""
    info = adapted.info()
    state = initial_adapter(info.sites, info.dense, rank, seed)
    draw = torch.Generator().manual_seed(seed)
    return state.map(lambda update: LowRank(0.1 * torch.randn(update.B.shape, generator=draw), update.A))


def rows_of(kind: str, count: int, seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (1,), generator=draw))
        ids = torch.randint(5, 90, (length,), generator=draw).tolist()
        if kind == "classifier":
            rows.append(Example(ids, int(torch.randint(0, len(LABELS), (1,), generator=draw))))
        else:
            rows.append(Example(ids, [IGNORE] * (length // 2) + ids[length // 2 :]))
    return rows


class Client:
    """One client, to be trained either way."""

    def __init__(self, kind: str, rank: int, rows: int, seed: int, methods: Sequence[Method] = (), labels=()):
        self.kind, self.rank, self.seed, self.methods, self.labels = kind, rank, seed, methods, tuple(labels)
        self.rows = rows_of(kind, rows, seed)

    def begin(self, adapted: AdaptedModel, parts: frozenset[str]) -> tuple[Any, dict[str, Any], Any]:
        state = start_of(adapted, self.rank, self.seed)
        model, name = adapted.at_rank(self.rank), f"r{self.rank}"
        insert(model, name, state)
        parameters = name_parameters(model, name, parts)
        begun = start_from(state, parameters, adapted.spec.scaling, parts)
        kind = next(iter(parameters.values())).dtype
        return model, parameters, replace(begun, tensors={n: t.to(kind) for n, t in begun.tensors.items()})

    def stack(self) -> MethodStack:
        return MethodStack(self.methods)

    def member(self, adapted: AdaptedModel, parts: frozenset[str]) -> Member:
        _, _, begun = self.begin(adapted, parts)
        methods = self.stack()
        return Member(begun.tensors, self.rows, self.seed, methods, methods.begin(begun), self.labels)

    def alone(self, adapted: AdaptedModel, options: TrainingConfig, parts: frozenset[str]) -> Trained:
        model, parameters, begun = self.begin(adapted, parts)
        methods = self.stack()
        work = LocalWork(
            model, parameters, self.rows, options, self.seed, 0, methods, methods.begin(begun), self.labels
        )
        result = train(work)
        return Trained({**begun.tensors, **{name: p.detach().clone() for name, p in parameters.items()}}, result)


def options_of(**changes: Any) -> TrainingConfig:
    usual = {"learning_rate": 0.01, "per_device_train_batch_size": 2, "base_dropout": False}
    return TrainingConfig.model_validate(usual | changes)


def together(clients: Sequence[Client], options: TrainingConfig, parts: frozenset[str], dtype: torch.dtype) -> Any:
    adapted = model_of(clients[0].kind, dtype)
    members = [client.member(adapted, parts) for client in clients]
    trained = frozenset(clients[0].begin(adapted, parts)[1])
    model = adapted.at_rank(clients[0].rank)
    return train_cohort(model, f"r{clients[0].rank}", members, trained, options, 0)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of any two tensors, relative to the largest value of the tensor."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-3)) for n in one)


def check_equal(
    clients: Sequence[Client],
    options: TrainingConfig,
    parts: frozenset[str] = PARTS,
    dtype: torch.dtype = torch.float32,
    within: float = 1e-5,
) -> None:
    answers = together(clients, options, parts, dtype)
    for client, answer in zip(clients, answers, strict=True):
        expected = client.alone(model_of(client.kind, dtype), options, parts)
        assert difference(answer.tensors, expected.tensors) < within
        mine, theirs = answer.result, expected.result
        assert (mine.steps, mine.tokens, mine.rows) == (theirs.steps, theirs.tokens, theirs.rows)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.first_loss == pytest.approx(theirs.first_loss, rel=1e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["classifier", "writer"]),
    sizes=st.lists(st.tuples(st.sampled_from([1, 2, 5]), st.integers(1, 7)), min_size=1, max_size=5),
    changes=st.fixed_dictionaries(
        {
            "optim": st.sampled_from(["adamw_torch", "sgd"]),
            "per_device_train_batch_size": st.integers(1, 4),
            "gradient_accumulation_steps": st.integers(1, 2),
            "max_steps": st.sampled_from([-1, 3]),
            "num_train_epochs": st.sampled_from([1, 2]),
            "lr_scheduler_type": st.sampled_from(["constant", "linear", "cosine"]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "max_grad_norm": st.sampled_from([0.0, 0.3]),
        }
    ),
    parts=st.sampled_from([PARTS, frozenset({"B"}), frozenset({"A", "B"})]),
)
def test_in_double_precision_both_agree_to_twelve_digits(kind: str, sizes: Any, changes: Any, parts: Any) -> None:
    clients = [Client(kind, rank, rows, seed) for seed, (rank, rows) in enumerate(sizes)]
    # Adam divides by the size of a gradient: where that is rounding alone, so is the step
    check_equal(clients, options_of(adam_epsilon=1e-3, **changes), parts, torch.float64, 1e-12)


@pytest.mark.parametrize("kind", ["classifier", "writer"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_in_single_precision_both_agree_to_rounding(kind: str, optim: str) -> None:
    clients = [Client(kind, rank, rows, seed) for seed, (rank, rows) in enumerate([(2, 5), (8, 3), (4, 1), (8, 6)])]
    check_equal(clients, options_of(optim=optim, num_train_epochs=2, adam_epsilon=1e-3))


METHODS = {
    "fedprox": Method.of("fedprox", mu=0.5),
    "tail_penalty": Method.of("tail_penalty", gamma=0.5, weight=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_local_methods_work_as_they_do_alone(method: str) -> None:
    clients = [Client("classifier", rank, 4, seed, (METHODS[method],)) for seed, rank in enumerate([2, 8, 4])]
    check_equal(clients, options_of(max_steps=4), dtype=torch.float64, within=1e-11)


def test_a_method_may_weigh_the_loss_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedProx, "data_weight", 0.25)
    clients = [Client("classifier", 4, 4, seed, (METHODS["fedprox"],)) for seed in range(2)]
    check_equal(clients, options_of(max_steps=3, optim="sgd"), dtype=torch.float64, within=1e-11)


def test_each_client_has_its_own_competing_labels() -> None:
    clients = [
        Client("classifier", 4, 6, 0, labels=(0, 1, 2, 3)),
        Client("classifier", 2, 6, 1, labels=(0, 1, 2, 3)),
    ]
    for client, labels in zip(clients, [(0, 1), (1, 2, 3)], strict=True):
        client.labels = labels
        client.rows = [replace(row, labels=labels[row.labels % len(labels)]) for row in client.rows]
    check_equal(clients, options_of(max_steps=3), dtype=torch.float64, within=1e-11)


def test_a_client_whose_loss_is_no_number_costs_itself_alone() -> None:
    clients = [Client("classifier", 4, 4, seed) for seed in range(3)]
    adapted, options = model_of("classifier"), options_of(max_steps=2)
    members = [client.member(adapted, PARTS) for client in clients]
    broken = {name: tensor * (torch.inf if name.endswith(":B") else 1) for name, tensor in members[1].tensors.items()}
    members[1] = replace(members[1], tensors=broken)
    trained = frozenset(clients[0].begin(adapted, PARTS)[1])
    answers = train_cohort(adapted.at_rank(4), "r4", members, trained, options, 0)
    assert "the loss became nan at step 1 of 2; lower training.learning_rate" in str(answers[1].error)
    for k in (0, 2):
        assert answers[k].error is None
        assert difference(answers[k].tensors, clients[k].alone(adapted, options, PARTS).tensors) < 1e-4


def test_the_model_is_left_as_it_was() -> None:
    adapted = model_of("classifier")
    model = adapted.at_rank(4)
    before = {name: (id(module), module) for name, module in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together(
        [Client("classifier", 4, 3, 0), Client("classifier", 4, 3, 1)], options_of(max_steps=1), PARTS, torch.float32
    )
    assert {name: (id(module), module) for name, module in model.named_modules()} == before
    lora = [name for name in values if "lora" in name or "modules_to_save" in name]
    assert all(torch.equal(model.state_dict()[n], values[n]) for n in values if n not in lora)


def test_what_cannot_be_stacked_is_named() -> None:
    base = load_base(SPECS["classifier"])
    dora = AdaptedModel(base, AdapterSpec(("query",), 2.0, use_dora=True))
    assert "such as DoRA" in (why_not(dora.at_rank(2), "r2") or "")
    other = AdaptedModel(load_base(SPECS["classifier"]), AdapterSpec(("query",), 2.0, modules_to_save=("LayerNorm",)))
    assert "is trained in full and is a LayerNorm" in (why_not(other.at_rank(2), "r2") or "")
    assert why_not(model_of("classifier").at_rank(2), "r2") is None


def test_a_rank_of_zero_padding_stays_zero() -> None:
    small, large = Client("classifier", 2, 4, 0), Client("classifier", 8, 4, 1)
    answer = together([small, large], options_of(max_steps=3, weight_decay=0.1), PARTS, torch.float64)[0]
    alone = together([small], options_of(max_steps=3, weight_decay=0.1), PARTS, torch.float64)[0]
    assert {n: t.shape for n, t in answer.tensors.items()} == {n: t.shape for n, t in alone.tensors.items()}
    assert difference(answer.tensors, alone.tensors) < 1e-12
