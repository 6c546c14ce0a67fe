"""``fedlora eval --lm-eval``: a task of lm-evaluation-harness with local rows, before and after a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.errors import ConfigError, DataError
from orchestrator import launch
from orchestrator.artifacts import Run, load, open_run
from orchestrator.cli import main
from orchestrator.harness import as_text, score_task
from orchestrator.harness_task import read_task
from tests.conftest import quiet, toy_config

ROOT = Path(__file__).parents[2]
TASK: dict[str, Any] = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The capital of {{country}} is",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROWS = [
    {"country": "France", "choices": ["Rome", "Paris"], "answer": 1},
    {"country": "Italy", "choices": ["Rome", "Paris"], "answer": 0},
    {"country": "Egypt", "choices": ["Cairo", "Havana"], "answer": 0},
    {"country": "Cuba", "choices": ["Cairo", "Havana"], "answer": 1},
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A task file with its rows beside it; keys that are None are left out."""

    def write(text: str = "", **changes: Any) -> Path:
        (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        content = {key: value for key, value in (TASK | changes).items() if value is not None}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(content) + text)
        return tmp_path / "task.yaml"

    return write


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny language model that was trained for one round."""
    folder = tmp_path_factory.mktemp("language") / "run"
    config = toy_config(
        folder,
        model={"name": "builtin:tiny-llama"},
        data={"name": "builtin:chatterbot", "max_length": 48, "max_train_rows": 40, "max_test_rows": 4},
        clients={"count": 2},
        lora={"r": 2, "target_modules": ["q_proj", "v_proj"]},
        training={"learning_rate": 0.05, "max_steps": 4, "per_device_eval_batch_size": 8},
        rounds=1,
    )
    launch.run(config, quiet)
    return open_run(folder)


def test_paths_are_relative_to_the_task_file_then_to_the_current_folder(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(tmp_path / "capitals.jsonl")
    assert read_task(write()).content["dataset_kwargs"] == {"data_files": {"test": rows}}
    (tmp_path / "below").mkdir()
    moved = write().rename(tmp_path / "below" / "task.yaml")
    monkeypatch.chdir(tmp_path)
    assert read_task(moved).content["dataset_kwargs"] == {"data_files": {"test": rows}}


def test_what_is_included_is_read_too_and_the_files_own_keys_win(write: Callable[..., Path], tmp_path: Path) -> None:
    write().rename(tmp_path / "common.yaml")
    (tmp_path / "task.yaml").write_text("include: common.yaml\ntask: towns\n")
    found = read_task(tmp_path / "task.yaml")
    assert (found.name, found.content["doc_to_text"]) == ("towns", TASK["doc_to_text"])


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a dataset of the hub": ({"dataset_path": "allenai/ai2_arc"}, "", "would be fetched from the hub"),
    "a file behind a URL": (
        {"dataset_kwargs": {"data_files": {"test": ["capitals.jsonl", "https://example.org/rows.jsonl"]}}},
        "",
        "reads https://example.org/rows.jsonl; only rows on this machine",
    ),
    "a folder of a bucket": ({"dataset_kwargs": {"data_dir": "s3://rows"}}, "", "only rows on this machine"),
    "a file that is missing": (
        {"dataset_kwargs": {"data_files": "capitols.jsonl"}},
        "",
        "did you mean capitals.jsonl?",
    ),
    "rows that are pickled": ({"dataset_path": "pandas"}, "", "no folder here"),
    "a dataset that is a file": ({"dataset_path": "capitals.jsonl"}, "", "write dataset_path: json"),
    "no rows at all": ({"dataset_path": None}, "", "does not say where its rows are"),
    "no files": ({"dataset_kwargs": None}, "", "names no files"),
    "a function": ({"doc_to_text": None}, "doc_to_text: !function code.text\n", "runs Python (!function code.text)"),
    "another tag of Python": ({}, "description: !!python/name:os.system\n", "is not YAML"),
    "unsafe code": ({"unsafe_code": True}, "", "marked unsafe_code"),
    "a metric of the hub": ({"metric_list": [{"metric": "bleurt", "hf_evaluate": True}]}, "", "code from there"),
    "another library's prompts": ({"use_prompt": "promptsource:all"}, "", "use_prompt"),
    "a group": ({"group": "geography", "task": ["capitals"]}, "", "a group of tasks"),
    "no name": ({"task": None}, "", "does not name its task"),
    "an include of nothing": ({"include": "tsk.yaml"}, "", "did you mean"),
    "an include of itself": ({"include": "task.yaml"}, "", "includes itself"),
    "a line that is no key": ({}, "- but an entry\n", "is not YAML"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_task_file_that_fetches_runs_code_or_is_malformed_is_refused(write: Callable[..., Path], name: str) -> None:
    changes, text, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        read_task(write(text, **changes))
    assert message in str(caught.value)


def test_a_folder_with_a_script_or_a_card_that_names_remote_files_is_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0]))
    task = write(dataset_path="rows", dataset_kwargs=None)
    assert read_task(task).content["dataset_path"] == str(folder)
    (folder / "README.md").write_text("---\nconfigs: [{data_files: 'https://example.org/rows.jsonl'}]\n---\n")
    with pytest.raises(DataError, match="README.md names files that are not on this machine"):
        read_task(task)
    (folder / "rows.py").touch()
    with pytest.raises(DataError, match="dataset script, which is never run"):
        read_task(task)


def test_a_pattern_of_files_is_found_and_one_without_a_file_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    pattern = str(tmp_path / "cap*.jsonl")
    for given in ("cap*.jsonl", pattern):
        task = read_task(write(dataset_kwargs={"data_files": {"test": [given]}}))
        assert task.content["dataset_kwargs"] == {"data_files": {"test": [pattern]}}
    with pytest.raises(DataError, match=r"reads cat\*.jsonl, which is not in"):
        read_task(write(dataset_kwargs={"data_files": "cat*.jsonl"}))


def test_a_file_that_holds_no_keys_is_refused(write: Callable[..., Path]) -> None:
    task = write()
    task.write_text("- capitals\n")
    with pytest.raises(DataError, match="holds list, expected the keys and values of a task"):
        read_task(task)


def test_a_missing_task_file_names_one_nearby(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"no task file .*tsak.yaml; did you mean .*task.yaml\?"):
        read_task(write().with_name("tsak.yaml"))


def test_without_lm_eval_the_extra_is_named(
    language: Run, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[lm-eval\]'"):
        score_task(language, write())


def test_a_classifier_is_refused_before_anything_is_loaded(write: Callable[..., Path], tmp_path: Path) -> None:
    launch.run(toy_config(tmp_path / "run", rounds=1, clients={"count": 2}), quiet)
    with pytest.raises(ConfigError, match="trained a classifier, and lm_eval scores language models"):
        score_task(open_run(tmp_path / "run"), write())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --data ROWS.jsonl and --lm-eval TASK.yaml"),
        (["--data", "x.jsonl", "--lm-eval", "x.yaml"], "one of --data ROWS.jsonl and --lm-eval TASK.yaml"),
        (["--data", "x.jsonl", "--limit", "3"], "--limit goes with --lm-eval"),
        (["--data", "x.jsonl", "--allow-code"], "--allow-code goes with --lm-eval"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedlora", "eval", "run", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, message in capsys.readouterr().err) == (2, True)


def test_a_task_is_scored_before_and_after(language: Run, write: Callable[..., Path]) -> None:
    """By hand: the answer whose bytes are likeliest, by the bare base."""
    pytest.importorskip("lm_eval")
    import torch

    report = score_task(language, write())
    base = load(language)

    def likelihood(question: str, answer: str) -> float:
        asked = base.tokenizer(question)["input_ids"]
        whole = base.tokenizer(f"{question} {answer}")["input_ids"]
        with torch.no_grad():
            told = base.model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        return sum(float(told[place - 1, whole[place]]) for place in range(len(asked), len(whole)))

    def is_right(row: dict[str, Any]) -> bool:
        chances = [likelihood(f"The capital of {row['country']} is", answer) for answer in row["choices"]]
        return chances.index(max(chances)) == row["answer"]

    (score,) = report.scores
    assert (report.task, report.rows, report.fewshot) == ("capitals", 4, 0)
    assert (score.metric, score.higher_is_better) == ("acc", True)
    assert score.before == sum(map(is_right, ROWS)) / 4
    assert 0 <= score.after <= 1
    assert score.before_stderr is not None
    assert as_text(report).splitlines()[1].split() == ["metric", "before", "after", "change", "better"]


PERPLEXITY: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_choice": None,
    "doc_to_target": "{{country}}",
    "metric_list": [{"metric": "word_perplexity", "higher_is_better": False}],
}


def test_the_adapter_and_what_the_ledger_froze_are_in_the_model_that_is_scored_after(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """flora folds every round into the ledger and leaves an adapter of zeros."""
    pytest.importorskip("lm_eval")
    config = toy_config(
        tmp_path / "run",
        model={"name": "builtin:tiny-llama"},
        data={"name": "builtin:chatterbot", "max_length": 48, "max_train_rows": 40, "max_test_rows": 4},
        clients={"count": 2},
        lora={"r": 2, "target_modules": ["q_proj", "v_proj"]},
        training={"learning_rate": 0.05, "max_steps": 4},
        strategy="flora",
        rounds=1,
    )
    launch.run(config, quiet)
    (score,) = score_task(open_run(tmp_path / "run"), write(**PERPLEXITY)).scores
    assert (score.metric, score.higher_is_better) == ("word_perplexity", False)
    assert abs(score.after / score.before - 1) > 1e-3


def test_the_limit_is_the_number_of_rows_and_json_has_the_whole_report(
    language: Run, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    command = [
        "fedlora",
        "eval",
        str(language.folder),
        "--lm-eval",
        str(write(num_fewshot=1)),
        "--limit",
        "3",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    written = capsys.readouterr()
    assert (caught.value.code or 0, written.err) == (0, "")
    report = json.loads(written.out)
    assert (report["task"], report["rows"], report["fewshot"]) == ("capitals", 3, 1)
    assert set(report["scores"][0]) >= {"metric", "before", "after"}


ALONE = """
import socket, sys

def refuse(*_, **__):
    print("asked the network", file=sys.__stderr__)
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
from orchestrator.cli import main
main()
"""


def test_nothing_is_asked_of_the_network(language: Run, write: Callable[..., Path]) -> None:
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-c", ALONE, "eval", str(language.folder), "--lm-eval", str(write())]
    online = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(command, env=online, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("capitals: 4 rows")


CODE = """
def text(row):
    return f"The capital of {row['country']} is"
"""


def test_code_that_is_allowed_gives_the_same_as_the_template_it_stands_for(
    language: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "code.py").write_text(CODE)
    plain = score_task(language, write())
    coded = write("doc_to_text: !function code.text\n", doc_to_text=None)
    assert score_task(language, coded, allow_code=True) == plain
    coded = write("doc_to_text: !function code.txt\n", doc_to_text=None)
    with pytest.raises(DataError, match="names !function code.txt, which cannot be imported"):
        score_task(language, coded, allow_code=True)


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a template that leaves the data": ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "SecurityError"),
    "a metric nobody knows": ({"metric_list": [{"metric": "accc"}]}, "unknown to lm_eval; did you mean acc?"),
    "a column that is not there": ({"doc_to_text": "{{county}}"}, "'county' is undefined"),
    "a split that is not there": ({"test_split": "validation"}, "KeyError"),
    "a key of no task": ({"doc_to_txt": "x"}, "doc_to_txt"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_task_that_lm_eval_cannot_use_is_one_sentence_and_no_model_is_loaded(
    language: Run, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("orchestrator.harness.load", lambda run: pytest.fail("a model was loaded"))
    changes, message = UNUSABLE[name]
    with pytest.raises(DataError) as caught:
        score_task(language, write(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
