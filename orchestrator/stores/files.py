"""The run folder on a file system: atomic files, append-only logs."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.config import RunConfig, differences, load_config
from fedlora.errors import ConfigError, RunFolderError

SHARDS = "shards"  # folders of the runs that a run of shards is made of
UNFINISHED = "{0} is a run of shards that has not finished; let it end (fedlora resume {0}), then ask again"
_WRITTEN = {
    *("config", "journal", "metrics", "partition", "labels", "summary", "report", "exports"),
    *("checkpoints", "adapter", "ledger", "private", "contributions", "shards", "lease"),
}


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn an operating-system error into one sentence about ``what``."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {what}: {error.strerror or error}; free space or choose another output_dir."
            " Committed rounds are safe"
        ) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves either the old one or the new one.

    Raises:
        RunFolderError: if it cannot be written.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which takes the place of the old one when it is whole: ``write_atomic``."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
            sync_folder(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """``write_atomic`` of indented JSON."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        RunFolderError: if it is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read piece by piece.

    Raises:
        RunFolderError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error


class JsonLines:
    """An append-only log of JSON objects. A torn last line, left by a crash, is cut off on opening."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                content = path.read_bytes()
                whole = content[: content.rfind(b"\n") + 1]
                if whole != content:
                    write_atomic(path, whole)
            self._file = path.open("ab")

    def append(self, item: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system."""
        with writing(self.path):
            self._file.write(json.dumps(item).encode() + b"\n")
            self._file.flush()

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines that are not ``wanted``."""
        lines = [line for line in read_lines(self.path) if wanted(line)]
        self._file.close()
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Close the file; the log stays readable."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; none if there is no file."""
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        records = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    if not all(isinstance(record, dict) for record in records):
        raise RunFolderError(f"{path} is damaged: a line is not a JSON object")
    return records


def check_output(config: RunConfig, overwrite: bool) -> bool:
    """Whether the output folder already holds this very run. Changes nothing.

    Raises:
        RunFolderError: not a run folder, or a run of another configuration.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file; choose a folder")
    if not _content(folder):
        return False
    if not overwrite and check_folder(folder, config):
        return True
    _check_removable(folder)
    return False


def open_folder(config: RunConfig, overwrite: bool) -> bool:
    """``check_output``, and unless the folder holds this run, prepare it. Only for whoever holds the run's lease.

    Raises:
        RunFolderError: also if it cannot be written.
    """
    folder = Path(config.output_dir)
    if check_output(config, overwrite):
        return True
    with writing(folder):
        for path in _content(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_atomic(folder / "config.yaml", config.to_yaml())
    return False


def check_folder(folder: Path, config: RunConfig) -> bool:
    """Whether a folder that is not empty holds this very run; False if nothing in it needs protection.

    Raises:
        RunFolderError: not a run folder, or a run of another configuration with committed rounds.
    """
    previous = read_config(folder)
    if previous.sha256() == config.sha256():
        return True
    if not any(any(folder.glob(f"{place}checkpoints/round-*")) for place in ("", "shards/*/")):
        return False  # it failed before its first commit
    keys = ", ".join(differences(config, previous)[:5])
    raise RunFolderError(
        f"{folder} holds a run of another configuration (different: {keys}); choose another with"
        f" --set output_dir=..., replace it with --overwrite, or go on with it: fedlora resume {folder}"
    )


def read_config(folder: Path) -> RunConfig:
    """The configuration a run folder belongs to.

    Raises:
        RunFolderError: if this is not a run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"{folder} is not a run folder (no config.yaml in it){_runs_nearby(folder)}")
    try:
        config = load_config(folder / "config.yaml")
    except ConfigError as error:
        raise RunFolderError(f"{folder}/config.yaml cannot be read: {error}") from error
    return config.model_copy(update={"output_dir": str(folder)})


def shard_folders(folder: Path) -> dict[int, Path]:
    """The run folder of every shard of a run by number; empty for a run without shards."""
    found = [path.parent for path in (folder / SHARDS).glob("*/config.yaml") if path.parent.name.isdigit()]
    return {int(path.name): path for path in sorted(found, key=lambda path: int(path.name))}


def home_of(folder: Path) -> Path | None:
    """The folder of the run that a folder is a shard of; None for any other."""
    place = folder.absolute().parent
    return place.parent if place.name == SHARDS and (place.parent / "config.yaml").is_file() else None


def _runs_nearby(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    runs = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
    return f"; runs in {folder.parent}: {', '.join(runs[:8])}" if runs else ""


def _content(folder: Path) -> list[Path]:
    """What is in a folder besides leases: they outlive what is replaced, so that tokens go on growing."""
    return [path for path in folder.iterdir() if not path.name.startswith("lease.")] if folder.is_dir() else []


def _check_removable(folder: Path) -> None:
    """Refuse to touch a folder that holds anything but what a run writes."""
    if (folder / "unlearning" / "requests.jsonl").exists():
        raise RunFolderError(
            f"{folder} holds requests to unlearn and what became of them (unlearning/), which must outlive the run;"
            " choose another output_dir, or move the folder away first"
        )
    foreign = sorted(path.name for path in folder.iterdir() if path.name.lstrip(".").split(".")[0] not in _WRITTEN)
    if foreign or not (folder / "journal.jsonl").is_file():
        what = f"it holds {foreign[0]}" if foreign else "it has no journal.jsonl"
        raise RunFolderError(
            f"{folder} is not a run folder ({what}); only runs are replaced. Choose another output_dir"
        )
