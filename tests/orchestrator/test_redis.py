"""The Redis mirror: what it shows, and that losing it costs a run nothing. With a real server."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, LeaseHeld, LeaseLost
from orchestrator import launch
from orchestrator.lease import hold
from orchestrator.stores.files import read_lines
from orchestrator.stores.redis import RedisStore, RedisView, run_id
from tests.conftest import quiet, toy_config
from tests.orchestrator.servers import Server, serve, until


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    sha256: str = launch.run(toy_config(tmp_path_factory.mktemp("undisturbed") / "run"), quiet)["adapter_sha256"]
    return sha256


class At:
    """A listener that does something once, at an event of a round, and remembers all events."""

    def __init__(self, event: str, round: int, act: Callable[[], None]):
        self._where: tuple[str, int | None] = (event, round)
        self._act = act
        self.heard: Counter[str] = Counter()

    def __call__(self, event: str, fields: Any) -> None:
        self.heard[event] += 1
        if (event, fields.get("round")) == self._where:
            self._where = ("", None)
            self._act()


def mirrored(folder: Path, url: str, **changes: Any) -> Any:
    return toy_config(folder, store={"redis": url, "lease_s": 1.0}, **changes)


def holder_of(name: str, token: int) -> dict[str, Any]:
    return {"id": name, "token": token, "host": "elsewhere", "pid": 7, "since": "2026-01-01", "lease_s": 60.0}


# Whatever happens to it ------------------------------------------------------------------------------------------

DISASTERS: dict[str, Callable[[Server], None]] = {
    "emptied": lambda server: server.client.flushall(),
    "killed": Server.kill,
    "restarted empty": Server.restart_empty,
    "cut off": Server.cut_off,
}


@pytest.mark.parametrize("disaster", DISASTERS)
def test_a_run_that_loses_its_server_ends_with_the_same_adapter_and_hardly_later(
    tmp_path: Path, server: Server, undisturbed: str, disaster: str
) -> None:
    took = 0.0

    def strike() -> None:
        nonlocal took
        DISASTERS[disaster](server)
        took = time.monotonic()

    listen = At("update_admitted", 2, strike)
    summary = launch.run(mirrored(tmp_path / "run", server.url), listen)
    took = time.monotonic() - took
    if disaster == "cut off":
        server.reconnect()
    assert summary["adapter_sha256"] == undisturbed
    possible = {"emptied": {0}, "restarted empty": {0, 1}}.get(disaster, {1})  # a restart can be too quick to be seen
    assert listen.heard["store_down"] in possible
    assert took < 20  # the rest of the run, on a busy machine; waiting for every write would add 15 s


def test_a_server_that_was_never_there_is_mentioned_once(tmp_path: Path, server: Server, undisturbed: str) -> None:
    server.kill()
    listen = At("", 0, lambda: None)
    summary = launch.run(mirrored(tmp_path / "run", server.url), listen)
    assert (summary["adapter_sha256"], listen.heard["store_down"]) == (undisturbed, 1)


def test_waiting_for_a_server_that_does_not_answer_takes_a_second_and_not_again(server: Server) -> None:
    store = RedisStore(server.url, "/run", 60.0)
    store.claim(holder_of("a", 1), "")
    server.cut_off()
    try:
        start = time.monotonic()
        for number in range(200):
            store.publish({"event": "e", "number": number})
        assert time.monotonic() - start < 2
    finally:
        server.reconnect()
    assert [event for event, _ in store.news] == ["store_down"]
    store.beat(holder_of("a", 1))
    assert [event for event, _ in store.news] == ["store_down", "store_up"]
    # nothing is missing, and nothing that had arrived without our hearing of it is there twice
    told = [record["number"] for _, record in RedisView(server.url).events(run_id("/run"))]
    assert told == list(range(200))


def test_a_server_that_comes_back_is_found_and_told_everything(tmp_path: Path, server: Server) -> None:
    def come_back() -> None:
        server.restart_empty()
        until(lambda: view.runs() and view.registered(run_id(str(folder))))

    folder, view = tmp_path / "run", RedisView(server.url)
    killed = At("run_started", 0, server.kill)
    back = At("round_started", 2, come_back)

    def listen(event: str, fields: Any) -> None:
        killed(event, fields)
        back(event, fields)

    launch.run(mirrored(folder, server.url), listen)
    journal = read_lines(folder / "journal.jsonl")
    told = [record for _, record in view.events(run_id(str(folder)))]
    assert told == journal[-len(told) :]
    assert "round_started" in [record["event"] for record in told if record.get("round") == 1]  # from the outage
    assert (killed.heard["store_down"], killed.heard["store_up"]) == (1, 1)


# What it shows ---------------------------------------------------------------------------------------------------


def test_a_run_shows_its_events_its_pointer_and_who_takes_part(tmp_path: Path, server: Server) -> None:
    folder, view = tmp_path / "run", RedisView(server.url)
    seen: dict[str, Any] = {}

    def look() -> None:
        seen["members"] = view.registered(run_id(str(folder)))
        seen["pointer"] = view.runs()[0]
        seen["holder"] = view.holder(run_id(str(folder)))

    summary = launch.run(mirrored(folder, server.url), At("round_started", 2, look))
    assert [member["kind"] for member in seen["members"]] == ["orchestrator", "worker"]
    assert (seen["pointer"]["status"], seen["pointer"]["round"]) == ("running", 1)
    assert seen["holder"]["token"] == 1
    (pointer,) = view.runs()
    assert {name: pointer[name] for name in ("name", "folder", "round", "status", "adapter_sha256")} == {
        "name": "toy",
        "folder": str(folder),
        "round": 3,
        "status": "finished",
        "adapter_sha256": summary["adapter_sha256"],
    }
    assert [record for _, record in view.events(pointer["id"])] == read_lines(folder / "journal.jsonl")
    assert (view.registered(pointer["id"]), view.holder(pointer["id"])) == ([], None)


def test_the_stream_starts_over_with_the_run_and_stays_bounded(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.stores.redis.KEEP_EVENTS", 200)
    folder, view = tmp_path / "run", RedisView(server.url)
    launch.run(mirrored(folder, server.url, rounds=1), quiet)
    launch.run(mirrored(folder, server.url, rounds=1), quiet, overwrite=True)
    journal = read_lines(folder / "journal.jsonl")
    assert [record for _, record in view.events(run_id(str(folder)))] == journal
    store = RedisStore(server.url, "/other", 60.0)
    store.claim(holder_of("a", 1), "")
    for number in range(500):
        store.publish({"event": "e", "number": number})
    assert 200 <= server.client.xlen(f"fedlora:{run_id('/other')}:events") <= 300


# The lease on it -------------------------------------------------------------------------------------------------


def test_orchestrators_that_do_not_share_a_folder_are_told_apart_by_the_server(tmp_path: Path, server: Server) -> None:
    other = RedisStore(server.url, str(tmp_path / "run"), 60.0)
    assert other.claim(holder_of("other", 4), "") is None
    with pytest.raises(LeaseHeld, match="is being played by process 7 on elsewhere since 2026-01-01"):
        launch.run(mirrored(tmp_path / "run", server.url), quiet)
    assert not (tmp_path / "run").exists()
    other.close(holder_of("other", 4))
    with hold(tmp_path / "run", server.url, 60.0) as lease:
        assert lease.holder.token == 5  # above every one there was, also without the folder that counted them


def test_an_emptied_server_is_leased_again_unless_a_higher_token_was_faster(tmp_path: Path, server: Server) -> None:
    run = run_id(str(tmp_path))
    with hold(tmp_path, server.url, 60.0) as lease:
        server.client.flushall()
        lease.check()
        assert json.loads(server.client.get(f"fedlora:{run}:lease") or "")["id"] == lease.holder.id
        server.client.set(f"fedlora:{run}:lease", json.dumps(holder_of("lower", 0)))
        lease.check()
        server.client.set(f"fedlora:{run}:lease", json.dumps(holder_of("higher", 2)))
        with pytest.raises(LeaseLost, match="lost the run to process 7 on elsewhere"):
            lease.check()
        server.client.flushall()
        with pytest.raises(LeaseLost):  # once lost is lost
            lease.check()
    assert server.client.get(f"fedlora:{run}:lease") is None


def test_a_lease_is_renewed_while_it_is_held_and_given_back_only_by_its_owner(tmp_path: Path, server: Server) -> None:
    key = f"fedlora:{run_id(str(tmp_path))}:lease"
    with hold(tmp_path, server.url, 1.0):
        start = time.monotonic()
        until(lambda: time.monotonic() - start > 1.5)
        assert server.client.get(key)
        server.client.set(key, json.dumps(holder_of("other", 9)))
    assert json.loads(server.client.get(key) or "")["id"] == "other"


def test_a_silent_holder_publishes_nothing_after_the_next_one_has(server: Server) -> None:
    old, new = RedisStore(server.url, "/run", 60.0), RedisStore(server.url, "/run", 60.0)
    old.claim(holder_of("old", 1), "")
    old.publish({"event": "first"})
    new.claim(holder_of("new", 2), "old")
    new.publish({"event": "second"})
    old.publish({"event": "ghost"})
    assert [record["event"] for _, record in RedisView(server.url).events(run_id("/run"))] == ["first", "second"]


def test_addresses_that_are_none_are_refused_and_passwords_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store.redis: http://host/ is not redis://host:port/0"):
        launch.run(mirrored(tmp_path / "run", "http://host/"), quiet)
    assert not (tmp_path / "run").exists()
    store = RedisStore("redis://me:secret@127.0.0.1:1/0", "/run", 1.0)
    store.publish({"event": "e"})
    assert "secret" not in str(store.news)
    assert "redis://127.0.0.1:1/0" in str(store.news)
