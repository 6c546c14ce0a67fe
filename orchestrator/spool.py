"""Where admitted updates wait for their round to be aggregated: memory while they are few, a file beyond."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

from fedlora.adapter.wire import decode_update
from fedlora.errors import RunFolderError
from fedlora.protocol import ClientUpdate

_IN_MEMORY = 1 << 30  # bytes


class Spool:
    """Updates of one round. The file has no name and is gone with the process."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        # not in a with block: it lives as long as the round's updates are looked at
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._left = in_memory

    def put(self, payload: bytes | memoryview, update: ClientUpdate) -> Callable[[], ClientUpdate]:
        """Keep an update; returns what gives it again.

        Args:
            payload: as it came.
            update: what it says.

        Raises:
            RunFolderError: if the disk refuses.
        """
        if len(payload) <= self._left:
            self._left -= len(payload)
            return lambda: update
        try:
            start = self._file.seek(0, 2)
            self._file.write(payload)
            self._file.flush()  # a full disk must be noticed here
        except OSError as error:
            raise RunFolderError(
                f"cannot keep the round's updates in {tempfile.gettempdir()}: {error.strerror or error};"
                " free space or set TMPDIR. Committed rounds are safe"
            ) from error
        return functools.partial(self._read, start, len(payload))

    def _read(self, start: int, length: int) -> ClientUpdate:
        self._file.seek(start)
        return decode_update(self._file.read(length))
