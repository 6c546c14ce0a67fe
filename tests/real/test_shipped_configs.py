"""The shipped configurations reach what the README says of them. Minutes each: make test-all."""

from pathlib import Path

import pytest

from fedlora.config import load_config
from orchestrator import launch
from tests.conftest import quiet

CONFIGS = Path(__file__).parents[2] / "configs"


def test_smoke_learns_more_than_chance(tmp_path: Path) -> None:
    summary = launch.run(load_config(CONFIGS / "smoke.yaml", ["threads=1", f"output_dir={tmp_path}/run"]), quiet)
    assert summary["final"]["accuracy"] > 0.4


@pytest.mark.slow
def test_quickstart_reaches_93_percent_on_bbc_news(tmp_path: Path) -> None:
    summary = launch.run(load_config(CONFIGS / "quickstart.yaml", [f"output_dir={tmp_path}/run"]), quiet)
    assert summary["final"]["accuracy"] >= 0.93


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_clinc150_reaches_80_percent(tmp_path: Path, clinc150: Path) -> None:
    files = [f"data.{split}_file={clinc150}/{split}.jsonl.gz" for split in ("train", "test")]
    config = load_config(CONFIGS / "clinc150.yaml", [*files, f"output_dir={tmp_path}/run"])
    assert config.rounds <= 30
    assert launch.run(config, quiet)["final"]["accuracy"] >= 0.80


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_in_nf4_lowers_the_answer_loss_by_a_tenth(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "smollm2_qlora.yaml", [f"output_dir={tmp_path}/run"])
    assert config.rounds == 3
    summary = launch.run(config, quiet)
    assert summary["final"]["loss"] <= 0.9 * summary["initial"]["loss"]
