"""Whole runs under secure sums: the same models as without, after a crash too, and what they refuse."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RoundError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.pools.secure import SecurePool
from orchestrator.rounds import play_round
from orchestrator.stores.files import read_json, read_lines
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config
from tests.orchestrator.test_resume import in_a_process, without_times
from tests.summing import Leaky

SECURE: dict[str, Any] = {"privacy__secure_sum": {"threshold": 0.66, "clip": 1.0}, "strategy": "fedit"}
DP = [{"dp": {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}}, "fedit"]


def _play(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, clients__per_round=4, **SECURE), quiet)


def _resume(folder: str) -> None:
    launch.resume(Path(folder), quiet)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    state = load_latest(folder)[0]
    assert state is not None
    return state.adapter.tensors()


def assert_close(one: Path, other: Path) -> None:
    """Adapters that differ by 1e-6 of their size at most."""
    expected = adapter_of(other)
    for name, tensor in adapter_of(one).items():
        assert float((tensor - expected[name]).norm()) <= 1e-6 * float(expected[name].norm())


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedit"},
        pytest.param({"strategy": "rolora"}, marks=pytest.mark.slow),
        pytest.param({"strategy": [{"server_momentum": {"beta": 0.9}}, "ffa"]}, marks=pytest.mark.slow),
        pytest.param({"strategy": "fedit", "fleet": {"dropout": 0.2}}, marks=pytest.mark.slow),
        pytest.param({"strategy": "fedit", "weighting": "uniform", "training__cohort_size": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_under_secure_sums_ends_with_the_adapter_of_the_plain_run(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    # AdamW's first steps are hardly more than signs, which makes 1e-5 of what the two round differently
    steps = {"training__optim": "sgd", "training__learning_rate": 0.5}
    same = {"clients__ranks": [4], "clients__per_round": 5, **steps, **changes}
    launch.run(toy_config(tmp_path / "plain", **same), quiet)
    summary = launch.run(toy_config(tmp_path / "secure", **{**SECURE, **same}), quiet)
    assert_close(tmp_path / "secure", tmp_path / "plain")
    rows, plain = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("secure", "plain"))
    for row, expected in zip(rows, plain, strict=True):
        assert row["admitted"] == expected["admitted"]
        assert row["train_tokens"] == expected["train_tokens"]
        assert row["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-5)
        assert row["bytes_up"] > 1.5 * expected["bytes_up"]  # masked values take 8 bytes
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in rows)


def test_noise_on_the_sum_is_on_the_same_sum(tmp_path: Path) -> None:
    # half the changes are longer than 0.5: clients shorten them where the server would have
    same = {"strategy": DP, "weighting": "uniform", "clients__per_round": 4}
    launch.run(toy_config(tmp_path / "plain", **same), quiet)
    summary = launch.run(toy_config(tmp_path / "secure", **{**SECURE, **same}), quiet)
    assert_close(tmp_path / "secure", tmp_path / "plain")
    assert summary["privacy"] == read_json(tmp_path / "plain" / "summary.json")["privacy"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_a_process(_play, str(folder), "") == 0
    return folder


# after the sum was opened, and before: the round is repeated under other masks
@pytest.mark.parametrize(
    "failpoint",
    [
        "round.answered:2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("round.planned:2", "commit.begun:3")),
    ],
)
def test_kill_9_and_resume_end_with_the_same_bytes_whatever_masks_were_drawn(
    tmp_path: Path, undisturbed: Path, failpoint: str
) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_play, str(folder), failpoint) == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    ended, expected = (read_json(f / "summary.json") for f in (folder, undisturbed))
    assert ended["adapter_sha256"] == expected["adapter_sha256"]
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed))
    assert without_times(rows) == without_times(expected_rows)


def test_a_round_below_the_threshold_changes_nothing_and_says_why(tmp_path: Path) -> None:
    config = toy_config(tmp_path, **SECURE)
    between = Leaky(LocalPool(config), {"masked": ["c0", "c1", "c2"]})
    pool = SecurePool(between, config)
    fed, base = open_federation(config, pool, quiet)
    start = first_state(config, fed, base)
    state = play_round(fed, start)
    assert state.row is not None
    assert state.row["admitted"] == []
    assert state.row["failed"]["c0"] == "lost on the way"
    assert state.row["failed"]["c5"] == ("there is no secure sum: 3 of 6 clients sent masked updates, and 4 are needed")
    before, after = start.adapter.tensors(), state.adapter.tensors()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    state = play_round(fed, state)
    with pytest.raises(RoundError, match="3 rounds in a row brought no usable update"):
        play_round(fed, state)
    between.lost = {"masked": ["c0", "c1"]}
    state = play_round(fed, state)
    assert state.row is not None
    assert state.row["admitted"] == ["c2", "c3", "c4", "c5"]


def test_validate_says_what_a_sum_needs_and_how_exact_it_is(toy: Callable[..., RunConfig]) -> None:
    facts, problems = validate(toy(**SECURE))
    assert not problems
    assert facts["secure"] == "sums of at least 4 of 6 clients; values are cut to 1 and off by 9e-16 at the most"
    masked, plain = (validate(toy(**fields))[0]["budget"]["round"] for fields in (SECURE, {"strategy": "fedit"}))
    assert masked["up_bytes"] == 2 * plain["up_bytes"]


MIXED = {**SECURE, "strategy": "zero_pad"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "flexlora"}, "flexlora needs each client's own; use fedit, zero_pad, rbla"),
    ({"strategy": "flora"}, "flora needs each client's own"),
    ({"strategy": "hetlora"}, "hetlora needs each client's own"),
    ({"strategy": ["multi_krum", "fedit"]}, "multi_krum looks at single updates, and the server gets their sum alone"),
    ({"strategy": ["clip", "fedit"]}, "clip looks at single updates"),
    ({"strategy": [{"server_momentum": {}}, "trimmed_mean", "ffa"], "clients__ranks": [4]}, "leave trimmed_mean out"),
    ({"strategy": ["scaffold", "fedit"]}, "with scaffold clients send tensors beside their change"),
    ({"strategy": "fedsa", "clients__ranks": [4]}, "fedsa keeps parts on the clients"),
    ({"strategy": "zero_pad"}, "clients train at ranks 2, 4, 8, and changes of different shapes have no sum"),
    ({"clients__per_round": 2}, "a round asks 2 clients, and a sum needs 3"),
    (
        {"schedule__mode": "async", "schedule__buffer": 3, "strategy": ["staleness", "fedit"]},
        "staleness looks at single updates",
    ),
    ({"schedule__over_selection": 1.5, "clients__per_round": 4}, "set it to 1, and a schedule.deadline_s"),
    ({"clients__selection": "oort"}, "the server learns no losses; use uniform, weighted, round_robin or poisson"),
    ({"clients__selection": "power_of_choice"}, "the server learns no losses"),
    ({"wire__up": "int8"}, "masked values look all alike; set wire.up: fp32"),
    ({"wire__top_k": 0.1}, "masked values look all alike; set wire.up: fp32 without top_k"),
    ({"attack": {"name": "sign_flip"}}, "attack is for studying what the server sees of attackers"),
    ({"contributions": {}}, "contributions keeps what single clients sent"),
    (
        {
            "forgetting": [
                {
                    "clients": ["c1"],
                    "first": 2,
                    "last": 2,
                    "loss": "npo",
                    "steps": 1,
                    "learning_rate": 0.1,
                    "max_norm": 1,
                }
            ],
            "clients__exclude": ["c1"],
        },
        "forgetting asks single clients for their changes, and the sum of one is that one",
    ),
    ({"federation__shards": 2}, "fewer clients share a sum"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=lambda value: str(value)[:50])
def test_whatever_needs_single_updates_is_refused_at_validate_with_a_way_out(
    toy: Callable[..., RunConfig], changes: dict[str, Any], reason: str
) -> None:
    _, problems = validate(toy(**{**SECURE, **changes}))
    told = [str(problem) for problem in problems if str(problem).startswith("privacy.secure_sum: ")]
    assert len(told) == 1, problems
    assert reason in told[0]


def test_the_run_refuses_what_validate_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flexlora needs each client's own"):
        launch.run(toy_config(tmp_path / "run", **{**SECURE, "strategy": "flexlora"}), quiet)


@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.1])
def test_a_threshold_of_half_or_less_is_no_threshold(toy: Callable[..., RunConfig], threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy.secure_sum.threshold is"):
        toy(privacy__secure_sum={"threshold": threshold})
