"""What a run folder holds that a target may have left traces in, by path and SHA-256."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from orchestrator.stores.files import file_sha256

# records of what was done, and what is drawn from the rest; everything else counts, strange files included
_RECORDS = ("journal.jsonl", "exports.jsonl", "summary.json", "report.html")


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every artefact of a run by its path in the folder.

    Raises:
        RunFolderError: if a file cannot be read.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        plain = re.sub(r"^shards/\d+/", "", name)
        if path.is_file() and plain not in _RECORDS and not plain.startswith(("unlearning/", "lease.")):
            found[name] = file_sha256(path)
    return found


def still_there(purged: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """A sentence for every purged content that a folder holds, under whatever name."""
    was = {digest: path for path, digest in purged.items() if digest}
    return [
        f"{path} holds what was purged as {was[digest]} (SHA-256 {digest[:12]})"
        for path, digest in sorted(present.items())
        if digest in was
    ]
