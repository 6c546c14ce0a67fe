"""Finding runs on disk and saying how they stand."""

from pathlib import Path
from typing import Any

from fedlora.errors import RunFolderError
from orchestrator.stores.files import read_config, read_json, read_lines


def find(folder: Path) -> list[Path]:
    """Run folders directly inside ``folder``, by name.

    Raises:
        RunFolderError: if there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}; runs are written to the configuration's output_dir")
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def describe(folder: Path) -> dict[str, Any]:
    """Name, status, progress and latest scores of one run.

    Raises:
        RunFolderError: if this is not a run folder.
    """
    config = read_config(folder)
    rows = read_lines(folder / "metrics.jsonl")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    scored = next((row["eval"] for row in reversed(rows) if row["eval"]), None) or {}
    return {
        "run": folder.name,
        "status": summary.get("status", "unfinished"),
        "round": rows[-1]["round"] if rows else 0,
        "rounds": config.rounds,
        "strategy": config.strategy_name,
        "model": config.model.name,
        "accuracy": scored.get("accuracy"),
        "loss": scored.get("loss"),
    }
