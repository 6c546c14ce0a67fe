"""Classes and data files, taken out by the names of their rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.config import RunConfig, parse_config
from fedlora.continual.stream import open_stream
from fedlora.data.partition import Corpus
from fedlora.errors import DataError, UnlearningError
from fedlora.unlearning.keys import authorised, new_key
from fedlora.unlearning.request import hashed
from orchestrator import launch
from orchestrator.cli import app
from orchestrator.stores.files import read_config, read_json
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.rollback import without
from orchestrator.unlearning.targets import rows_in_file, rows_with_labels
from tests.conftest import quiet
from tests.unlearning.test_rollback import adapter_of, config_of


def corpus_of(config: RunConfig) -> Corpus:
    return open_stream(config.data, config.continual, config.clients.count, config.seed).corpus


def labels_held(corpus: Corpus) -> set[str]:
    """Labels of all rows that clients train on or hold out."""
    held = [row for own in (corpus.shards, corpus.heldout) for rows in own.values() for row in rows]
    return set(corpus.train.select(held)["label"][:])


def test_a_class_is_every_row_with_its_label_and_the_label_set_stays(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    names = rows_with_labels(config, ["food"])
    smaller = corpus_of(without(config, records=names))
    assert labels_held(smaller) == {"animals", "colours", "weather"}
    assert smaller.labels == corpus_of(config).labels
    with pytest.raises(UnlearningError, match="the run has no label foot; did you mean food"):
        rows_with_labels(config, ["foot"])
    with pytest.raises(UnlearningError, match="no client has a row with the label food"):
        rows_with_labels(without(config, records=names), ["food"])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_class_of_a_stream_is_looked_for_where_its_task_reads_its_rows(tmp_path: Path) -> None:
    tasks = []
    for task in ("a", "b"):
        rows = [
            {"key": f"{task}{n}", "sentence": f"{task} says {n}", "label": "yn"[n % 2], "who": "pq"[n // 2 % 2]}
            for n in range(24)
        ]
        files = {kind: str(write(tmp_path / f"{task}.{kind}.jsonl", rows)) for kind in ("train", "test")}
        data = {"train_file": files["train"], "test_file": files["test"], "text_column": "sentence"}
        tasks.append({"name": task, "data": {**data, "id_column": "key"}, "prefix": True})
    content = {"model": {"name": "builtin:tiny-bert"}, "data": {}, "continual": {"tasks": tasks, "rounds": 1}}
    config = parse_config({**content, "clients": {"count": 2}})
    assert rows_with_labels(config, ["b/n"]) == hashed(f"b{n}" for n in range(24) if n % 2)
    wanted = write(tmp_path / "wanted.jsonl", [{"key": "a7", "sentence": "a says 7"}])
    assert rows_in_file(config, wanted) == hashed(["a7"])
    assert labels_held(corpus_of(without(config, records=hashed(f"b{n}" for n in range(1, 24, 2))))) == {
        *("a/y", "a/n", "b/y")
    }


def test_a_data_file_is_read_as_a_training_file_is(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    file = write(tmp_path / "rows.jsonl", [{"text": "cat dog", "label": "animals"}, {"text": "rain", "label": "x"}])
    assert rows_in_file(config, file) == hashed(["cat dog", "rain"])
    named = config.model_copy(update={"data": config.data.model_copy(update={"id_column": "key"})})
    with pytest.raises(DataError, match="the training rows have no column key"):
        rows_in_file(named, file)
    with pytest.raises(DataError, match="expected messages, prompt and completion, text"):
        rows_in_file(config, write(tmp_path / "other.jsonl", [{"sentence": "cat"}]))
    with pytest.raises(DataError, match=r"no file .*row\.jsonl; did you mean"):
        rows_in_file(config, tmp_path / "row.jsonl")


def taken_out(folder: Path, keys: Path, *words: str) -> Any:
    """What the command answers."""
    common = ["--key", str(keys / "officer"), "--authorised", str(keys)]
    return CliRunner().invoke(app, ["unlearn", "run", str(folder), *words, *common])


def test_a_class_is_taken_out_of_a_run(tmp_path: Path) -> None:
    folder, keys = tmp_path / "run", tmp_path / "keys"
    new_key(keys / "officer")
    config = config_of(folder, rounds=2)
    launch.run(config, quiet)
    told = CliRunner().invoke(app, ["unlearn", "plan", str(folder), "--class", "food"]).output
    names = rows_with_labels(config, ["food"])
    assert f"class food: {len(names)} names of rows" in told
    assert "drop" not in told
    result = taken_out(folder, keys, "--class", "food")
    assert result.exit_code == 0, result.output
    assert "R1: class food taken out at level E1" in result.output
    left = without(config, records=names).model_copy(update={"output_dir": str(tmp_path / "control")})
    launch.run(left, quiet)
    assert adapter_of(folder) == adapter_of(tmp_path / "control")
    statement = read_json(folder / "unlearning" / "R1.json")["statement"]
    assert (statement["request"]["kind"], statement["request"]["target"]) == ("class", ["food"])
    assert statement["verdict"]["records_left_out"] == len(names)
    assert "The labels stay in the model's label set, so that nothing changes its shape." in statement["residual_risk"]
    assert verify_certificate(folder, "R1", authorised([keys])) == []
    again = taken_out(folder, keys, "--class", "food", "--now")
    assert "class food was already erased by R1" in str(again.exception)
    assert "unknown label foot; did you mean food" in str(taken_out(folder, keys, "--class", "foot").exception)


@pytest.mark.slow
def test_the_rows_of_a_file_are_taken_out_and_only_their_hashes_stay(tmp_path: Path) -> None:
    folder, keys = tmp_path / "run", tmp_path / "keys"
    new_key(keys / "officer")
    launch.run(config_of(folder, rounds=2), quiet)
    corpus = corpus_of(read_config(folder))
    rows = corpus.train.select(corpus.shards["c0"][:2]).to_list()
    result = taken_out(folder, keys, "--data", str(write(tmp_path / "rows.jsonl", rows)))
    assert result.exit_code == 0, result.output
    assert read_config(folder).data.forget == list(hashed(row["text"] for row in rows))
    assert not any(rows[0]["text"].encode() in path.read_bytes() for path in (folder / "unlearning").iterdir())
    strange = taken_out(folder, keys, "--data", str(write(tmp_path / "strange.jsonl", [{"text": "nobody's"}])))
    assert "is refused: no client has a row of these names" in str(strange.exception)


def test_a_class_without_which_there_is_no_run_is_refused_and_the_run_stays(tmp_path: Path) -> None:
    folder, keys = tmp_path / "run", tmp_path / "keys"
    new_key(keys / "officer")
    launch.run(config_of(folder, rounds=2, continual={"split": 2, "rounds": 1}), quiet)
    before = adapter_of(folder)
    both = taken_out(folder, keys, *(f"--class={label}" for label in ("animals", "colours", "food", "weather")))
    assert "without these rows the run cannot be played: continual: no client has rows of task" in str(both.exception)
    assert adapter_of(folder) == before
