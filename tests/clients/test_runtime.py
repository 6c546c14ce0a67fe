"""The runtime shared by all pools: clients do not reach into each other, or into the server's rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from clients.private_state import PrivateState
from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState
from fedlora.adapter.wire import decode_adapter, decode_update, digest, encode_adapter
from fedlora.aggregation import Contribution, RoundContext, compose
from fedlora.aggregation.base import State
from fedlora.aggregation.combine import apply_delta, combine, hand_out, part_of
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedLoRAError, ModelError, RunInterrupted
from fedlora.protocol import ClientUpdate, EvalTask, Method, TrainPlan, TrainTask
from fedlora.seeds import derive_seed
from orchestrator import launch
from orchestrator.stores.files import read_lines
from tests.conftest import quiet, toy_config


def task(runtime: ClientRuntime, client: str, spoil: bool = False) -> TrainTask:
    base = runtime.base()
    state = initial_adapter(base.sites, base.dense, 8, seed=0)
    if spoil:
        state = AdapterState(state.modules, {name: tensor * float("nan") for name, tensor in state.dense.items()})
    payload = encode_adapter(state)
    return TrainTask(1, client, TrainPlan(8), payload, digest(payload), seed=3)


def test_a_client_that_breaks_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    fresh, used = ClientRuntime(config, 1), ClientRuntime(config, 1)
    with pytest.raises(FedLoRAError, match="the loss became nan"):
        used.train(task(used, "c0", spoil=True))
    assert used.train(task(used, "c1")) == fresh.train(task(fresh, "c1"))


def test_a_client_called_test_trains_on_its_own_rows(tmp_path: Path) -> None:
    for name, count in (("test", 30), ("other", 12)):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data__name": None, "data__client_files": str(tmp_path / "*.jsonl"), "data__client_holdout": 0}
    runtime = ClientRuntime(toy_config(tmp_path / "run", **files), 1)
    assert len(runtime.corpus.test) == 6 + 2
    runtime.evaluate(EvalTask("", task(runtime, "test").adapter))
    assert decode_update(runtime.train(task(runtime, "test"))).num_examples == 24


def test_held_out_rows_without_a_token_to_learn_cost_that_clients_score_only(tmp_path: Path) -> None:
    good, long = {"prompt": "a", "completion": "b"}, {"prompt": "x" * 99, "completion": "y"}
    for name, rows in (("good", [good] * 20), ("long", [long] * 20)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = toy_config(
        tmp_path / "run",
        model__name="builtin:tiny-llama",
        data__name=None,
        data__client_files=str(tmp_path / "*.jsonl"),
        lora__target_modules=["q_proj"],
    )
    runtime = ClientRuntime(config, 1)
    payload = task(runtime, "good").adapter
    assert runtime.evaluate(EvalTask("good", payload)).num_examples > 0
    result = runtime.evaluate(EvalTask("long", payload))
    assert "none of" in (result.error or "")


def test_rows_longer_than_the_models_positions_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="data.max_length is 500, but the model has 128 positions"):
        ClientRuntime(toy_config(tmp_path, data__max_length=500), 1).base()


def test_a_misspelt_module_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no module is called poolerr; did you mean pooler"):
        ClientRuntime(toy_config(tmp_path, lora__modules_to_save=["poolerr"]), 1).base()


# Local methods and private state ----------------------------------------------------------------------------


def three(output_dir: Path, **changes: Any) -> RunConfig:
    """One client of each rank: 2, 4 and 8."""
    return toy_config(output_dir, **{"clients__count": 3, **changes})


@dataclass(frozen=True, eq=False)
class Round:
    """One round as a test looks at it: what everyone was asked and answered, by client, and what came of it."""

    tasks: dict[str, TrainTask]
    payloads: dict[str, bytes]
    updates: dict[str, ClientUpdate]
    adapter: AdapterState
    state: State


def play(runtime: ClientRuntime, spec: Any, rounds: int) -> Iterator[Round]:
    """A federation of all members of ``runtime``, equally weighted, without orchestrator."""
    strategy, base, members = compose(spec), runtime.base(), runtime.members()
    fresh = initial_adapter(base.sites, base.dense, 8, seed=0)
    adapter, state = strategy.start(fresh, 0), {}
    for number in range(1, rounds + 1):
        ctx = RoundContext(number, 8, number, revive(adapter, fresh), members)
        played = Round({}, {}, {}, adapter, state)
        contributions = []
        for member in members:
            plan = strategy.plan(ctx, member, state)
            planned = replace(member, rank=plan.rank)
            handed = hand_out(strategy, planned, ctx, state, fresh)
            sent = encode_adapter(handed, strategy.broadcast(planned, ctx, state))
            seed = derive_seed(0, number, member.id, "train")
            task = TrainTask(number, member.id, plan, sent, digest(sent), seed, accepted=number - 1)
            payload = runtime.train(task)
            update = decode_update(payload)
            played.tasks[member.id], played.payloads[member.id], played.updates[member.id] = task, payload, update
            received = decode_adapter(sent)
            trained = apply_delta(received, update.delta)
            contributions.append(Contribution(planned, 1.0, trained, received, update.metrics, update.extras))
        outcome = combine(strategy, contributions, ctx, state)
        adapter, state = outcome.adapter, outcome.state
        yield replace(played, adapter=adapter, state=state)


def last(rounds: Iterator[Round]) -> Round:
    *_, final = rounds
    return final


def private_files(folder: Path) -> list[Path]:
    return sorted((folder / "private").rglob("*.safetensors"))


SCAFFOLD = [{"scaffold": {}}, "zero_pad"]
PERSONAL = pytest.mark.parametrize(
    ("spec", "sent", "kept"),
    [("fedsa", {"A"}, {"B", "dense"}), (["personal_head", "zero_pad"], {"A", "B"}, {"dense"})],
    ids=["fedsa", "personal_head"],
)


def test_the_servers_control_variate_is_the_mean_of_the_clients_over_those_who_have_the_coordinate(
    tmp_path: Path,
) -> None:
    runtime = ClientRuntime(three(tmp_path), 1)
    before: dict[str, torch.Tensor] = {}
    for number, played in enumerate(play(runtime, SCAFFOLD, 3), start=1):
        kept = {c: PrivateState(tmp_path / "private", 2).load(c, number).methods for c in played.tasks}
        control = played.state["control"]
        for name, tensor in control.items():
            total, holders, change = (torch.zeros_like(tensor) for _ in range(3))
            for client, update in played.updates.items():
                own = kept[client][f"scaffold/{name}"]
                assert own.shape == update.delta[name].shape == update.extras[f"control/{name}"].shape
                block = tuple(slice(size) for size in own.shape)
                total[block] += own
                holders[block] += 1
                change[block] += update.extras[f"control/{name}"]
            assert_close(tensor, total / holders, atol=1e-6, rtol=1e-5)
            assert_close(tensor, before.get(name, torch.zeros_like(tensor)) + change / holders, atol=1e-6, rtol=1e-5)
        before = dict(control)
    assert any(tensor.any() for tensor in before.values())


def test_alone_in_the_federation_scaffold_is_plain_training(tmp_path: Path) -> None:
    alone = {"clients__count": 1, "clients__ranks": [8], "training__max_steps": 3}
    plain = last(play(ClientRuntime(toy_config(tmp_path / "plain", **alone), 1), "zero_pad", 3))
    corrected = last(play(ClientRuntime(toy_config(tmp_path / "corrected", **alone), 1), SCAFFOLD, 3))
    # c == c_k up to the rounding of c + (new c_k - c_k), which Adam's division enlarges
    assert_close(corrected.adapter.tensors(), plain.adapter.tensors(), atol=1e-4, rtol=1e-3)


def test_two_clients_with_different_data_drift_less_under_scaffold(tmp_path: Path) -> None:
    changes = {
        "clients__count": 2,
        "clients__ranks": [8, 8],
        "data__partition": {"method": "dirichlet", "alpha": 0.1},
        "training__optim": "sgd",
        "training__learning_rate": 0.1,
        "training__max_steps": 6,
        "training__base_dropout": False,
    }

    def drift(spec: Any) -> float:
        runtime = ClientRuntime(toy_config(tmp_path / str(len(spec)), **changes), 1)
        one, other = last(play(runtime, spec, 3)).updates.values()
        return sum(float((one.delta[name] - other.delta[name]).square().sum()) for name in one.delta) ** 0.5

    assert drift(SCAFFOLD) < 0.5 * drift("zero_pad")


def test_control_variates_survive_a_restart_and_a_repeated_round_gives_the_same_bytes(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", clients__count=2, clients__ranks=[2, 4])
    rounds = list(play(ClientRuntime(config, 1), SCAFFOLD, 3))
    restarted = ClientRuntime(config, 1)
    for played in rounds[1:]:  # round 2 is repeated although round 3 has been: a crash before its commit
        assert {client: restarted.train(task) for client, task in played.tasks.items()} == played.payloads
    forgetful = ClientRuntime(config.model_copy(update={"output_dir": str(tmp_path / "empty")}), 1)
    with pytest.raises(FedLoRAError, match="private state of client c0 after round 2 is not at"):
        forgetful.train(rounds[2].tasks["c0"])


@pytest.mark.parametrize("rule", ["ffa", "rolora", "fedsa", "fedsb"])
def test_methods_follow_what_a_rule_trains_and_sends(tmp_path: Path, rule: str) -> None:
    runtime = ClientRuntime(three(tmp_path), 1)
    for played in play(runtime, [{"fedprox": {"mu": 0.1}}, {"scaffold": {}}, rule], 2):
        for client, update in played.updates.items():
            plan = played.tasks[client].plan
            assert sorted(update.extras) == sorted(f"control/{n}" for n in update.delta)
            assert {part_of(name) for name in update.delta} == plan.train & plan.send
            assert all(torch.isfinite(tensor).all() for tensor in update.extras.values())
            assert any(tensor.any() for tensor in update.extras.values())
    kept = PrivateState(tmp_path / "private", 2).load("c0", 2).methods
    expected = {"ffa": {"B", "dense"}, "rolora": {"A", "B", "dense"}, "fedsa": {"A"}, "fedsb": {"C", "dense"}}
    # rolora: the control variate of B stays while A has its turn
    assert {part_of(name.removeprefix("scaffold/")) for name in kept} == expected[rule]


def test_methods_that_keep_nothing_leave_no_files(tmp_path: Path) -> None:
    last(play(ClientRuntime(three(tmp_path), 1), [{"fedprox": {"mu": 0.1}}, "hetlora"], 1))
    assert not (tmp_path / "private").exists()


def test_what_a_plan_asks_and_no_client_knows_is_refused_before_training(tmp_path: Path) -> None:
    runtime = ClientRuntime(three(tmp_path), 1)
    asked = task(runtime, "c0")
    unknown = replace(asked, plan=replace(asked.plan, methods=(Method.of("fedpox", mu=1.0),)))
    with pytest.raises(ConfigError, match=r"fedpox is not known.*\(known: .*fedprox, .*scaffold, tail_penalty\)"):
        runtime.train(unknown)
    extra = replace(asked, adapter=encode_adapter(decode_adapter(asked.adapter), {"momentum/x:A": torch.ones(2)}))
    with pytest.raises(FedLoRAError, match=r"no local method of the plan answers: momentum/x:A"):
        runtime.train(extra)


@PERSONAL
def test_personal_parts_never_leave_the_client(tmp_path: Path, spec: Any, sent: set[str], kept: set[str]) -> None:
    runtime = ClientRuntime(three(tmp_path), 1)
    everything = set(initial_adapter(runtime.base().sites, runtime.base().dense, 8, seed=0).tensors())
    for number, played in enumerate(play(runtime, spec, 2), start=1):
        for client, update in played.updates.items():
            assert update.extras == {}
            assert set(update.delta) == {name for name in everything if part_of(name) in sent}
            own = PrivateState(tmp_path / "private", 2).load(client, number).personal
            assert set(own) == {name for name in everything if part_of(name) in kept}
            # no trace of their values either
            for tensor in own.values():
                assert tensor.contiguous().numpy().tobytes() not in played.payloads[client]


@PERSONAL
def test_personal_parts_survive_a_restart_and_are_scored_as_they_were_after_a_round(
    tmp_path: Path, spec: Any, sent: set[str], kept: set[str]
) -> None:
    config = three(tmp_path / "run", training__max_steps=4)
    runtime = ClientRuntime(config, 1)
    rounds = list(play(runtime, spec, 2))
    restarted = ClientRuntime(config, 1)
    assert {c: restarted.train(task) for c, task in rounds[1].tasks.items()} == rounds[1].payloads
    sent_down = rounds[1].tasks["c2"].adapter
    own = PrivateState(tmp_path / "run" / "private", 2)
    losses = []
    for number in (1, 2):
        mine = own.load("c2", number).personal
        by_hand = encode_adapter(AdapterState.from_tensors({**decode_adapter(sent_down).tensors(), **mine}))
        keep = frozenset(kept)
        came = restarted.evaluate(EvalTask("c2", sent_down, keep=keep, accepted=number))
        assert came.num_examples > 0
        assert came == restarted.evaluate(EvalTask("c2", by_hand))
        losses.append(came.loss)
    received = restarted.evaluate(EvalTask("c2", sent_down))
    assert len({*losses, received.loss}) == 3
    stranger = ClientRuntime(config.model_copy(update={"output_dir": str(tmp_path / "empty")}), 1)
    # whoever never trained scores what it received; whose state lies elsewhere scores nothing
    assert "is not at" in (stranger.evaluate(EvalTask("c2", sent_down, keep=keep, accepted=2)).error or "")
    assert restarted.evaluate(EvalTask("c2", sent_down, keep=keep, accepted=0)) == received


def test_a_clients_own_parts_follow_its_rank(tmp_path: Path) -> None:
    config = toy_config(tmp_path, clients__count=1, clients__ranks=[4])
    runtime = ClientRuntime(config, 1)
    last(play(runtime, [{"scaffold": {}}, "fedsa"], 1))
    base = runtime.base()
    for number, rank in ((2, 2), (3, 8)):  # down to 2, then up to 8
        fresh = initial_adapter(base.sites, base.dense, rank, seed=0)
        extras = {f"control/{n}": torch.zeros_like(t) for n, t in fresh.tensors().items() if part_of(n) == "A"}
        sent = encode_adapter(fresh, extras)
        plan = replace(compose("fedsa").plan(None, runtime.members()[0], {}), rank=rank)  # type: ignore[arg-type]
        plan = replace(plan, methods=(Method.of("scaffold"),))
        update = decode_update(runtime.train(TrainTask(number, "c0", plan, sent, digest(sent), 0, accepted=number - 1)))
        assert {name: t.shape for name, t in update.extras.items()} == {name: t.shape for name, t in extras.items()}
        own = PrivateState(tmp_path / "private", 2).load("c0", number)
        assert {t.shape[1] for name, t in own.personal.items() if part_of(name) == "B"} == {rank}
        assert {t.shape[0] for t in own.methods.values()} == {rank}


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs, and has tests of its own."""
    monkeypatch.setattr("orchestrator.results.write_report", lambda folder: None)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("spec", [[{"fedprox": {"mu": 0.1}}, "flexlora"], "hetlora"], ids=["fedprox", "hetlora"])
def test_whole_runs_with_methods_that_keep_nothing(tmp_path: Path, spec: Any) -> None:
    launch.run(three(tmp_path, strategy=spec, rounds=2), quiet)
    assert everyone_was_admitted(tmp_path)
    assert private_files(tmp_path) == []


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("spec", [SCAFFOLD, "fedsa"], ids=["scaffold", "fedsa"])
def test_a_run_with_private_state_that_is_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path, spec: Any) -> None:
    """Ranks 2, 4 and 8; the run is stopped in round 2, when two of the clients have trained it."""

    def stop(event: str, fields: Any) -> None:
        if event == "update_admitted" and (fields["round"], fields["client"]) == (2, "c1"):
            raise KeyboardInterrupt

    settings = {"strategy": spec, "rounds": 2}
    whole = launch.run(three(tmp_path / "whole", **settings), quiet)
    with pytest.raises(RunInterrupted):
        launch.run(three(tmp_path / "stopped", **settings), stop)
    resumed = launch.resume(tmp_path / "stopped", quiet)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["final"] == whole["final"]
    assert everyone_was_admitted(tmp_path / "whole")
    one, other = (
        {path.relative_to(tmp_path / run): path.read_bytes() for path in private_files(tmp_path / run)}
        for run in ("whole", "stopped")
    )
    assert len(one) == 6
    assert other == one


def everyone_was_admitted(folder: Path) -> bool:
    rows = read_lines(folder / "metrics.jsonl")
    return [(len(row["admitted"]), row["failed"], row["refused"]) for row in rows] == [(3, {}, {})] * 2


@pytest.mark.usefixtures("no_report")
def test_a_run_started_anew_finds_no_private_state(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", strategy="fedsa", rounds=1, clients__count=2)
    first = launch.run(config, quiet)
    stale = private_files(tmp_path / "run")[0].with_name("round-000000.safetensors")
    stale.write_bytes(b"not even readable: it would be loaded in round 1")
    again = launch.run(config, quiet, overwrite=True)
    assert not stale.exists()
    assert again["final"] == first["final"]
