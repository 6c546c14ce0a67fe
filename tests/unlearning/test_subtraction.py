"""The actions on the contribution log: subtract and negation."""

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter.algebra import norm, scaled, stack
from fedlora.adapter.rank import revive
from fedlora.adapter.state import AdapterState
from fedlora.aggregation import Aggregate, compose
from fedlora.aggregation.combine import combine
from fedlora.errors import RunInterrupted, UnlearningError
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.negation import task_vector
from fedlora.unlearning.request import Request, sign_request
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.contributions import log_file, read_log
from orchestrator.results import whole_adapter
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_json, write_json
from orchestrator.unlearning.actions import ACTIONS
from orchestrator.unlearning.again import aggregate_again, context, fresh_pair, logged_rounds, members_of, trace
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.execute import carry_out, estimates
from orchestrator.unlearning.requests import find_request, identity, receive
from orchestrator.unlearning.rollback import Rollback, plan_rollback
from orchestrator.unlearning.subtraction import Negation, Subtract
from tests.conftest import quiet
from tests.unlearning.test_rollback import adapter_of, asked, config_of

QUICK = {"repair_rounds": 1, "gate": False}


def played(folder: Path, rule: Any = "flexlora", **changes: Any) -> Path:
    """A finished run of three rounds with a log; c1 takes part in the last one only."""
    ranks = [4] if "fedit" in rule else [2, 4, 8]
    clients = {"count": 4, "ranks": ranks, "joins": {"c1": 3}, **changes.pop("clients", {})}
    settings = {"contributions": {}, "rounds": 3, "training__max_steps": 1, "evaluation__per_client": False, **changes}
    launch.run(config_of(folder, strategy=rule, clients=clients, **settings), quiet)
    return folder


def last(folder: Path) -> RunState:
    state, _ = load_latest(folder)
    assert state is not None
    return state


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "officer")
    return tmp_path / "keys"


def take_out(
    folder: Path, keys: Path, client: str, action: str, listen: Callable[[str, Any], None] = quiet, **options: Any
) -> str:
    """Ask for it and carry it out."""
    key = load_key(keys / "officer")
    wanted = Request("client", (client,), action, options={**QUICK, **options})
    name = receive(folder, sign_request(wanted, identity(folder), key), authorised([keys])).id
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, key, listen)
    return name


# The mathematics, before anything is repaired ---------------------------------------------------------------------

RULES: list[Any] = ["flexlora", "fedit", "fedex_het", "zero_pad", ["clip", "flexlora"]]
SLOW = [pytest.param(rule, marks=pytest.mark.slow) if rule in ("fedit", "zero_pad") else rule for rule in RULES]


def of_the_others(folder: Path, number: int, client: str) -> Aggregate:
    """A round of the log as the rule aggregates it when one client never sent anything."""
    config = read_config(folder)
    (logged,) = logged_rounds(folder, last(folder), [number])
    ctx = context(config, logged, revive(logged.adapter, fresh_pair(config, logged)), members_of(folder))
    others = [update for update in logged.updates if update.client.id != client]
    return combine(compose(config.strategy), others, ctx, logged.strategy)


@pytest.mark.parametrize("rule", SLOW, ids=str)
def test_a_client_of_the_last_round_leaves_the_aggregate_of_the_others(tmp_path: Path, rule: Any) -> None:
    folder = played(tmp_path / "run", rule)
    state, expected = last(folder), of_the_others(folder, 3, "c1")
    assert trace(folder, state, ["c1"]).needed == (3,)
    found = aggregate_again(folder, read_config(folder), state, ["c1"])
    for name, tensor in expected.adapter.tensors().items():
        # the same sums; fedit adds deltas up in one case and adapters in the other
        assert_close(found.adapter.tensors()[name], tensor, atol=1e-6, rtol=1e-5)
    assert bool(expected.patch) == (rule == "fedex_het")
    if expected.patch:
        *before, entry = found.ledger.entries
        assert [one.id for one in before] == [one.id for one in state.ledger.entries[:-1]]
        assert sorted(entry.provenance["contributors"]) == ["c0", "c2", "c3"]
        assert all(torch.equal(update.B, expected.patch[path].B) for path, update in entry.modules().items())


def test_from_the_first_round_on_exact_changes_of_the_others_add_up(tmp_path: Path) -> None:
    folder = played(tmp_path / "run", "fedex_het", rounds=2)
    state, config = last(folder), read_config(folder)
    found = aggregate_again(folder, config, state, ["c0"])
    parts = []
    for logged in logged_rounds(folder, state, (1, 2)):
        others = [update for update in logged.updates if update.client.id != "c0"]
        total = sum(update.weight for update in others)
        for update in others:
            share = update.weight / total
            for adapter, sign in ((update.trained, share), (update.received, -share)):
                parts.append({path: scaled(one, sign) for path, one in adapter.whole().modules.items()})
    came = whole_adapter(replace(state, adapter=found.adapter, ledger=found.ledger)).modules
    apart = stack([came, {path: scaled(update, -1.0) for path, update in stack(parts).items()}])
    assert norm(AdapterState(apart)) <= 1e-5 * norm(AdapterState(came))


def test_negation_takes_away_what_entered_and_nothing_is_lost_in_the_base(tmp_path: Path, keys: Path) -> None:
    folder = played(tmp_path / "run", [{"clip": {"max_norm": 0.05}}, "fedex_het"], rounds=2)
    state, config = last(folder), read_config(folder)
    plan = plan_rollback(folder, ["c0"])
    changed, told = Negation(strength=0.5, repair_rounds=1, gate=False).changed(folder, config, plan, state)
    assert told["rounds_negated"] == 2
    before, after = whole_adapter(state).modules, whole_adapter(changed).modules
    taken = stack([before, {path: scaled(update, -1.0) for path, update in after.items()}])
    # two rounds with a share below one, each change no longer than what clip lets through in factors
    sent = [u for one in logged_rounds(folder, state, (1, 2)) for u in one.updates if u.client.id == "c0"]
    raw = norm(task_vector([replace(update, weight=0.5) for update in sent]))
    assert 0 < norm(AdapterState(taken)) < raw
    assert norm(AdapterState(taken)) == pytest.approx(_without_dense(told["norm"], state, changed), rel=1e-4)


def _without_dense(length: float, state: RunState, changed: RunState) -> float:
    """Of a vector of this length, the part that is in modules."""
    dense = norm(AdapterState({}, {n: t - changed.adapter.dense[n] for n, t in state.adapter.dense.items()}))
    return float((length**2 - dense**2) ** 0.5)


def test_float16_comes_close_and_says_so(tmp_path: Path) -> None:
    folder = played(tmp_path / "run", rounds=2, contributions={"dtype": "float16"})
    found = aggregate_again(folder, read_config(folder), last(folder), ["nobody", "c0"])
    assert found.rounded
    assert found.left_out == ()


# Carried out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "rule"),
    [
        ("subtract", "fedex_het"),
        ("negation", ["clip", "flexlora"]),
        *(pytest.param("subtract", rule, marks=pytest.mark.slow) for rule in RULES if rule != "fedex_het"),
        *(pytest.param("negation", rule, marks=pytest.mark.slow) for rule in RULES if rule != ["clip", "flexlora"]),
    ],
    ids=str,
)
def test_a_client_is_taken_out_by_its_updates_and_the_log_forgets_them(
    tmp_path: Path, keys: Path, action: str, rule: Any
) -> None:
    folder = played(tmp_path / "run", rule)
    before, logged = adapter_of(folder), read_log(folder).entries
    name = take_out(folder, keys, "c1", action)
    standing = find_request(folder, name)
    assert (standing.phase, standing.level) == ("certified", "S")
    assert standing.facts["executed"]["rounds_played"] == 1
    assert adapter_of(folder) != before
    assert len(asked(folder)) == 4
    assert "c1" not in asked(folder)[3]
    assert verify_certificate(folder, name, authorised([keys])) == []
    # rounds before it are there as they were, its own is gone, and the round that mends has one
    entries = read_log(folder).entries
    assert list(entries) == [1, 2, 4]
    assert [entries[n]["sha256"] for n in (1, 2)] == [logged[n]["sha256"] for n in (1, 2)]
    clients = {one.client.id for n in entries for one in read_log(folder).open(n).updates.pending}
    assert clients == {"c0", "c2", "c3"}
    assert standing.facts["purged"]["files"]["contributions/round-0003.zip"] == logged[3]["sha256"]
    with pytest.raises(UnlearningError, match=r"has no round 3 \(it was off then, or an earlier request"):
        Subtract(gate=False).check(folder, plan_rollback(folder, ["c2"]))


def test_a_forget_round_is_not_undone(tmp_path: Path, keys: Path) -> None:
    folder = played(tmp_path / "run")
    take_out(folder, keys, "c1", "npo", steps=1)
    # its own round has left the log with the first request, and its forget round is there
    assert list(read_log(folder).entries) == [1, 2, 4, 5]
    plan = plan_rollback(folder, ["c1"])
    assert trace(folder, last(folder), ["c1"]).used == (3,)
    with pytest.raises(UnlearningError, match="negation: it was used in round 3, and the contribution log has none"):
        Negation(gate=False).check(folder, plan)


def test_a_replay_from_a_state_that_holds_a_suppressed_client_is_not_called_identical(
    tmp_path: Path, keys: Path
) -> None:
    folder = played(tmp_path / "run", rounds=2, clients={"joins": {"c1": 4}})
    take_out(folder, keys, "c2", "negation", repair_rounds=2)
    plan = plan_rollback(folder, ["c1"])
    assert (plan.first, plan.start, plan.level) == (4, 3, "E2")
    assert plan.doubts == (
        "R1 only suppressed client c2 (level S), which is in the state after round 3 that the replay begins from",
    )
    again = plan_rollback(folder, ["c2"])  # begins before c2 came
    assert (again.start, again.level) == (0, "E1")
    key, wanted = load_key(keys / "officer"), Request("client", ("c2",), "rollback")
    name = receive(folder, sign_request(wanted, identity(folder), key), authorised([keys])).id
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, key, quiet)
    assert (plan_rollback(folder, ["c1"]).start, plan_rollback(folder, ["c1"]).level) == (3, "E1")


def _killed(folder: str, keys: str, action: str, place: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = place
    take_out(Path(folder), Path(keys), "c1", action)


def same_end(folder: Path, whole: Path, keys: Path, name: str) -> None:
    assert adapter_of(folder) == adapter_of(whole)
    assert verify_certificate(folder, name, authorised([keys])) == []
    assert read_json(folder / "contributions" / "manifest.json") == read_json(whole / "contributions" / "manifest.json")


@pytest.mark.slow
def test_stopped_while_it_mends_and_asked_again_it_ends_the_same(tmp_path: Path, keys: Path) -> None:
    folder, whole = played(tmp_path / "run"), tmp_path / "whole"
    shutil.copytree(folder, whole)

    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed" and fields["round"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        take_out(folder, keys, "c1", "subtract", stop, repair_rounds=2)
    name = take_out(folder, keys, "c1", "subtract", repair_rounds=2)
    take_out(whole, keys, "c1", "subtract", repair_rounds=2)
    same_end(folder, whole, keys, name)


PLACES = ["round.aggregated:4", "contributions.listed:4", "commit.ledger:3", "request.executed:1", "publish.done:0"]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ["subtract", "negation"])
def test_kill_9_in_the_middle_then_the_same_command_gives_the_same_bytes(
    tmp_path: Path, keys: Path, action: str, place: str
) -> None:
    folder, whole = played(tmp_path / "run"), tmp_path / "whole"
    shutil.copytree(folder, whole)
    process = get_context("spawn").Process(target=_killed, args=(str(folder), str(keys), action, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    name = take_out(folder, keys, "c1", action)
    take_out(whole, keys, "c1", action)
    same_end(folder, whole, keys, name)


def test_a_rollback_leaves_a_log_of_rounds_without_the_client(tmp_path: Path, keys: Path) -> None:
    folder = played(tmp_path / "run")
    key, wanted = load_key(keys / "officer"), Request("client", ("c1",), "rollback")
    name = receive(folder, sign_request(wanted, identity(folder), key), authorised([keys])).id
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, key, quiet)
    log = read_log(folder)
    assert list(log.entries) == [1, 2, 3]
    assert all(one.client.id != "c1" for n in log.entries for one in log.open(n).updates.pending)
    # and another client can be subtracted from what was played again
    assert trace(folder, last(folder), ["c2"]).missing == []
    Subtract(gate=False).check(folder, plan_rollback(folder, ["c2"]))


# Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "subtract", "negation"),
    [
        ({"contributions": None}, "subtract needs the contribution log, and this run kept none", "kept none"),
        ({"contributions": {"every": 2}}, r"has no rounds 1, 3 \(contributions.every: 2\); use negation", ""),
        ({"contributions": {"keep_rounds": 1}}, r"rounds 1 to 2 \(contributions.keep_rounds: 1\)", ""),
        ({"rule": "fedex", "clients": {"ranks": [4]}}, "fedex can only take a change of the adapter", ""),
        ({"rule": ["scaffold", "zero_pad"]}, "clients answered to what scaffold.*sent beside the adapter", ""),
        ({"rule": "fedsb"}, "", "under fedsb the model holds no share of one client's"),
        ({"rule": ["trimmed_mean", "zero_pad"]}, "", "under trimmed_mean the model holds no share"),
    ],
    ids=str,
)
def test_what_the_log_or_the_strategy_cannot_do_is_said_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], subtract: str, negation: str
) -> None:
    folder = played(tmp_path / "run", **changes)
    plan = plan_rollback(folder, ["c0"])
    found = {one.action: one.reason for one in estimates(folder, Request("client", ("c0",)), plan)}
    for action, message in ((Subtract, subtract), (Negation, negation)):
        if not message:
            action(gate=False).check(folder, plan)
            continue
        with pytest.raises(UnlearningError, match=message):
            action(gate=False).check(folder, plan)
        assert found["subtract" if action is Subtract else "negation"]


def test_a_damaged_log_and_a_client_without_updates_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    folder = played(tmp_path / "run", clients={"joins": {"c1": 9}})
    with pytest.raises(UnlearningError, match="subtract: no round learned from an update of it; use rollback"):
        Subtract(gate=False).check(folder, plan_rollback(folder, ["c1"]))
    manifest = folder / "contributions" / "manifest.json"
    told = read_json(manifest)
    plan, summary = plan_rollback(folder, ["c0"]), read_json(folder / "summary.json")
    write_json(folder / "summary.json", {**summary, "status": "interrupted"})
    with pytest.raises(UnlearningError, match="is not finished; let it end, or use rollback"):
        Subtract(gate=False).check(folder, plan)
    write_json(folder / "summary.json", summary)
    log_file(folder, 2).write_bytes(b"no zip")
    for action in (Subtract, Negation):
        with pytest.raises(UnlearningError, match="round-0002.zip is truncated or altered"):
            action(gate=False).check(folder, plan)
    del told["rounds"]["2"]
    write_json(manifest, told)
    with pytest.raises(UnlearningError, match="has no round 2"):
        Subtract(gate=False).check(folder, plan)


def test_two_rounds_that_mend_cost_a_fifth_of_ten() -> None:
    plan = Rollback(("c1",), (), (), 3, 2, 10, "E1")
    for name in ("subtract", "negation"):
        assert ACTIONS.create(name).cost(Path("run"), plan) == 0.2


@pytest.mark.parametrize("strength", [0, -1.0, "much", True])
def test_a_strength_that_is_none_is_refused(strength: Any) -> None:
    with pytest.raises(Exception, match="negation needs strength above 0"):
        ACTIONS.create("negation", strength=strength)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["subtract", "negation"])
def test_others_go_on_from_what_packing_left_unsent(tmp_path: Path, keys: Path, action: str) -> None:
    wire = {"up": "int4", "error_feedback": True}
    folder = played(tmp_path / "run", "zero_pad", wire=wire)
    take_out(folder, keys, "c1", action)
    state = last(folder)
    assert state.row is not None
    assert state.row["admitted"]
    assert not state.row["failed"]
