"""The shipped configurations reach what the README says of them. Minutes each: make test-all."""

from pathlib import Path

import pytest

from fedlora.config import load_config
from orchestrator import launch
from tests.conftest import SHARED_DATA, quiet

TEXTS = ("dbpedia", "amazon", "agnews", "sst2")
INSTRUCTIONS = ("sciq", "commonsenseqa", "emotion", "relation")
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


def files_of(folder: str, names: tuple[str, ...]) -> list[str]:
    """Overrides that give every task of a stream its local files; the test is skipped where they are absent."""
    root = SHARED_DATA / folder
    if not root.is_dir():
        pytest.skip(f"needs the files in {root}")
    return [
        f"continual.tasks.{name}.data.{kind}_file={root}/{name}/{kind}.jsonl.gz"
        for name in names
        for kind in ("train", "test")
    ]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["clinc150_stream", "task_free"])
def test_streams_of_intents_end_better_than_their_last_task_alone(name: str, tmp_path: Path, clinc150: Path) -> None:
    files = [f"data.{split}_file={clinc150}/{split}.jsonl.gz" for split in ("train", "test")]
    config = load_config(CONFIGS / f"{name}.yaml", [*files, f"output_dir={tmp_path}/run"])
    stream = launch.run(config, quiet)["stream"]
    assert stream["freezes"]
    assert stream["metrics"]["ACC"] > 1 / len(stream["tasks"])  # what a model that knows its last task alone would get


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_text_stream_learns_every_task(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "text_stream.yaml", [*files_of("text_stream", TEXTS), f"output_dir={tmp_path}/run"])
    stream = launch.run(config, quiet)["stream"]
    learned = [row[task] for task, row in enumerate(stream["rows"])]
    assert all(score > chance for score, chance in zip(learned, (1 / 14, 1 / 5, 1 / 4, 1 / 2), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_instruction_stream_in_nf4_keeps_its_frozen_tasks_beside_the_base(tmp_path: Path) -> None:
    files = files_of("instruct_stream", INSTRUCTIONS)
    config = load_config(CONFIGS / "instruct_stream.yaml", [*files, f"output_dir={tmp_path}/run"])
    summary = launch.run(config, quiet)
    assert summary["stream"]["freezes"] == [2, 4, 6]
    assert summary["final"]["probe_perplexity"] < 2 * summary["initial"]["probe_perplexity"]
