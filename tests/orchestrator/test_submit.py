"""What ``fedlora submit`` decides before it talks to a cluster."""

from pathlib import Path

import pytest

from fedlora.errors import ConfigError, FedLoRAError
from orchestrator.submit import prepare, submit
from tests.cluster import free_ports
from tests.conftest import toy_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(toy_config("runs/toy").to_yaml())
    return path


def test_the_same_run_is_the_same_job_and_another_folder_or_another_seed_is_another(config: Path) -> None:
    keys = [
        prepare(config, overrides, config.parent).key
        for overrides in ([], ["output_dir=runs/toy"], ["store.lease_s=5"], ["seed=1"], ["output_dir=/elsewhere"])
    ]
    assert keys[0] == keys[1] == keys[2]  # who looks on does not make another run
    assert len({*keys}) == 3
    assert keys[0].startswith("fedlora-toy-")


def test_a_relative_output_dir_becomes_absolute_because_the_job_runs_in_a_copy_that_vanishes(config: Path) -> None:
    order = prepare(config, ["rounds=2"], config.parent)
    assert order.output_dir == str(Path("runs/toy").absolute())
    assert f"""--set rounds=2 --set 'output_dir="{order.output_dir}"'""" in order.command
    assert order.command.startswith("python -m orchestrator run toy.yaml ")


def test_a_url_as_output_dir_stays_one(config: Path) -> None:
    assert prepare(config, ["output_dir=s3://bucket/toy"], config.parent).output_dir == "s3://bucket/toy"


def test_mistakes_in_the_configuration_are_found_before_anything_is_submitted(config: Path) -> None:
    with pytest.raises(ConfigError, match="rouds is not a key; did you mean rounds?"):
        prepare(config, ["rouds=2"], config.parent)


def test_a_configuration_outside_the_folder_that_is_uploaded_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    with pytest.raises(ConfigError, match="a job sees a copy of this folder only; copy it here"):
        prepare(config, [], tmp_path / "project")


def test_where_no_cluster_answers_a_sentence_says_how_to_start_one(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # what is asked for wins over Ray's variable
    (port,) = free_ports(1)
    order = prepare(config, [], config.parent)
    with pytest.raises(FedLoRAError, match=f"no Ray cluster answers at http://127.0.0.1:{port} .* ray start --head"):
        submit(order, f"127.0.0.1:{port}", print, print)
    with pytest.raises(ConfigError, match="ray://127.0.0.1:10001: give the dashboard's"):
        submit(order, "ray://127.0.0.1:10001", print, print)
