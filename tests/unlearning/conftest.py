"""A run folder as the parts of unlearning see it, without training anything, and keys to sign with."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.unlearning.keys import Keys, fingerprint
from tests.conftest import toy_config

CLIENTS = [f"c{i}" for i in range(4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run with four clients and two tasks."""
    folder = tmp_path / "run"
    config = toy_config(folder, clients__count=4, continual={"split": 2, "rounds": 1}, rounds=2)
    files = {
        "config.yaml": config.to_yaml(),
        "journal.jsonl": json.dumps({"event": "run_opened", "round": 0, "config_sha256": config.sha256()}) + "\n",
        "partition.json": json.dumps([{"client": client} for client in CLIENTS]),
        "labels.json": json.dumps(["animals", "colours", "food", "weather"]),
        "adapter/adapter_model.safetensors": "weights",
        "checkpoints/round-0002/state.json": "{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def officer() -> Ed25519PrivateKey:
    """The key of who may ask and certify."""
    return Ed25519PrivateKey.generate()


@pytest.fixture
def keys(officer: Ed25519PrivateKey) -> Keys:
    """The authorised keys."""
    return {fingerprint(officer.public_key()): officer.public_key()}
