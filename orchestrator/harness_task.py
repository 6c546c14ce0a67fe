"""A task file of lm-evaluation-harness: read, and refused where it would fetch anything or run code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import DataError, nearest

# of the builders of datasets, those that only read rows: pandas, for one, unpickles what it is given
BUILDERS = ("json", "csv", "parquet", "text", "arrow")
TRUST = "give --allow-code if you trust it"


@dataclass(frozen=True, eq=False)
class HarnessTask:
    """A task as lm_eval takes it: includes merged, functions imported, paths of data absolute."""

    name: str
    file: Path
    content: dict[str, Any]
    allow_code: bool


def read_task(file: Path, allow_code: bool = False) -> HarnessTask:
    """Read a task file. Paths in it are relative to its folder, or to the current one as lm_eval has it.

    Args:
        file: YAML of one task.
        allow_code: import and run what ``!function`` names, run what is marked ``unsafe_code``, and let templates reach
            everything Python has.

    Raises:
        DataError: a missing or malformed file, data that is not on this machine, or code that is not allowed.
    """
    content = _read(file, allow_code, ())
    if "group" in content or isinstance(content.get("task"), list):
        raise DataError(f"lm-eval: {file} is a group of tasks; give the file of one of them")
    name = content.get("task")
    if not name or not isinstance(name, str):
        raise DataError(f"lm-eval: {file} does not name its task; expected task: NAME, dataset_path, doc_to_text, ...")
    if content.get("unsafe_code") and not allow_code:
        raise DataError(f"lm-eval: {file} is marked unsafe_code, it runs code that a model writes; {TRUST}")
    if "use_prompt" in content:
        raise DataError(f"lm-eval: {file} has use_prompt, which is not read here; write doc_to_text and doc_to_target")
    _check_metrics(content.get("metric_list"), file)
    return HarnessTask(name, file, _with_local_data(content, file), allow_code)


def _read(file: Path, allow_code: bool, including: tuple[Path, ...]) -> dict[str, Any]:
    """One file with what it includes, its own keys winning."""
    if not file.is_file():
        siblings = [str(other) for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise DataError(f"lm-eval: no task file {file}{nearest(str(file), siblings)}")
    if file.resolve() in including:
        raise DataError(f"lm-eval: {file} includes itself")

    class Loader(yaml.SafeLoader):
        """Knows the one tag of task files."""

    def function(loader: Any, node: yaml.ScalarNode) -> Any:
        if not allow_code:
            raise DataError(
                f"lm-eval: line {node.start_mark.line + 1} of {file} runs Python (!function {node.value}); {TRUST}"
            )
        return _function(loader, node, file)

    Loader.add_constructor("!function", function)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"lm-eval: {file} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise DataError(f"lm-eval: {file} holds {type(content).__name__}, expected the keys and values of a task")
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read(file.parent / str(name), allow_code, (*including, file.resolve()))
    return merged | content


def _function(loader: Any, node: yaml.ScalarNode, file: Path) -> Any:
    from lm_eval.utils import import_function

    try:
        return import_function(loader, node, file)
    except Exception as error:
        raise DataError(
            f"lm-eval: {file} names !function {node.value}, which cannot be imported from {file.parent}:"
            f" {type(error).__name__}: {error}"
        ) from error


def _check_metrics(metrics: Any, file: Path) -> None:
    if metrics is not None and not (isinstance(metrics, list) and all(isinstance(entry, dict) for entry in metrics)):
        raise DataError(f"lm-eval: metric_list of {file} is {metrics!r}; expected a list such as [{{metric: acc}}]")
    for entry in metrics or []:
        if entry.get("hf_evaluate"):
            raise DataError(
                f"lm-eval: {file} takes the metric {entry.get('metric')} from the hub (hf_evaluate), which would run"
                " code from there; use a metric of lm_eval"
            )


def _with_local_data(content: dict[str, Any], file: Path) -> dict[str, Any]:
    path, options = content.get("dataset_path"), content.get("dataset_kwargs") or {}
    if not isinstance(options, dict):
        raise DataError(f"lm-eval: dataset_kwargs of {file} is {options!r}; expected keys and values")
    if callable(content.get("custom_dataset")):  # there only if code is allowed
        return content
    if not isinstance(path, str):
        raise DataError(
            f"lm-eval: {file} does not say where its rows are; expected dataset_path: json with dataset_kwargs:"
            " {data_files: rows.jsonl}, or dataset_path: FOLDER"
        )
    roots = [file.parent.absolute(), Path.cwd()]
    options = dict(options)
    if path not in BUILDERS:
        path = _folder(path, roots, file)
        roots = [Path(path) / str(options.get("data_dir", ""))]
    elif "data_dir" in options:
        options["data_dir"] = _found(str(options["data_dir"]), roots, file)
        roots = [Path(options["data_dir"])]
    elif not options.get("data_files"):
        raise DataError(f"lm-eval: {file} names no files; expected dataset_kwargs: {{data_files: rows.jsonl}}")
    if "data_files" in options:
        options["data_files"] = _files(options["data_files"], roots, file)
    return content | {"dataset_path": path, "dataset_kwargs": options}


def _files(given: Any, roots: Sequence[Path], file: Path) -> Any:
    """Absolute paths in the form they were given in: one, a list, or either of them by split."""
    if isinstance(given, dict):
        return {split: _files(names, roots, file) for split, names in given.items()}
    if isinstance(given, list):
        return [_found(str(name), roots, file) for name in given]
    return _found(str(given), roots, file)


def _found(name: str, roots: Sequence[Path], file: Path) -> str:
    """The absolute path, which may be a pattern, in the first folder that has it."""
    if _is_remote(name):
        raise DataError(f"lm-eval: {file} reads {name}; only rows on this machine are read, so download them first")
    for path in (root / name for root in roots):
        if path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
            return str(path)
    siblings = [str(other.relative_to(root)) for root in roots if root.is_dir() for other in root.iterdir()]
    raise DataError(f"lm-eval: {file} reads {name}, which is not in {roots[0]}{nearest(name, siblings)}")


def _folder(name: str, roots: Sequence[Path], file: Path) -> str:
    """The absolute path of a folder with rows."""
    folder = next((root / name for root in roots if not _is_remote(name) and (root / name).exists()), None)
    if folder is None:
        raise DataError(
            f"lm-eval: dataset_path of {file} is {name}, which is no folder here and would be fetched from the hub;"
            " download it and name the folder, or the files with dataset_path: json"
        )
    if folder.suffix == ".py" or (folder / f"{folder.name}.py").exists():
        raise DataError(f"lm-eval: dataset_path of {file} is a dataset script, which is never run; name files of rows")
    if not folder.is_dir():
        raise DataError(
            f"lm-eval: dataset_path of {file} is the file {name}; write dataset_path: json (or"
            f" {', '.join(BUILDERS[1:])}) and dataset_kwargs: {{data_files: {name}}}"
        )
    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        if card.exists() and _is_remote(str(_card(card).get("configs"))):
            raise DataError(
                f"lm-eval: {card} names files that are not on this machine; name files with dataset_path: json"
            )
    return str(folder)


def _card(card: Path) -> dict[str, Any]:
    """What a dataset card says of the files in its folder."""
    text = card.read_text(encoding="utf-8", errors="replace")
    if card.suffix == ".md":
        text = text.split("---")[1] if text.startswith("---") else ""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"lm-eval: {card} is not YAML: {' '.join(str(error).split())[:200]}") from error
    return content if isinstance(content, dict) else {}


def _is_remote(name: str) -> bool:
    return "://" in name or "::" in name
