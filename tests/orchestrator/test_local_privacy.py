"""Runs whose clients put noise on their own changes: what leaves them, what it costs, and what is refused."""

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.lesson import Learned
from clients.noise import LocalNoise
from clients.private_state import Private
from fedlora.adapter.wire import decode_update
from fedlora.config import LocalPrivacyConfig, RunConfig
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.privacy.accountant import Accountant
from fedlora.protocol import TrainPlan, TrainTask
from orchestrator import launch
from orchestrator.pools.local import LocalPool
from orchestrator.stores.files import read_json, read_lines
from orchestrator.unlearning.doubts import doubts_about
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config
from tests.orchestrator.test_resume import in_a_process, without_times
from tests.pools import tasks_for

DELTA = 1e-5
COST = Accountant(2.0 / 2, 1.0, DELTA)  # two changes are two clips apart
LOCAL: dict[str, Any] = {
    "privacy__local": {"clip": 0.5, "noise_multiplier": 2.0, "delta": DELTA},
    "weighting": "uniform",
    "evaluation__per_client": False,
    "clients__per_round": 4,
}
SEEDED: dict[str, Any] = {**LOCAL, "privacy__local": {**LOCAL["privacy__local"], "noise": "seeded"}}


def _play(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, **SEEDED), quiet)


def _resume(folder: str) -> None:
    launch.resume(Path(folder), quiet)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_a_process(_play, str(folder), "") == 0
    return folder


def test_what_leaves_a_client_is_its_change_under_noise_and_nothing_else_of_its_rows(tmp_path: Path) -> None:
    plain, noisy = LocalPool(toy_config(tmp_path / "plain")), LocalPool(toy_config(tmp_path / "noisy", **LOCAL))
    tasks = tasks_for(plain)
    for before, after in zip(plain.train(tasks), noisy.train(tasks), strict=True):
        assert before.payload is not None
        assert after.payload is not None
        clear, sent = decode_update(before.payload), decode_update(after.payload)
        assert (dict(sent.metrics), sent.num_examples) == ({}, 1)
        values = torch.cat([tensor.flatten() for tensor in sent.delta.values()])
        assert sent.delta.keys() == clear.delta.keys()
        # noise of standard deviation 2 * 0.5 on every value, beside which the clipped change is small
        assert abs(float(values.std()) - 1) < 5 / (2 * len(values)) ** 0.5
    # a task that is done again is answered with the same bytes, from a secret of the client's own
    first, again = (list(noisy.train(tasks[:2])) for _ in range(2))
    assert [reply.payload for reply in first] == [reply.payload for reply in again]
    secrets = sorted((tmp_path / "noisy" / "private" / "noise").glob("*/secret"))
    assert len({path.read_bytes() for path in secrets}) == len(secrets) == len(tasks)
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    other = LocalPool(toy_config(tmp_path / "other", **LOCAL))
    assert next(iter(other.train(tasks[:1]))).payload != first[0].payload


def test_the_summary_has_the_epsilon_of_every_client_by_how_often_it_was_asked(undisturbed: Path) -> None:
    summary, rows = read_json(undisturbed / "summary.json"), read_lines(undisturbed / "metrics.jsonl")
    asked = [client for row in rows for client in row["selected"]]
    spent = summary["local_privacy"]
    assert spent["clients"] == {client: COST.epsilon(asked.count(client)) for client in sorted(set(asked))}
    assert spent["epsilon"] == max(spent["clients"].values()) > min(spent["clients"].values())
    assert all(row["train"] is None and row["train_tokens"] == 0 and row["admitted"] for row in rows)
    assert "Local epsilon" in (undisturbed / "report.html").read_text(encoding="utf-8")
    events = {line["event"]: line for line in read_lines(undisturbed / "journal.jsonl")}
    assert events["local_privacy_planned"]["text"].startswith(f"epsilon {COST.epsilon(3):.3f} at delta 1e-05")


def test_kill_9_and_resume_end_with_the_same_bytes_where_noise_is_seeded(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    assert in_a_process(_play, str(folder), "round.aggregated:2") == -signal.SIGKILL
    assert in_a_process(_resume, str(folder)) == 0
    ended, expected = (read_json(f / "summary.json") for f in (folder, undisturbed))
    assert ended["adapter_sha256"] == expected["adapter_sha256"]
    assert ended["local_privacy"] == expected["local_privacy"]
    rows, expected_rows = (read_lines(f / "metrics.jsonl") for f in (folder, undisturbed))
    assert without_times(rows) == without_times(expected_rows)


def test_noise_that_is_secret_leaves_a_doubt_about_replays(undisturbed: Path, toy: Callable[..., RunConfig]) -> None:
    secret, seeded = (doubts_about(undisturbed, toy(**changes), [], 0) for changes in (LOCAL, SEEDED))
    assert set(secret) - set(seeded) == {"privacy.local: noise is secret, and clients of another run draw other noise"}


@pytest.mark.slow
def test_noise_goes_under_the_masks_of_a_secure_sum(tmp_path: Path) -> None:
    same = {**SEEDED, "strategy": "fedit", "training__optim": "sgd", "training__learning_rate": 0.5}
    plain = launch.run(toy_config(tmp_path / "plain", **same), quiet)
    launch.run(toy_config(tmp_path / "secure", **same, privacy__secure_sum={"clip": 100.0}), quiet)
    rows, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("secure", "plain"))
    assert all(row["train"] is None for row in rows)
    for row, other in zip(rows, expected, strict=True):
        assert row["eval"]["loss"] == pytest.approx(other["eval"]["loss"], rel=1e-5)
    assert read_json(tmp_path / "secure" / "summary.json")["local_privacy"] == plain["local_privacy"]


def test_validate_says_what_it_costs_a_client(toy: Callable[..., RunConfig]) -> None:
    facts, problems = validate(toy(**LOCAL, rounds=9))
    assert not problems
    assert facts["local"] == (
        f"epsilon {COST.epsilon(9):.3f} at delta 1e-05 for a client after 9 tasks, {COST.epsilon(6):.3f} after 6, as"
        " many as is usual"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weighting": "examples"}, "set weighting: uniform"),
        ({"evaluation__per_client": True}, "set evaluation.per_client: false"),
        ({"strategy": ["scaffold", "zero_pad"]}, "with scaffold clients send tensors beside their change"),
        ({"strategy": "fedsa"}, "personal parts are scored by the clients"),
        ({"clients__selection": "oort"}, "goes by losses, which clients keep"),
        ({"federation__shards": 2}, "set shards to 1"),
        ({"continual": {"split": 2, "rounds": 2}, "rounds": 4}, "leave continual out"),
    ],
)
def test_whatever_else_would_tell_of_rows_is_refused(
    toy: Callable[..., RunConfig], changes: dict[str, Any], reason: str
) -> None:
    _, problems = validate(toy(**{**LOCAL, **changes}))
    assert [reason in str(problem) for problem in problems if "privacy.local" in str(problem)] == [True], problems


def test_too_little_noise_to_count_is_no_noise(toy: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"privacy.local.noise_multiplier is '0.1'"):
        toy(privacy__local={"noise_multiplier": 0.1})


def test_a_client_with_noise_of_its_own_sends_nothing_beside_its_change(tmp_path: Path) -> None:
    noise = LocalNoise(tmp_path, LocalPrivacyConfig(), seed=0)
    beside = Learned({}, {"sketch": torch.ones(1)}, Private(), 1, {})
    with pytest.raises(FedLoRAError, match="asked for more than that"):
        noise.protect(TrainTask(1, "c0", TrainPlan(2), b"", "", 0), beside)
