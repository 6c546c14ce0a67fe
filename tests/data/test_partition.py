"""Dividing rows: nothing lost, nothing doubled, nobody empty."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.partition import open_corpus, partition
from fedlora.errors import DataError

ROWS = Dataset.from_dict({"text": [f"t{i}" for i in range(120)], "label": [str(i % 6) for i in range(120)]})


@pytest.mark.parametrize(
    "how",
    [
        {"method": "iid"},
        {"method": "dirichlet", "alpha": 0.5},
        {"method": "pathological", "classes_per_client": 2},
        {"method": "shards", "shards_per_client": 2},
        {"method": "sizes", "sizes": [60, 30, 20, 10]},
        {"method": "linear"},
        {"method": "square"},
        {"method": "exponential"},
    ],
    ids=lambda how: how["method"],
)
def test_every_row_goes_to_one_client_and_the_same_one_each_time(how: dict[str, object]) -> None:
    shards = partition(ROWS, PartitionConfig.model_validate(how), 4, seed=0)
    assert list(shards) == ["c0", "c1", "c2", "c3"]
    rows = sorted(row for shard in shards.values() for row in shard)
    assert len(rows) == len(set(rows))
    if how["method"] not in ("pathological", "shards"):  # these may leave a remainder out, as in flwr-datasets
        assert rows == list(range(120))
    assert partition(ROWS, PartitionConfig.model_validate(how), 4, seed=0) == shards


def test_natural_makes_one_client_per_value_of_a_column() -> None:
    shards = partition(ROWS, PartitionConfig(method="natural", by="label"), 1, seed=0)
    assert sorted(shards) == ["0", "1", "2", "3", "4", "5"]
    assert all(set(ROWS.select(rows)["label"]) == {name} for name, rows in shards.items())


def test_another_seed_gives_another_dirichlet_draw() -> None:
    how = PartitionConfig(method="dirichlet", alpha=0.5)
    assert partition(ROWS, how, 4, seed=0) != partition(ROWS, how, 4, seed=1)


def test_a_client_that_would_be_empty_is_an_error_that_says_what_to_change() -> None:
    how = PartitionConfig(method="dirichlet", alpha=0.001, min_rows=25)
    with pytest.raises(DataError, match="Raise alpha, lower clients.count"):
        partition(ROWS, how, 4, seed=0)


def test_more_clients_than_rows_and_unknown_columns_are_refused() -> None:
    with pytest.raises(DataError, match="120 rows .* 500 clients"):
        partition(ROWS, PartitionConfig(), 500, seed=0)
    with pytest.raises(DataError, match="did you mean label"):
        partition(ROWS, PartitionConfig(method="natural", by="lable"), 4, seed=0)


def test_test_rows_held_out_and_client_rows_are_disjoint() -> None:
    corpus = open_corpus(DataConfig(name="builtin:toy", client_holdout=0.25), 4, seed=0)
    assert len(corpus.test) == 96
    for client, rows in corpus.shards.items():
        assert not set(rows) & set(corpus.heldout[client])
    everyone = [row for part in (corpus.shards, corpus.heldout) for rows in part.values() for row in rows]
    assert sorted(everyone) == list(range(384))


def test_silos_keep_their_own_rows(tmp_path: Path) -> None:
    for name in ("north", "south"):
        text = "".join(json.dumps({"text": f"{name} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(20))
        (tmp_path / f"{name}.jsonl").write_text(text)
    corpus = open_corpus(DataConfig(client_files=str(tmp_path / "*.jsonl"), test_fraction=0.5), 99, seed=0)
    assert list(corpus.shards) == ["north", "south"]
    for client, rows in corpus.shards.items():
        assert all(text.startswith(client) for text in corpus.train.select(rows)["text"])
    assert len(corpus.test) == 20


def test_a_label_outside_the_label_set_names_the_row_and_the_nearest_label(tmp_path: Path) -> None:
    for name, label in (("train", "weather"), ("test", "wether")):
        rows = [{"text": "t", "label": label}, {"text": "t", "label": "news"}] * 10
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train_file": str(tmp_path / "train.jsonl"), "test_file": str(tmp_path / "test.jsonl")}
    with pytest.raises(DataError, match=r"row 0 of .*test.jsonl .*'wether'.* did you mean weather"):
        open_corpus(DataConfig.model_validate(files), 2, seed=0)


@pytest.mark.parametrize("method", ["iid", "linear", "sizes"])
def test_rows_sorted_by_label_are_still_dealt_at_random(method: str) -> None:
    table = Dataset.from_dict({"text": ["t"] * 40, "label": ["a"] * 20 + ["b"] * 20})
    how = PartitionConfig(method=method, sizes=[10] * 4)  # type: ignore[arg-type]
    for rows in partition(table, how, 4, seed=0).values():
        assert len(rows) < 5 or len(set(table.select(rows)["label"])) == 2


def test_natural_needs_a_value_in_every_row_and_no_client_count() -> None:
    how = PartitionConfig(method="natural", by="topic")
    with pytest.raises(DataError, match="row 1 of data has no topic"):
        partition(Dataset.from_dict({"topic": ["x", None]}), how, 10, seed=0)
    assert len(partition(Dataset.from_dict({"topic": ["x", "y"]}), how, 10, seed=0)) == 2


def test_one_label_is_not_a_classification(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "t", "label": "only"}\n' * 30)
    with pytest.raises(DataError, match="only the label 'only'"):
        open_corpus(DataConfig(train_file=str(tmp_path / "d.jsonl")), 2, seed=0)


def test_a_language_model_reads_text_as_text_even_beside_a_label(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "t", "category": "x"}\n' * 30)
    assert open_corpus(DataConfig(train_file=str(tmp_path / "d.jsonl")), 2, seed=0, task="causal-lm").form == "text"
