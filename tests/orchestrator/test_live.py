"""Runs over rows that go on coming in: a folder or a list that grows."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis

from clients.redis_list import RedisList
from fedlora.config import RunConfig
from fedlora.data.live import LiveFolder, LiveStream
from fedlora.data.sources import TOY_WORDS
from fedlora.errors import ConfigError, DataError, FedLoRAError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_lines
from orchestrator.validate import validate
from tests.conftest import quiet, toy_config
from tests.orchestrator.servers import Server, serve

LABELS = sorted(TOY_WORDS)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    labels = [draw.choice(LABELS) for _ in range(count)]
    sites = ("north", "south")
    return [
        {"text": " ".join(draw.choices(TOY_WORDS[label], k=5)), "label": label, "site": draw.choice(sites)}
        for label in labels
    ]


def add(file: Path, new: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in new)


server = pytest.fixture(serve)


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., RunConfig]:
    """A run over the rows of ``incoming``: three rounds of 24 rows for four clients."""
    add(tmp_path / "test" / "test.jsonl", rows(40, seed=9))

    def config(to: str = "run", **changes: Any) -> RunConfig:
        source = {"source": str(tmp_path / "incoming"), "rows": 24, "patience_s": 0.0, **changes.pop("live", {})}
        continual = {"live": source, "rounds": 3, "freeze": "never", **changes.pop("continual", {})}
        data = {"test_file": str(tmp_path / "test" / "test.jsonl"), "max_length": 32}
        return toy_config(tmp_path / to, data=data, clients={"count": 4}, continual=continual, **changes)

    toy = toy_config(tmp_path / "unused")
    assert "rounds" in toy.model_fields_set  # which a live stream counts itself
    return lambda *a, **k: config(*a, rounds=k.get("continual", {}).get("rounds", 3), **k)


def journal(config: RunConfig, event: str) -> list[Any]:
    return [line for line in read_lines(Path(config.output_dir) / "journal.jsonl") if line["event"] == event]


# A source -------------------------------------------------------------------------------------------------------


def stream_over(folder: Path, **changes: Any) -> LiveStream:
    options = {"per_round": 4, "window": 1, "clients": ["c0", "c1"], "by": None, "read": lambda new, _: new, **changes}
    return LiveStream(LiveFolder(folder), **options)


def test_a_round_has_the_rows_that_belong_to_it_however_many_have_come(tmp_path: Path) -> None:
    add(tmp_path / "1.jsonl", [{"n": n} for n in range(7)])
    stream = stream_over(tmp_path)
    assert (stream.has(1), stream.has(2), stream.come, stream.needs(2)) == (True, False, 7, 8)
    add(tmp_path / "1.jsonl", [{"n": 7}])
    add(tmp_path / "2.jsonl", [{"n": n} for n in range(8, 13)])
    assert (stream.has(2), stream.has(3), stream.has(4)) == (True, True, False)
    assert [row["n"] for row in stream.rows(stream.present("c0", 3))] == [8, 10]
    assert stream.counts(3) == {"c0": 2, "c1": 2}
    assert [row["n"] for row in stream.rows(stream.earlier("c1", 3))] == [1, 3, 5, 7]
    late = stream_over(tmp_path)  # a process that begins to look later sees the same
    assert late.has(3)
    assert [late.sha256(n) for n in range(4)] == [stream.sha256(n) for n in range(4)]
    wide = stream_over(tmp_path, window=2)
    assert wide.has(3)
    assert [row["n"] for row in wide.rows(wide.present("c1", 3))] == [5, 7, 9, 11]
    assert wide.earlier("c1", 1) == []


def test_a_line_counts_once_it_has_an_end(tmp_path: Path) -> None:
    add(tmp_path / "1.jsonl", [{"n": n} for n in range(3)])
    file = tmp_path / "1.jsonl"
    with file.open("a") as stream:
        stream.write('{"n": 3')
    live = stream_over(tmp_path)
    assert not live.has(1)
    with file.open("a") as stream:
        stream.write("0}\n")
    assert live.has(1)
    assert live.rows([3]) == [{"n": 30}]


def _cut(folder: Path) -> None:
    content = (folder / "2.jsonl").read_bytes()
    (folder / "2.jsonl").write_bytes(content[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "2.jsonl has shrunk; a live stream may only grow at its end"),
        (lambda folder: (folder / "1.jsonl").unlink(), "1.jsonl is gone"),
        (lambda folder: add(folder / "1.jsonl", [{}]), "1.jsonl has grown after 2.jsonl came"),
        (lambda folder: add(folder / "0.jsonl", [{}]), "0.jsonl came after 2.jsonl, which has a later name"),
        (lambda folder: add(folder / "2.jsonl", [3, 4, 5, 6]), "row 4 of .* is not an object"),
        (lambda folder: (folder / "3.jsonl").write_text("{\n" * 4), "row 4 of .* is not JSON"),
    ],
)
def test_what_does_not_only_grow_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "incoming"
    add(folder / "1.jsonl", [{"n": 0}, {"n": 1}])
    add(folder / "2.jsonl", [{"n": 2}, {"n": 3}])
    stream = stream_over(folder)
    assert stream.has(1)
    damage(folder)
    with pytest.raises(DataError, match=message):
        stream.has(2)


def test_a_row_of_nobody_is_refused_by_its_place(tmp_path: Path) -> None:
    add(tmp_path / "1.jsonl", [{"site": "c0"}, {"site": "c1"}, {"site": "c2"}, {"site": "c0"}])
    with pytest.raises(DataError, match="row 2 of .* belongs to 'c2', which is no client .* continual.live.clients"):
        stream_over(tmp_path, by="site").has(1)
    with pytest.raises(DataError, match="row 0 of .* has no column sit.*did you mean site"):
        stream_over(tmp_path, by="sit").has(1)
    with pytest.raises(DataError, match="there is no folder"):
        stream_over(tmp_path / "nowhere").has(1)


# A run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_what_comes_while_it_goes_on(live: Callable[..., RunConfig], tmp_path: Path) -> None:
    add(tmp_path / "incoming" / "1.jsonl", rows(30))

    def writer(event: str, fields: Mapping[str, Any]) -> None:
        if event == "awaiting_rows":
            add(tmp_path / "incoming" / f"{fields['round']}.jsonl", rows(24, seed=fields["round"]))

    replay = {"replay": {"rows": 6, "balanced": True}, "scenario": "domain"}
    config = live(live={"patience_s": 60.0}, continual=replay)
    summary = launch.run(config, writer)
    assert (summary["status"], summary["rounds"]) == ("finished", 3)
    assert len(summary["stream"]["rows"]) == 1
    assert [line["round"] for line in journal(config, "awaiting_rows")] == [2, 3]
    # the same rows, there from the start, give the same adapter
    again = live("again", continual=replay)
    assert launch.run(again, quiet)["adapter_sha256"] == summary["adapter_sha256"]


def test_a_stream_that_ends_leaves_a_finished_run_that_goes_on_when_more_comes(
    live: Callable[..., RunConfig], tmp_path: Path
) -> None:
    add(tmp_path / "incoming" / "1.jsonl", rows(50))
    config = live()
    first = launch.run(config, quiet)
    assert (first["status"], first["rounds"]) == ("finished", 2)
    assert first["final"]["round"] == 2
    (ended,) = journal(config, "stream_ended")
    assert (ended["rows"], ended["needed"]) == (50, 72)
    add(tmp_path / "incoming" / "1.jsonl", rows(22, seed=1))
    second = launch.resume(config.output_dir, quiet)
    assert second["rounds"] == 3
    undisturbed = launch.run(live("undisturbed"), quiet)
    assert second["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert second["stream"] == undisturbed["stream"]


def test_rows_that_have_been_altered_since_are_noticed_when_a_run_goes_on(
    live: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "incoming" / "1.jsonl"
    add(file, rows(48))
    config = live()
    launch.run(config, quiet)
    content = file.read_text()
    file.write_text(content.replace(content.split('"')[3], content.split('"')[3][::-1], 1))
    add(file, rows(24, seed=1))
    with pytest.raises(DataError, match="the first 48 rows of .* are not those that this run has learned from"):
        launch.resume(config.output_dir, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert state.round == 2


def test_a_column_may_say_whose_a_row_is_and_who_has_none_is_not_asked(
    live: Callable[..., RunConfig], tmp_path: Path
) -> None:
    mine = [row for row in rows(200) if row["site"] == "north"][:24]
    add(tmp_path / "incoming" / "1.jsonl", mine + rows(48, seed=1))
    config = live(live={"by": "site", "clients": ["north", "south"]})
    launch.run(config, quiet)
    metrics = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert [row["selected"] for row in metrics] == [["north"], ["north", "south"], ["north", "south"]]


def test_a_list_on_a_redis_server_is_a_stream_too(
    live: Callable[..., RunConfig], tmp_path: Path, server: Server
) -> None:
    add(tmp_path / "incoming" / "1.jsonl", rows(72))
    client = redis.Redis.from_url(server.url)
    client.rpush("rows", *[json.dumps(row) for row in rows(72)])
    config = live("over-redis", live={"source": f"{server.url}#rows"})
    summary = launch.run(config, quiet)
    assert summary["adapter_sha256"] == launch.run(live("over-files"), quiet)["adapter_sha256"]
    begun = RedisList(f"{server.url}#rows")
    assert len(begun.more()) == 72
    client.rpush("rows", "{}")
    assert begun.more() == [b"{}"]
    client.ltrim("rows", 0, 10)
    with pytest.raises(DataError, match="list rows on .* has shrunk from 73 to 11 rows"):
        begun.more()
    with pytest.raises(FedLoRAError, match="list rows on .* has 11 rows, and round 1 needs 24; nothing more"):
        launch.run(live("shrunk", live={"source": f"{server.url}#rows"}), quiet)
    with pytest.raises(ConfigError, match="names no list; write redis://host:6379/0#key"):
        launch.run(live("nowhere", live={"source": server.url}), quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continual": {"freeze": "boundaries"}}, "a live stream has no boundaries; use freeze: plateau"),
        ({"continual": {"split": 2}}, "continual needs tasks, or split"),
        ({"continual": {"merge": "ties"}}, "a live stream has no tasks that are known before; leave merge out"),
        ({"live": {"by": "site"}}, "by and clients belong together"),
        ({"live": {"rows": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_live_stream_that_makes_no_sense_is_refused(
    live: Callable[..., RunConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        live(**changes)


def test_validate_tells_how_much_has_come(live: Callable[..., RunConfig], tmp_path: Path) -> None:
    add(tmp_path / "incoming" / "1.jsonl", rows(30))
    facts, problems = validate(live())
    assert problems == []
    assert facts["stream"] == f"live, rounds of 24 rows; 30 rows of {tmp_path / 'incoming'} have come"
    assert facts["rows"] == "40 to test on, form: classification"


def test_rows_of_another_kind_end_the_run_with_a_sentence(live: Callable[..., RunConfig], tmp_path: Path) -> None:
    odd = [*rows(24), *({**row, "label": "wether"} for row in rows(24))]
    add(tmp_path / "incoming" / "1.jsonl", odd)
    config = live()
    with pytest.raises(FedLoRAError, match="from row 24 has the label 'wether'.*did you mean weather"):
        launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert state.round == 1


def test_rows_that_could_not_be_handed_out_have_not_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "1.jsonl", [{"n": n} for n in range(4)])
    add(tmp_path / "2.jsonl", [{"n": n} for n in range(4, 8)])
    stream = stream_over(tmp_path)
    whole, broken = LiveFolder._from, [True]

    def flaky(self: LiveFolder, name: str) -> bytes:
        if name == "2.jsonl" and broken:
            broken.clear()
            raise OSError(5, "Input/output error")
        return whole(self, name)

    monkeypatch.setattr(LiveFolder, "_from", flaky)
    with pytest.raises(DataError, match="cannot be read: Input/output error"):
        stream.has(1)
    assert stream.has(1)
    assert [row["n"] for row in stream.rows([0, 1, 2, 3])] == [0, 1, 2, 3]


def test_values_of_different_types_are_refused_and_columns_nobody_needs_are_not_looked_at(
    live: Callable[..., RunConfig], tmp_path: Path
) -> None:
    new = rows(72)
    for place, row in enumerate(new):
        row["meta"] = place if place % 2 else "odd"
    add(tmp_path / "incoming" / "1.jsonl", new[:48])
    add(tmp_path / "incoming" / "1.jsonl", [{**row, "text": 3} if i == 5 else row for i, row in enumerate(new[48:])])
    config = live()
    with pytest.raises(FedLoRAError, match="the rows of .* from row 48 have values of different types"):
        launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    assert state.round == 2
