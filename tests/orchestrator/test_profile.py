"""Where the time of a run went."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.profile import profile
from tests.conftest import quiet, toy_config


def test_phases_sum_to_the_wall_time(toy: Callable[..., RunConfig]) -> None:
    config = toy(rounds=2)
    summary = launch.run(config, quiet)
    found = profile(Path(config.output_dir))
    assert sum(found.phases.values()) == pytest.approx(found.wall_s)
    assert found.wall_s == pytest.approx(summary["wall_s"], rel=0.5)
    assert all(found.phases[phase] > 0 for phase in ("load", "tokenise", "train", "evaluate", "adapters", "commit"))
    assert (found.rounds, found.workers) == (2, 1)
    told = CliRunner().invoke(app, ["profile", config.output_dir])
    assert "2 rounds on 1 worker" in told.output
    data = json.loads(CliRunner().invoke(app, ["profile", config.output_dir, "--json"]).output)
    assert data["phases"].keys() == found.phases.keys()
    assert 0 < data["overhead"] < 1


def test_a_run_that_has_not_ended_has_no_profile(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a finished run"):
        profile(tmp_path)


def test_a_run_may_begin_without_a_look_at_the_model(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    for place, change in (("looked", {}), ("not", {"evaluation__at_start": False})):
        told.append(launch.run(toy_config(tmp_path / place, rounds=1, **change), quiet))
    assert [summary["initial"] is None for summary in told] == [False, True]
    assert told[0]["adapter_sha256"] == told[1]["adapter_sha256"]
    assert "Final accuracy" in (tmp_path / "not" / "report.html").read_text()
    with pytest.raises(ConfigError, match="leave it on"):
        toy_config(tmp_path, continual={"split": 2, "rounds": 2}, rounds=4, evaluation__at_start=False)
