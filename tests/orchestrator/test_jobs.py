"""Runs as jobs of a real cluster: a head and two worker nodes, each started by its own ``ray start``."""

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import load_config
from orchestrator import launch
from orchestrator.stores.files import read_json, read_lines
from tests.cluster import ROOT, Cluster, ray_cluster, wait_until
from tests.conftest import quiet

pytestmark = pytest.mark.ray

CONFIG = "configs/smoke.yaml"  # a job sees the repository only
ROUNDS_OF_SECONDS = ["training.max_steps=40", "rounds=4", "threads=1"]  # time to kill somebody in each
ON_RAY = ["pool=ray", "ray.workers=2", "store.lease_s=1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the adapter as the same run makes it in one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    config = load_config(ROOT / CONFIG, [*ROUNDS_OF_SECONDS, f"output_dir={folder}"])
    return str(launch.run(config, quiet)["adapter_sha256"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def submitting(cluster: Cluster, run: Path, *options: str) -> list[str]:
    """The command that submits the run."""
    settings = as_options([*ROUNDS_OF_SECONDS, *ON_RAY, f"output_dir={run}"])
    return ["python", "-m", "orchestrator", "submit", CONFIG, *settings, "--address", cluster.dashboard, *options]


def as_options(overrides: Sequence[str]) -> list[str]:
    """``--set`` before each."""
    return [part for override in overrides for part in ("--set", override)]


def wait_for(run: Path, event: str, round: int = 0) -> dict[str, Any]:
    """The event of a round, once it is in the run's journal."""
    found: list[dict[str, Any]] = []

    def happened() -> bool:
        lines = read_lines(run / "journal.jsonl")
        found[:] = [line for line in lines if line["event"] == event and line.get("round", 0) == round]
        return bool(found)

    wait_until(happened, f"{event} of round {round}", 180, run / "journal.jsonl")
    return found[-1]


def kill_a_busy_node(cluster: Cluster) -> None:
    busy = next(node for node in cluster.workers if node.holds_a_worker())
    busy.kill()


def kill_a_node_and_then_the_driver(cluster: Cluster, run: Path) -> None:
    """In rounds 2 and 3; another node joins afterwards."""
    wait_for(run, "round_started", 2)
    kill_a_busy_node(cluster)
    wait_for(run, "round_started", 3)
    os.kill(wait_for(run, "run_opened")["pid"], signal.SIGKILL)
    cluster.add_worker()


@pytest.mark.slow
def test_a_job_that_loses_a_node_and_then_its_driver_ends_with_the_bytes_of_the_undisturbed_run(
    cluster: Cluster, undisturbed: str, run: Path
) -> None:
    with cluster.running(*submitting(cluster, run)) as follower:
        kill_a_node_and_then_the_driver(cluster, run)
        told, _ = follower.communicate(timeout=180)
    assert follower.returncode == 0, told
    assert re.search(r"was killed by signal 9; submitting it again: it goes on from the last commit", told)
    assert re.search(r"submitted job fedlora-smoke-\w+-2;", told)
    assert wait_for(run, "run_resumed", 2)
    assert read_json(run / "summary.json")["adapter_sha256"] == undisturbed

    again = cluster.run(*submitting(cluster, run))
    assert again.returncode == 0, again.stdout
    assert "is already finished" in again.stdout


@pytest.mark.slow
def test_a_node_killed_in_round_2_costs_its_work_and_not_the_run(cluster: Cluster, undisturbed: str, run: Path) -> None:
    with cluster.running(*submitting(cluster, run)) as follower:
        wait_for(run, "round_started", 2)
        kill_a_busy_node(cluster)
        told, _ = follower.communicate(timeout=180)
    cluster.add_worker()
    assert follower.returncode == 0, told
    assert "submitting it again" not in told
    assert read_json(run / "summary.json")["adapter_sha256"] == undisturbed


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_ray_job_stop_ends_it_resumable(cluster: Cluster, run: Path) -> None:
    longer = ("--set", "rounds=12")
    with cluster.running(*submitting(cluster, run, *longer)) as follower:
        wait_for(run, "run_opened")
        second = cluster.run(*submitting(cluster, run, *longer, "--no-follow"))
        wait_for(run, "round_started", 2)
        follower.send_signal(signal.SIGINT)
        told, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130, told
    stop = re.search(r"Stop it: (ray job stop .*)", told)
    assert stop, told
    assert "is already under way" in second.stdout
    assert second.returncode == 0

    stopped = cluster.run(*stop[1].split(), timeout=45)
    assert stopped.returncode == 0, stopped.stdout
    assert read_json(run / "summary.json")["status"] == "interrupted"
    assert "Go on with: fedlora resume" in cluster.run("ray", "job", "logs", *stop[1].split()[3:]).stdout

    finished = cluster.run(*submitting(cluster, run, *longer), timeout=180)
    assert finished.returncode == 0, finished.stdout
    assert "resuming after round" in finished.stdout
    assert read_json(run / "summary.json")["rounds"] == 12


@pytest.mark.slow
def test_a_head_that_dies_and_comes_back_empty_is_given_the_job_again(
    cluster: Cluster, undisturbed: str, run: Path
) -> None:
    with cluster.running(*submitting(cluster, run)) as follower:
        wait_for(run, "round_started", 3)
        cluster.kill()
        cluster.start_head()
        for _ in range(2):
            cluster.add_worker()
        told, _ = follower.communicate(timeout=180)
    assert follower.returncode == 0, told
    assert "the cluster was started anew and does not know job" in told
    assert wait_for(run, "run_resumed", 2)
    assert read_json(run / "summary.json")["adapter_sha256"] == undisturbed


@pytest.mark.slow
def test_a_mistake_that_only_the_job_can_see_is_not_tried_again(cluster: Cluster, run: Path) -> None:
    told = cluster.run(*submitting(cluster, run, "--set", "data.train_file=nowhere.jsonl", "--set", "data.name=null"))
    assert told.returncode == 3, told.stdout
    assert told.stdout.count("submitted job") == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_loses_a_node_and_its_driver_and_ends_with_the_bytes_of_a_quiet_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    quickstart, settings = "configs/quickstart.yaml", ["pool=ray", "ray.workers=2", "store.lease_s=1"]
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    job = ["python", "-m", "orchestrator", "run", quickstart, *as_options([*settings, f"output_dir={calm}"])]
    submit = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--", *job]
    finished = cluster.run(*submit, timeout=600)
    assert finished.returncode == 0, finished.stdout
    assert read_json(calm / "summary.json")["final"]["accuracy"] > 0.85

    submit = ["python", "-m", "orchestrator", "submit", quickstart, "--address", cluster.dashboard]
    with cluster.running(*submit, *as_options([*settings, f"output_dir={shaken}"])) as follower:
        kill_a_node_and_then_the_driver(cluster, shaken)
        told, _ = follower.communicate(timeout=900)
    assert follower.returncode == 0, told
    assert wait_for(shaken, "run_resumed", 2)
    ended = [read_json(folder / "summary.json")["adapter_sha256"] for folder in (calm, shaken)]
    assert ended[0] == ended[1]
