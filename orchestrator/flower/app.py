"""The ServerApp that plays a whole run, and the files of a Flower app around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, RunFolderError

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedlora-app"
version = "1.0.0"
description = "A federation of LoRA adapters: rows, base models and personal parts stay on the nodes"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["server_app.py", "client_app.py", "config.yaml"]

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
config = "config.yaml"
rounds = 0
"""
SERVER_APP = '''\
"""Plays the run of config.yaml; what it does is in orchestrator/flower/app.py."""

from pathlib import Path

from orchestrator.flower.app import make_app

app = make_app(Path(__file__).parent)
'''
CLIENT_APP = '''\
"""What a SuperNode runs: the app that is installed with fedlora."""

from clients.flower import app

__all__ = ["app"]
'''
CONFIG = """\
# flwr run . NAME   (see docs/flower.md)
name: flower
model:
  name: builtin:tiny-bert     # the server's copy; every node names its own with --node-config
data:
  labels: [animals, colours, food, weather]   # the same on every node
  max_length: 32
  test_file: null             # rows of the server's own, to score on; null: every node holds some of its rows out
lora:
  r: 16                       # the largest rank a node may train at
  target_modules: [query, value]
training:
  learning_rate: 0.01
  max_steps: 4
  per_device_train_batch_size: 8
strategy: fedex_het
rounds: 5
schedule:
  deadline_s: 600             # a round closes with what it has
pool: flower
flower:
  nodes: 2                    # organisations the run waits for
output_dir: {output_dir}
"""
POLICY = """\
# What this node lets a server ask of it. The keys and what they mean: docs/flower.md
max_rank: 16
max_steps: 200
max_rounds: 100
strategies: [fedex_het, fedex, flexlora, fedit, zero_pad]
methods: []
min_cohort: 2
require_dp: false
require_secure_sum: false
require_local: false
tell_labels: false
tell_errors: false
# base_fingerprints: [the server's summary.json says which]
"""


def make_app(folder: Path) -> Any:
    """The ServerApp of a folder with a configuration. Repeating ``flwr run`` goes on from the last commit.

    Args:
        folder: has the file that ``config`` of the app's run configuration names.
    """
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from orchestrator.pools.flower import GRID

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedlora.config import load_config
        from fedlora.errors import FedLoRAError
        from orchestrator import launch
        from orchestrator.console import JsonScreen

        told = context.run_config
        overrides = [f"rounds={told['rounds']}"] if told.get("rounds") else []
        token = GRID.set(grid)
        try:
            config = load_config(folder / str(told.get("config", "config.yaml")), [*overrides, "pool=flower"])
            summary = launch.run(config, JsonScreen())
        except FedLoRAError as error:
            raise RuntimeError(str(error)) from None  # a sentence, which flwr log and flwr ls show
        finally:
            GRID.reset(token)
        JsonScreen()("summary", summary)

    return app


def write_app(folder: Path) -> list[Path]:
    """Write a Flower app to a new or empty folder.

    Returns:
        The files.

    Raises:
        RunFolderError: if it cannot be written, or something is there already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty; choose a new folder")
        contents = {
            "pyproject.toml": PYPROJECT,
            "server_app.py": SERVER_APP,
            "client_app.py": CLIENT_APP,
            "config.yaml": CONFIG.format(output_dir=(folder / "run").absolute()),
            "client_policy.yaml": POLICY,
            ".gitignore": "run/\n",
        }
        written = [folder / name for name in contents]
        for path in written:
            path.write_text(contents[path.name], encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror or error}") from error
    return written


def check_installed() -> None:
    """Raise ``ConfigError`` where Flower is not installed."""
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise ConfigError("flower: Flower is not installed; install it with pip install 'fedlora[flower]'")
