"""What was taken out of a run: ``exports.jsonl``. Who has to remove something can only look where he knows of."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.stores.files import JsonLines, file_sha256, read_lines

EXPORTS = "exports.jsonl"


def note_export(folder: Path, target: Path, kind: str, round: int) -> None:
    """Add a line for what was written to ``target``.

    Args:
        folder: of the run.
        kind: ``adapter`` or ``merged``.
        round: of the state that was exported.

    Raises:
        RunFolderError: if the line cannot be written.
    """
    files = sorted(target.rglob("*.safetensors"))
    weights = {path.relative_to(target).as_posix(): file_sha256(path) for path in files}
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": time, "path": str(target.resolve()), "kind": kind, "round": round, "weights": weights}
    with closing(JsonLines(folder / EXPORTS)) as log:
        log.append(line)


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """Every export that is known, oldest first: time, path, kind, round, and the SHA-256 of its weights."""
    return read_lines(folder / EXPORTS)
