"""The contribution log: what it gives back, what it keeps, and what a crash leaves of it."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapter.rank import revive
from fedlora.aggregation import compose
from fedlora.aggregation.cohort import Pending
from fedlora.aggregation.combine import apply_delta, combine, make_delta
from fedlora.aggregation.trials import Start, cohort, cold, train
from fedlora.config import ContributionsConfig
from fedlora.errors import ConfigError, RunFolderError, UnlearningError
from fedlora.protocol import PARTS, TrainPlan
from orchestrator import launch
from orchestrator.checkpoint import checkpoints, commit, load
from orchestrator.contributions import copy_log, keep_round, log_file, read_log
from orchestrator.flights import Flight
from orchestrator.inbox import Used
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_json
from orchestrator.unlearning.again import context, fresh_pair, members_of
from orchestrator.unlearning.lineage import lineage
from tests.conftest import quiet, toy_config
from tests.unlearning.test_rollback import asked, config_of


def used_of(start: Start, strategy: Any) -> list[Used]:
    """Updates as they wait in a round's inbox."""
    found = []
    for update in train(strategy, start, cohort(strategy)):
        delta = make_delta(update.received, update.trained, PARTS)
        pending = Pending(update.client, update.weight, lambda u=update: u, lambda u=update, d=delta: (u.received, d))
        flight = Flight(start.ctx.round, update.client.id, TrainPlan(update.client.rank), str(update.client.rank), 0)
        found.append(Used(pending, update.metrics, flight, 0.0))
    return found


def keep(folder: Path, number: int, **settings: Any) -> list[Used]:
    """Log one round of four clients, always the same but for its number."""
    strategy = compose("flexlora")
    start = cold(strategy)
    used = used_of(start, strategy)
    ctx = replace(start.ctx, round=number)
    state = RunState(number - 1, start.adapter, {"kept": torch.ones(2), "deep": {"n": 3}}, "", "")
    keep_round(folder, ContributionsConfig(**settings), lambda: None, ctx, state, used)
    return used


def test_a_round_comes_back_as_the_strategy_saw_it(tmp_path: Path) -> None:
    used = keep(tmp_path, 1)
    found = read_log(tmp_path).open(1)
    assert found.strategy["deep"] == {"n": 3}
    assert torch.equal(found.strategy["kept"], torch.ones(2))
    for came, sent in zip(found.updates, used, strict=True):
        update = sent.update.load()
        assert (came.client, came.weight, dict(came.metrics)) == (update.client, update.weight, dict(update.metrics))
        assert sent.update.change is not None
        trained = apply_delta(update.received, sent.update.change()[1]).tensors()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in came.trained.tensors().items())
        assert all(torch.equal(t, update.received.tensors()[name]) for name, t in came.received.tensors().items())


def test_only_so_many_rounds_stay_and_only_every_so_many_are_kept(tmp_path: Path) -> None:
    for number in range(1, 6):
        keep(tmp_path / "short", number, keep_rounds=2)
        keep(tmp_path / "thin", number, every=2)
    assert list(read_log(tmp_path / "short").entries) == [4, 5]
    assert sorted(path.name for path in log_file(tmp_path / "short", 4).parent.iterdir()) == [
        *("manifest.json", "round-0004.zip", "round-0005.zip")
    ]
    assert list(read_log(tmp_path / "thin").entries) == [2, 4]
    keep(tmp_path / "short", 4, keep_rounds=2)  # played again, since round 5 was never committed
    assert list(read_log(tmp_path / "short").entries) == [4]


def test_float16_takes_half_the_place_of_the_changes_and_rounds_them(tmp_path: Path) -> None:
    keep(tmp_path / "whole", 1)
    keep(tmp_path / "half", 1, dtype="float16")
    whole, half = (read_log(tmp_path / name).open(1) for name in ("whole", "half"))
    assert (whole.dtype, half.dtype) == ("float32", "float16")
    for left, right in zip(whole.updates, half.updates, strict=True):
        for name, tensor in left.trained.tensors().items():
            change = tensor - left.received.tensors()[name]
            # half precision has 11 bits
            assert float((right.trained.tensors()[name] - tensor).norm()) <= 2**-11 * float(change.norm()) + 1e-6
    sizes = [log_file(tmp_path / name, 1).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < sizes[0]


def test_what_is_not_as_it_was_written_is_one_clear_error(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    path = log_file(tmp_path, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(UnlearningError, match="round-0001.zip is truncated or altered .* restore it, or use rollback"):
        read_log(tmp_path).open(1)
    path.unlink()
    with pytest.raises(UnlearningError, match=r"round-0001.zip is missing; the contribution log has no round 1"):
        read_log(tmp_path).open(1)
    manifest = path.with_name("manifest.json")
    manifest.write_text(json.dumps({"rounds": {"one": {}}}))
    with pytest.raises(UnlearningError, match=r"manifest.json is altered or incomplete"):
        read_log(tmp_path)
    copy_log(tmp_path, tmp_path / "copy", 9)  # a replay does not need it
    assert not (tmp_path / "copy").exists()


def test_a_stream_has_no_log() -> None:
    with pytest.raises(ConfigError, match="the rounds of a stream cannot be aggregated again"):
        toy_config("nowhere", continual={"split": 2, "rounds": 1}, rounds=2, contributions={})


def run_of(folder: Path, rule: Any = "flexlora", **changes: Any) -> Path:
    settings = {"contributions": {}, "training__max_steps": 1, "evaluation__per_client": False, **changes}
    launch.run(config_of(folder, strategy=rule, **settings), quiet)
    return folder


def test_a_log_does_not_change_the_run_and_every_round_can_be_done_again(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    run_of(tmp_path / "plain", contributions=None)
    expected = {(state := load(path)).round: state for path in checkpoints(folder)}
    plain = load(checkpoints(tmp_path / "plain")[-1]).adapter.tensors()
    assert all(torch.equal(plain[name], tensor) for name, tensor in expected[4].adapter.tensors().items())
    config, log = read_config(folder), read_log(folder)
    for number in (1, 2, 3, 4):
        logged = log.open(number)
        ctx = context(config, logged, revive(logged.adapter, fresh_pair(config, logged)), members_of(folder))
        found = combine(compose(config.strategy), logged.updates, ctx, logged.strategy).adapter.tensors()
        came = expected[number].adapter.tensors()
        assert all(torch.equal(tensor, found[name]) for name, tensor in came.items())
    client = asked(folder)[1][0]
    assert any(line.startswith("  contribution log: rounds ") for line in lineage(folder, client=client))


def same_log(folder: Path, whole: Path) -> None:
    names = sorted(path.name for path in (whole / "contributions").iterdir())
    assert names == ["manifest.json", "round-0003.zip", "round-0004.zip"]
    assert sorted(path.name for path in (folder / "contributions").iterdir()) == names
    for name in names:
        assert (folder / "contributions" / name).read_bytes() == (whole / "contributions" / name).read_bytes()
    assert read_json(folder / "summary.json")["adapter_sha256"] == read_json(whole / "summary.json")["adapter_sha256"]


def test_a_round_that_was_logged_and_not_committed_is_logged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = run_of(tmp_path / "whole", contributions={"keep_rounds": 2}), tmp_path / "run"

    def full(place: Path, state: RunState, *rest: Any) -> None:
        if state.round == 3:
            raise RunFolderError("no space left")
        commit(place, state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(launch, "commit", full)
        with pytest.raises(RunFolderError, match="no space left"):
            run_of(folder, contributions={"keep_rounds": 2})
    assert list(read_log(folder).entries) == [2, 3]
    launch.resume(folder, quiet)
    same_log(folder, whole)


def _killed(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    run_of(Path(folder), contributions={"keep_rounds": 2})


@pytest.mark.slow
@pytest.mark.parametrize("place", ["contributions.written:3", "contributions.listed:3", "commit.renamed:3"])
def test_kill_9_between_the_log_and_the_commit_leaves_the_same_log(tmp_path: Path, place: str) -> None:
    whole, folder = run_of(tmp_path / "whole", contributions={"keep_rounds": 2}), tmp_path / "run"
    process = get_context("spawn").Process(target=_killed, args=(str(folder), place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    launch.resume(folder, quiet)
    same_log(folder, whole)
