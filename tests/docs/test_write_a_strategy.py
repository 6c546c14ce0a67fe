"""The guide for authors of strategies does what it says, from a folder that is not the repository."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.aggregation.conformance import LAWS
from fedlora.plugins import unload_plugins
from orchestrator import cli, launch
from orchestrator.verdicts import check_file, passed
from tests.conftest import quiet, toy_config

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "write-a-strategy.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


STRATEGY = blocks("python")[-1]
COMMANDS = [command for block in blocks("sh") for command in block.splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """The strategy at the end of the guide, in a file of its own."""
    path = tmp_path / "my_strategy.py"
    path.write_text(STRATEGY)
    yield path
    unload_plugins()


def toy_run(file: Path, pool: str = "local", **changes: Any) -> dict[str, Any]:
    config = toy_config(file.parent / pool, pool=pool, plugins=[str(file)], strategy="tempered", rounds=1, **changes)
    return launch.run(config, quiet)


def test_the_guide_ends_with_a_strategy_of_15_lines() -> None:
    assert GUIDE.rstrip().endswith("```")
    assert STRATEGY in GUIDE[-len(STRATEGY) - 10 :]
    assert len([line for line in STRATEGY.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_strategy_and_wrapper_of_the_guide_passes_every_law(number: int, file: Path) -> None:
    file.write_text(blocks("python")[number])
    verdicts = check_file(str(file))
    assert passed(verdicts), verdicts


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_works_as_written(
    command: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("orchestrator.pools.local.cores", lambda: 1)  # other tests share the cores
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code, capsys.readouterr().err


def test_the_guide_names_every_law() -> None:
    table = GUIDE.partition("## Laws")[2].partition("\n## ")[0]
    named = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")]
    assert named[1:] == [law.name for law in LAWS]


def test_the_strategy_of_the_guide_trains_in_this_process(file: Path) -> None:
    assert toy_run(file)["strategy"] == "tempered"


@pytest.mark.ray
@pytest.mark.slow
def test_the_strategy_of_the_guide_trains_on_ray_with_the_same_scores(file: Path) -> None:
    local = toy_run(file)
    ray = toy_run(file, pool="ray", ray__workers=1)
    assert ray["final"]["loss"] == pytest.approx(local["final"]["loss"], rel=1e-4)
