"""The worked example of the unlearning guide works as written."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.stores.files import read_config, read_lines

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "unlearning.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
# what a plan says, by its target
PLANNED = {
    "c3": ["first used in round 4 of 6; a rollback begins from the checkpoint of round 3", "rollback       E1"],
    "food": ["class food: ", "rollback       E1"],
    "rows.jsonl": ["client c0 has rows of these names", "rollback       E1"],
    "task2": ["task task2: first used in round 2", "drop           E1     0 %", "rollback       E1"],
}


@pytest.mark.slow
def test_every_command_of_the_guide_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as written, but with a fifth of its steps
    smoke = (ROOT / "configs" / "smoke.yaml").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text(smoke.replace("max_steps: 10", "max_steps: 2"))
    monkeypatch.chdir(tmp_path)
    run = Path("runs/forget-me")
    for command in COMMANDS:
        if "names.txt" in command:
            assert read_config(run).clients.exclude == ["c3"]
            assert not any("c3" in row["selected"] for row in read_lines(run / "metrics.jsonl"))
            Path("names.txt").write_text(_a_text(run) + "\n")
        if "rows.jsonl" in command:
            Path("rows.jsonl").write_text(json.dumps({"text": _a_text(run)}) + "\n")
        program, *words = shlex.split(command)
        assert program == "fedlora"
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        if "plan" in words:
            for line in PLANNED[words[-1]]:
                assert line in result.output


def _a_text(run: Path) -> str:
    from fedlora.data.partition import open_corpus

    config = read_config(run)
    corpus = open_corpus(config.data, config.clients.count, config.seed)
    text: str = corpus.train[corpus.shards["c0"][0]]["text"]
    return text
