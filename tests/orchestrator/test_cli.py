"""The command line: what a user types, and what a user's mistake looks like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel

from fedlora.training.model import BaseSpec, load_base
from orchestrator import cli
from orchestrator.stores.files import read_json
from tests.conftest import toy_config

TOY = ("cat dog", "red blue", "bread soup", "rain snow")


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``fedlora`` with arguments, as the entry point does."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from orchestrator import launch

    folder = tmp_path_factory.mktemp("runs") / "toy"
    launch.run(toy_config(folder), lambda event, fields: None)
    return folder


@pytest.fixture
def config(tmp_path: Path):
    """A configuration file with changed keys; ``write(training__max_steps=1)``."""

    def write(**changes: object) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(toy_config(tmp_path / "run", **changes).to_yaml())
        return path

    return write


def test_run_prints_rounds_and_a_summary_and_leaves_the_documented_files(fedlora, config, tmp_path: Path) -> None:
    result = fedlora("run", config(), "--set", "rounds=2", "--set", "strategy=zero_pad")
    assert result.code == 0
    assert "round   2" in result.out
    assert "zero_pad" in result.out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        "config.yaml",
        "journal.jsonl",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "adapter",
        "report.html",
    }
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["rounds"] == 2
    for key in (
        *("status", "rounds", "final", "best", "bytes_up", "bytes_down", "wall_s", "train_tokens"),
        *("peak_rss_mb", "adapter_sha256", "config_sha256"),
    ):
        assert summary[key], key
    assert set(summary["final"]) >= {"loss", "accuracy"}


def test_fedit_on_mixed_ranks_trains_everyone_at_the_smallest_and_says_so(fedlora, config, tmp_path: Path) -> None:
    result = fedlora("run", config(rounds=1), "--set", "strategy=fedit")
    assert result.code == 0
    assert "every client trains at the smallest, rank 2" in result.out
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_run_json_prints_one_object_per_line(fedlora, config) -> None:
    result = fedlora("run", config(), "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [e["event"] for e in events].count("round_committed") == 3
    assert events[-1]["event"] == "summary"
    assert events[-1]["status"] == "finished"


def test_running_a_finished_run_again_says_so_and_changes_nothing(fedlora, config, tmp_path: Path) -> None:
    path = config(rounds=1)
    assert fedlora("run", path).code == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = fedlora("run", path)
    assert again.code == 0
    assert "already finished; --overwrite runs it again" in again.out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_runs_list_and_show(fedlora, finished: Path) -> None:
    listed = fedlora("runs", "list", finished.parent)
    assert "toy" in listed.out
    assert "finished" in listed.out
    shown = fedlora("runs", "show", finished)
    assert "round   3" in shown.out
    assert fedlora("runs", "list", finished / "nowhere").code == 5
    assert json.loads(fedlora("runs", "show", finished, "--json").out)["summary"]["status"] == "finished"


def test_eval_scores_a_file(fedlora, finished: Path, tmp_path: Path) -> None:
    labels = read_json(finished / "labels.json")
    rows = [{"text": text, "label": label} for text, label in zip(TOY, labels, strict=True)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = fedlora("eval", finished, "--data", tmp_path / "my.jsonl", "--json")
    assert result.code == 0
    assert json.loads(result.out)["examples"] == 4


def test_export_writes_a_loadable_adapter_with_the_runs_own_logits(fedlora, finished: Path, tmp_path: Path) -> None:
    result = fedlora("export", finished, "--to", tmp_path / "out")
    assert result.code == 0, result.err
    assert "largest difference of a logit" in result.out
    labels = tuple(read_json(finished / "labels.json"))
    logits = []
    for folder in (finished / "adapter", tmp_path / "out"):
        base = load_base(BaseSpec("builtin:tiny-bert", "sequence-classification", labels))
        model = PeftModel.from_pretrained(base.model, folder).eval()
        with torch.no_grad():
            logits.append(model(**base.tokenizer(["rain and soup"], return_tensors="pt")).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    assert fedlora("export", finished, "--to", tmp_path / "out").code == 5


def test_export_merge_writes_a_whole_model(fedlora, finished: Path, tmp_path: Path) -> None:
    result = fedlora("export", finished, "--to", tmp_path / "merged", "--merge")
    assert result.code == 0, result.err
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert not [name for name in tensors if "lora" in name]
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_run_with_a_cosine_head_is_scored_and_exported_as_what_it_is(fedlora, config, tmp_path: Path) -> None:
    assert fedlora("run", config(model__head="cosine", rounds=1)).code == 0
    rows = [{"text": text, "label": label} for text, label in zip(TOY, read_labels(tmp_path / "run"), strict=True)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fedlora("eval", tmp_path / "run", "--data", tmp_path / "my.jsonl").code == 0
    result = fedlora("export", tmp_path / "run", "--to", tmp_path / "out")
    assert result.code == 0, result.err  # which compares the logits
    assert "put_cosine_head(model)" in (tmp_path / "out" / "README.md").read_text()
    assert "put_cosine_head(model)" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    merged = fedlora("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge")
    assert merged.code == 2
    assert "transformers knows no cosine head" in merged.err
    assert not (tmp_path / "merged").exists()


def read_labels(run: Path) -> list[str]:
    return read_json(run / "labels.json")


def test_a_run_on_a_bf16_base_merges_into_full_precision(fedlora, config, tmp_path: Path) -> None:
    assert fedlora("run", config(model__dtype="bfloat16", rounds=1)).code == 0
    result = fedlora("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge")
    assert result.code == 0, result.err


@pytest.mark.parametrize("model", ["builtin:tiny-llama"])
def test_a_quantised_language_model_runs_and_exports(fedlora, tmp_path: Path, model: str) -> None:
    content = {
        "model": {"name": model, "quantization": "nf4"},
        "data": {"name": "builtin:chatterbot", "max_train_rows": 60, "max_test_rows": 8, "max_length": 64},
        "clients": {"count": 3, "ranks": [2, 4]},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 1, "learning_rate": 0.01},
        "rounds": 2,
        "threads": 1,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    assert fedlora("run", tmp_path / "c.yaml").code == 0
    assert read_json(tmp_path / "run" / "summary.json")["metric"] == "exact match"
    for flags in ([], ["--merge"]):
        result = fedlora("export", tmp_path / "run", "--to", tmp_path / f"out{len(flags)}", *flags)
        assert result.code == 0, result.err


def test_validate_says_what_a_run_would_be(fedlora, config) -> None:
    result = fedlora("validate", config())
    assert result.code == 0
    assert "2 (2 clients), 4 (2 clients), 8 (2 clients)" in result.out


def test_validate_reports_problems_of_every_kind_at_once(fedlora, tmp_path: Path) -> None:
    content = yaml.safe_load(toy_config(tmp_path / "run").to_yaml())
    content["strategy"] = "flexlor"
    content["data"]["train_file"] = str(tmp_path / "none.jsonl")
    content["lora"]["target_modules"] = ["qury"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    result = fedlora("validate", tmp_path / "c.yaml")
    assert result.code == 2
    assert "did you mean flexlora" in result.err
    assert "no file" in result.err
    assert "did you mean query" in result.err


BAD = {
    "unknown key": (["--set", "training.learning_rat=1"], 2, "did you mean training.learning_rate?"),
    "wrong type": (["--set", "rounds=many"], 2, "rounds is 'many'"),
    "malformed override": (["--set", "rounds"], 2, "expected key=value"),
    "unknown strategy": (["--set", "strategy=flexlor"], 2, "did you mean flexlora?"),
    "option of no strategy": (["--set", "strategy={fedit: {tau: 1}}"], 2, "does not take these options"),
    "missing file": (["--set", "data.train_file=gone.jsonl"], 3, "no file gone.jsonl"),
    "columns": (["--set", "data.train_file={tmp}/columns.jsonl"], 3, "expected messages, prompt and completion"),
    "empty shard": (
        ["--set", "data.partition.alpha=0.01", "--set", "data.partition.min_rows=70"],
        3,
        "Raise alpha, lower clients.count",
    ),
    "rank 0": (["--set", "clients.ranks=0"], 2, "whole numbers of at least 1"),
    "rank above the layer": (["--set", "lora.r=64"], 4, "larger than the layer"),
    "unknown target module": (["--set", "lora.target_modules=[qury]"], 4, "did you mean query"),
    "model that is not there": (["--set", "model.name=no/such"], 4, "cannot load no/such"),
    "label outside the label set": (
        ["--set", "data.labels=[animals, food, weather, colors]"],
        3,
        "did you mean colors",
    ),
    "folder not writable": (["--set", "output_dir=/proc/fedlora"], 5, "cannot write"),
    "folder of something else": (["--set", "output_dir={tmp}"], 5, "is not a run folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_users_mistake_is_one_clear_message_and_the_documented_exit_code(
    fedlora, config, tmp_path: Path, name: str
) -> None:
    flags, code, message = BAD[name]
    (tmp_path / "columns.jsonl").write_text('{"a": 1}\n')
    result = fedlora("run", config(), *(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert result.code == code, result.err
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_client_with_fewer_rows_than_a_batch_trains_on_what_it_has(fedlora, config, tmp_path: Path) -> None:
    path = config(training__per_device_train_batch_size=500, rounds=1)
    assert fedlora("run", path).code == 0


@pytest.mark.parametrize("command", ["resume", "eval", "export"])
def test_commands_on_something_that_is_no_run_name_the_runs_nearby(fedlora, finished: Path, command: str) -> None:
    more = {"eval": ["--data", "x"], "export": ["--to", "x"]}.get(command, [])
    result = fedlora(command, finished.parent / "ty", *more)
    assert result.code == 5
    assert "is not a run folder" in result.err
    assert "toy" in result.err


def test_the_help_does_not_wait_for_torch() -> None:
    assert imported_by("orchestrator.cli") & {"torch", "transformers", "ray", "pydantic"} == set()


def test_the_driver_of_a_run_on_ray_has_no_need_of_what_trains() -> None:
    modules = imported_by("orchestrator.launch", "orchestrator.pools.ray")
    assert modules & {"transformers", "peft", "datasets", "bitsandbytes"} == set()


def imported_by(*names: str) -> set[str]:
    """Every module that a fresh process has after importing these."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
