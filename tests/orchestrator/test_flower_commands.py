"""What surrounds the Flower pool: its configuration, the app it writes, keys, and the door of the SuperLink."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fedlora.config import load_config, parse_config
from fedlora.errors import ConfigError, FedLoRAError, RunFolderError
from orchestrator.flower.app import POLICY, write_app
from orchestrator.flower.gate import FleetOnly
from orchestrator.flower.keys import read_keys, write_certificates, write_node_key
from orchestrator.validate import validate
from tests.silos import served, write_files


def problems(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        served(folder, None, **changes)
    return str(refusal.value)


def test_what_a_server_cannot_say_of_nodes_is_refused(tmp_path: Path) -> None:
    assert "rows stay on the nodes" in problems(tmp_path, data__train_file="rows.jsonl")
    assert "rows stay on the nodes" in problems(tmp_path, data__client_files={"a": "a.jsonl"})
    assert "every node says its own rank" in problems(tmp_path, clients__ranks=[4, 8])
    assert "give the label set that all nodes share" in problems(tmp_path, data__labels=None)
    assert "attack does not go together with pool: flower" in problems(tmp_path, attack={"name": "nan"})
    assert "federation.shards does not go together" in problems(tmp_path, federation__shards=2)
    parse_config(served(tmp_path, None, data__labels=None, model__task="causal-lm").resolved())


def test_a_configuration_for_nodes_validates_without_a_row(tmp_path: Path) -> None:
    test = write_files(tmp_path / "files", ["amber"])["test"]
    for config in (served(tmp_path / "a", None), served(tmp_path / "b", test)):
        facts, found = validate(config)
        assert found == []
        assert facts["clients"] == "2 nodes, who bring rows and ranks"


def test_how_nodes_are_reached_does_not_define_a_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: m}\ndata: {labels: [a, b]}\npool: flower\n")
    assert load_config(path, ["flower.address=host:1"]).output_dir == load_config(path).output_dir
    assert served(tmp_path, None).sha256() == served(tmp_path, None, flower__address="host:1").sha256()


def test_the_app_that_init_writes_is_whole_and_its_policy_fits_its_configuration(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    from clients.policy import Policy, check_run
    from clients.recipe import recipe_of

    names = {path.name for path in write_app(tmp_path / "app")}
    assert names == {
        "pyproject.toml",
        "server_app.py",
        "client_app.py",
        "config.yaml",
        "client_policy.yaml",
        ".gitignore",
    }
    config = load_config(tmp_path / "app" / "config.yaml")
    assert config.pool == "flower"
    check_run(Policy.model_validate(yaml.safe_load(POLICY)), recipe_of(config))
    (tmp_path / "app" / "rows.jsonl").write_text('{"text": "secret", "label": "food"}\n')
    assert b"rows.jsonl" not in build_fab_from_disk(tmp_path / "app")  # data in the folder is not handed out
    with pytest.raises(RunFolderError, match="is not empty"):
        write_app(tmp_path / "app")


def test_private_keys_are_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    for path in (*write_certificates(tmp_path, ["localhost", "192.0.2.7"]), *write_node_key(tmp_path / "node")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if path.name in ("server.key", "node") else 0o644)
    with pytest.raises(RunFolderError, match="is there already"):
        write_node_key(tmp_path / "node")
    assert read_keys({"amber": str(tmp_path / "node.pub")})["amber"].startswith(b"-----BEGIN PUBLIC KEY-----")
    with pytest.raises(ConfigError, match="the key of amber, cannot be read"):
        read_keys({"amber": str(tmp_path / "server.key")})


@pytest.mark.parametrize(
    ("client", "path", "status"),
    [
        ("127.0.0.1", "/v1/control/start-run", 200),
        ("::1", "/v1/runtime/acquire-task", 200),
        ("::ffff:127.0.0.1", "/v1/control/start-run", 200),
        ("192.0.2.7", "/v1/fleet/pull-messages", 200),
        ("192.0.2.7", "/v1/control/register-node", 403),
        ("192.0.2.7", "/v1/runtime/acquire-task", 403),
        ("192.0.2.7", "/v1/fleet/../control/start-run", 403),
        ("::ffff:192.0.2.7", "/docs", 403),
    ],
)
def test_from_elsewhere_a_superlink_answers_nodes_only(client: str, path: str, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> int:
        transport = httpx.ASGITransport(FleetOnly(app), client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://link") as http:
            # a header of a proxy changes nothing
            return (await http.post(path, headers={"x-forwarded-for": "127.0.0.1"})).status_code

    assert asyncio.run(ask()) == status


def test_a_superlink_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    from orchestrator.flower.link import connect

    config = served(tmp_path, None, flower__address="127.0.0.1:9", flower__insecure=True)
    with pytest.raises(FedLoRAError, match=r"no SuperLink answers at 127.0.0.1:9"):
        connect(config.flower)
    with pytest.raises(ConfigError, match=r"flower.root_certificates: give the PEM file"):
        connect(served(tmp_path, None, flower__address="127.0.0.1:9").flower)
