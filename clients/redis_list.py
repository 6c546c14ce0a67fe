"""A list on a Redis server to which somebody appends rows."""

from __future__ import annotations

from typing import cast
from urllib.parse import urlsplit

import redis

from fedlora.errors import ConfigError, DataError


class RedisList:
    """Rows of a list, pushed to its right end as JSON: ``redis://host:6379/0#key``.

    Raises:
        ConfigError: an address without a key, or one that is none.
    """

    def __init__(self, address: str):
        url, _, self._key = address.partition("#")
        if not self._key:
            raise ConfigError(f"continual.live.source: {address} names no list; write redis://host:6379/0#key")
        try:
            self._server = redis.Redis.from_url(url, socket_timeout=30, socket_connect_timeout=5)
        except ValueError as error:
            raise ConfigError(f"continual.live.source: {address} is no address of a Redis server: {error}") from error
        self.origin = f"list {self._key} on {urlsplit(url).hostname}"  # without a password
        self._read = 0

    def more(self) -> list[bytes]:
        try:
            length = self._server.llen(self._key)
            if length < self._read:
                raise DataError(
                    f"continual.live: {self.origin} has shrunk from {self._read} to {length} rows; a live stream may"
                    " only grow at its end"
                )
            rows = cast(list[bytes], self._server.lrange(self._key, self._read, length - 1))
        except redis.RedisError as error:
            raise DataError(f"continual.live: {self.origin} cannot be read: {error}") from error
        self._read += len(rows)
        return rows
