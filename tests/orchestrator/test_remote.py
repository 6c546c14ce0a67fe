"""A run folder on another file system: the copy is the truth, and a copy that was cut short is passed over."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fedlora.errors import RunFolderError
from orchestrator import launch
from orchestrator.stores.files import read_json
from orchestrator.stores.remote import Mirror, localised
from tests.conftest import quiet, toy_config

URL = "memory://bucket/toy"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    there = fsspec.filesystem("memory")
    yield there
    if there.exists("/bucket"):
        there.rm("/bucket", recursive=True)


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache-of-another-machine"))


def test_what_was_published_is_fetched_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(URL)
    (mirror.folder / "checkpoints" / "round-0001").mkdir(parents=True)
    for name in ("config.yaml", "journal.jsonl", "checkpoints/round-0001/manifest.json"):
        (mirror.folder / name).write_text(name)
    mirror.publish()
    another_machine(tmp_path, monkeypatch)
    folder = localised(URL)
    assert folder != mirror.folder
    assert (folder / "checkpoints" / "round-0001" / "manifest.json").read_text().endswith("manifest.json")


def test_files_that_are_gone_here_are_gone_there_and_those_that_are_gone_there_are_not_believed(
    bucket: fsspec.AbstractFileSystem,
) -> None:
    mirror = Mirror(URL)
    mirror.folder.mkdir(parents=True)
    for name in ("config.yaml", "old", "new"):
        (mirror.folder / name).write_text(name)
    mirror.publish()
    (mirror.folder / "old").unlink()
    mirror.publish()
    assert sorted(Path(path).name for path in bucket.find("/bucket/toy")) == ["config.yaml", "new"]
    bucket.rm_file("/bucket/toy/new")
    Mirror(URL).fetch()
    assert [path.name for path in mirror.folder.iterdir()] == ["config.yaml"]


def test_one_file_is_copied_outside_a_session_and_outlives_the_next_fetch(bucket: fsspec.AbstractFileSystem) -> None:
    mirror = Mirror(URL)
    (mirror.folder / "exports.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (mirror.folder / "exports.jsonl").write_text("{}\n")
    mirror.put("exports.jsonl")
    Mirror(URL).fetch()
    assert (mirror.folder / "exports.jsonl").read_text() == "{}\n"


def test_what_clients_keep_to_themselves_leaves_no_machine(bucket: fsspec.AbstractFileSystem) -> None:
    mirror = Mirror(URL)
    (mirror.folder / "private").mkdir(parents=True)
    (mirror.folder / "private" / "head").write_text("mine")
    (mirror.folder / "config.yaml").write_text("x")
    mirror.publish()
    mirror.fetch()
    assert [Path(path).name for path in bucket.find("/bucket/toy")] == ["config.yaml"]
    assert (mirror.folder / "private" / "head").exists()


def test_a_log_is_copied_when_it_has_grown_by_a_tenth_and_at_the_end(bucket: fsspec.AbstractFileSystem) -> None:
    mirror = Mirror(URL)
    mirror.folder.mkdir(parents=True)
    log = mirror.folder / "journal.jsonl"
    sizes = []
    for size in (100, 105, 120, 121):
        log.write_text("x" * size)
        mirror.publish()
        sizes.append(bucket.size("/bucket/toy/journal.jsonl"))
    mirror.publish(everything=True)
    assert (*sizes, bucket.size("/bucket/toy/journal.jsonl")) == (100, 100, 120, 120, 121)


def test_a_run_is_played_to_a_url_and_resumed_from_it_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: fsspec.AbstractFileSystem
) -> None:
    expected = launch.run(toy_config(tmp_path / "plain"), quiet)

    class PowerCut(BaseException):
        pass

    def cut(event: str, fields: object) -> None:
        if event == "round_committed" and fields["round"] == 2:  # type: ignore[index]
            raise PowerCut

    with pytest.raises(PowerCut):
        launch.run(toy_config(URL), cut)
    another_machine(tmp_path, monkeypatch)
    heard: list[str] = []
    summary = launch.run(toy_config(URL), lambda event, fields: heard.append(event))
    assert "run_resumed" in heard
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert bucket.exists("/bucket/toy/adapter/adapter_model.safetensors")
    assert read_json(localised(URL) / "summary.json")["adapter_sha256"] == expected["adapter_sha256"]


def test_a_checkpoint_whose_copy_was_cut_short_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: fsspec.AbstractFileSystem
) -> None:
    expected = launch.run(toy_config(URL), quiet)
    bucket.rm_file("/bucket/toy/checkpoints/round-0003/manifest.json")
    another_machine(tmp_path, monkeypatch)
    heard = []
    summary = launch.run(toy_config(URL), lambda event, fields: heard.append((event, fields)))
    assert any(event == "checkpoint_damaged" and "round-0003" in fields["reason"] for event, fields in heard)
    assert summary["adapter_sha256"] == expected["adapter_sha256"]


def test_overwrite_replaces_the_copy(bucket: fsspec.AbstractFileSystem) -> None:
    launch.run(toy_config(URL, seed=1, rounds=1), quiet)
    with pytest.raises(RunFolderError, match="another configuration"):
        launch.run(toy_config(URL, rounds=1), quiet)
    launch.run(toy_config(URL, rounds=1), quiet, overwrite=True)
    assert bucket.find("/bucket/toy/checkpoints")


def test_places_that_cannot_be_are_named(bucket: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(RunFolderError, match="memory://bucket/nothing is not a run folder"):
        localised("memory://bucket/nothing")
    with pytest.raises(RunFolderError, match="cannot open nosuch://bucket/run: .*nosuch"):
        Mirror("nosuch://bucket/run")


def test_rounds_that_could_not_be_copied_are_not_lost(
    monkeypatch: pytest.MonkeyPatch, bucket: fsspec.AbstractFileSystem
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the bucket is locked")

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    put, heard = type(bucket).put_file, []

    def listen(event: str, fields: object) -> None:
        heard.append(event)
        if event == "round_committed" and fields["round"] == 1:  # type: ignore[index]
            monkeypatch.setattr(type(bucket), "put_file", refuse)

    with pytest.raises(RunFolderError, match=r"cannot write memory://bucket/toy: OSError: the bucket is locked"):
        launch.run(toy_config(URL), listen)
    assert heard.count("copy_failed") == 2
    monkeypatch.setattr(type(bucket), "put_file", put)
    launch.run(toy_config(URL), lambda event, fields: heard.append(event))
    assert heard[-1] == "already_finished"
    Mirror(URL).fetch()
    assert read_json(localised(URL) / "summary.json")["status"] == "finished"
