"""Local methods: FedProx, SCAFFOLD and the tail penalty, by hand, against autograd, and in the training loop."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter.peft import extract, insert
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.config import TrainingConfig
from fedlora.data.text import Example
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.protocol import Method
from fedlora.training.loop import LocalResult, LocalWork, train
from fedlora.training.methods import (
    LOCAL_METHODS,
    LocalMethod,
    Memory,
    MethodStack,
    Start,
    fitted,
    name_parameters,
    start_from,
    unit,
)
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base

PROX = Method.of("fedprox", mu=0.7)
SCAFFOLD = Method.of("scaffold")
TAIL = Method.of("tail_penalty", gamma=0.5, weight=0.3)
SCALING = 5 / 3  # no power of two: dividing by it and multiplying again would round


def tensors(seed: int = 0, rank: int = 4) -> dict[str, Tensor]:
    """One module of 5 x 3 and a head, in PEFT's units."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"m:A": (rank, 3), "m:B": (5, rank), ":head": (2,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def start_of(own: Mapping[str, Tensor], **changes: Any) -> Start:
    """Everything is trained and sent."""
    return Start(own, **{"trained": frozenset(own), "shared": frozenset(own), "scaling": SCALING, **changes})


def zeros(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def controls(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they travel."""
    return {f"control/{name}": tensor for name, tensor in own.items()}


def identical(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# FedProx ----------------------------------------------------------------------------------------------------


def test_fedprox_adds_the_gradient_of_half_mu_times_the_squared_distance_in_effective_units() -> None:
    here, start, raw = tensors(1), tensors(2), tensors(3)
    stack = MethodStack([PROX])
    came, _ = stack.correct(raw, here, stack.begin(start_of(start)))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in here.items()}
    distance = sum((unit(n, SCALING) ** 2 * (leaves[n] - start[n]).square().sum() for n in leaves), torch.zeros(()))
    (0.7 / 2 * distance).backward()
    assert_close(came, {name: raw[name] + leaf.grad for name, leaf in leaves.items()})


def test_fedprox_adds_nothing_where_a_client_starts() -> None:
    stack, start, raw = MethodStack([PROX]), tensors(2), tensors(3)
    assert identical(stack.correct(raw, start, stack.begin(start_of(start)))[0], raw)


# SCAFFOLD ---------------------------------------------------------------------------------------------------


def test_scaffold_changes_no_bit_where_both_control_variates_agree() -> None:
    stack, raw, control = MethodStack([SCAFFOLD]), tensors(1), tensors(2)
    kept = {f"scaffold/{name}": tensor for name, tensor in control.items()}
    memory = stack.begin(start_of(tensors(), extras=controls(control), kept=kept))
    assert identical(stack.correct(raw, tensors(), memory)[0], raw)


def test_scaffold_by_hand() -> None:
    own, raw, c, c_k = ({"m:A": torch.tensor([[x]]), "m:B": torch.tensor([[x]])} for x in (1.0, 8.0, 5.0, 3.0))
    kept = {f"scaffold/{name}": tensor for name, tensor in c_k.items()}
    stack = MethodStack([SCAFFOLD])
    memory = stack.begin(start_of(own, scaling=4.0, extras=controls(c), kept=kept))
    first, memory = stack.correct(raw, own, memory)
    # A: 8 - 3 + 5.  B in effective units: 8/4 - 3 + 5 = 4, in PEFT's 16
    assert (float(first["m:A"]), float(first["m:B"])) == (10, 16)
    _, memory = stack.correct(zeros(raw), own, memory)
    answer = stack.finish(own, memory)
    # means over the two steps: A: (8 + 0)/2 = 4.  B: (2 + 0)/2 = 1
    assert {name: float(x) for name, x in answer.kept.items()} == {"scaffold/m:A": 4, "scaffold/m:B": 1}
    assert {name: float(x) for name, x in answer.extras.items()} == {"control/m:A": 1, "control/m:B": -2}


def test_a_control_variate_is_the_same_under_another_alpha() -> None:
    def answer(scaling: float) -> Mapping[str, Tensor]:
        # the loss is a function of scaling * B, so its gradient by B is scaling times that by effective B
        raw = {name: unit(name, scaling) * tensor for name, tensor in tensors(1).items()}
        stack = MethodStack([SCAFFOLD])
        memory = stack.begin(start_of(tensors(), scaling=scaling, extras=controls(tensors(2))))
        return stack.finish(tensors(), stack.correct(raw, tensors(), memory)[1]).extras

    assert identical(answer(1.0), answer(4.0))


def test_only_what_is_trained_and_sent_has_a_control_variate() -> None:
    own, raw = tensors(), tensors(1)
    sent = {"m:A": tensors(2)["m:A"]}
    stack = MethodStack([SCAFFOLD])
    memory = stack.begin(start_of(own, shared=frozenset(sent), extras=controls(sent)))
    came, memory = stack.correct(raw, own, memory)
    assert identical({n: came[n] for n in ("m:B", ":head")}, {n: raw[n] for n in ("m:B", ":head")})
    assert_close(came["m:A"], raw["m:A"] + sent["m:A"])
    answer = stack.finish(own, memory)
    assert (list(answer.extras), list(answer.kept)) == (["control/m:A"], ["scaffold/m:A"])


def test_control_variates_that_do_not_belong_to_the_plan_are_refused() -> None:
    own = tensors()
    stack = MethodStack([SCAFFOLD])
    with pytest.raises(FedLoRAError, match=r"scaffold: control/:head was not sent \(3 such tensors\)"):
        stack.begin(start_of(own))
    with pytest.raises(FedLoRAError, match="control/m:B was sent for a tensor that is not trained and sent on"):
        stack.begin(start_of(own, shared=frozenset({"m:A", ":head"}), extras=controls(own)))


@pytest.mark.parametrize("methods", [(PROX, TAIL, SCAFFOLD), (SCAFFOLD, TAIL, PROX)], ids=["last", "first"])
def test_control_variates_are_of_the_data_alone_whatever_else_changes_the_gradient(methods: Any) -> None:
    own, raw = tensors(), tensors(1)

    def kept(*asked: Method) -> Mapping[str, Tensor]:
        stack = MethodStack(asked)
        memory = stack.begin(start_of(tensors(4), extras=controls(tensors(2))))
        return stack.finish(own, stack.correct(raw, own, memory)[1]).kept

    assert identical(kept(*methods), kept(SCAFFOLD))


def quadratic_rounds(method: Method | None) -> tuple[float, Tensor]:
    """Two clients with losses h/2 (x - b)^2; h = 1, 3 and b = 0, 4. FedAvg of 10 SGD steps, 40 rounds.

    Returns:
        How far apart the clients end in the last round, and the server's x.
    """
    clients = ((1.0, 0.0), (3.0, 4.0))
    stack = MethodStack([method] if method else [])
    x, c, kept = torch.zeros(1), torch.zeros(1), [{}, {}]
    for _ in range(40):
        ends, changes = [], []
        for k, (h, b) in enumerate(clients):
            own = {":x": x.clone()}
            extras = controls({":x": c}) if method == SCAFFOLD else {}
            memory = stack.begin(start_of(own, extras=extras, kept=kept[k]))
            for _ in range(10):
                gradients, memory = stack.correct({":x": h * (own[":x"] - b)}, own, memory)
                own = {":x": own[":x"] - 0.05 * gradients[":x"]}
            answer = stack.finish(own, memory)
            kept[k] = answer.kept
            ends.append(own[":x"])
            changes.append(answer.extras.get("control/:x", torch.zeros(1)))
        x, c = sum(ends) / 2, c + sum(changes) / 2
    return float((ends[0] - ends[1]).abs()), x


def test_clients_with_different_data_drift_apart_less_and_meet_at_the_true_optimum() -> None:
    plain_drift, plain = quadratic_rounds(None)
    drift, x = quadratic_rounds(SCAFFOLD)
    assert plain_drift > 0.5
    assert drift < 1e-4
    # the minimum of the mean loss is (1*0 + 3*4) / (1 + 3) = 3; averaging drifting clients ends elsewhere
    assert_close(x, torch.tensor([3.0]), atol=1e-4, rtol=0)
    assert float((plain - 3).abs()) > 0.1
    assert quadratic_rounds(PROX)[0] < plain_drift


def test_what_was_kept_is_cut_or_padded_where_the_rank_has_changed() -> None:
    kept = torch.arange(6.0).reshape(2, 3)
    assert fitted(kept, torch.zeros(1, 3)).tolist() == [[0, 1, 2]]
    assert fitted(kept, torch.zeros(3, 3)).tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    assert fitted(None, torch.zeros(1, 1)).tolist() == [[0]]


# The tail penalty -------------------------------------------------------------------------------------------


def tail_gradient(own: Mapping[str, Tensor], **changes: Any) -> Mapping[str, Tensor]:
    stack = MethodStack([TAIL])
    begun = start_of(own, **changes)
    trained = {name: own[name] for name in begun.trained}
    return stack.correct(zeros(trained), trained, stack.begin(begun))[0]


def test_the_tail_penalty_is_the_product_of_the_norms_of_the_last_components() -> None:
    own = tensors()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    B, A = SCALING * leaves["m:B"], leaves["m:A"]
    (0.3 * B[:, 2:].square().sum().sqrt() * A[2:].square().sum().sqrt()).backward()  # kept = int(0.5 * 4)
    expected = {name: torch.zeros_like(own[name]) if t.grad is None else t.grad for name, t in leaves.items()}
    assert_close(tail_gradient(own), expected)


def test_the_tail_penalty_of_a_fresh_adapter_has_no_gradient_and_no_nan() -> None:
    own = tensors() | {"m:B": torch.zeros(5, 4)}
    assert identical(tail_gradient(own), zeros(own))


def test_a_single_component_is_never_penalised() -> None:
    own = tensors(rank=1)
    assert identical(tail_gradient(own), zeros(own))


def test_a_factor_that_does_not_train_still_counts_in_the_tail() -> None:
    own = tensors()
    alone = tail_gradient(own, trained=frozenset({"m:B"}))
    assert identical(alone, {"m:B": tail_gradient(own)["m:B"]})
    assert identical(tail_gradient(own, trained=frozenset({":head"})), {":head": torch.zeros(2)})


# All of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PROX, SCAFFOLD], ids=lambda m: m.name)
def test_hooks_can_be_mapped_over_many_clients_at_once(method: Method) -> None:
    def one(own: Any, raw: Any, control: Any) -> Any:
        hook = LOCAL_METHODS.create(method.name, **dict(method.options))
        memory = hook.begin(start_of(own, extras=control if method == SCAFFOLD else {}))
        gradients, memory = hook.project(raw, raw, own, memory)
        return dict(gradients), dict(hook.finish(own, memory).extras)

    clients = [(tensors(k), tensors(k + 10), tensors(k + 20)) for k in range(3)]
    stacked = [{name: torch.stack([c[i][name] for c in clients]) for name in clients[0][i]} for i in range(3)]
    gradients, answers = torch.vmap(one)(*stacked)
    for k, client in enumerate(clients):
        alone, answer = one(*client)
        assert_close({name: t[k] for name, t in gradients.items()}, alone)
        assert_close({name: t[k] for name, t in answers.items()}, answer)


def test_the_penalty_can_be_mapped_over_many_clients_at_once() -> None:
    hook = LOCAL_METHODS.create("tail_penalty", gamma=0.5, weight=0.3)
    clients = [tensors(k) for k in range(3)]
    memory = hook.begin(start_of(clients[0]))
    stacked = {name: torch.stack([c[name] for c in clients]) for name in clients[0]}
    came = torch.vmap(lambda own: hook.penalty(own, memory))(stacked)
    assert_close(came, torch.stack([hook.penalty(own, memory) for own in clients]))


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    expected = (
        r"local method: fedprx is not known; did you mean fedprox\? \(known: .*fedprox, .*scaffold, tail_penalty\)"
    )
    with pytest.raises(ConfigError, match=expected):
        MethodStack([Method.of("fedprx", mu=1)])
    with pytest.raises(ConfigError, match="local method: fedprox does not take these options"):
        MethodStack([Method.of("fedprox", nu=1)])
    with pytest.raises(ConfigError, match="scaffold is asked for twice"):
        MethodStack([SCAFFOLD, SCAFFOLD])


def test_extra_tensors_that_nobody_answers_are_named() -> None:
    extras = {"control/m:A": torch.zeros(1), "momentum/m:A": torch.zeros(1)}
    with pytest.raises(FedLoRAError, match=r"answers: control/m:A, momentum/m:A \(2 in all; methods: fedprox\)"):
        MethodStack([PROX]).begin(start_of(tensors(), extras=extras))


# In the training loop ---------------------------------------------------------------------------------------

ROWS = [Example([2, 5 + i, 9, 3 + i % 4], i % 2) for i in range(8)]


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    base = load_base(BaseSpec("builtin:tiny-bert", "sequence-classification", ("no", "yes")))
    return AdaptedModel(base, AdapterSpec(("query", "value"), SCALING))


def begin_state(model: Any, adapter: str) -> AdapterState:
    """Factors that are not zero, as after a few rounds."""
    draw = torch.Generator().manual_seed(3)
    now = extract(model, adapter)
    return now.map(
        lambda u: LowRank(torch.randn(u.B.shape, generator=draw) * 0.1, torch.randn(u.A.shape, generator=draw))
    )


def play(
    adapted: AdaptedModel,
    *methods: Method,
    parts: frozenset[str] = frozenset({"A", "B", "dense"}),
    control: float | None = None,
    rank: int = 2,
    rows: list[Example] = ROWS,
    **options: Any,
) -> tuple[dict[str, Tensor], LocalResult, Mapping[str, Tensor]]:
    """How far each tensor moved [PEFT's units], the loop's result, and the methods' extras.

    Args:
        control: the server's control variate, everywhere; default 0 if SCAFFOLD is among the methods.
    """
    model, adapter = adapted.at_rank(rank), f"r{rank}"
    torch.manual_seed(0)
    state = begin_state(model, adapter)
    insert(model, adapter, state)
    parameters = name_parameters(model, adapter, parts)
    begun = start_from(state, parameters, SCALING, parts)
    if SCAFFOLD in methods:
        extras = {f"control/{n}": torch.full_like(begun.tensors[n], control or 0.0) for n in begun.shared}
        begun = Start(begun.tensors, begun.trained, begun.shared, SCALING, extras)
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 3, "base_dropout": False}
    stack = MethodStack(methods)
    memory: Memory = stack.begin(begun)
    work = LocalWork(model, parameters, rows, TrainingConfig.model_validate(settings | options), 5, 0, stack, memory)
    result = train(work)
    after = {name: p.detach().clone() for name, p in parameters.items()}
    insert(model, adapter, state)  # the head is shared by the tests
    return {n: after[n] - begun.tensors[n] for n in after}, result, stack.finish(after, result.memory).extras


class Shift(LocalMethod):
    """Moves the head by a number after every step, and counts."""

    def __init__(self, by: float):
        self.by = by

    def begin(self, start: Start) -> Memory:
        return {"steps": 0}

    def constrain(self, tensors: Mapping[str, Tensor], memory: Memory) -> tuple[Mapping[str, Tensor], Memory]:
        heads = {name: tensor + self.by for name, tensor in tensors.items() if name.startswith(":")}
        return heads, {"steps": memory["steps"] + 1}


def test_methods_move_parameters_after_a_step_one_after_the_other() -> None:
    stack = MethodStack(also={"one": Shift(1.0), "two": Shift(0.5)})
    own = tensors()
    moved, memory = stack.constrain(own, stack.begin(start_of(own)))
    assert moved.keys() == {":head"}
    assert_close(moved[":head"], own[":head"] + 1.5)
    assert memory == {"one": {"steps": 1}, "two": {"steps": 1}}


def test_a_method_that_no_plan_can_name_must_have_a_name_of_its_own() -> None:
    with pytest.raises(ConfigError, match="fedprox is asked for twice"):
        MethodStack([PROX], also={"fedprox": Shift(1.0)})


def size(moves: Mapping[str, Tensor]) -> float:
    return float(sum(t.square().sum() for t in moves.values())) ** 0.5


@pytest.mark.parametrize("parts", [{"A"}, {"B"}, {"A", "B", "dense"}], ids=lambda p: "+".join(sorted(p)))
def test_parameters_are_known_by_the_names_of_the_adapters_tensors(adapted: AdaptedModel, parts: set[str]) -> None:
    model = adapted.at_rank(2)
    insert(model, "r2", begin_state(model, "r2"))
    parameters = name_parameters(model, "r2", frozenset(parts))
    present = extract(model, "r2").tensors()
    assert {n.rpartition(":")[2] if n[0] != ":" else "dense" for n in parameters} == parts
    for name, parameter in parameters.items():
        assert parameter.requires_grad
        assert torch.equal(parameter * unit(name, SCALING), present[name])
    assert sum(p.requires_grad for p in model.parameters()) == len(parameters)


def test_cores_have_names_too(adapted: AdaptedModel) -> None:
    model = adapted.at_rank(3)
    draw = torch.Generator().manual_seed(0)
    state = begin_state(model, "r3").map(lambda u: LowRank(u.B, u.A, torch.randn(3, 3, generator=draw)))
    insert(model, "r3", state)
    parameters = name_parameters(model, "r3", frozenset({"C"}))
    assert sorted(parameters) == sorted(f"{path}:C" for path in state.modules)
    assert all(torch.equal(parameters[f"{path}:C"], update.C) for path, update in state.modules.items())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_fedprox_without_weight_is_plain_training_bit_for_bit(adapted: AdaptedModel, optim: str) -> None:
    plain, result, _ = play(adapted, optim=optim)
    prox, other, _ = play(adapted, Method.of("fedprox", mu=0.0), optim=optim)
    assert identical(prox, plain)
    assert other.loss == result.loss


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch", 1e-3), ("sgd", 0.02)])
def test_fedprox_with_a_huge_weight_stays_at_what_was_received(adapted: AdaptedModel, optim: str, rate: float) -> None:
    # the largest that plain SGD can follow: learning_rate * mu * scaling^2 = 1
    huge = Method.of("fedprox", mu=1 / (rate * SCALING**2))
    options = {"optim": optim, "learning_rate": rate, "max_steps": 40, "max_grad_norm": 0}
    plain, pulled = size(play(adapted, **options)[0]), size(play(adapted, huge, **options)[0])
    assert pulled < plain / 8


@pytest.mark.parametrize("method", [PROX, TAIL, SCAFFOLD], ids=lambda m: m.name)
def test_the_reported_loss_is_that_of_the_data(adapted: AdaptedModel, method: Method) -> None:
    # no step is large enough to change the loss: whatever else were added to it would show
    options = {"max_steps": 2, "learning_rate": 1e-12}
    plain, other = play(adapted, **options)[1], play(adapted, method, control=0.5, **options)[1]
    assert (other.loss, other.first_loss) == (plain.loss, plain.first_loss)


@pytest.mark.parametrize("method", [PROX, TAIL, SCAFFOLD], ids=lambda m: m.name)
def test_every_method_changes_the_steps(adapted: AdaptedModel, method: Method) -> None:
    assert not identical(play(adapted, method, control=0.5)[0], play(adapted)[0])


def test_one_sgd_step_gives_the_gradient_as_control_variate_clipped_or_not(adapted: AdaptedModel) -> None:
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
    plain, _, _ = play(adapted, max_grad_norm=0, **options)
    gradient = {f"control/{name}": -step / unit(name, SCALING) for name, step in plain.items()}
    for changes in ({"max_grad_norm": 0.0}, {"max_grad_norm": 1e-3}, {"weight_decay": 0.1}):
        # a step is a difference of numbers near 1, so it is known to 1e-7
        assert_close(dict(play(adapted, SCAFFOLD, control=0.5, **options, **changes)[2]), gradient, atol=2e-7, rtol=0)


def test_the_corrected_gradient_is_what_is_clipped(adapted: AdaptedModel) -> None:
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.25}
    assert size(play(adapted, SCAFFOLD, control=100.0, **options)[0]) == pytest.approx(0.25, rel=1e-4)


def test_accumulated_micro_batches_count_as_one_step(adapted: AdaptedModel) -> None:
    options = {"optim": "sgd", "max_steps": 2}
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    rows = ROWS[:4]  # one batch, so that both see the same rows
    whole = play(adapted, SCAFFOLD, PROX, control=0.1, rows=rows, **options)
    parted = play(adapted, SCAFFOLD, PROX, control=0.1, rows=rows, **options, **split)
    assert_close(parted[0], whole[0])
    assert_close(dict(parted[2]), dict(whole[2]), atol=1e-6, rtol=1e-4)


def test_a_client_with_fewer_rows_than_a_batch_answers_too(adapted: AdaptedModel) -> None:
    _, result, extras = play(adapted, SCAFFOLD, PROX, TAIL, rows=ROWS[:1], per_device_train_batch_size=64)
    assert result.rows == 3  # one row in each of three steps
    assert all(torch.isfinite(tensor).all() for tensor in extras.values())
    assert size(extras) > 0


@pytest.mark.parametrize("part", ["A", "B"])
def test_parts_that_do_not_train_neither_move_nor_answer(adapted: AdaptedModel, part: str) -> None:
    moves, _, extras = play(adapted, SCAFFOLD, PROX, TAIL, parts=frozenset({part}), control=0.1)
    assert {name.rpartition(":")[2] for name in moves} == {part}
    assert sorted(extras) == sorted(f"control/{name}" for name in moves)
    assert all(tensor.any() for tensor in moves.values())
