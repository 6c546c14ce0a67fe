"""The guide for Flower names commands, options, keys and rules that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from clients.policy import Policy
from clients.silo import SiloSettings
from fedlora.config import FlowerConfig
from orchestrator.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "flower.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]
PASSED_ON = {"superlink": "flower-superlink", "supernode": "flower-supernode"}


def options_of(*command: str) -> set[str]:
    program = Path(sys.executable).parent / command[0]
    told = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[\w-]+", told))


@pytest.mark.parametrize("command", [line for line in COMMANDS if line[0] == "fedlora"], ids=" ".join)
def test_every_fedlora_command_parses(command: list[str]) -> None:
    node = typer.main.get_command(app)
    _, *arguments = command
    while hasattr(node, "commands"):
        node, arguments = node.commands[arguments[0]], arguments[1:]
    node.make_context(node.name, list(arguments))
    if node.name in PASSED_ON:
        assert {word for word in arguments if word.startswith("--")} <= options_of(PASSED_ON[node.name])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line[0].startswith("fl")], ids=" ".join)
def test_every_option_given_to_flower_is_one_it_has(command: list[str]) -> None:
    words = {"flwr run": 2, "flwr supernode": 3}.get(" ".join(command[:2]), 1)
    assert {word for word in command if word.startswith("--")} <= options_of(*command[:words])


def test_what_nodes_say_of_themselves_in_the_guide_is_what_they_have_to_say() -> None:
    told = [line[line.index("--node-config") + 1] for line in COMMANDS if "--node-config" in line]
    assert len(told) == 3
    for text in told:
        SiloSettings.model_validate(dict(word.split("=") for word in shlex.split(text)))


def test_every_rule_of_the_policy_and_every_key_is_told() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(Policy.model_fields)
    assert {f"flower.{key}" for key in FlowerConfig.model_fields} <= set(re.findall(r"`(flower\.\w+)`", TEXT))
