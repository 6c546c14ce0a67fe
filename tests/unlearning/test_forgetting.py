"""Bounded unlearning of one client, on a tiny classifier and a tiny language model that have learned their rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedlora.adapter.peft import extract, insert
from fedlora.adapter.state import AdapterState
from fedlora.config import TrainingConfig
from fedlora.data.text import IGNORE, Example
from fedlora.errors import ConfigError, DataError, FedLoRAError
from fedlora.protocol import Method
from fedlora.training.batches import collate
from fedlora.training.loop import LocalWork, train
from fedlora.training.methods import Local, MethodStack, Start, name_parameters
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from fedlora.unlearning import FORGET_LOSSES, ForgetLoss
from fedlora.unlearning.forgetting import Forgetting, ForgetWork, Forgotten, Recipe, log_likelihoods, unlearn

PARTS = frozenset({"A", "B", "dense"})
SCALING = 2.0
STEPS = 25


@dataclass(frozen=True)
class Taught:
    """A model that knows its rows by heart, as an adapter to start from."""

    model: Any
    parameters: dict[str, nn.Parameter]
    state: AdapterState
    forget: list[Example]
    retain: list[Example]

    def work(self, *, labels: tuple[int, ...] = (), seed: int = 1, **recipe: Any) -> ForgetWork:
        """From what was taught, whatever a test before did to the model."""
        insert(self.model, "r4", self.state)
        settings = {"steps": STEPS, "learning_rate": 0.01, "max_norm": 4.0, **recipe}
        chosen = Recipe(**settings)
        return ForgetWork(self.model, self.parameters, self.forget, self.retain, chosen, seed, 0, SCALING, labels)

    def tensors(self) -> dict[str, Tensor]:
        return extract(self.model, "r4").tensors()


def teach(spec: BaseSpec, targets: tuple[str, ...], forget: list[Example], retain: list[Example]) -> Taught:
    base = load_base(spec)
    if spec.task == "causal-lm":
        # a random head of this size gives every token the same probability, and nothing could be learned by heart
        base.model.get_output_embeddings().weight.data.mul_(20)
    model = AdaptedModel(base, AdapterSpec(targets, SCALING, lora_dropout=0.1)).at_rank(4)
    parameters = name_parameters(model, "r4", PARTS)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        if name.endswith(":A"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5)
    options = TrainingConfig(max_steps=100, learning_rate=0.02, base_dropout=False)
    train(LocalWork(model, parameters, [*forget, *retain], options, seed=0, pad_token_id=0))
    return Taught(model, parameters, extract(model, "r4"), forget, retain)


@pytest.fixture(scope="module")
def classifier() -> Taught:
    """Four labels, of which the last is to be forgotten."""
    rows = [Example([1, 10 + label, 50 + i, 60 + i * 7 % 11], label) for label in range(4) for i in range(6)]
    spec = BaseSpec("builtin:tiny-bert", "sequence-classification", ("a", "b", "c", "d"))
    return teach(spec, ("query", "value"), rows[18:], rows[:18])


@pytest.fixture(scope="module")
def writer() -> Taught:
    """Twelve prompts with answers of two to four tokens, of which four are to be forgotten."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(12):
        answer = torch.randint(100, 110, (2 + i % 3,), generator=draw).tolist()
        rows.append(Example([20 + i, 5, 40 + i, *answer], [IGNORE] * 3 + answer))
    return teach(BaseSpec("builtin:tiny-llama", "causal-lm"), ("q_proj", "v_proj", "down_proj"), rows[:4], rows[4:])


@pytest.fixture(params=["classifier", "writer"])
def taught(request: pytest.FixtureRequest) -> Taught:
    found: Taught = request.getfixturevalue(request.param)
    return found


def local(taught: Taught, labels: tuple[int, ...] = ()) -> Local:
    return Local(taught.model, taught.parameters, taught.retain, 0, labels)


def start(taught: Taught, labels: tuple[int, ...] = ()) -> Start:
    own = {name: parameter.detach().clone() for name, parameter in taught.parameters.items()}
    return Start(own, frozenset(own), frozenset(), SCALING, local=local(taught, labels))


# What comes of it -------------------------------------------------------------------------------------------


GENTLE = {"npo": {"beta": 1.0}, "simnpo": {}, "gradient_difference": {"limit": 2.0}}


@pytest.mark.parametrize("loss", GENTLE)
def test_forget_rows_become_unlikely_and_the_others_stay(taught: Taught, loss: str) -> None:
    found = unlearn(taught.work(loss=loss, options=GENTLE[loss], steps=40))
    assert found.forget_before.accuracy == found.retain_before.accuracy == 1.0
    assert found.forget_after.loss > found.forget_before.loss + 1.0
    assert found.forget_after.accuracy == 0.0
    assert found.retain_after.loss < found.retain_before.loss + 0.1
    assert found.retain_after.accuracy == 1.0


def test_ascent_without_a_bound_takes_the_other_rows_with_it(writer: Taught) -> None:
    careless = {"loss": "ascent", "retain_weight": 1e-3}  # as good as no retain rows, which are not to be had
    free = unlearn(writer.work(**careless, max_norm=math.inf, steps=40))
    held = unlearn(writer.work(**careless, max_norm=1.0, steps=40))
    assert free.retain_after.accuracy == 0.0
    assert free.retain_after.loss > 5.0
    assert not free.bounded
    assert held.retain_after.loss < held.retain_before.loss + 0.5
    assert held.bounded


def test_npo_lets_go_where_ascent_never_does(writer: Taught) -> None:
    # beta 1: a row that is some nats less likely than it was has no gradient any more
    ascent = unlearn(writer.work(loss="ascent", max_norm=math.inf, steps=40))
    npo = unlearn(writer.work(loss="npo", options={"beta": 1.0}, max_norm=math.inf, steps=40))
    assert npo.forget_after.loss < ascent.forget_after.loss / 2
    assert npo.change < ascent.change


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_the_change_never_leaves_the_ball(taught: Taught, limit: float) -> None:
    found = unlearn(taught.work(max_norm=limit))
    before, after = taught.state.tensors(), taught.tensors()  # in effective units both
    # float32 keeps 7 digits of every coordinate
    moved = vector_norm(torch.stack([vector_norm(after[name] - before[name]) for name in before]))
    assert float(moved) == pytest.approx(limit, rel=1e-4)
    assert found.change == pytest.approx(limit, rel=1e-4)
    assert 0 < found.held_steps <= STEPS


def test_a_wide_bound_is_no_bound(classifier: Taught) -> None:
    free = unlearn(classifier.work(max_norm=math.inf, steps=5))
    loose = classifier.tensors()
    wide = unlearn(classifier.work(max_norm=1e3, steps=5))
    assert (free.held_steps, wide.held_steps) == (0, 0)
    assert all(torch.equal(tensor, loose[name]) for name, tensor in classifier.tensors().items())


def test_one_seed_gives_the_same_bytes_and_another_others(taught: Taught) -> None:
    def tensors(seed: int) -> dict[str, Tensor]:
        unlearn(taught.work(seed=seed, steps=5, batch_size=3))
        return taught.tensors()

    once, again, other = tensors(1), tensors(1), tensors(2)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_the_log_names_what_was_measured(classifier: Taught) -> None:
    found = unlearn(classifier.work(steps=1))
    metrics = found.metrics()
    assert metrics["forget_loss_before"] == found.forget_before.loss
    assert (found.forget_before.num_examples, found.retain_after.num_examples) == (6, 18)
    assert (metrics["steps"], metrics["shared_rows"]) == (1, 0)
    assert all(isinstance(number, int | float) for number in metrics.values())


# What is minimised ------------------------------------------------------------------------------------------


def by_hand(taught: Taught, work: ForgetWork, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a function of the forget rows' log-likelihoods plus the weighted loss on the retain rows."""
    taught.model.eval()
    at = local(taught)
    logp = log_likelihoods(at, taught.forget)[0]
    kept, lengths = log_likelihoods(at, taught.retain)
    total = value(logp) + work.recipe.retain_weight * -kept.sum() / lengths.sum()
    found = torch.autograd.grad(total, list(taught.parameters.values()))
    return dict(zip(taught.parameters, found, strict=True))


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_step_follows_the_forget_loss_plus_the_weighted_retain_loss(
    classifier: Taught, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one step of plain SGD at rate 1 without clipping moves by minus the gradient; dropout is off throughout
    import fedlora.unlearning.forgetting as forgetting

    def plain(**options: Any) -> TrainingConfig:
        return TrainingConfig(**{**options, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0})

    work = classifier.work(loss="npo", max_norm=math.inf, steps=1, retain_weight=weight, batch_size=64)
    before = {name: parameter.detach().clone() for name, parameter in classifier.parameters.items()}
    expected = by_hand(classifier, work, lambda logp: logp.mean())  # the gradient of NPO where nothing has changed
    monkeypatch.setattr(forgetting, "TrainingConfig", plain)
    monkeypatch.setattr("fedlora.training.loop.train_mode", lambda model, _: model.eval())
    unlearn(work)
    for name, parameter in classifier.parameters.items():
        assert_close(before[name] - parameter.detach(), expected[name], atol=1e-5, rtol=1e-4)


def test_log_likelihoods_are_those_of_the_loss(taught: Taught) -> None:
    insert(taught.model, "r4", taught.state)
    taught.model.eval()
    logp, lengths = log_likelihoods(local(taught), taught.forget)
    for place, row in enumerate(taught.forget):
        batch = collate([row], 0, torch.device("cpu"))
        loss = float(taught.model(**batch).loss.detach())  # of transformers: mean over the row's targets
        assert float(logp[place].detach()) == pytest.approx(-loss * int(lengths[place]), abs=1e-5)


def test_the_reference_is_read_once_without_dropout_and_the_model_is_left_as_it_was(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = taught.work()
    taught.model.train()
    modes = [module.training for module in taught.model.modules()]
    reference = Forgetting(taught.forget, work.recipe).begin(start(taught))["reference"]
    assert [module.training for module in taught.model.modules()] == modes
    taught.model.eval()
    assert_close(reference, log_likelihoods(local(taught), taught.forget)[0].detach())
    assert not reference.requires_grad

    reads: list[Tensor] = []
    monkeypatch.setitem(FORGET_LOSSES._factories, "spy", lambda: Spy(reads))
    unlearn(taught.work(loss="spy", steps=3, batch_size=64))
    assert_close(reads[0].sort().values, reference.sort().values)
    assert torch.equal(reads[0].sort().values, reads[2].sort().values)  # three steps later still that of the start


class Spy(ForgetLoss):
    def __init__(self, reads: list[Tensor]):
        self.reads = reads

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        self.reads.append(reference)
        return logp


def test_only_the_labels_of_the_cohort_compete(classifier: Taught) -> None:
    classifier.work()
    classifier.model.eval()
    masked, _ = log_likelihoods(local(classifier, (2, 3)), classifier.forget)
    logits = classifier.model(**collate(classifier.forget, 0, torch.device("cpu"))).logits
    expected = -cross_entropy(logits[:, 2:], torch.ones(6, dtype=torch.int64), reduction="none")
    assert_close(masked, expected)

    rows = [row for row in classifier.retain if row.labels in (1, 2)]
    found = unlearn(replace(classifier.work(labels=(1, 2, 3), max_norm=8.0), retain=rows))
    assert found.forget_after.loss > 1.0
    assert found.retain_after.accuracy == 1.0
    assert math.isfinite(found.forget_after.loss)


def test_it_stands_beside_the_methods_of_a_plan(classifier: Taught) -> None:
    # FedProx pulls towards the start, so the two together move less
    def moved(*plan: Method) -> float:
        work = classifier.work(max_norm=math.inf)
        stack = MethodStack(plan, also={"forget": Forgetting(classifier.forget, work.recipe)})
        options = TrainingConfig(learning_rate=0.01, max_steps=10, base_dropout=False)
        memory = stack.begin(start(classifier))
        train(LocalWork(work.model, work.parameters, work.retain, options, 1, 0, stack, memory))
        before, after = classifier.state.tensors(), classifier.tensors()
        return float(vector_norm(torch.stack([vector_norm(after[name] - before[name]) for name in before])))

    assert moved(Method.of("fedprox", mu=10.0)) < moved() / 2


def test_every_forget_row_has_its_turn_before_any_has_two(classifier: Taught) -> None:
    method = Forgetting(classifier.forget, classifier.work(batch_size=4).recipe)
    turns = [method._places(step, seed=5) for step in range(4)]
    assert sorted(turns[0] + turns[1]) == sorted(turns[2] + turns[3]) == list(range(6))
    assert turns[:2] != turns[2:]


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "unlearning: steps must be at least 1, not 0"),
        ({"batch_size": 0}, "unlearning: batch_size must be at least 1, not 0"),
        ({"learning_rate": -1.0}, "unlearning: learning_rate must be a number above 0, not -1.0"),
        ({"retain_weight": 0.0}, "unlearning: retain_weight must be a number above 0, not 0.0"),
        ({"retain_weight": math.inf}, "unlearning: retain_weight must be a number above 0, not inf"),
        ({"max_norm": 0.0}, "unlearning: max_norm must be above 0, not 0.0"),
        ({"max_norm": math.nan}, "unlearning: max_norm must be above 0, not nan"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"steps": 1, "learning_rate": 0.1, "max_norm": 1.0, **change})


def refused(work: ForgetWork, **changes: Any) -> str:
    with pytest.raises(DataError) as refusal:
        unlearn(replace(work, **changes))
    return str(refusal.value)


def test_unlearning_without_rows_is_refused(classifier: Taught) -> None:
    work = classifier.work()
    assert refused(work, forget=[]) == "unlearning: there are no rows to forget"
    assert "there are no retain rows, and without them forgetting takes the rest" in refused(work, retain=[])
    assert refused(work, retain=classifier.forget[::-1]) == (
        "unlearning: all 6 forget rows are among the retain rows; take them out of those"
    )
    some = [*classifier.retain, *classifier.forget[:2]]
    assert unlearn(replace(classifier.work(steps=1), retain=some)).shared_rows == 2


def test_rows_that_cannot_be_worked_on_are_named(classifier: Taught, writer: Taught) -> None:
    work = classifier.work()
    assert "some rows have one label and others a label per token" in refused(work, retain=writer.retain)
    assert refused(work, labels=(2, 1, 0)) == (
        "unlearning: forget row 0 has label 3, which does not compete (0, 1, 2 do)"
    )
    empty = Example([1, 2], [5, IGNORE])  # the first token is predicted from nothing
    assert refused(writer.work(), retain=[writer.retain[0], empty]) == "unlearning: retain row 1 has no target token"


class Odd(ForgetLoss):
    def __init__(self, kind: str):
        self.kind = kind

    def loss(self, logp: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return logp.mean() if self.kind == "scalar" else logp * torch.nan


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("scalar", "nan"):
        monkeypatch.setitem(FORGET_LOSSES._factories, kind, lambda kind=kind: Odd(kind))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("scalar", r"forget loss: scalar returned \[\]; expected one number per row, \[6\]"),
        ("nan", "forget loss: nan became nan at step 1; lower learning_rate or max_norm"),
    ],
)
def test_a_loss_of_your_own_that_is_wrong_is_told(classifier: Taught, odd: None, loss: str, message: str) -> None:
    with pytest.raises(FedLoRAError, match=message):
        unlearn(classifier.work(loss=loss))


def test_an_unknown_loss_is_told(classifier: Taught) -> None:
    with pytest.raises(ConfigError, match="forget loss: nop is not known; did you mean npo?"):
        unlearn(classifier.work(loss="nop"))


def test_a_step_that_breaks_the_model_is_told(classifier: Taught) -> None:
    def broken(steps: int) -> Forgotten:
        return unlearn(classifier.work(loss="ascent", learning_rate=1e30, max_norm=math.inf, steps=steps))

    with pytest.raises(FedLoRAError, match="after 1 steps the loss on the retain rows is nan; lower learning_rate"):
        broken(1)
    with pytest.raises(FedLoRAError, match="became nan at step 2"):
        broken(3)
