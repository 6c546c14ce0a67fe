"""Shared by all tests: small federations, and where the real data is if it is there."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# processes share the cores: numpy keeps to one, and Ray's workers do not stand behind everything else
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch

from fedlora.config import RunConfig, parse_config

torch.set_num_threads(1)

_ended = 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests: a file stays in one, and all that starts Ray does."""
    for item in items:
        together = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(together))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how it ended."""
    global _ended
    _ended = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without tearing anything down: ray, torch and arrow in one process have crashed while doing it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # still has to tell the process that started it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_ended)


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def toy_config(output_dir: Path | str, **changes: Any) -> RunConfig:
    """Six clients at ranks 2, 4 and 8 on the toy topics; dotted names change single keys."""
    content: dict[str, Any] = {
        "name": "toy",
        "model": {"name": "builtin:tiny-bert"},
        "data": {"name": "builtin:toy", "max_length": 32, "partition": {"method": "dirichlet", "alpha": 1.0}},
        "clients": {"count": 6, "ranks": [2, 4, 8]},
        "lora": {"r": 8, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 0.01, "max_steps": 2, "per_device_train_batch_size": 8},
        "rounds": 3,
        "threads": 1,
        "output_dir": str(output_dir),
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_config(content)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., RunConfig]:
    """``toy_config`` writing to this test's folder."""
    return lambda **changes: toy_config(tmp_path / "run", **changes)


@pytest.fixture
def clinc150() -> Path:
    """The CLINC150 files; the test is skipped where they are absent."""
    folder = SHARED_DATA / "clinc150"
    if not folder.is_dir():
        pytest.skip(f"needs the CLINC150 files in {folder}")
    return folder


def quiet(event: str, fields: Any) -> None:
    """A listener that hears nothing."""
