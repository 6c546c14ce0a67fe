"""Attackers in a run: NaN goes no further than admission under any rule, and robust rules do what the mean cannot."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import STRATEGIES, WRAPPERS, Contribution, RoundContext, compose
from fedlora.aggregation.combine import combine
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from orchestrator.cli import app
from orchestrator.launch import run
from orchestrator.opening import first_state, open_federation
from orchestrator.pools.local import LocalPool
from orchestrator.results import whole_adapter
from orchestrator.rounds import play_round
from orchestrator.validate import validate
from tests.conftest import toy_config

OPTIONS: Mapping[str, dict[str, Any]] = {"fltrust": {"root": "c0"}}


def over_a_rule(wrapper: str) -> list[Any]:
    """The wrapper over the first rule that it takes."""
    for rule in ("fedit", "flexlora", "zero_pad", "ffa"):
        stack = [{wrapper: OPTIONS.get(wrapper, {})}, rule]
        try:
            compose(stack)
        except ConfigError:
            continue
        return stack
    raise AssertionError(f"no rule for {wrapper}; add its options to OPTIONS")


STACKS = {name: name for name in STRATEGIES} | {f"{name} over a rule": over_a_rule(name) for name in WRAPPERS}


@dataclass(frozen=True)
class Attacked:
    """Five clients at ranks 2, 4 and 8, of which two send a NaN in every tensor; one pool for all rules."""

    config: RunConfig
    pool: LocalPool


SAME_TWICE = {"scenario": "domain", "rounds": 1, "tasks": [{"name": "before"}, {"name": "after"}]}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return under_attack(tmp_path_factory)


@pytest.fixture(scope="module")
def attacked_stream(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """The same, with a freeze between its rounds, for wrappers that protect what was frozen."""
    return under_attack(tmp_path_factory, continual=SAME_TWICE, rounds=2)


def under_attack(tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> Attacked:
    attack = {"name": "nan", "clients": ["c1", "c4"]}
    small = {
        "clients__count": 5,
        "training__max_steps": 1,
        "training__per_device_train_batch_size": 2,
        "data__max_test_rows": 8,
    }
    config = toy_config(
        tmp_path_factory.mktemp("attacked"), attack=attack, evaluation__per_client=False, **small, **changes
    )
    return Attacked(config, LocalPool(config))


@pytest.mark.parametrize("name", STACKS)
def test_nan_never_reaches_the_global_adapter_and_the_attackers_are_named(
    name: str, request: pytest.FixtureRequest
) -> None:
    protects = compose(STACKS[name]).traits.protects
    attacked: Attacked = request.getfixturevalue("attacked_stream" if protects else "attacked")
    weighting = "uniform" if compose(STACKS[name]).traits.private else "examples"
    config = attacked.config.model_copy(update={"strategy": STACKS[name], "rounds": 2, "weighting": weighting})
    events: list[tuple[str, Mapping[str, Any]]] = []
    fed, base = open_federation(config, attacked.pool, lambda event, fields: events.append((event, fields)))
    state = first_state(config, fed, base)
    for _ in range(2):
        state = play_round(fed, state)
        assert state.row is not None
        assert set(state.row["refused"]) == {"c1", "c4"}
        assert state.row["admitted"] == ["c0", "c2", "c3"]
    final = whole_adapter(state).tensors()  # what is in the base's patches included
    assert all(torch.isfinite(tensor).all() for tensor in final.values())
    refusals = [fields for event, fields in events if event == "update_refused"]
    assert [(fields["round"], fields["client"]) for fields in refusals] == [(1, "c1"), (1, "c4"), (2, "c1"), (2, "c4")]
    assert all("not finite" in fields["reason"] for fields in refusals)


def test_a_run_says_who_attacks_in_its_journal_its_summary_and_on_the_screen(
    toy: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = toy(attack={"name": "nan", "options": {"everywhere": True}, "clients": ["c4", "c1"]}, rounds=1)
    said: list[tuple[str, Any]] = []
    summary = run(config, lambda event, fields: said.append((event, dict(fields))))
    assert summary["attack"] == {"name": "nan", "options": {"everywhere": True}, "clients": ["c4", "c1"]}
    journal = [json.loads(line) for line in (Path(config.output_dir) / "journal.jsonl").read_text().splitlines()]
    (who,) = [event for event in journal if event["event"] == "attackers"]
    assert (who["attack"], who["clients"]) == ("nan", ["c1", "c4"])
    assert [event["client"] for event in journal if event["event"] == "update_refused"] == ["c1", "c4"]
    assert ("attackers", {"attack": "nan", "clients": ["c1", "c4"]}) in said
    facts, problems = validate(toy_config(tmp_path / "other", attack={"name": "alie", "clients": 0.34}))
    assert (facts["attack"], problems) == ("alie by c0, c5", [])


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("{name: sing_flip}", "attack: sing_flip is not known; did you mean sign_flip?"),
        ("{name: sign_flip, clients: [c1, c77]}", "attack.clients: c77 is not registered"),
        ("{name: sign_flip, clients: 2}", "attack.clients: expected a share of the clients above 0 and below 1"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_an_attack_that_cannot_be_mounted_ends_the_command_with_a_sentence(
    command: str, attack: str, said: str, toy: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(toy().to_yaml(), encoding="utf-8")
    result = CliRunner().invoke(app, [command, str(path), "--set", f"attack={attack}"])
    text = result.output + str(result.exception or "")  # the entry point turns errors of ours into exit codes
    assert said in text
    assert getattr(result.exception, "exit_code", result.exit_code) == 2


# What a rule makes of ten updates, of which two lie ------------------------------------------------------------


def update(client: str, along: float, across: float) -> Contribution:
    """A change of B from (0, 0) to (along, across), under A = (1, 0)."""
    received, trained = (
        AdapterState({"q": LowRank(torch.tensor(B), torch.tensor([[1.0, 0.0]]))})
        for B in ([[0.0], [0.0]], [[along], [across]])
    )
    return Contribution(ClientInfo(client, 1, 1), 1.0, trained, received)


def step(strategy: Any, attacker: float) -> float:
    """How far the rule moves along the honest direction: eight clients move by 1, two by ``attacker``."""
    honest = [update(f"c{i}", 1.0, (i - 3.5) / 10) for i in range(8)]
    updates = [*honest, update("c8", attacker, 0.0), update("c9", attacker, 0.1)]
    adapter = combine(compose(strategy), updates, RoundContext(1, 1, seed=0), {}).adapter
    return float(adapter.modules["q"].B[0, 0])


def test_the_plain_mean_goes_backwards_under_two_flipped_updates_of_ten() -> None:
    # (8 * 1 - 2 * 10) / 10
    assert step("fedit", attacker=-10.0) == pytest.approx(-1.2)
    assert step("fedit", attacker=10.0) == pytest.approx(2.8)


@pytest.mark.parametrize("attacker", [-10.0, 10.0])
@pytest.mark.parametrize(
    "wrapper",
    [
        {"krum": {"byzantine": 0.2}},
        {"multi_krum": {"byzantine": 0.2}},
        {"trimmed_mean": {"trim": 0.2}},
        "coordinate_median",
        "geometric_median",
        {"fltrust": {"root": "c3"}},
    ],
    ids=lambda wrapper: wrapper if isinstance(wrapper, str) else next(iter(wrapper)),
)
def test_robust_rules_move_as_the_honest_clients_do(wrapper: Any, attacker: float) -> None:
    # a median of points is between them: the geometric one gives the liars a pull of constant length
    assert step([wrapper, "fedit"], attacker) == pytest.approx(1.0, abs=0.06)


def test_clipping_bounds_the_harm_and_does_not_undo_it() -> None:
    # both liars are cut to the median length, just above 1: (8 - 2) / 10
    assert step(["clip", "fedit"], attacker=-10.0) == pytest.approx(0.6, abs=0.03)
