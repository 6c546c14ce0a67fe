"""Files and overrides into a configuration; every problem of a file is reported at once, in our words."""

from __future__ import annotations

import hashlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedlora.config.run import AROUND, RunConfig
from fedlora.errors import ConfigError, nearest


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``--set key=value`` overrides.

    Without an ``output_dir``, results go to ``runs/<name>``, or to ``runs/<name>-<hash of the overrides>``.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config: cannot read {path}: {error.strerror}{nearest(str(path), siblings)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not UTF-8 text") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold a mapping of keys, not {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    content.setdefault("name", path.stem)
    content.setdefault("output_dir", f"runs/{content['name']}{_suffix(overrides)}")
    return parse_config(content)


def parse_config(content: Mapping[str, Any]) -> RunConfig:
    """Validate plain data.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(*[_sentence(item) for item in error.errors()]) from error


def differences(mine: RunConfig, other: RunConfig) -> list[str]:
    """Dotted keys whose values differ, those aside that do not define the results."""
    left, right = dict(_flatten(mine.resolved())), dict(_flatten(other.resolved()))
    different = {key for key in left | right if left.get(key) != right.get(key)}
    return sorted(key for key in different if key.split(".")[0] not in AROUND)


def _suffix(overrides: Sequence[str]) -> str:
    """Part of a default folder's name that tells runs with different overrides apart, such as ``-1f3a9c``.

    How nodes are reached makes no other run of it.
    """
    overrides = [text for text in overrides if not text.startswith("flower.")]
    if not overrides:
        return ""
    return "-" + hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:6]


def _override(content: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, such as --set training.learning_rate=0.001")
    *parents, last = key.strip().split(".")
    node: Any = content
    for parent in parents:
        child = _entry(node, parent, text) if isinstance(node, list) else node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict) and not _named(child):
            raise ConfigError(f"--set {text}: {parent} is {child!r}, not a section with keys of its own")
        node = child
    if isinstance(node, list):
        raise ConfigError(f"--set {text}: name a key of {last}, such as {key.strip()}.rounds=3")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from error


def _named(child: Any) -> bool:
    """Whether this is a list of sections that have names, such as the tasks of a stream."""
    return isinstance(child, list) and bool(child) and all(isinstance(one, dict) and "name" in one for one in child)


def _entry(sections: list[dict[str, Any]], name: str, text: str) -> dict[str, Any]:
    """The section of this name."""
    names = [str(one["name"]) for one in sections]
    if name not in names:
        raise ConfigError(f"--set {text}: there is no {name}{nearest(name, names)} (there are: {', '.join(names)})")
    return sections[names.index(name)]


def _sentence(item: Mapping[str, Any]) -> str:
    """One problem in our words."""
    location = [str(part) for part in item["loc"] if isinstance(part, str)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"config: {key} is not a key{_suggest(location)}"
    if item["type"] == "missing":
        return f"config: {key} is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"config: {key}: {message}" if key else f"config: {message}"
    value = str(item["input"])
    return f"config: {key} is {value[:80]!r}: {message[0].lower()}{message[1:]}"


def _suggest(location: list[str]) -> str:
    """The nearest key in the same section, else the same name in another section."""
    every = list(known_keys())
    parent = ".".join(location[:-1])
    siblings = [key for key in every if key.rpartition(".")[0] == parent]
    hint = nearest(".".join(location), siblings)
    if not hint or location[-1] in {key.rpartition(".")[2] for key in every}:
        same = [key for key in every if key.rpartition(".")[2] == location[-1]]
        hint = f"; did you mean {same[0]}?" if same else hint
    return hint or nearest(".".join(location), every)


def known_keys() -> Iterator[str]:
    """Every dotted key of a configuration."""
    yield from _keys_of(RunConfig, "")


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _keys_of(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
