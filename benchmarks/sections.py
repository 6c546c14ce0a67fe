"""Where benchmarks keep results: a line per finished cell, a section of a page by its heading, text between marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

README = Path(__file__).parent / "README.md"


def replace_section(heading: str, section: str) -> None:
    """Put a section into the README, in the place of the one before if there is one.

    Args:
        heading: its first line, such as ``## Overhead``.
        section: the whole of it, with the heading.
    """
    before, _, rest = README.read_text(encoding="utf-8").partition(heading + "\n")
    after = rest.find("\n## ")
    kept = "" if after < 0 else rest[after:]
    README.write_text(f"{before.rstrip()}\n\n{section}{kept}", encoding="utf-8")


def fill(page: Path, mark: str, text: str) -> None:
    """Put text between ``<!-- mark -->`` and ``<!-- /mark -->`` of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")
    _, _, after = rest.partition(f"<!-- /{mark} -->")
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{after}", encoding="utf-8")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by key; a line that was cut off by a crash is run again."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError):
            continue
    return rows
