"""Where the time of a run went."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.config import RunConfig
from fedlora.errors import RunFolderError
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.profile import profile
from tests.conftest import quiet


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
