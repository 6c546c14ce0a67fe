"""A run folder on any file system that fsspec knows: ``s3://bucket/run``, ``gs://``, ``sftp://``, ``memory://``.

The run is played in a folder on this machine and copied after every commit. The copy is the truth: a run starts from
what is there, so it may go on on another machine. A checkpoint's manifest is copied last and deleted first, so that a
copy that was cut short never looks whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import tenacity
import yaml

from fedlora.errors import RunFolderError
from orchestrator.lease import current_holder
from orchestrator.stores.files import write_atomic

_MANIFEST = "manifest.json"
_LOGS = ("journal.jsonl",)  # copied whole once they have grown by a tenth, so that all copies together stay linear
_GROWN = 1.1


def is_url(place: str) -> bool:
    """Whether this names another file system than the machine's own."""
    return "://" in place


def localised(place: str) -> Path:
    """The folder of a run on this machine; of a URL, an up-to-date copy.

    Raises:
        RunFolderError: if the place cannot be read, or the URL holds no run.
    """
    if not is_url(place):
        return Path(place)
    mirror = Mirror(place)
    if not current_holder(mirror.folder):  # what is played here is newer than its copy
        mirror.fetch()
    if not (mirror.folder / "config.yaml").is_file():
        raise RunFolderError(f"{place} is not a run folder (no config.yaml in it)")
    return mirror.folder


class Mirror:
    """A folder here and its copy there.

    Attributes:
        url: of the copy.
        folder: on this machine, under ``$FEDLORA_CACHE`` (default ``~/.cache/fedlora``).

    Raises:
        RunFolderError: if no installed package knows this kind of URL.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        cache = Path(os.environ.get("FEDLORA_CACHE", Path.home() / ".cache" / "fedlora"))
        name = f"{self.url.rpartition('/')[2]}-{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"
        self.folder = cache / "runs" / name
        with self._speaking("open"):
            self._there, self._root = fsspec.core.url_to_fs(self.url)
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of change of each file as it was copied last

    def fetch(self) -> None:
        """Make the folder here what is there; files of a client's own (``private/``) stay.

        Rounds that were committed here and could not be copied are kept, and copied with the next ``publish``.
        """
        with self._speaking("read"):
            self._there.invalidate_cache()
            found = self._sizes()
            if _last_round(map(self._name, self._files())) > _last_round(found) and self._same_run(found):
                return
            for path in self._files():
                name = self._name(path)
                if name not in found and _shared(name):
                    path.unlink()
            for name, size in found.items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != size or not _immutable(name):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._get(name, path)
                self._copied[name] = _stamp(path)
            for path in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
                if not any(path.iterdir()):
                    path.rmdir()

    def config(self) -> dict[str, Any]:
        """The configuration of the run that is there.

        Raises:
            RunFolderError: if there is none.
        """
        with self._speaking("read"):
            if self._there.exists(f"{self._root}/config.yaml"):
                content = yaml.safe_load(self._there.cat_file(f"{self._root}/config.yaml"))
                if isinstance(content, dict):
                    return content
        raise RunFolderError(f"{self.url} is not a run folder (no config.yaml in it)")

    def publish(self, everything: bool = False) -> None:
        """Copy what is new. Returns when it is there.

        Args:
            everything: logs too that have hardly grown: at the end of a session.

        Raises:
            RunFolderError: if the other side refuses after a few tries; nothing here is lost.
        """
        here = {name: _stamp(path) for path in self._files() if _shared(name := self._name(path))}
        gone = [name for name in self._copied if name not in here]
        new = [name for name, stamp in here.items() if self._changed(name, stamp, everything)]
        with self._speaking("write"):
            for name in sorted(new, key=lambda name: name.endswith(_MANIFEST)):
                self._put(name)
                self._copied[name] = here[name]
            for name in sorted(gone, key=lambda name: not name.endswith(_MANIFEST)):
                self._remove(name)
                del self._copied[name]

    def put(self, name: str) -> None:
        """Copy one file that was changed here outside a session.

        Raises:
            RunFolderError: as of ``publish``.
        """
        with self._speaking("write"):
            self._put(name)

    def _changed(self, name: str, stamp: tuple[int, int], everything: bool) -> bool:
        before = self._copied.get(name)
        if before is None or before == stamp:
            return before is None
        return everything or name not in _LOGS or stamp[0] > _GROWN * before[0]

    @tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_exponential(0.2, max=2), reraise=True)
    def _put(self, name: str) -> None:
        path = f"{self._root}/{name}"
        self._there.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._there.put_file(str(self.folder / name), path)

    def _get(self, name: str, path: Path) -> None:
        """Fetch a file; a log that goes on from what is there, because its last lines were not copied yet, stays."""
        content = self._there.cat_file(f"{self._root}/{name}")
        if not (name in _LOGS and path.is_file() and path.read_bytes().startswith(content)):
            write_atomic(path, content)

    def _remove(self, name: str) -> None:
        path = f"{self._root}/{name}"
        if self._there.exists(path):
            self._there.rm_file(path)

    def _sizes(self) -> dict[str, int]:
        if not self._there.exists(self._root):
            return {}
        root = self._there._strip_protocol(self._root)
        found = self._there.find(root, detail=True)
        return {path.removeprefix(root).lstrip("/"): entry["size"] for path, entry in found.items()}

    def _same_run(self, found: Collection[str]) -> bool:
        mine = self.folder / "config.yaml"
        if "config.yaml" not in found or not mine.is_file():
            return False
        return bool(self._there.cat_file(f"{self._root}/config.yaml") == mine.read_bytes())

    def _files(self) -> list[Path]:
        scratch = (path for path in self.folder.rglob("*") if path.is_file())
        return [path for path in scratch if not any(part.startswith(".") for part in self._name(path).split("/"))]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def _speaking(self, verb: str) -> Iterator[None]:
        """Whatever a file system raises, as one sentence."""
        try:
            yield
        except RunFolderError:
            raise
        except (ImportError, ValueError) as error:
            raise RunFolderError(f"cannot {verb} {self.url}: {error}") from error
        except Exception as error:  # every file system has its own errors
            raise RunFolderError(
                f"cannot {verb} {self.url}: {type(error).__name__}: {error}; what is committed is in {self.folder}"
            ) from error


def _last_round(names: Iterable[str]) -> int:
    """Of the checkpoints that are whole; -1 for none."""
    found = (name.split("/") for name in names if name.startswith("checkpoints/round-") and name.endswith(_MANIFEST))
    return max((int(part[1].removeprefix("round-")) for part in found), default=-1)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _shared(name: str) -> bool:
    """Not what a client keeps to itself, and no lock, which means nothing elsewhere."""
    return not name.startswith(("private/", "lease"))


def _immutable(name: str) -> bool:
    """Files whose content never changes under one name and size."""
    return name.startswith("ledger/")
