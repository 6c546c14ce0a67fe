"""The guide for clusters names commands, options and files that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fedlora.config import load_config
from orchestrator.cli import app

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line[0] == "fedlora"], ids=" ".join)
def test_every_fedlora_command_parses_and_its_configuration_loads(command: list[str]) -> None:
    node = typer.main.get_command(app)
    _, *arguments = command
    while hasattr(node, "commands"):
        node, arguments = node.commands[arguments[0]], arguments[1:]
    given = node.make_context(node.name, arguments).params
    if "config" in given:
        load_config(ROOT / given["config"], given["overrides"])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line[0] == "ray"], ids=" ".join)
def test_every_option_given_to_ray_is_one_it_has(command: list[str]) -> None:
    ours = command[: command.index("--")] if "--" in command else command
    words = ["job", ours[2]] if ours[1] == "job" else [ours[1]]
    ray = Path(sys.executable).parent / "ray"
    told = subprocess.run([ray, *words, "--help"], capture_output=True, text=True, check=True).stdout
    assert {word for word in ours if word.startswith("--")} <= set(re.findall(r"--[\w-]+", told))


def test_the_job_by_hand_is_a_run_that_loads() -> None:
    (by_hand,) = (line for line in COMMANDS if line[:3] == ["ray", "job", "submit"])
    entry = by_hand[by_hand.index("--") + 1 :]
    assert entry[:4] == ["python", "-m", "orchestrator", "run"]
    overrides = [entry[i + 1] for i, word in enumerate(entry) if word == "--set"]
    assert load_config(ROOT / entry[4], overrides).pool == "ray"
