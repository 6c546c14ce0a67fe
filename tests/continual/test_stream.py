"""The rows of a stream."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import ContinualConfig, DataConfig, parse_config
from fedlora.continual.stream import Stream, labels_of, open_stream
from fedlora.data.partition import open_corpus
from fedlora.errors import ConfigError, DataError

TOY = DataConfig(name="builtin:toy")
TOPICS = open_corpus(TOY, 1, 0).labels


def opened(data: DataConfig = TOY, clients: int = 3, seed: int = 0, **continual: Any) -> Stream:
    return open_stream(data, ContinualConfig.model_validate(continual), clients, seed)


def labels_in(stream: Stream, rows: Any) -> set[str]:
    return set(stream.corpus.train.select(list(rows))["label"])


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(labels: list[str], count: int = 12, **more: str) -> list[dict[str, str]]:
    return [{"text": f"{label} number {i}", "label": label, **more} for label in labels for i in range(count)]


def test_a_split_gives_every_label_to_one_task_and_every_row_to_its_labels_task() -> None:
    stream = opened(split=2)
    assert [task.name for task in stream.tasks] == ["task1", "task2"]
    assert sorted(label for task in stream.tasks for label in task.labels) == [0, 1, 2, 3]
    for task in stream.tasks:
        names = {stream.corpus.labels[label] for label in task.labels}
        for rows in (*task.shards.values(), *task.heldout.values()):
            assert labels_in(stream, rows) <= names
        assert set(stream.corpus.test.select(task.test)["label"]) == names
    for client, rows in stream.corpus.shards.items():
        assert sorted(row for task in stream.tasks for row in task.shards[client]) == sorted(rows)
    assert labels_of(stream, {0, 1}) == (0, 1, 2, 3)


def test_the_order_of_a_split_is_drawn_from_the_seed() -> None:
    assert opened(split=2).tasks == opened(split=2).tasks
    assert len({opened(split=2, seed=seed).tasks[0].labels for seed in range(8)}) > 1


def test_tasks_by_label_and_by_another_column(tmp_path: Path) -> None:
    rows = rows_of(["up", "down"], site="north") + rows_of(["up", "down"], site="south")
    data = DataConfig(train_file=write(tmp_path / "d.jsonl", rows))
    by_label = opened(data, tasks=[{"name": "first", "labels": ["down"]}, {"name": "second", "labels": ["up"]}])
    assert [by_label.corpus.labels[task.labels[0]] for task in by_label.tasks] == ["down", "up"]
    sites = [{"name": site, "where": {"site": [site]}} for site in ("north", "south")]
    by_site = opened(data, scenario="domain", tasks=sites)
    for task in by_site.tasks:
        for own in task.shards.values():
            assert set(by_site.corpus.train.select(own)["site"]) == {task.name}
        assert task.labels == (0, 1)


def test_tasks_with_data_of_their_own_stand_in_one_table(tmp_path: Path) -> None:
    owners = {"a": ["x", "y"], "b": ["z", "w"]}
    files = {name: write(tmp_path / f"{name}.jsonl", rows_of(labels)) for name, labels in owners.items()}
    stream = opened(tasks=[{"name": name, "data": {"train_file": file}} for name, file in files.items()])
    assert set(stream.corpus.labels) == {"x", "y", "z", "w"}
    for task in stream.tasks:
        own = set(owners[task.name])
        assert {stream.corpus.labels[label] for label in task.labels} == own
        assert all(labels_in(stream, rows) <= own for rows in task.shards.values())
        assert set(stream.corpus.test.select(task.test)["label"]) == own
    parts = [rows for task in stream.tasks for rows in (*task.shards.values(), *task.heldout.values())]
    assert sorted(row for rows in parts for row in rows) == list(range(len(stream.corpus.train)))


def test_the_same_word_may_mean_another_thing_in_another_task(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", rows_of(["good", "bad"])) for name in "ab"]
    tasks = [{"name": name, "data": {"train_file": file}} for name, file in zip("ab", files, strict=True)]
    with pytest.raises(DataError, match=r"'(good|bad)' is in a and in b; use scenario: domain .* or prefix: true"):
        opened(tasks=tasks)
    stream = opened(tasks=[task | {"prefix": True} for task in tasks])
    assert sorted(stream.corpus.labels) == ["a/bad", "a/good", "b/bad", "b/good"]
    assert [task.labels for task in opened(tasks=tasks, scenario="domain").tasks] == [(0, 1), (0, 1)]


def test_blur_moves_a_share_of_the_rows_to_the_neighbours_and_loses_none() -> None:
    sharp, blurred = opened(split=4), opened(split=4, blur=0.3)
    total = moved = 0
    for before, after in zip(sharp.tasks, blurred.tasks, strict=True):
        for client, rows in before.shards.items():
            total += len(rows)
            moved += len(set(rows) - set(after.shards[client]))
    assert 0.1 < moved / total < 0.35
    for client in sharp.corpus.shards:
        own = [row for task in blurred.tasks for row in task.shards.get(client, ())]
        assert sorted(own) == sorted(sharp.corpus.shards[client])
    assert blurred.tasks[0].test == sharp.tasks[0].test


BAD = {
    "a label nobody has": (
        {"tasks": [{"name": "a", "labels": ["fod"]}, {"name": "b", "labels": ["food"]}]},
        r"task a has the label 'fod'",
    ),
    "a column nobody has": (
        {"tasks": [{"name": "a", "where": {"lable": ["x"]}}]},
        r"task a asks for the column lable; did you mean label",
    ),
    "a task without rows": ({"tasks": [{"name": "a", "where": {"label": ["x"]}}]}, "no client has rows of task a"),
    "more tasks than labels": ({"split": 9}, "4 labels cannot make 9 tasks"),
    "one label in two tasks": (
        {"tasks": [{"name": "a", "labels": ["colours"]}, {"name": "b", "labels": ["colours"]}]},
        "'colours' is in a and in b",
    ),
    "other labels in a domain": (
        {"scenario": "domain", "split": 2},
        "domain needs one label set for all tasks",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_stream_that_cannot_be_is_refused_with_what_to_do(case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(DataError, match=message):
        opened(**settings)


WHOLE = {"model": {"name": "builtin:tiny-bert"}, "data": {"name": "builtin:toy"}}


def test_the_rounds_of_a_run_are_those_of_its_tasks() -> None:
    tasks = [{"name": "a", "rounds": 2}, {"name": "b"}]
    config = parse_config({**WHOLE, "continual": {"tasks": tasks, "rounds": 3}})
    assert config.rounds == 5
    assert parse_config(config.resolved()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"continual": {}}, "continual needs tasks, or split"),
        ({"continual": {"split": 2, "tasks": [{"name": "a"}]}}, "continual needs tasks, or split"),
        ({"continual": {"tasks": [{"name": "a"}, {"name": "a"}]}}, "two tasks have the name a"),
        ({"continual": {"split": 2, "rounds": 3}, "rounds": 7}, "rounds is 7, but the tasks of continual take 6"),
        ({"continual": {"split": 2, "joint": True}}, "joint knows no boundaries; set freeze: never"),
        ({"continual": {"split": 2, "joint": True, "blur": 0.1}}, "leave blur out"),
        ({"continual": {"tasks": [{"name": "a", "prefix": True}]}}, "task a has no data of its own"),
        ({"continual": {"splt": 2}}, "continual.splt is not a key; did you mean continual.split"),
    ],
)
def test_a_stream_that_contradicts_itself_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**WHOLE, **settings})


def test_a_configuration_that_was_written_out_gives_the_same_rows_again(tmp_path: Path) -> None:
    files = {
        name: write(tmp_path / f"{name}.jsonl", rows_of(list(labels), 30))
        for name, labels in (("a", "xy"), ("b", "zw"))
    }
    tasks = [{"name": name, "data": {"train_file": file, "client_holdout": 0.1}} for name, file in files.items()]
    data = {"max_train_rows": 20, "client_holdout": 0.3, "partition": {"method": "linear"}}
    config = parse_config({**WHOLE, "data": data, "continual": {"tasks": tasks}})
    again = parse_config(config.resolved())
    assert again == config
    first, second = (open_stream(one.data, one.continual, 3, 0) for one in (config, again))
    assert first.tasks == second.tasks
    assert len(first.corpus.train) == 40
    assert {len(rows) for rows in first.tasks[0].shards.values()} != {6}  # linear, as the run's data say


def test_columns_that_only_one_task_can_mean_do_not_matter(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [row | {"id": place} for place, row in enumerate(rows_of(["x", "y"]))])  # type: ignore[dict-item]
    other = write(tmp_path / "b.jsonl", [row | {"id": "none"} for row in rows_of(["z", "w"])])
    tasks = [{"name": "a", "data": {"train_file": one}}, {"name": "b", "data": {"train_file": other}}]
    assert opened(tasks=tasks).corpus.train.column_names == ["text", "label"]


def test_rows_of_no_task_are_nobodys() -> None:
    stream = opened(
        tasks=[{"name": "a", "labels": [TOPICS[0]]}, {"name": "b", "labels": [TOPICS[1]]}], joint=True, freeze="never"
    )
    for rows in stream.corpus.shards.values():
        assert labels_in(stream, rows) <= set(TOPICS[:2])


def test_without_a_task_its_rows_are_nobodys_and_everything_else_stays() -> None:
    whole, left = opened(split=3), opened(split=3, without=["task2"])
    assert [task.name for task in left.tasks] == ["task1", "task3"]
    assert left.tasks == (whole.tasks[0], whole.tasks[2])
    assert left.corpus.labels == whole.corpus.labels
    assert left.corpus.train[:] == whole.corpus.train[:]
    for client, rows in left.corpus.shards.items():
        assert set(rows) == set(whole.corpus.shards[client]) - set(whole.tasks[1].shards.get(client, ()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"without": ["task9"]}, "there is no task task9"),
        ({"without": ["task1", "task2", "task3"]}, "without leaves no task to train"),
        ({"without": ["task1"], "order": "shuffled"}, "with order its rows are trained on in rounds of other tasks"),
    ],
)
def test_what_cannot_be_left_out_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualConfig.model_validate({"split": 3, **settings})
