"""The image and the compose file name only what exists: files, versions, services, commands and their options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fedlora.config import load_config
from orchestrator.cli import app

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "docker" / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def compose() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert isinstance(content, dict)
    return content


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def pinned(image: str) -> bool:
    """``name:1.2`` or longer; ``latest`` and ``3`` move."""
    return bool(re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w.-]+)?", image))


# The image -------------------------------------------------------------------------------------------------------


def test_the_dockerfile_has_known_instructions_and_starts_from_a_pinned_slim_python() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    (base,) = arguments_of("FROM")
    assert pinned(base)
    assert base.startswith("python:3.11.")
    assert "-slim" in base


def test_whatever_is_copied_exists_and_is_not_kept_outside_by_the_dockerignore() -> None:
    sources = [source for line in arguments_of("COPY") for source in shlex.split(line)[:-1]]
    ignore = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(sources)


def test_versions_in_the_dockerfile_are_those_of_the_constraints() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    installs = [line for line in arguments_of("RUN") if "pip install" in line]
    exact = [found for line in installs for found in re.findall(r"([\w.-]+)==(\S+)", line)]
    assert exact == [("torch", constraints["torch"])]
    assert all("--constraint constraints.txt" in line or "==" in line for line in installs)
    assets = re.search(r"^ASSETS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert assets
    assert assets[1] in re.sub(r"\s+", " ", installs[-1])


def test_the_image_runs_fedlora_and_not_as_root() -> None:
    order = [name for name, _ in instructions()]
    assert arguments_of("USER")[-1] not in {"root", "0"}
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert "RUN" not in order[order.index("USER") :]
    assert arguments_of("ENTRYPOINT") == ['["fedlora"]']


# The cluster -----------------------------------------------------------------------------------------------------


def test_services_refer_to_volumes_services_and_files_that_exist() -> None:
    volumes = compose()["volumes"]
    for name, service in SERVICES.items():
        assert pinned(service["image"]), name
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in volumes
        for other, needed in service.get("depends_on", {}).items():
            assert needed == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other], f"{name} waits for the health of {other}"
        if build := service.get("build"):
            context = (ROOT / "docker" / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]).is_file()
    assert {*SERVICES} == {"redis", "head", "worker", "quickstart"}
    assert SERVICES["worker"]["deploy"]["replicas"] == 2


def test_the_image_has_the_version_of_the_package() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    ours = {service["image"] for name, service in SERVICES.items() if name != "redis"}
    assert ours == {f"fedlora:{version[1]}"}


def test_head_and_workers_share_the_folder_of_the_run_and_find_each_other() -> None:
    for name in ("head", "worker", "quickstart"):
        assert SERVICES[name]["volumes"] == ["runs:/runs"]
        assert SERVICES[name]["environment"]["FEDLORA_REDIS"] == "redis://redis:6379/0"
    port = SERVICES["head"]["command"][SERVICES["head"]["command"].index("--port") + 1]
    assert f"head:{port}" in SERVICES["worker"]["command"]
    assert f"head:{port}" in SERVICES["worker"]["healthcheck"]["test"]


def test_the_job_api_which_runs_anybodys_code_is_published_to_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8265:8265"]


@pytest.mark.parametrize("command", ["start", "health-check"])
def test_every_option_given_to_ray_is_one_it_has(command: str) -> None:
    given = [SERVICES[name]["command"] for name in ("head", "worker")]
    given += [SERVICES["worker"]["healthcheck"]["test"][2:]]
    lines = [line for line in given if line[0] == command]
    assert lines
    ray = Path(sys.executable).parent / "ray"
    told = subprocess.run([ray, command, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[\w-]+", told))
    assert {option for line in lines for option in line if option.startswith("--")} <= known


def test_the_quickstart_submits_a_configuration_that_loads_on_ray() -> None:
    name, *arguments = SERVICES["quickstart"]["command"]
    group = typer.main.get_command(app)
    parsed = group.commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]
    assert parsed["address"] == "http://head:8265"
    config = load_config(ROOT / parsed["config"], parsed["overrides"])
    assert config.pool == "ray"
    assert config.output_dir == "/runs/quickstart"


def test_the_commands_of_the_readme_name_files_and_services_that_exist() -> None:
    readme = (ROOT / "docker" / "README.md").read_text()
    commands = [shlex.split(line) for line in readme.splitlines() if line.startswith("    docker ")]
    assert commands
    for command in commands:
        files = [command[i + 1] for i, word in enumerate(command) if word == "--file"]
        assert all((ROOT / file).is_file() for file in files), command
        assert not any(word.endswith(".yaml") and not (ROOT / word).is_file() for word in command), command
        if "--profile" in command:
            assert command[command.index("--profile") + 1] in SERVICES["quickstart"]["profiles"]
            assert command[-1] in SERVICES
