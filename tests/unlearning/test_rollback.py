"""A client rolled back: the bytes of a run that never had it."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.continual.stream import open_stream
from fedlora.errors import RunInterrupted, UnlearningError
from fedlora.plugins import unload_plugins
from fedlora.protocol import TrainPlan, TrainTask
from fedlora.unlearning.request import hashed
from orchestrator import launch
from orchestrator.stores.files import read_config, read_lines
from orchestrator.unlearning.rollback import plan_rollback, replay, without
from tests.conftest import quiet, toy_config

RULES: dict[str, Any] = {
    "fedit": "fedit",
    "flexlora": "flexlora",
    "fedex_het with momentum": [{"server_momentum": {"beta": 0.9}}, "fedex_het"],
    "scaffold": ["scaffold", "fedit"],
    "zero_pad": "zero_pad",
    "dp": [{"dp": {"noise_multiplier": 0.5}}, "zero_pad"],
}
STREAM = {"continual": {"split": 2, "rounds": 2}}


def config_of(folder: Path, rule: str = "flexlora", **changes: Any) -> RunConfig:
    """Four rounds of three out of six clients; c1 comes in round 3."""
    equal = rule in ("fedit", "scaffold")
    clients = {"count": 6, "per_round": 3, "ranks": [4] if equal else [2, 4, 8], "joins": {"c1": 3}}
    if rule == "fedex_het with momentum":
        clients["ranks"] = [4]
    settings = {"clients": clients, "strategy": RULES[rule], "rounds": 4, "keep_checkpoints": 9, **changes}
    return toy_config(folder, **settings)


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def asked(folder: Path) -> list[list[str]]:
    return [row["selected"] for row in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("flexlora", {}),
        ("fedex_het with momentum", STREAM),
        pytest.param("scaffold", {}, marks=pytest.mark.slow),
        pytest.param("scaffold", STREAM, marks=pytest.mark.slow),
        pytest.param("dp", {"weighting": "uniform"}, marks=pytest.mark.slow),
        pytest.param("fedit", {"privacy__secure_sum": {}, "clients__per_round": 5}, marks=pytest.mark.slow),
        pytest.param("zero_pad", {"wire": {"up": "int8", "error_feedback": True}}, marks=pytest.mark.slow),
    ],
)
def test_a_replay_gives_the_bytes_of_a_run_that_never_had_the_client(
    tmp_path: Path, rule: str, changes: dict[str, Any]
) -> None:
    config = config_of(tmp_path / "run", rule, **changes)
    launch.run(config, quiet)
    late = _late(asked(tmp_path / "run"))
    plan = plan_rollback(tmp_path / "run", [late])
    assert (plan.level, plan.doubts) == ("E1", ())
    assert plan.first is not None
    assert plan.start == plan.first - 1
    assert plan.cost == (4 - plan.start) / 4
    before = adapter_of(tmp_path / "run")
    replay(tmp_path / "run", plan, tmp_path / "replay", quiet)
    launch.run(without(config, [late]).model_copy(update={"output_dir": str(tmp_path / "control")}), quiet)
    assert adapter_of(tmp_path / "replay") == adapter_of(tmp_path / "control") != before
    assert asked(tmp_path / "replay") == asked(tmp_path / "control")
    assert adapter_of(tmp_path / "run") == before  # nothing has been done to the run itself
    assert not any(late in row for row in asked(tmp_path / "replay"))


def _early(rows: list[list[str]]) -> str:
    return rows[0][0]


def _late(rows: list[list[str]]) -> str:
    return next(client for row in reversed(rows) for client in row if client not in rows[0])


def _is_exact(tmp_path: Path, rule: str, changes: dict[str, Any], kind: str, seed: int, pool: str) -> None:
    everybody = {"clients__per_round": 6} if kind == "every round" else {}
    settings = {**changes, **everybody, "seed": seed, "pool": pool}
    config = config_of(tmp_path / "run", rule, **settings)
    launch.run(config, quiet)
    rows = asked(tmp_path / "run")
    target = _late(rows) if kind == "late" else _early(rows)
    plan = plan_rollback(tmp_path / "run", [target])
    assert plan.level == "E1"
    replay(tmp_path / "run", plan, tmp_path / "replay", quiet)
    launch.run(without(config, [target]).model_copy(update={"output_dir": str(tmp_path / "control")}), quiet)
    assert adapter_of(tmp_path / "replay") == adapter_of(tmp_path / "control") != adapter_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["late", "early", "every round"])
@pytest.mark.parametrize("changes", [{}, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("rule", ["fedit", "flexlora", "fedex_het with momentum"])
def test_whenever_a_client_took_part(tmp_path: Path, rule: str, changes: dict[str, Any], kind: str, seed: int) -> None:
    _is_exact(tmp_path, rule, changes, kind, seed, "local")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("changes", [{}, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("rule", ["fedit", "flexlora", "fedex_het with momentum"])
def test_on_ray_too(tmp_path: Path, rule: str, changes: dict[str, Any]) -> None:
    _is_exact(tmp_path, rule, changes, "late", 0, "ray")


@pytest.mark.parametrize("changes", [{}, pytest.param(STREAM, marks=pytest.mark.slow)], ids=["plain", "stream"])
def test_records_are_left_out_by_the_client_that_has_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(tmp_path / "run", **changes)
    launch.run(config, quiet)
    corpus = open_stream(config.data, config.continual, 6, config.seed).corpus
    target = _late(asked(tmp_path / "run"))
    texts = corpus.train.select(corpus.shards[target][:3])["text"][:]
    owners = [c for c in corpus.shards if set(texts) & set(corpus.train.select(corpus.shards[c])["text"][:])]
    plan = plan_rollback(tmp_path / "run", records=hashed(texts))
    assert (list(plan.owners), plan.clients, plan.level) == (owners, (), "E1")
    replay(tmp_path / "run", plan, tmp_path / "replay", quiet)
    smaller = without(config, records=hashed(texts))
    launch.run(smaller.model_copy(update={"output_dir": str(tmp_path / "control")}), quiet)
    assert adapter_of(tmp_path / "replay") == adapter_of(tmp_path / "control")
    left = open_stream(smaller.data, smaller.continual, 6, config.seed).corpus
    assert not set(texts) & set(left.train.select(left.shards[target])["text"][:])
    assert len(left.shards[target]) < len(corpus.shards[target])


def test_a_client_whose_rows_are_all_taken_out_is_taken_out_with_them(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    launch.run(config, quiet)
    corpus = open_stream(config.data, config.continual, 6, config.seed).corpus
    texts = corpus.train.select(corpus.shards["c0"])["text"][:]
    plan = plan_rollback(tmp_path / "run", records=hashed(texts))
    assert "c0" in plan.clients
    with pytest.raises(UnlearningError, match="no client has a row of these names"):
        plan_rollback(tmp_path / "run", records=hashed(["nobody wrote this"]))
    with pytest.raises(UnlearningError, match="has no client c9"):
        plan_rollback(tmp_path / "run", ["c9"])


@pytest.mark.slow
def test_without_an_old_enough_checkpoint_everything_is_played_again(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", keep_checkpoints=1)
    launch.run(config, quiet)
    target = asked(tmp_path / "run")[0][0]
    plan = plan_rollback(tmp_path / "run", [target])
    assert (plan.first, plan.start, plan.replayed, plan.level) == (1, None, 4, "E1")
    replay(tmp_path / "run", plan, tmp_path / "replay", quiet)
    launch.run(without(config, [target]).model_copy(update={"output_dir": str(tmp_path / "control")}), quiet)
    assert adapter_of(tmp_path / "replay") == adapter_of(tmp_path / "control")


def test_a_client_that_never_took_part_costs_nothing(tmp_path: Path) -> None:
    launch.run(config_of(tmp_path / "run", clients__joins={"c5": 9}), quiet)
    plan = plan_rollback(tmp_path / "run", ["c5"])
    assert (plan.first, plan.replayed, plan.cost) == (None, 0, 0.0)


def test_a_replay_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    launch.run(config_of(tmp_path / "run"), quiet)
    plan = plan_rollback(tmp_path / "run", [asked(tmp_path / "run")[0][0]])

    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        replay(tmp_path / "run", plan, tmp_path / "stopped", stop)
    replay(tmp_path / "run", plan, tmp_path / "stopped", quiet)
    replay(tmp_path / "run", plan, tmp_path / "whole", quiet)
    assert adapter_of(tmp_path / "stopped") == adapter_of(tmp_path / "whole")
    assert read_config(tmp_path / "stopped").clients.exclude == list(plan.clients)


def test_what_is_left_to_a_real_clock_is_not_claimed_to_be_the_same_bytes(tmp_path: Path) -> None:
    launch.run(config_of(tmp_path / "run", schedule={"deadline_s": 300.0}), quiet)
    plan = plan_rollback(tmp_path / "run", ["c0"])
    assert plan.level == "E2"
    assert plan.doubts == ("which answers came in time was left to a real clock",)


def test_a_run_without_a_committed_round_has_nothing_to_unlearn(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UnlearningError, match="has no committed round"):
        plan_rollback(tmp_path / "run", ["c0"])


def test_what_goes_by_the_time_clients_took_is_not_claimed_to_be_the_same_bytes(tmp_path: Path) -> None:
    clients = {"count": 6, "per_round": 3, "ranks": [2, 4, 8], "selection": "oort"}
    launch.run(config_of(tmp_path / "run", clients=clients), quiet)
    plan = plan_rollback(tmp_path / "run", ["c0"])
    assert plan.doubts == ("clients.selection: oort may go by how long clients took",)


def test_a_run_with_a_plug_in_can_be_rolled_back(tmp_path: Path) -> None:
    mine = """from fedlora.aggregation import STRATEGIES
from fedlora.aggregation.averaging import FedIT


@STRATEGIES.register("mine")
class Mine(FedIT):
    name = "mine"
"""
    (tmp_path / "mine.py").write_text(mine)
    launch.run(config_of(tmp_path / "run", plugins=[str(tmp_path / "mine.py")]), quiet)
    assert plan_rollback(tmp_path / "run", ["c0"]).level == "E1"
    unload_plugins()
    (tmp_path / "mine.py").write_text(mine + "# edited\n")
    assert plan_rollback(tmp_path / "run", ["c0"]).doubts == ("a session was played with another plugins",)
    unload_plugins()


def test_an_excluded_colluder_is_nobody(tmp_path: Path) -> None:
    attack = {"name": "alie", "clients": ["c0", "c1"]}
    config = config_of(tmp_path / "run", attack=attack, clients={"count": 6, "exclude": ["c1"]}, rounds=1)
    runtime, trained = ClientRuntime(config), []
    runtime._honest = lambda task: trained.append(task.client)  # type: ignore[assignment,method-assign]
    assault = runtime._assault
    assert assault is not None
    with contextlib.suppress(AttributeError):
        runtime._honest_deltas(assault, TrainTask(1, "c0", TrainPlan(2), b"", "", 0))
    assert trained == ["c0"]
