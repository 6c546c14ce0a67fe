"""Reading rows: four forms, local files, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import pytest

from fedlora.config import DataConfig
from fedlora.data.sources import read_client_files, read_train
from fedlora.errors import DataError


def lines(path: Path, rows: list[object]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return str(path)


LABELLED = [{"text": "a b", "label": "x"}, {"text": "c", "label": "y"}]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_json_lines_are_read_also_gzipped(tmp_path: Path, name: str) -> None:
    rows = read_train(DataConfig(train_file=lines(tmp_path / name, LABELLED)))
    assert (rows.form, rows.table["text"][:], rows.table["label"][:]) == ("classification", ["a b", "c"], ["x", "y"])


def test_csv_tsv_and_parquet_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "d.tsv").write_text("text\tlabel\na\t1\nb\t2\n")
    table = read_train(DataConfig(train_file=str(tmp_path / "d.csv"))).table
    table.to_parquet(tmp_path / "d.parquet")
    for name in ("d.csv", "d.tsv", "d.parquet"):
        rows = read_train(DataConfig(train_file=str(tmp_path / name)))
        assert rows.table["label"][:] == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt"),
        ({"text": "t"}, "text"),
        ({"text": "t", "intent": "i"}, "classification"),
    ],
)
def test_the_form_is_found_from_the_columns(tmp_path: Path, row: dict[str, object], form: str) -> None:
    assert read_train(DataConfig(train_file=lines(tmp_path / "d.jsonl", [row]))).form == form


def test_columns_of_other_names_can_be_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"sentence": "s", "polarity": 1, "text": "other"}])
    rows = read_train(DataConfig(train_file=path, text_column="sentence", label_column="polarity"))
    assert rows.table["text"][:] == ["s"]
    assert rows.table["label"][:] == ["1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence": "s"}\n', "expected messages, prompt and completion, text"),
        ("", "cannot be read as json|has no rows"),
        ("not json\n", "cannot be read as json"),
        ('{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', "row 0 .* lacks its text or label"),
    ],
    ids=["columns", "empty", "malformed", "null"],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_train(DataConfig(train_file=str(path)))
    assert "bad.jsonl" in str(caught.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", LABELLED)
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        read_train(DataConfig(train_file=str(tmp_path / "trian.jsonl")))


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.xlsx").write_text("x")
    with pytest.raises(DataError, match="not of a known type"):
        read_train(DataConfig(train_file=str(tmp_path / "d.xlsx")))


def test_an_unknown_builtin_and_an_unreachable_hub_name_say_what_to_do() -> None:
    with pytest.raises(DataError, match="did you mean builtin:bbc-news"):
        read_train(DataConfig(name="builtin:bbc-new"))
    with pytest.raises(DataError, match="data.train_file"):
        read_train(DataConfig(name="nobody/nothing"))


def test_silos_are_named_by_their_files_or_by_the_user(tmp_path: Path) -> None:
    lines(tmp_path / "north.jsonl", LABELLED)
    lines(tmp_path / "south.jsonl.gz", LABELLED)
    assert sorted(read_client_files(DataConfig(client_files=str(tmp_path / "*.jsonl*")))) == ["north", "south"]
    named = read_client_files(DataConfig(client_files={"a": str(tmp_path / "north.jsonl")}))
    assert list(named) == ["a"]


def test_a_silo_without_rows_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="empty.csv has no rows"):
        read_client_files(DataConfig(client_files={"a": str(tmp_path / "empty.csv")}))


def test_bbc_news_has_five_topics_and_no_repeated_article() -> None:
    table = read_train(DataConfig(name="builtin:bbc-news")).table
    assert sorted(set(table["label"])) == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(set(table["text"])) == len(table) == 2127


def test_chatterbot_rows_alternate_user_and_assistant() -> None:
    rows = read_train(DataConfig(name="builtin:chatterbot"))
    assert rows.form == "messages"
    for messages in rows.table["messages"]:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_two_files_that_would_be_one_client_are_refused(tmp_path: Path) -> None:
    for folder in ("h1", "h2"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "train.jsonl", LABELLED)
    with pytest.raises(DataError, match="would both be client train; name clients yourself"):
        read_client_files(DataConfig(client_files=str(tmp_path / "*" / "train.jsonl")))


def test_numbers_where_text_belongs_name_the_row(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\n1,a\n2,b\n")
    with pytest.raises(DataError, match="row 0 .* has 1 where text was expected"):
        read_train(DataConfig(train_file=str(tmp_path / "d.csv")))


def test_rows_the_hub_marks_as_unlabelled_are_refused() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    from fedlora.data.sources import normalise

    features = Features(text=Value("string"), label=ClassLabel(names=["neg", "pos"]))
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    with pytest.raises(DataError, match="row 1 of x lacks its text or label"):
        normalise(table, DataConfig(name="x"), "x")
