"""Organisations with a file each, and the same federation in one process."""

import json
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.data.sources import BUILTIN, TOY_WORDS
from tests.conftest import toy_config

RANKS = {"amber": 4, "birch": 8, "cedar": 16}


def write_files(folder: Path, names: list[str]) -> dict[str, Path]:
    """The toy topics dealt to so many files, and a test file called ``test``."""
    rows = list(BUILTIN["builtin:toy"]().shuffle(seed=1))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [*names, "test"]
    for place, name in enumerate(parts):
        text = "".join(json.dumps(row) + "\n" for row in rows[place :: len(parts)])
        (folder / f"{name}.jsonl").write_text(text)
    return {name: folder / f"{name}.jsonl" for name in parts}


def served(output_dir: Path, test: Path | None, **changes: Any) -> RunConfig:
    """The server's configuration of a run over Flower."""
    return _config(output_dir, test, **{"pool": "flower", "flower__poll_s": 0.05, "flower__wait_s": 60.0, **changes})


def together(
    output_dir: Path, files: dict[str, Path], ranks: list[int], test: Path | None, **changes: Any
) -> RunConfig:
    """The same run in one process."""
    own = {name: str(path) for name, path in files.items() if name != "test"}
    return _config(output_dir, test, data__client_files=own, clients__ranks=ranks, **changes)


def _config(output_dir: Path, test: Path | None, **changes: Any) -> RunConfig:
    data = {"labels": sorted(TOY_WORDS), "max_length": 32, "test_file": str(test) if test else None}
    settings: dict[str, Any] = {"data": data, "clients": {}, "lora__r": 16, "training__cohort_size": 1, "seed": 3}
    return toy_config(output_dir, **{**settings, **changes})
