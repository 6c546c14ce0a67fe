"""A Redis server that mirrors a run: its lease, who takes part, its events, where it stands.

The run folder stays the truth, so nothing here may stop or slow a run: a write that fails marks the server down, no
further one is tried until the heartbeat thread finds it up again, and everything is then written anew.

Keys, ``<run>`` being a hash of the run folder's absolute path:

    fedlora:<run>:lease           the holder as JSON; expires when it is not renewed
    fedlora:<run>:token           the highest fencing token there was
    fedlora:<run>:events          stream of events; an entry's ID is ``<token>-<number>``
    fedlora:<run>:member:<kind>:<id>   who takes part; expires without a heartbeat
    fedlora:run:<run>             the latest pointer: round, folder, adapter, status
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedlora.errors import ConfigError

T = TypeVar("T")

TIMEOUT_S = 0.4  # of one attempt to connect, to send or to read
KEEP_EVENTS = 10_000
KEEP_S = 7 * 24 * 3600  # what a run leaves behind on the server after its last sign of life

# Take or renew a lease. To renew, a lower token gives way; to take, only the holder that the run folder proved gone.
_CLAIM = """
local held = redis.call('GET', KEYS[1])
if held then
  local other, mine = cjson.decode(held), cjson.decode(ARGV[1])
  local stands = other.id ~= mine.id and other.id ~= ARGV[2]
  if ARGV[3] == 'renew' then stands = stands and other.token >= mine.token end
  if stands then return held end
end
local token = cjson.decode(ARGV[1]).token
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[4])
if tonumber(redis.call('GET', KEYS[2]) or '0') < token then
  redis.call('SET', KEYS[2], token, 'EX', ARGV[5])
end
return false
"""

_RELEASE = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held).id == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


def run_id(folder: str) -> str:
    """Short name of a run on the server. ``folder`` is absolute."""
    return hashlib.sha256(folder.encode()).hexdigest()[:12]


def connect(url: str, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A client that gives up quickly. Connects when it is first used.

    Raises:
        ConfigError: if this is not the URL of a Redis server.
    """
    # once more at once, for a connection that died while it was idle; a server that is slow to answer is down
    retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=retry,
            protocol=2,
            decode_responses=True,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"store.redis: {shown(url)} is not redis://host:port/0 ({error})") from error


def shown(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class RedisStore:
    """One run's side of the server. No method raises over the server or waits longer than about a second.

    Attributes:
        news: ``store_down`` and ``store_up`` events that nobody has told the user yet.
    """

    def __init__(self, url: str, folder: str, lease_s: float):
        self.news: deque[tuple[str, dict[str, Any]]] = deque(maxlen=100)
        self._url, self._run, self._ttl_ms = url, run_id(folder), int(lease_s * 1000)
        self._client = connect(url)
        self._lease, self._token = (f"fedlora:{self._run}:{name}" for name in ("lease", "token"))
        self._events = f"fedlora:{self._run}:events"
        self._down = False
        self._sending = threading.Lock()
        self._unsent: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=KEEP_EVENTS)
        self._stamp, self._count = 0, 0
        self._members: dict[str, str] = {}
        self._pointer: str | None = None

    def peek(self) -> tuple[int, dict[str, Any] | None]:
        """The highest token so far, and the holder; ``(0, None)`` where the server does not know."""
        found = self._attempt(lambda client: client.mget(self._token, self._lease))
        token, holder = cast(list[Any], found or [None, None])
        return int(token or 0), json.loads(holder) if holder else None

    def claim(self, holder: Mapping[str, Any], superseded: str) -> dict[str, Any] | None:
        """Take the lease; the other holder if there is one that is not ``superseded``."""
        self._stamp = holder["token"]
        return self._attempt(lambda client: self._claim(client, holder, superseded, "claim"))

    def renew(self, holder: Mapping[str, Any]) -> dict[str, Any] | None:
        """Keep the lease, or take it again where it vanished; the other holder if one has taken over."""
        return self._attempt(lambda client: self._claim(client, holder, "", "renew"))

    def beat(self, holder: Mapping[str, Any]) -> dict[str, Any] | None:
        """``renew`` and all other signs of life, even while the server is down: this is what finds it up again."""
        rival = self._attempt(lambda client: self._claim(client, holder, "", "renew"), even_down=True)
        if not self._down and not rival:
            self._attempt(self._write_all)
            self._send()
        return rival

    def publish(self, record: Mapping[str, Any]) -> None:
        """Add an event to the stream; while the server is down, keep it for later.

        A fresh run of an old folder, which says ``run_opened``, starts the stream over.
        """
        with self._sending:
            self._count += 1
            self._unsent.append((f"{self._stamp}-{self._count}", record))
        self._send()

    def register(self, kind: str, id: str, facts: Mapping[str, Any]) -> None:
        """Enter a member; it stays entered for as long as this process lives."""
        key, content = f"fedlora:{self._run}:member:{kind}:{id}", json.dumps({"kind": kind, "id": id, **facts})
        self._members = {**self._members, key: content}
        self._attempt(lambda client: client.set(key, content, px=self._ttl_ms))

    def point(self, facts: Mapping[str, Any]) -> None:
        """Say where the run stands."""
        self._pointer = json.dumps({"id": self._run, **facts})
        self._attempt(lambda client: client.set(f"fedlora:run:{self._run}", cast(str, self._pointer), ex=KEEP_S))

    def close(self, holder: Mapping[str, Any]) -> None:
        """Give back the lease if it is still ours, and leave."""
        self._send()
        keys, members = [self._lease], list(self._members)
        if self._attempt(lambda client: client.eval(_RELEASE, 1, *keys, holder["id"])) and members:
            self._attempt(lambda client: client.delete(*members))
        self._client.close()

    def _claim(
        self, client: redis.Redis, holder: Mapping[str, Any], superseded: str, mode: str
    ) -> dict[str, Any] | None:
        values = (json.dumps(holder), superseded, mode, str(self._ttl_ms), str(KEEP_S))
        held = client.eval(_CLAIM, 2, self._lease, self._token, *values)
        return json.loads(cast(str, held)) if held else None

    def _write_all(self, client: redis.Redis) -> None:
        """The registry and the pointer, whether or not the server still has them."""
        pipeline = client.pipeline(transaction=False)
        for key, content in self._members.items():
            pipeline.set(key, content, px=self._ttl_ms)
        if self._pointer:
            pipeline.set(f"fedlora:run:{self._run}", self._pointer, ex=KEEP_S)
            pipeline.expire(self._events, KEEP_S)
        pipeline.execute()

    def _send(self) -> None:
        """Events in their order, each once: the server refuses an ID that is not above the last one."""
        with self._sending:
            while self._unsent and not self._down:
                batch = list(islice(self._unsent, 500))
                if self._attempt(partial(self._add, batch)):
                    for _ in batch:
                        self._unsent.popleft()

    def _add(self, batch: list[tuple[str, Mapping[str, Any]]], client: redis.Redis) -> bool:
        pipeline = client.pipeline(transaction=False)
        for id, record in batch:
            if record["event"] == "run_opened":
                pipeline.delete(self._events)
            pipeline.xadd(self._events, {"event": json.dumps(record)}, id=id, maxlen=KEEP_EVENTS, approximate=True)
        for answer in pipeline.execute(raise_on_error=False):
            if isinstance(answer, Exception) and "equal or smaller" not in str(answer):
                raise answer
        return True

    def _attempt(self, work: Callable[[redis.Redis], T], even_down: bool = False) -> T | None:
        if self._down and not even_down:
            return None
        try:
            result = work(self._client)
        except (redis.RedisError, OSError) as error:
            if not self._down:
                self.news.append(("store_down", {"url": shown(self._url), "reason": str(error)}))
            self._down = True
            return None
        if self._down:
            self.news.append(("store_up", {"url": shown(self._url)}))
        self._down = False
        return result


class RedisView:
    """What anybody may read from the server.

    Raises:
        ConnectionError: from every method, if the server does not answer.
    """

    def __init__(self, url: str, timeout_s: float = 2.0):
        self.url = shown(url)
        self._client = connect(url, timeout_s)
        self._wait_ms = int(timeout_s * 500)

    def runs(self) -> list[dict[str, Any]]:
        """The latest pointers, newest first."""
        found = self._values("fedlora:run:*")
        return sorted(found, key=lambda pointer: str(pointer.get("time")), reverse=True)

    def registered(self, run: str) -> list[dict[str, Any]]:
        """Members whose heartbeat is fresh, with the facts they were registered with."""
        return sorted(self._values(f"fedlora:{run}:member:*"), key=lambda member: (member["kind"], member["id"]))

    def holder(self, run: str) -> dict[str, Any] | None:
        """Who plays a run; None if nobody does."""
        held = self._ask(lambda client: client.get(f"fedlora:{run}:lease"))
        return json.loads(cast(str, held)) if held else None

    def events(self, run: str, after: str = "0-0") -> Iterator[tuple[str, dict[str, Any]]]:
        """IDs and events after an ID; waits about a second for one where there is none yet."""
        key = f"fedlora:{run}:events"
        found = self._ask(lambda client: client.xread({key: after}, count=1000, block=self._wait_ms))
        for _, entries in cast(list[Any], found or []):
            for id, fields in entries:
                yield id, json.loads(fields["event"])

    def _values(self, pattern: str) -> list[dict[str, Any]]:
        keys = self._ask(lambda client: list(client.scan_iter(match=pattern, count=1000)))
        values = self._ask(lambda client: client.mget(keys)) if keys else []
        return [json.loads(value) for value in cast(list[Any], values) if value]

    def _ask(self, work: Callable[[redis.Redis], T]) -> T:
        try:
            return work(self._client)
        except (redis.RedisError, OSError) as error:
            raise ConnectionError(f"{self.url} does not answer: {error}") from error
