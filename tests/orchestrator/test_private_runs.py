"""Runs under differential privacy: what they say they cost, where the budget ends them, and what they refuse."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.aggregation import compose
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.privacy.accountant import Accountant
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.privacy import spending
from orchestrator.rounds import play_round
from orchestrator.stores.files import read_json, read_lines
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config
from tests.orchestrator.test_resume import in_a_process, without_times

DELTA = 1e-3
COST = Accountant(1.0, 2 / 6, DELTA)  # Poisson draws of two of six clients
SMALL: dict[str, Any] = {
    "weighting": "uniform",
    "clients__selection": "poisson",
    "clients__per_round": 2,
    "training__max_steps": 1,
    "data__max_test_rows": 8,
    "evaluation__every": 3,
}
FORGET = {"clients": ["c1"], "first": 2, "last": 2, "loss": "npo", "steps": 1, "learning_rate": 0.1, "max_norm": 1.0}


def dp(**options: Any) -> list[Any]:
    return [{"dp": {"clip": 0.5, "noise_multiplier": 1.0, "delta": DELTA, **options}}, "zero_pad"]


def for_rounds(rounds: int) -> float:
    """A budget that so many rounds fit into."""
    return (COST.epsilon(rounds) + COST.epsilon(rounds + 1)) / 2


def _play(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, strategy=dp(budget=for_rounds(4)), rounds=9, **SMALL), quiet)


def _resume(folder: str) -> None:
    launch.resume(Path(folder), quiet)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    _play(str(folder), "")
    return folder


def test_the_budget_ends_a_run_as_finished_and_it_says_so_everywhere(undisturbed: Path) -> None:
    summary, rows = read_json(undisturbed / "summary.json"), read_lines(undisturbed / "metrics.jsonl")
    journal = read_lines(undisturbed / "journal.jsonl")
    assert (summary["status"], summary["rounds"]) == ("finished", 4)
    assert summary["privacy"] == {
        "epsilon": COST.epsilon(4),
        "delta": DELTA,
        "unit": "client",
        "rounds": 4,
        "planned": 2,
        "clip": 0.5,
        "noise_multiplier": 1.0,
        "sampling": 2 / 6,
        "budget": for_rounds(4),
        "fits": 4,
        "ended_by_budget": True,
    }
    assert [row["strategy"]["epsilon"] for row in rows] == [COST.epsilon(number) for number in (1, 2, 3, 4)]
    assert [bool(row["eval"]) for row in rows] == [False, False, True, True]  # the last one is scored as any last one
    events = {line["event"]: line for line in journal}
    assert (events["privacy_planned"]["fits"], events["budget_spent"]["epsilon"]) == (4, COST.epsilon(4))
    committed = [line["strategy"]["epsilon"] for line in journal if line["event"] == "round_committed"]
    assert committed == [row["strategy"]["epsilon"] for row in rows]
    assert "the budget of" in (undisturbed / "report.html").read_text(encoding="utf-8")


def test_a_run_that_the_budget_ended_is_finished_and_plays_no_further_round(undisturbed: Path) -> None:
    heard: list[str] = []
    summary = launch.resume(undisturbed, lambda event, fields: heard.append(event))
    assert heard == ["already_finished"]
    assert summary["rounds"] == 4


@pytest.mark.slow  # each point is a run in two processes
@pytest.mark.parametrize(
    "failpoint",
    ["round.aggregated:2", "commit.renamed:3", "round.started:4", "commit.renamed:4", "finish.summarised:4"],
)
def test_kill_9_anywhere_and_the_budget_ends_the_run_after_the_same_rounds_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, failpoint: str
) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_play, str(folder), failpoint) == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    ended, expected = (read_json(f / "summary.json") for f in (folder, undisturbed))
    assert (ended["privacy"], ended["adapter_sha256"]) == (expected["privacy"], expected["adapter_sha256"])
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed))
    assert without_times(rows) == without_times(expected_rows)
    states = [load_latest(f)[0] for f in (folder, undisturbed)]
    assert [state and state.strategy["rounds"] for state in states] == [4, 4]


def test_a_poisson_draw_of_nobody_moves_the_model_by_noise_and_counts(tmp_path: Path) -> None:
    config = toy_config(tmp_path, strategy=dp(), rounds=5, seed=2, **{**SMALL, "clients__per_round": 1})
    pool = LocalPool(config)
    fed, base = open_federation(config, pool, quiet)
    state, drawn = first_state(config, fed, base), []
    while state.round < fed.rounds:
        before, state = state, play_round(fed, state)
        assert state.row is not None
        drawn.append(len(state.row["selected"]))
        if not drawn[-1]:
            after = state.adapter.tensors()
            assert not any(torch.equal(after[name], tensor) for name, tensor in before.adapter.tensors().items())
    assert drawn == [0, 0, 2, 2, 1]
    assert state.strategy["rounds"] == 5


def test_validate_says_what_the_rounds_cost_and_how_many_fit(toy: Callable[..., RunConfig]) -> None:
    facts, problems = validate(toy(strategy=dp(budget=for_rounds(4)), rounds=9, **SMALL))
    assert not problems
    assert facts["privacy"] == (
        f"epsilon {COST.epsilon(9):.3f} at delta 0.001 after 9 rounds of 2 of 6 clients, drawn with chance 0.333; the"
        f" budget of {for_rounds(4):g} ends the run after 4, at {COST.epsilon(4):.3f}"
    )


@pytest.mark.parametrize("changes", [{"clients__selection": "uniform"}, {"fleet": {}}])
def test_without_poisson_draws_by_a_real_clock_every_client_counts_as_asked(
    toy: Callable[..., RunConfig], changes: dict[str, Any]
) -> None:
    config = toy(strategy=dp(), **{**SMALL, **changes})
    facts, problems = validate(config)
    assert not problems
    assert facts["privacy"].startswith(f"epsilon {Accountant(1.0, 1.0, DELTA).epsilon(3):.3f} at delta 0.001")
    assert "all counted as asked; only clients.selection: poisson" in facts["privacy"]


def test_shards_are_refused_before_one_is_played(toy: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="federation.shards: what .* spends is counted for one run of everybody"):
        launch.run(toy(strategy=dp(), federation={"shards": 2}, **SMALL), quiet)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weighting": "examples"}, "set weighting: uniform; how many rows a client has is private too"),
        ({"clients__selection": "oort"}, "clients.selection: oort may go by what clients have or report"),
        ({"clients__selection": {"power_of_choice": {"d": 3}}}, "clients.selection: power_of_choice may go by"),
        ({"clients__selection": "weighted"}, "use poisson, uniform or round_robin"),
        ({"schedule": {"over_selection": 1.5}}, "schedule.over_selection lets a fast client push another one out"),
        ({"schedule": {"quorum": 0.5}}, "schedule.quorum would tell how many answered; set it to 0"),
        ({"schedule": {"late": "keep", "deadline_s": 5}}, "use synchronous rounds with late: drop"),
        ({"contributions": {}}, "contributions keeps what clients sent"),
        ({"wire": {"up": "int8", "error_feedback": True}}, "wire.error_feedback has clients send what was clipped"),
        ({"continual": {"split": 2, "rounds": 1}, "rounds": 2}, "the rounds of a stream are not counted"),
        ({"forgetting": [FORGET], "clients__exclude": ["c1"]}, "forgetting asks named"),
        ({"strategy": dp(delta=0.5)}, "dp.delta of 0.5 allows one of 6 clients to be told outright; set it below 0.17"),
        ({"strategy": dp(budget=0.01)}, "one round costs an epsilon of .*, and dp.budget is 0.01; raise noise"),
    ],
)
def test_what_the_accounting_does_not_cover_is_refused_with_a_way_out(
    toy: Callable[..., RunConfig], changes: dict[str, Any], reason: str
) -> None:
    config = toy(**{"strategy": dp(), **SMALL, **changes})
    with pytest.raises(ConfigError, match=reason):
        spending(compose(config.strategy), config, 6)
