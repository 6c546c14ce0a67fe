"""What the benchmarks share."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("sections")


def test_a_section_replaces_the_one_before_and_nothing_else(
    sections: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Benchmarks\n\n## Aggregation\n\nold\n\n## Other\n\nkept\n")
    monkeypatch.setattr(sections, "README", readme)
    for section in ("## Aggregation\n\nnew\n", "## Aggregation\n\nnewer\n", "## Soak\n\nadded\n"):
        sections.replace_section(section.splitlines()[0], section)
    assert readme.read_text() == ("# Benchmarks\n\n## Aggregation\n\nnewer\n\n## Other\n\nkept\n\n## Soak\n\nadded\n")


def test_text_between_marks_is_replaced_and_nothing_else(sections: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    sections.fill(page, "table", "new")
    sections.fill(page, "table", "newer")
    assert page.read_text() == "before\n<!-- table -->\nnewer\n<!-- /table -->\nafter\n"
