"""Organisations over Flower in earnest: a SuperLink with TLS and authenticated SuperNodes, each a process."""

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.flower.keys import write_node_key
from tests.conftest import quiet
from tests.silos import RANKS, served, together, write_files
from tests.superlink import Site, kill, site, wait_until

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {"strategy": "fedex_het", "rounds": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("files"), list(RANKS))


@pytest.fixture(scope="module")
def local(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same federation in one process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    launch.run(together(folder, files, list(RANKS.values()), files["test"], **SETTINGS), quiet)
    return folder


@pytest.fixture(scope="module")
def three(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three organisations with a file and a rank each."""
    with site(tmp_path_factory.mktemp("site")) as opened:
        for client, rank in RANKS.items():
            opened.register(client)
            opened.nodes[client] = opened.start_node(client, files[client], rank)
        yield opened


def configure(three: Site, name: str, files: dict[str, Path], **changes: Any) -> Path:
    """A configuration whose run folder is called like it."""
    keys = {client: str(three.folder / "keys" / f"{client}.pub") for client in RANKS}
    settings = {**SETTINGS, "flower__nodes": 3, "flower__wait_s": 120.0, "flower__keys": keys, **changes}
    path = three.folder / f"{name}.yaml"
    path.write_text(served(three.folder / name, files["test"], **settings).to_yaml())
    return path


def events(three: Site, name: str, kind: str) -> list[dict[str, Any]]:
    """What a run has told so far."""
    path = three.folder / name / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = (load_latest(folder)[0] for folder in (one, other))
    assert mine is not None
    assert theirs is not None
    assert mine.round == theirs.round == SETTINGS["rounds"]
    for name, tensor in mine.adapter.tensors().items():
        torch.testing.assert_close(theirs.adapter.tensors()[name], tensor, rtol=0, atol=1e-6)
    assert len(mine.ledger.entries) == len(theirs.ledger.entries)


def test_five_rounds_at_ranks_4_8_and_16_equal_the_local_pool(three: Site, files: dict[str, Path], local: Path) -> None:
    process = three.run(configure(three, "equal", files))
    assert process.wait(300) == 0, three.log("equal")
    assert_same_adapter(local, three.folder / "equal")
    rounds = events(three, "equal", "round_committed")
    assert [row["admitted"] for row in rounds] == [sorted(RANKS)] * 5


def test_five_rounds_of_minilm_on_clinc150_equal_the_local_pool(tmp_path: Path, clinc150: Path) -> None:
    files = clinc150_files(clinc150, tmp_path)
    with gzip.open(clinc150 / "train.jsonl.gz", "rt", encoding="utf-8") as rows:
        labels = sorted({json.loads(row)["label"] for row in rows})
    changes = {**SETTINGS, "model__name": "builtin:minilm", "training__base_dropout": False}
    real = {"labels": labels, "max_length": 32, "test_file": str(files["test"])}
    names = {name: path for name, path in files.items() if name != "test"}
    alone = together(tmp_path / "local", files, list(RANKS.values()), files["test"], **changes)
    alone = alone.model_copy(update={"data": alone.data.model_copy(update=real)})
    launch.run(alone, quiet)
    with site(tmp_path / "site") as opened:
        for client, path in names.items():
            opened.register(client)
            opened.start_node(client, path, RANKS[client], model="builtin:minilm")
        config = served(opened.folder / "run", files["test"], flower__nodes=3, flower__wait_s=120.0, **changes)
        config = config.model_copy(update={"data": config.data.model_copy(update=real)})
        path = opened.folder / "run.yaml"
        path.write_text(config.to_yaml())
        process = opened.run(path)
        assert process.wait(600) == 0, opened.log("run")
        assert_same_adapter(tmp_path / "local", opened.folder / "run")


def clinc150_files(source: Path, folder: Path) -> dict[str, Path]:
    """A file of its own for each organisation, and test rows for the server."""
    files = {name: folder / f"{name}.jsonl" for name in (*RANKS, "test")}
    for kind, names, most in (("train", list(RANKS), 900), ("test", ["test"], 200)):
        with gzip.open(source / f"{kind}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = list(file)
        rows = rows[:: max(1, len(rows) // most)]
        for place, name in enumerate(names):
            files[name].write_text("".join(rows[place :: len(names)]), encoding="utf-8")
    return files


def test_a_wrong_key_a_key_of_nobody_and_plain_text_are_refused(three: Site) -> None:
    write_node_key(three.folder / "keys" / "stranger")
    trust = ["--superlink", three.address, "--root-certificates", str(three.certificates / "ca.crt")]
    attempts = {
        "wrong key": [*trust, "--auth-supernode-private-key", str(three.folder / "keys" / "stranger")],
        "no key": trust,
        "plain text": ["--superlink", three.address, "--insecure"],
    }
    for name, arguments in attempts.items():
        process = three.start(name, "fedlora", "flower", "supernode", *arguments, "--max-retries", "1")
        assert process.wait(60) != 0, name
        assert "Failed to initialize the connection to the SuperLink" in three.log(name), name
    nodes = json.loads(three.flwr("supernode", "ls", "here", "--format", "json"))["nodes"]
    assert len(nodes) == len(RANKS)


def test_a_run_goes_on_after_the_superlink_and_the_driver_were_killed(
    three: Site, files: dict[str, Path], local: Path
) -> None:
    config = configure(three, "cut", files)
    process = three.run(config)
    wait_until(lambda: len(events(three, "cut", "round_committed")) == 2)
    kill(three.link)
    kill(process)
    three.link = three.start_link()
    process = three.run(config)
    wait_until(lambda: len(events(three, "cut", "round_committed")) == 3)
    kill(three.link)  # this time the driver waits for it
    three.link = three.start_link()
    assert process.wait(300) == 0, three.log("cut")
    assert_same_adapter(local, three.folder / "cut")


def test_a_node_killed_in_a_round_costs_its_rounds_and_takes_part_again(three: Site, files: dict[str, Path]) -> None:
    process = three.run(configure(three, "gone", files, rounds=60, schedule__deadline_s=15))
    wait_until(lambda: len(events(three, "gone", "round_committed")) == 1)
    asked = three.log("cedar").count("Receiving: train")
    wait_until(lambda: three.log("cedar").count("Receiving: train") > asked)
    kill(three.nodes["cedar"])
    wait_until(lambda: len(events(three, "gone", "round_committed")) >= 3)
    without = events(three, "gone", "round_committed")[2]
    assert without["admitted"] == ["amber", "birch"]

    def is_back() -> bool:
        if three.nodes["cedar"].poll() is not None:  # the SuperLink takes a node for present for up to a minute
            three.nodes["cedar"] = three.start_node("cedar", files["cedar"], RANKS["cedar"])
        return "cedar" in events(three, "gone", "round_committed")[-1]["admitted"]

    wait_until(is_back, 240)
    assert process.poll() is None
    kill(process)


def test_flwr_run_plays_the_app_that_flower_init_writes(files: dict[str, Path], tmp_path: Path) -> None:
    with site(tmp_path / "site", isolation="subprocess") as opened:
        app = opened.folder / "app"
        made = subprocess.run(["fedlora", "flower", "init", str(app)], env=opened.environment, capture_output=True)
        assert made.returncode == 0, made.stderr
        for client in ("amber", "birch"):
            opened.register(client)
            opened.start_node(client, files[client], RANKS[client], plain=client == "birch")
        for _ in range(2):  # the second time it is finished, and says so
            opened.flwr("run", str(app), "here", "--run-config", "rounds=1", "--stream")
        summary = json.loads((app / "run" / "summary.json").read_text())
        assert summary["status"] == "finished"
        assert summary["rounds"] == 1
        assert (app / "run" / "adapter").is_dir()
