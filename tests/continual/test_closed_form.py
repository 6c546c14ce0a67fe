"""A stream whose optimum is known: linear least squares, with inputs of different tasks in orthogonal subspaces.

A frozen random layer carries two branches. The teacher of task t adds a low-rank change that is seen on the inputs of
task t alone, so the sum of all changes is the joint optimum and costs no task anything. Clients have shares of the
rows and ranks of their own; rounds, aggregation, freezes and scores are those of every run.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.ledger import frozen
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.wire import decode_adapter, encode_update
from fedlora.aggregation.combine import make_delta
from fedlora.continual.course import Course
from fedlora.continual.plateau import POLICIES
from fedlora.protocol import ClientInfo, EvalResult, EvalTask, Reply, TrainTask
from fedlora.seeds import derive_seed
from orchestrator.progress import Progress
from orchestrator.rounds import play_round
from orchestrator.state import RunState
from tests.scripted import federation

INPUTS, TASKS, DIMENSIONS = 32, 4, 8
SITES = {"left": (24, INPUTS), "right": (16, INPUTS)}
RANKS = (2, 4, 8, 2, 4)
ROWS = (12, 20, 30, 16, 24)  # per task: more than a task's dimensions, so every client's problem has one solution
ENOUGH = 1e-3


@dataclass(frozen=True)
class Problem:
    """What is learned.

    Attributes:
        rank: of each teacher.
        stride: dimensions between the subspaces of two tasks; below ``DIMENSIONS`` they overlap.
        whitened: every client's inputs have the same covariance, a multiple of one.
    """

    rank: int = 2
    stride: int = DIMENSIONS
    whitened: bool = False
    seed: int = 0

    def drawn(self, what: str, *shape: int) -> Tensor:
        draw = torch.Generator().manual_seed(derive_seed(self.seed, 0, "", what))
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def basis(self, task: int) -> Tensor:
        """[in, dimensions], orthonormal: where the inputs of a task lie."""
        whole = torch.linalg.qr(self.drawn("inputs", INPUTS, INPUTS)).Q
        return whole[:, self.stride * task :][:, :DIMENSIONS]

    def base(self, path: str) -> Tensor:
        return self.drawn(f"base {path}", *SITES[path]) / INPUTS**0.5

    def teacher(self, path: str, task: int) -> Tensor:
        """The change that task asks for: singular values rank, rank - 1, ..., 1."""
        left = torch.linalg.qr(self.drawn(f"left {path} {task}", SITES[path][0], self.rank)).Q
        right = torch.linalg.qr(self.drawn(f"right {path} {task}", DIMENSIONS, self.rank)).Q
        sizes = torch.arange(self.rank, 0, -1, dtype=torch.float64)
        return left @ torch.diag(sizes) @ right.T @ self.basis(task).T

    def wanted(self, path: str, task: int) -> Tensor:
        """The weights that make the targets of a task: the base and all teachers so far."""
        return self.base(path) + sum(self.teacher(path, earlier) for earlier in range(task + 1))

    def inputs(self, client: str, task: int, rows: int) -> Tensor:
        """[in, rows]."""
        seen = self.drawn(f"rows {client} {task}", DIMENSIONS, rows)
        if self.whitened:
            seen = torch.linalg.qr(seen.T).Q.T
        return self.basis(task) @ seen

    def error(self, weights: dict[str, Tensor], task: int) -> float:
        """Of the change that a task asks for, the share that is missing or wrong on its inputs."""
        basis = self.basis(task)
        wrong = [((weights[path] - self.wanted(path, task)) @ basis).square().sum() for path in SITES]
        asked = [(self.teacher(path, task) @ basis).square().sum() for path in SITES]
        return float((sum(wrong) / sum(asked)) ** 0.5)


def solved(target: Tensor, inputs: Tensor, rank: int) -> LowRank:
    """The ``D`` of at most this rank that minimises ``|target - D @ inputs|``, and of those the smallest.

    Source: reduced-rank regression (Izenman, 1975).
    """
    inverse = torch.linalg.pinv(inputs)
    fit = target @ inverse
    left = torch.linalg.svd(fit @ inputs, full_matrices=False).U[:, :rank]
    return LowRank(left, left.T @ fit)


def descended(start: LowRank, target: Tensor, inputs: Tensor, drop: bool, steps: int = 200) -> LowRank:
    """Gradient descent on ``|target - B A inputs|^2 / (2 rows)``.

    Args:
        drop: begin without the part of A that this client's inputs do not see. It stays in A otherwise: no gradient
            reaches it, and once B is not 0 it acts on the inputs of other tasks.
    """
    B, A = start.B.clone(), start.A.clone()
    if drop:
        A = A @ inputs @ torch.linalg.pinv(inputs)
    covariance, cross = inputs @ inputs.T / inputs.shape[1], target @ inputs.T / inputs.shape[1]
    steepest = float(torch.linalg.eigvalsh(covariance)[-1])
    for _ in range(steps):
        gradient = B @ A @ covariance - cross
        step = 1 / (
            2 * steepest * (B.square().sum() + A.square().sum())
        )  # the sum bounds the curvature of both factors
        B, A = B - step * gradient @ A.T, A - step * B.T @ gradient
    return LowRank(B, A)


class LinearPool:
    """Clients that solve their least squares: ``closed``, by ``descent``, or by descent that is ``careless``."""

    workers = 1

    def __init__(self, problem: Problem, how: str, members: Sequence[ClientInfo]):
        self._problem, self._how = problem, how
        self._rows = {member.id: [rows for rows, _ in member.stages] for member in members}
        self.trained: set[tuple[str, int]] = set()

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        for task in tasks:
            assert task.stage is not None
            self.trained.add((task.client, task.stage))
            yield Reply(task.client, self._update(task, task.stage))

    def _update(self, task: TrainTask, stage: int) -> bytes:
        problem, rows = self._problem, self._rows[task.client][stage]
        received = decode_adapter(task.adapter)
        inputs = problem.inputs(task.client, stage, rows)
        loss, modules = 0.0, {}
        for path, pair in received.to(torch.float64).modules.items():
            target = (problem.wanted(path, stage) - self._frozen(path, task)) @ inputs
            loss += float((target - pair.B @ pair.A @ inputs).square().sum()) / rows
            if self._how == "closed":
                found = solved(target, inputs, pair.rank)
            else:
                found = descended(pair, target, inputs, drop=self._how == "descent")
            modules[path] = found
        trained = AdapterState(modules).to(torch.float32)
        delta = make_delta(received, trained, task.plan.send)
        metrics = {"loss": loss, "first_loss": loss, "tokens": rows}
        return encode_update(task.client, task.round, task.received, delta, rows, metrics, {})

    def _frozen(self, path: str, task: TrainTask | EvalTask) -> Tensor:
        """The base as it is now."""
        return self._problem.base(path) + product(frozen(task.ledger).modules, path)

    def abandon(self, clients: Collection[str]) -> None:
        pass

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        results = []
        for task in tasks:
            assert task.stage is not None
            adapter = decode_adapter(task.adapter).modules
            weights = {path: self._frozen(path, task) + product(adapter, path) for path in SITES}
            error = self._problem.error(weights, task.stage)
            results.append(EvalResult(task.subject, error, 1, int(error < ENOUGH), 1))
        return results


def product(modules: Any, path: str) -> Tensor:
    if path not in modules:
        return torch.zeros(SITES[path], dtype=torch.float64)
    return modules[path].B.double() @ modules[path].A.double()


@dataclass(frozen=True, eq=False)
class Played:
    """How a stream ended.

    Attributes:
        states: after every round.
        errors: of every task at the end.
        pool: that played it.
    """

    states: list[RunState]
    errors: list[float]
    pool: LinearPool


def weights_after(problem: Problem, state: RunState) -> dict[str, Tensor]:
    total, pair = state.ledger.total(), state.adapter.modules
    return {path: problem.base(path) + product(total, path) + product(pair, path) for path in SITES}


def play(
    problem: Problem,
    how: str = "closed",
    tasks: int = TASKS,
    rounds: int = 3,
    freeze: Any = ("boundaries", {}),
    ranks: Sequence[int] = RANKS,
) -> Played:
    """A whole stream, every round of it by the round loop."""
    # the fourth client has nothing of the second task
    stages = [tuple((0 if (c, t) == (3, 1) else rows, 0) for t in range(tasks)) for c, rows in enumerate(ROWS)]
    members = [
        ClientInfo(f"c{place}", rank, sum(rows for rows, _ in own), stages=own)
        for place, (rank, own) in enumerate(zip(ranks, stages, strict=True))
    ]
    pool, rank = LinearPool(problem, how, members), max(ranks)
    fed = federation(
        pool,
        members,
        strategy="flexlora",
        fresh=initial_adapter(SITES, {}, rank, 0),
        rank=rank,
        rounds=tasks * rounds,
        course=Course(tuple(f"task{t}" for t in range(tasks)), (rounds,) * tasks),
        freezer=POLICIES.create(freeze[0], **freeze[1]),
    )
    state = RunState(0, fed.strategy.start(fed.fresh, 0), {}, "config", "base", stream=Progress())
    states = []
    for _ in range(fed.rounds):
        state = play_round(fed, state)
        states.append(state)
    weights = weights_after(problem, state)
    return Played(states, [problem.error(weights, task) for task in range(tasks)], pool)


@pytest.mark.parametrize(("how", "rounds"), [("closed", 2), ("descent", 4)])
def test_a_stream_of_tasks_in_orthogonal_subspaces_reaches_the_joint_optimum(how: str, rounds: int) -> None:
    problem = Problem()
    played = play(problem, how, rounds=rounds)
    assert max(played.errors) < ENOUGH
    last = played.states[-1]
    # the four subspaces are the whole space, so not only the function is that of the joint optimum but the weights
    weights = weights_after(problem, last)
    for path in SITES:
        optimum = problem.wanted(path, TASKS - 1)
        assert (weights[path] - optimum).norm() < ENOUGH * (optimum - problem.base(path)).norm()
    assert last.stream is not None
    assert last.stream.freezes == tuple(rounds * (task + 1) for task in range(TASKS - 1))
    # every task is right from its own end on
    assert [row[: place + 1] for place, row in enumerate(last.stream.scores.rows)] == [
        (1.0,) * (place + 1) for place in range(TASKS)
    ]
    assert ("c3", 1) not in played.pool.trained
    assert len(played.pool.trained) == len(RANKS) * TASKS - 1


def test_on_inputs_that_overlap_a_later_task_undoes_an_earlier_one() -> None:
    problem = Problem(stride=DIMENSIONS // 2)
    played = play(problem)
    # half of a task's directions are those of the next, whose teacher asks for another change there
    assert min(played.errors[:-1]) > 0.1
    assert played.errors[-1] < ENOUGH
    learned = [state for state in played.states if state.round % 3 == 0]
    for task, state in enumerate(learned):  # each was learned in its own time
        assert problem.error(weights_after(problem, state), task) < ENOUGH


def test_freezing_alone_protects_nothing() -> None:
    # the same orthogonal inputs; but a random A sees all directions, so a B that has learned acts on earlier tasks
    problem = Problem()
    played = play(problem, "careless", tasks=2, rounds=3)
    assert problem.error(weights_after(problem, played.states[2]), 0) < ENOUGH
    assert played.errors[0] > 0.1


def test_what_does_not_fit_a_pair_is_learned_by_the_next_one() -> None:
    # singular values 4, 3, 2, 1 at rank 2: the first pair leaves sqrt(5 / 30), the second nothing
    problem = Problem(rank=4, whitened=True)
    options: dict[str, Any] = {"tasks": 1, "rounds": 4, "ranks": (2,) * 5}
    kept = play(problem, freeze=("never", {}), **options)
    frozen_each_round = play(problem, freeze=("period", {"rounds": 1}), **options)
    left = (5 / 30) ** 0.5
    for state in kept.states:
        assert problem.error(weights_after(problem, state), 0) == pytest.approx(left, rel=1e-4)
    first, second, *_ = frozen_each_round.states
    assert problem.error(weights_after(problem, first), 0) == pytest.approx(left, rel=1e-4)
    assert problem.error(weights_after(problem, second), 0) < 1e-5  # float32 factors
    assert frozen_each_round.errors[0] < 1e-5


def test_a_small_client_biases_a_mean_of_products_and_freezing_takes_the_bias_out() -> None:
    # a client of rank 2 cannot hold a teacher of rank 4, so the mean of all is never the teacher, however many rounds
    # pass; a pair that starts from what is left learns what was missing
    problem = Problem(rank=4)
    kept = play(problem, tasks=1, rounds=4, freeze=("never", {}))
    frozen_each_round = play(problem, tasks=1, rounds=4, freeze=("period", {"rounds": 1}))
    assert kept.errors[0] > 0.05
    assert frozen_each_round.errors[0] < ENOUGH
