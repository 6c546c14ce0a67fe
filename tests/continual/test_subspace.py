"""InfLoRA: what a task's inputs span is sketched, remembered, and left alone by the tasks after it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.subspace import design, grown, probes, root_of, sketch
from fedlora.aggregation import compose
from fedlora.aggregation.base import Contribution, RoundContext, State, Strategy
from fedlora.aggregation.combine import combine, hand_out
from fedlora.aggregation.evidence import load_state, same_tree, save_state
from fedlora.config import RunConfig
from fedlora.continual.subspace import InputSketch, drawn
from fedlora.data.text import Example
from fedlora.errors import FedLoRAError
from fedlora.protocol import ClientInfo, Method
from fedlora.training.methods import Local, Start
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_lines
from tests.conftest import quiet

NOTHING = torch.zeros(4, 0, dtype=torch.float64)
AXES = torch.eye(4, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The equations ----------------------------------------------------------------------------------------------


def test_a_sketch_by_hand() -> None:
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # X^T X = diag(4, 2), over 3 inputs of 2 coordinates
    Y, trace = sketch(X, torch.tensor([[1.0], [3.0]]))
    assert_close(Y, torch.tensor([[4 / 6], [6 / 6]]))
    assert float(trace) == 1.0
    assert float(trace) == float(X.square().mean())


def test_a_sketch_gives_back_a_covariance_of_low_rank() -> None:
    X = random(50, 3) @ random(3, 12, seed=1)
    C = (X.T @ X / X.numel()).double()
    omega = probes("m", 12, 8)
    Y, trace = sketch(X, omega.float())
    F = root_of(Y, omega)
    assert F.shape == (12, 3)
    assert_close(F @ F.T, C, rtol=0, atol=1e-5 * float(C.trace()))  # of float32 sketches
    assert math.isclose(float(trace), float(C.trace()), rel_tol=1e-5)


def test_the_mean_of_two_clients_sketches_is_the_sketch_of_both() -> None:
    one, other = random(20, 6), random(10, 6, seed=1)
    omega = probes("m", 6, 3).float()
    (Y1, t1), (Y2, t2) = sketch(one, omega), sketch(other, omega)
    Y, t = sketch(torch.cat([one, other]), omega)
    assert_close((20 * Y1 + 10 * Y2) / 30, Y)
    assert_close((20 * t1 + 10 * t2) / 30, t)


def test_probes_are_the_same_for_server_and_clients_and_no_wider_than_the_layer() -> None:
    assert torch.equal(probes("m", 6, 3), probes("m", 6, 3))
    assert not torch.equal(probes("m", 6, 3), probes("n", 6, 3))
    assert probes("m", 6, 64).shape == (6, 6)


@pytest.mark.parametrize("Y", [torch.zeros(6, 3), -probes("m", 6, 3), random(6, 3)], ids=["zero", "negative", "noise"])
def test_what_no_covariance_could_have_made_still_designs_orthonormal_rows(Y: Tensor) -> None:
    F = root_of(Y, probes("m", 6, 3))
    A = design(F, torch.zeros(6, 0, dtype=torch.float64), 4, seed=0)
    assert_close(A @ A.T, torch.eye(4, dtype=torch.float64))


def test_new_rows_are_the_leading_directions_outside_of_the_old_ones() -> None:
    F = AXES @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    A = design(F, AXES[:, :1], 3, seed=0)
    # the largest is taken already; then come 2 and 1, and the fourth axis is all that is left to fill up with
    assert_close(A.abs(), AXES[[1, 2, 3]])
    assert_close(design(F, NOTHING, 2, seed=0).abs(), AXES[[0, 1]])


def test_new_rows_are_orthogonal_to_old_directions_that_lie_askew() -> None:
    M, _ = torch.linalg.qr(random(32, 20).double())
    A = design(random(32, 16, seed=1).double(), M, 8, seed=0)
    assert float((A @ M).abs().max()) < 1e-14
    assert_close(A @ A.T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("energy", "known", "room", "expected"),
    [
        (0.8, NOTHING, 4, [0]),  # 8 of 10
        (0.85, NOTHING, 4, [0, 1]),  # 9.5 of 10
        (1.0, NOTHING, 4, [0, 1, 2]),  # the fourth axis has nothing
        (0.95, AXES[:, :1], 4, [0, 1]),  # the first one's 8 count
        (0.8, AXES[:, :1], 4, [0]),
        (1.0, AXES[:, 3:], 4, [3, 0, 1, 2]),
        (1.0, NOTHING, 2, [0, 1]),  # no room for the third
    ],
)
def test_memory_grows_until_it_holds_enough_of_the_inputs(
    energy: float, known: Tensor, room: int, expected: list[int]
) -> None:
    F = AXES @ torch.diag(torch.tensor([8.0, 1.5, 0.5, 0.0], dtype=torch.float64).sqrt())
    assert_close(grown(F, 10.0, known, energy, room).abs(), AXES[:, expected])


def test_what_a_narrow_sketch_has_missed_counts_as_not_remembered() -> None:
    F = AXES[:, :2] @ torch.diag(torch.tensor([8.0, 1.0], dtype=torch.float64).sqrt())
    assert grown(F, 9.0, NOTHING, 0.85, 4).shape[1] == 1  # 8 of 9
    assert grown(F, 10.0, NOTHING, 0.85, 4).shape[1] == 2  # 8 of 10


# On a client ------------------------------------------------------------------------------------------------

ROWS = [Example([2, 5 + i, 9, 3 + i % 4][: 2 + i % 3], i % 2) for i in range(8)]


@pytest.fixture(scope="module")
def model() -> Any:
    base = load_base(BaseSpec("builtin:tiny-bert", "sequence-classification", ("no", "yes")))
    adapted = AdaptedModel(base, AdapterSpec(("query", "pooler.dense"), 1.0, lora_dropout=0.5))
    return adapted.at_rank(2)


def asked(model: Any, width: int = 4) -> dict[str, Tensor]:
    paths = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    return {
        f"{path}:{part}": torch.zeros(shape) for path in paths for part, shape in (("Y", (32, width)), ("trace", 1))
    }


def answer(model: Any, rows: list[Example], limit: int = 64) -> dict[str, Tensor]:
    local = Local(model, {}, rows, pad_token_id=0, seed=3)
    method = InputSketch(limit)
    memory = method.begin(Start({}, frozenset(), frozenset(), extras=asked(model), local=local))
    found = method.finish({}, memory)
    assert not found.kept
    return dict(found.extras)


def test_a_client_answers_what_was_asked_and_nothing_else(model: Any) -> None:
    extras = answer(model, ROWS)
    assert {name: t.shape for name, t in extras.items()} == {name: t.shape for name, t in asked(model).items()}
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in extras.values())
    assert InputSketch().finish({}, InputSketch().begin(Start({}, frozenset(), frozenset()))).extras == {}


def test_padding_is_left_out(model: Any) -> None:
    together = answer(model, ROWS)
    alone = [answer(model, [row]) for row in ROWS]
    for name, tensor in together.items():
        # a layer behind the pooling sees one input per row, the others one per token
        sizes = [1 if "pooler" in name else len(row.input_ids) for row in ROWS]
        mean = sum((n * one[name] for n, one in zip(sizes, alone, strict=True)), torch.zeros(())) / sum(sizes)
        assert_close(tensor, mean, rtol=1e-4, atol=1e-6)


def test_a_client_leaves_its_model_as_it_was(model: Any) -> None:
    model.train()
    model.base_model.model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    dice = torch.get_rng_state()
    first, again = answer(model, ROWS), answer(model, ROWS)
    assert modes == [module.training for module in model.modules()]
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    assert torch.equal(dice, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)  # without dropout


def test_no_more_rows_are_looked_at_than_asked_and_the_seed_says_which(model: Any) -> None:
    local = Local(model, {}, ROWS, 0, seed=3)
    assert drawn(local, 3) == drawn(local, 3)
    assert len(drawn(local, 3)) == 3
    assert drawn(local, 3) != drawn(replace(local, seed=4), 3)
    assert sorted(row.input_ids for row in drawn(local, 64)) == sorted(row.input_ids for row in ROWS)


def test_a_module_without_an_adapter_is_named(model: Any) -> None:
    local = Local(model, {}, ROWS, 0)
    method = InputSketch()
    with pytest.raises(FedLoRAError, match="nowhere has no adapter"):
        method.finish({}, {"asked": {"nowhere:Y": torch.zeros(4, 2)}, "local": local})
    with pytest.raises(FedLoRAError, match="the start has none"):
        method.begin(Start({}, frozenset(), frozenset(), extras=asked(model)))


# A stream on a tiny network ---------------------------------------------------------------------------------

SIZE, RANK = 16, 4
SITES = {"deep": (SIZE, SIZE), "wide": (SIZE, SIZE)}
CLIENTS = [ClientInfo("ada", 4, 6), ClientInfo("ben", 2, 6)]


class Net:
    """``tanh`` of one layer into another, with adapters on both; the base is float32."""

    def __init__(self) -> None:
        self.base = {path: random(SIZE, SIZE, seed=place) / 4 for place, path in enumerate(SITES)}

    def run(self, x: Tensor, adapter: AdapterState) -> dict[str, Tensor]:
        """What each layer takes in, and the output under ``out``."""
        W = {path: self.base[path] + u.B @ u.A for path, u in adapter.modules.items()}
        middle = torch.tanh(x @ W["wide"].T)
        return {"wide": x, "deep": middle, "out": middle @ W["deep"].T}

    def learn(self, x: Tensor, y: Tensor, adapter: AdapterState) -> AdapterState:
        """20 steps on B alone."""
        B = {path: u.B.clone().requires_grad_() for path, u in adapter.modules.items()}
        for _ in range(20):
            now = AdapterState({path: LowRank(B[path], u.A) for path, u in adapter.modules.items()})
            gradients = torch.autograd.grad((self.run(x, now)["out"] - y).square().mean(), list(B.values()))
            B = {p: (b - 2.0 * g).detach().requires_grad_() for (p, b), g in zip(B.items(), gradients, strict=True)}
        return AdapterState({path: LowRank(B[path].detach(), u.A) for path, u in adapter.modules.items()})


class Stream:
    """Rounds and freezes as the orchestrator plays them: the base takes the product, and a fresh pair starts."""

    def __init__(self, spec: Any, clients: list[ClientInfo]):
        self.net, self.strategy, self.clients = Net(), compose(spec), clients
        self.round, self.state = 0, dict[str, Any]()
        self.adapter = self._started()

    def _started(self) -> AdapterState:
        return self.strategy.start(initial_adapter(SITES, {}, RANK, seed=self.round), self.round)

    def context(self) -> RoundContext:
        return RoundContext(self.round, RANK, self.round, self.adapter, self.clients)

    def play(self, x: Tensor, y: Tensor) -> None:
        self.round += 1
        ctx, updates = self.context(), []
        for client in self.clients:
            received = hand_out(self.strategy, client, ctx, self.state, self.adapter)
            trained = self.net.learn(x, y, received)
            seen = self.net.run(x, trained)
            extras = {}
            for name, form in self.strategy.broadcast(client, ctx, self.state).items():
                path = name.removeprefix("inputs/").partition(":")[0]
                Y, trace = sketch(seen[path], probes(path, SIZE, 64).float())
                extras[name] = Y if name.endswith(":Y") else trace.reshape(1)
                assert extras[name].shape == form.shape
            updates.append(Contribution(client, 1.0, trained, received, {}, extras))
        outcome = combine(self.strategy, updates, ctx, self.state)
        self.adapter, self.state = outcome.adapter, load_state(save_state(outcome.state))
        self.metrics = outcome.metrics

    def freeze(self) -> None:
        for path, update in self.adapter.modules.items():
            self.net.base[path] = self.net.base[path] + update.B @ update.A
        self.state = self.strategy.freeze(self.adapter, self.context(), self.state)
        self.adapter = self._started()

    def out(self, x: Tensor) -> Tensor:
        return self.net.run(x, self.adapter)["out"]


def test_what_was_learned_of_old_inputs_stays_while_new_ones_are_learned() -> None:
    """One client that measures in every round, so that memory holds the old inputs of both layers as they ended."""
    old, new = random(5, SIZE, seed=5), random(5, SIZE, seed=6)
    wanted_old, wanted_new = random(5, SIZE, seed=7), random(5, SIZE, seed=8)
    moved = {}
    for name, spec in {"inflora": [{"inflora": {"energy": 1.0, "refresh": True}}, "ffa"], "ffa": "ffa"}.items():
        stream = Stream(spec, CLIENTS[:1])
        for _ in range(3):
            stream.play(old, wanted_old)
        stream.freeze()
        before, loss = stream.out(old), (stream.out(new) - wanted_new).square().mean()
        for _ in range(3):
            stream.play(new, wanted_new)
            moved[name] = float((stream.out(old) - before).abs().max())
            assert name == "ffa" or moved[name] < 1e-4, f"after round {stream.round}"
        assert (stream.out(new) - wanted_new).square().mean() < 0.7 * loss
    assert moved["ffa"] > 0.1


def test_the_first_layer_is_left_alone_by_clients_of_any_rank_who_measured_once() -> None:
    stream = Stream([{"inflora": {"energy": 1.0, "refresh": False}}, "ffa"], CLIENTS)
    tasks = [(random(4, SIZE, seed=5 + t), random(4, SIZE, seed=15 + t)) for t in range(3)]
    for place, (x, y) in enumerate(tasks):
        for _ in range(2):
            stream.play(x, y)
            A = stream.adapter.modules["wide"].A
            assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
            for before, _ in tasks[:place]:
                assert float((before @ A.T).abs().max()) < 1e-4
        stream.freeze()
        # four inputs each; the next pair needs 4 of the 16 directions, so the third task's still fit
        assert stream.state["memory"]["wide"].shape == (SIZE, 4 * (place + 1))


def test_memory_leaves_a_direction_for_every_component_of_the_next_pair() -> None:
    stream = Stream([{"inflora": {"energy": 1.0, "refresh": False}}, "ffa"], CLIENTS)
    for task in range(4):
        stream.play(random(10, SIZE, seed=task), random(10, SIZE, seed=20 + task))
        A = stream.adapter.modules["wide"].A
        assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        stream.freeze()
    assert stream.state["memory"]["wide"].shape == (SIZE, SIZE - RANK)


def test_only_the_first_round_of_a_task_asks_and_refresh_asks_in_all() -> None:
    x, y = random(4, SIZE), random(4, SIZE, seed=1)
    for spec, expected in (({"inflora": {"refresh": False}}, [True, False, True, False]), ("inflora", [True] * 4)):
        stream, asks = Stream([spec, "ffa"], CLIENTS), []
        for number in range(4):
            if number == 2:
                stream.freeze()
            ctx = stream.context()
            plan = stream.strategy.plan(ctx, CLIENTS[0], stream.state)
            asks.append(bool(stream.strategy.broadcast(CLIENTS[0], ctx, stream.state)))
            assert (Method.of("input_sketch", rows=64) in plan.methods) == asks[-1]
            before = stream.adapter.modules["wide"].A
            stream.play(x, y)
            assert torch.equal(stream.adapter.modules["wide"].A, before) == (number in (1, 3))
        assert asks == expected


def test_the_rounds_update_goes_on_as_far_as_the_new_rows_reach() -> None:
    stream = Stream([{"inflora": {"refresh": False}}, "ffa"], CLIENTS[:1])
    x, y = random(4, SIZE), random(4, SIZE, seed=1)
    trained = stream.net.learn(x, y, stream.adapter)
    stream.play(x, y)
    for path, update in stream.adapter.modules.items():
        A = update.A
        assert_close(update.B @ A, trained.modules[path].B @ trained.modules[path].A @ A.T @ A, atol=1e-5, rtol=0)
    # four inputs are read in full by four rows, and nothing is forbidden yet
    assert stream.metrics == pytest.approx({"inputs_seen": 1.0, "inputs_free": 1.0, "inputs_read": 1.0}, abs=1e-4)


def test_a_freeze_survives_a_restart_and_changes_nothing_it_was_given() -> None:
    stream = Stream([{"inflora": {"refresh": False}}, "ffa"], CLIENTS)
    stream.play(random(4, SIZE), random(4, SIZE, seed=1))
    given = load_state(save_state(stream.state))
    strategy: Strategy = compose([{"inflora": {"refresh": False}}, "ffa"])
    frozen: State = strategy.freeze(stream.adapter, stream.context(), stream.state)
    same_tree(stream.state, given, "freeze changed the state it was given")
    restored = load_state(save_state(frozen))
    same_tree(restored, frozen, "after a restart")
    assert "inputs" not in frozen
    again = strategy.freeze(stream.adapter, stream.context(), restored)  # nothing was measured in between
    same_tree(again["memory"], frozen["memory"], "a freeze without a round")


# A run ------------------------------------------------------------------------------------------------------


def test_a_run_over_three_tasks_keeps_each_out_of_the_inputs_of_those_before(toy: Callable[..., RunConfig]) -> None:
    config = toy(
        strategy=[{"inflora": {"energy": 0.99, "width": 16, "rows": 8}}, "ffa"],
        continual={"split": 3, "rounds": 2, "loss_labels": "all"},  # a task of one label alone teaches nothing
        rounds=6,
    )
    summary = launch.run(config, quiet)
    assert summary["stream"]["freezes"] == [2, 4]
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert not any(row["failed"] or row["refused"] for row in rows)
    assert ["inputs_read" in row["strategy"] for row in rows] == [True, False] * 3
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    memory, inputs = state.strategy["memory"], state.strategy["inputs"]
    assert [entry.kind for entry in state.ledger.entries] == ["merge", "merge"]
    for path, pair in state.adapter.modules.items():
        M = memory[path]  # type: ignore[index]
        assert 1 <= M.shape[1] <= 32 - 8
        assert float((pair.A @ M).abs().max()) < 1e-5
        assert_close(M.T @ M, torch.eye(M.shape[1]), atol=1e-5, rtol=0)
        assert inputs[f"{path}:Y"].shape == (32, 16)  # type: ignore[index]
