"""Rows that go on coming in while a run trains on them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedlora.errors import DataError, nearest

Row = dict[str, Any]


class Source(Protocol):
    """A sequence of rows that only ever grows at its end.

    Attributes:
        origin: what errors call it.
    """

    origin: str

    def more(self) -> list[bytes]:
        """The rows, each as JSON, that have come since the last call.

        Raises:
            DataError: if it cannot be read, or what was read before is not there any more.
        """
        ...


class LiveFolder:
    """JSONL files of a folder, in the order of their names: lines are added to the last one, files after it.

    A line counts once its end has been written.
    """

    def __init__(self, path: Path):
        self.origin, self._path = str(path), path
        self._read: dict[str, int] = {}  # bytes of every file, in order

    def more(self) -> list[bytes]:
        try:
            sizes = {path.name: path.stat().st_size for path in sorted(self._path.glob("*.jsonl"))}
            if not self._path.is_dir():
                raise DataError(f"continual.live: there is no folder {self.origin}")
            self._check(sizes)
            names, lines, read = list(sizes), [], dict(self._read)
            for name in names:
                content = self._from(name)
                if name == names[-1]:
                    content = content[: content.rfind(b"\n") + 1]  # the rest is still being written
                read[name] = read.get(name, 0) + len(content)
                lines += [line for line in content.split(b"\n") if line.strip()]
        except OSError as error:
            raise DataError(f"continual.live: {self.origin} cannot be read: {error.strerror or error}") from error
        self._read = read  # only now: what was not handed out has not been read
        return lines

    def _check(self, sizes: Mapping[str, int]) -> None:
        known = list(self._read)
        for name in known:
            if sizes.get(name, -1) < self._read[name]:
                what = "has shrunk" if name in sizes else "is gone"
                raise DataError(f"continual.live: {self.origin}/{name} {what}; a live stream may only grow at its end")
            if name != known[-1] and sizes[name] > self._read[name]:
                raise DataError(
                    f"continual.live: {self.origin}/{name} has grown after {known[-1]} came; only the last file may"
                )
        if known and (odd := [name for name in sizes if name not in self._read and name < known[-1]]):
            raise DataError(
                f"continual.live: {self.origin}/{odd[0]} came after {known[-1]}, which has a later name; the order of"
                " names is that of the rows"
            )

    def _from(self, name: str) -> bytes:
        with (self._path / name).open("rb") as file:
            file.seek(self._read.get(name, 0))
            return file.read()


class LiveStream:
    """What has come, as rounds and clients see it. Round r trains on the rows of the last rounds up to its own.

    A round's rows are a number of rows and not what happens to be there, so that a run depends on their order alone.

    Args:
        source: where rows come from.
        per_round: rows that belong to a round.
        window: rounds whose rows a client trains on.
        clients: ids of all clients.
        by: column that names the client a row belongs to; None deals rows to clients in turn.
        read: gives rows the columns of the run, or raises ``DataError``; its second argument is what to call them.
        left_out: says of a row that its client leaves it out.
    """

    def __init__(
        self,
        source: Source,
        per_round: int,
        window: int,
        clients: Sequence[str],
        by: str | None,
        read: Callable[[list[Row], str], list[Row]],
        left_out: Callable[[Row], bool] = lambda row: False,
    ):
        self.origin = source.origin
        self._source, self._per_round, self._window = source, per_round, window
        self._clients, self._by, self._parse = list(clients), by, read
        self._left_out = left_out
        self._waiting: list[bytes] = []
        self._rows: list[Row] = []
        self._owners: list[str] = []
        self._hash, self._hashes = hashlib.sha256(), [hashlib.sha256().hexdigest()]

    def has(self, number: int) -> bool:
        """Whether the rows of round ``number`` [1-based] have all come; looks once.

        Raises:
            DataError: malformed rows, rows of nobody, or a source that has shrunk.
        """
        while len(self._hashes) <= number:
            if len(self._waiting) < self._per_round:
                self._waiting += self._source.more()
            if len(self._waiting) < self._per_round:
                return False
            self._take(self._waiting[: self._per_round])
            self._waiting = self._waiting[self._per_round :]
        return True

    @property
    def come(self) -> int:
        """Rows that have been seen so far."""
        return len(self._rows) + len(self._waiting)

    def needs(self, number: int) -> int:
        """Rows that must have come before round ``number`` can begin."""
        return number * self._per_round

    def sha256(self, number: int) -> str:
        """Of all rows of the rounds up to ``number``, which must have come."""
        return self._hashes[number]

    def counts(self, number: int) -> Mapping[str, int]:
        """Rows each client trains on in a round; clients without are absent."""
        return Counter(self._owners[place] for place in self._window_of(number))

    def present(self, client: str, number: int) -> list[int]:
        """Places of the rows a client trains on in a round."""
        return [place for place in self._window_of(number) if self._owners[place] == client]

    def earlier(self, client: str, number: int) -> list[int]:
        """Places of the rows it has met before these."""
        return [place for place in range(self._window_of(number).start) if self._owners[place] == client]

    def rows(self, places: Sequence[int]) -> list[Row]:
        """The rows at these places."""
        return [self._rows[place] for place in places]

    def _window_of(self, number: int) -> range:
        return range(max(number - self._window, 0) * self._per_round, number * self._per_round)

    def _take(self, lines: Sequence[bytes]) -> None:
        first = len(self._rows)
        found: list[Row] = []
        for place, line in enumerate(lines, first):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"continual.live: row {place} of {self.origin} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"continual.live: row {place} of {self.origin} is not an object with columns")
            found.append(row)
            self._hash.update(hashlib.sha256(line).digest())
        owners = [self._owner(place, row) for place, row in enumerate(found, first)]
        parsed = self._parse(found, f"{self.origin} from row {first}")
        self._rows += parsed
        self._owners += ["" if self._left_out(row) else owner for row, owner in zip(parsed, owners, strict=True)]
        self._hashes.append(self._hash.hexdigest())

    def _owner(self, place: int, row: Row) -> str:
        if self._by is None:
            return self._clients[place % len(self._clients)]
        if self._by not in row:
            raise DataError(
                f"continual.live.by: row {place} of {self.origin} has no column {self._by}{nearest(self._by, row)}"
            )
        owner = str(row[self._by])
        if owner not in self._clients:
            raise DataError(
                f"continual.live: row {place} of {self.origin} belongs to {owner!r}, which is no client of the"
                f" run{nearest(owner, self._clients)}; list it in continual.live.clients"
            )
        return owner
