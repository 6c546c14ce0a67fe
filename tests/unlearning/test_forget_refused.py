"""Forget rounds that are refused, each with what to do about it, and forgetting with nothing to retain."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.aggregation import compose
from fedlora.errors import ConfigError
from fedlora.unlearning.forgetting import unlearn
from fedlora.unlearning.request import Request
from orchestrator import launch
from orchestrator.forgetting import check_combining
from orchestrator.unlearning.actions import ACTIONS
from orchestrator.unlearning.execute import estimates
from orchestrator.unlearning.rollback import plan_rollback
from tests.conftest import quiet
from tests.unlearning.test_forgetting import Taught, by_hand, classifier  # noqa: F401 - a fixture
from tests.unlearning.test_rollback import asked, config_of

# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        ("npo", {"steps": 0}, "unlearning: steps must be at least 1, not 0"),
        ("npo", {"steps": "many"}, "unlearning action: npo.steps must be a whole number, not 'many'"),
        ("npo", {"max_norm": "far"}, "unlearning action: npo.max_norm must be a number, not 'far'"),
        ("npo", {"max_norm": math.inf}, "max_norm must be a number, not inf"),
        ("npo", {"max_norm": -1.0}, "unlearning: max_norm must be above 0, not -1.0"),
        ("npo", {"beta": 0}, "forget loss: npo.beta must be above 0, not 0"),
        ("npo", {"limit": 2.0}, "forget loss: npo does not take these options: .*limit"),
        ("npo", {"loss": "simnpo"}, "npo has a loss of its own; use forget with loss=simnpo"),
        ("npo", {"forget_rounds": 0}, "forget_rounds must be at least 1, not 0"),
        ("npo", {"repair_rounds": 0}, "repair_rounds must be at least 1, not 0"),
        ("forget", {}, "forget needs a loss, such as loss=npo"),
        ("forget", {"loss": "nop"}, "forget loss: nop is not known; did you mean npo?"),
    ],
)
def test_wrong_options_are_told(action: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ACTIONS.create(action, **options)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ([{"krum": {}}, "flexlora"], "krum makes something else of them"),
        (["scaffold", "fedit"], "scaffold makes something else of them"),
        ([{"server_momentum": {}}, "fedit"], "server_momentum makes something else of them"),
        ([{"clip": {"max_norm": 1.0}}, "flexlora"], "clip makes something else of them"),
        ([{"fltrust": {"root": "c0"}}, "flexlora"], "fltrust makes something else of them"),
        ("fedsa", "fedsa keeps parts on the clients"),
        ("fedsb", "fedsb trains a core"),
        ("head_only", "head_only leaves everything but the head"),
    ],
)
def test_a_strategy_that_would_change_what_owners_send_is_refused(strategy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*use rollback"):
        check_combining(compose(strategy))


def reasons(folder: Path, client: str) -> dict[str, str]:
    """Why each action cannot take a client out; empty where it can."""
    request = Request("client", (client,))
    return {one.action: one.reason for one in estimates(folder, request, plan_rollback(folder, [client]))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": {"name": "sign_flip", "clients": ["c0"]}}, "this run simulates attackers"),
        ({"continual": {"split": 2, "rounds": 1}, "rounds": 2}, "does not know streams of tasks"),
        ({"strategy": [{"clip": {"max_norm": 1.0}}, "flexlora"]}, "clip makes something else of them"),
        ({"strategy": "flora"}, "flora moves the adapter into the base, so that its norm says nothing; give max_norm"),
        (
            {"strategy": "zero_pad", "wire": {"up": "int8", "error_feedback": True}},
            "with wire.error_feedback clients would later send what they kept",
        ),
        ({}, ""),
    ],
    ids=["attackers", "a stream", "a wrapper", "a ledger", "what clients kept", "nothing"],
)
def test_what_cannot_forget_is_told_by_the_plan(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    launch.run(config_of(tmp_path, **{"rounds": 1, **changes}), quiet)
    found = reasons(tmp_path, asked(tmp_path)[0][0])
    told = {found[name] for name in ("npo", "simnpo", "gradient_difference", "ascent")}
    assert all(message in reason if message else not reason for reason in told)
    assert "forget needs a loss" in found["forget"]


def test_a_client_that_never_took_part_has_nothing_to_forget(tmp_path: Path) -> None:
    launch.run(config_of(tmp_path, rounds=1, clients__joins={"c5": 9}), quiet)
    assert reasons(tmp_path, "c5")["npo"].startswith("no round used it, so there is nothing to forget; use rollback")


ENTRY = {"clients": ["c0"], "first": 1, "last": 2, "loss": "npo", "steps": 2, "learning_rate": 0.01, "max_norm": 1.0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**ENTRY, "last": 9}], "rounds 1 to 9 are not all free; the run has 4"),
        ([ENTRY, {**ENTRY, "first": 2, "last": 3}], "rounds 2 to 3 are not all free"),
        ([{**ENTRY, "first": 3}], "rounds 3 to 2 are none"),
        ([{**ENTRY, "records": ["0" * 64]}], "forgetting.records are not all in data.forget too"),
        ([{**ENTRY, "clients": ["c1"]}], "forgetting: c1 forgets all it has, and would go on learning it; exclude it"),
        ([{**ENTRY, "lss": "npo"}], "forgetting.lss is not a key; did you mean forgetting.loss"),
        ([{**ENTRY, "max_norm": math.inf}], "forgetting.max_norm is 'inf'"),
    ],
)
def test_a_configuration_that_says_it_wrongly_is_refused(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, forgetting=entries, clients={"count": 6, "exclude": ["c0"]})


def test_a_configuration_that_names_what_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    clients = {"count": 6, "exclude": ["c0"]}
    for entry, message in (
        ({**ENTRY, "loss": "nop"}, "forget loss: nop is not known; did you mean npo?"),
        ({**ENTRY, "clients": ["c0", "x"], "records": ["0" * 64]}, "forgetting.clients: there is no client x"),
    ):
        config = config_of(tmp_path / "run", forgetting=[entry], clients=clients, data__forget=entry.get("records", []))
        with pytest.raises(ConfigError, match=message):
            launch.run(config, quiet, overwrite=True)


# Nothing to retain ------------------------------------------------------------------------------------------------


def test_without_retain_rows_the_forget_loss_is_all_there_is(classifier: Taught) -> None:  # noqa: F811
    work = replace(classifier.work(loss="ascent", steps=1, batch_size=64, learning_rate=1e-3), retain=[], alone=True)
    before = {name: parameter.detach().clone() for name, parameter in classifier.parameters.items()}
    only = replace(work, recipe=replace(work.recipe, retain_weight=1e-30))  # by hand it cannot be 0
    gradients = by_hand(classifier, only, lambda logp: logp.mean())
    found = unlearn(work)
    # the first step of AdamW is the learning rate against the sign of the gradient
    for name, parameter in classifier.parameters.items():
        step, clear = parameter.detach() - before[name], gradients[name].abs() > 1e-4
        assert (step[clear].sign() == -gradients[name][clear].sign()).all()
    assert found.retain_after.num_examples == 0
    assert "retain_loss_after" not in found.metrics()


def test_without_retain_rows_the_ball_holds(classifier: Taught) -> None:  # noqa: F811
    found = unlearn(replace(classifier.work(loss="ascent", max_norm=0.5), retain=[], alone=True))
    assert found.change == pytest.approx(0.5, rel=1e-4)
    assert found.bounded
    assert found.forget_after.loss > found.forget_before.loss
