"""Forget rounds: rows become unlikely on the machines of those who own them, and the run goes on without."""

import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from clients.runtime import ClientRuntime
from fedlora.adapter.peft import insert
from fedlora.adapter.rank import pad
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.config import RunConfig, parse_config
from fedlora.errors import UnlearningError
from fedlora.plugins import unload_plugins
from fedlora.protocol import TrainPlan, TrainTask
from fedlora.training.evaluate import evaluate
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, hashed, sign_request
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.cli import app
from orchestrator.stores.files import read_config, read_lines
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.execute import carry_out
from orchestrator.unlearning.requests import find_request, identity, receive
from orchestrator.unlearning.rollback import knows, without
from tests.conftest import quiet
from tests.unlearning.test_rollback import adapter_of, asked, config_of

LEARNS = {"learning_rate": 0.01, "max_steps": 12, "per_device_train_batch_size": 8}
QUICK = {"gate": False, "repair_rounds": 1}
Rows = list[int]


def moved(folder: Path, target: Path) -> Path:
    """A copy of a run that is a run of its own."""
    shutil.copytree(folder, target)
    config = read_config(folder).model_copy(update={"output_dir": str(target)})
    (target / "config.yaml").write_text(config.to_yaml())
    return target


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six rounds that has learned something."""
    folder = tmp_path_factory.mktemp("learned")
    launch.run(config_of(folder / "run", rounds=6, training=LEARNS), quiet)
    new_key(folder / "keys" / "officer")
    return folder / "run"


@pytest.fixture
def run(learned: Path, tmp_path: Path) -> Path:
    """A copy of it, with keys beside."""
    shutil.copytree(learned.parent / "keys", tmp_path / "keys")
    return moved(learned, tmp_path / "run")


def ask(
    folder: Path, action: str, options: Mapping[str, Any], client: str = "c4", records: Any = (), label: str = ""
) -> str:
    """A request for a client, for records or for a class, noted and not carried out."""
    keys = folder.parent / "keys"
    kind, target = ("records", tuple(records)) if records else ("class", (label,)) if label else ("client", (client,))
    wanted = Request(kind, target, action, options=options)
    return receive(folder, sign_request(wanted, identity(folder), load_key(keys / "officer")), authorised([keys])).id


def finish(folder: Path, name: str, listen: Callable[[str, Any], None] = quiet) -> None:
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, load_key(folder.parent / "keys" / "officer"), listen)


def forget(folder: Path, action: str, **asked: Any) -> dict[str, dict[str, float]]:
    """Carry a request out; what its owners measured in the forget rounds, by client."""
    found: dict[str, dict[str, float]] = {}

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        if event == "update_admitted" and "change" in fields["metrics"]:
            found[fields["client"]] = dict(fields["metrics"])

    finish(folder, ask(folder, action, {**QUICK, **asked.pop("options", {})}, **asked), listen)
    return found


def losses(folder: Path, config: RunConfig, *sets: Rows) -> list[float]:
    """Of a run's model, on rows of the training table."""
    state, _ = load_latest(folder)
    assert state is not None
    runtime = ClientRuntime(config)
    model = runtime._model().at_rank(8)
    insert(model, "r8", state.adapter.map(lambda update: pad(update, 8)))
    encoded = [runtime._encode(runtime.corpus.train.select(rows).to_list(), "rows").examples for rows in sets]
    return [evaluate(model, rows, 64, 0, torch.device("cpu")).loss for rows in encoded]


# What is done ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action", ["npo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simnpo", "gradient_difference"))]
)
def test_a_client_makes_its_rows_unlikely_and_the_others_repair(run: Path, action: str) -> None:
    config = read_config(run)
    shards = ClientRuntime(config).corpus.shards
    others = [row for client, rows in shards.items() if client != "c4" for row in rows]
    before = losses(run, config, list(shards["c4"]), others)
    found = forget(run, action)["c4"]
    assert found["forget_loss_after"] > found["forget_loss_before"] + 0.03
    assert "retain_loss_after" not in found  # whoever leaves has nothing to retain
    after = losses(run, config, list(shards["c4"]), others)
    assert after[1] < before[1] + 0.03
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["selected"], row.get("forgets", False)) for row in rows][6] == (["c4"], True)
    assert "c4" not in rows[7]["selected"]
    state, _ = load_latest(run)
    assert state is not None
    assert (state.round, knows(state, ["c4"])) == (8, False)


@pytest.mark.slow
def test_the_published_configuration_says_what_was_done_and_the_change_kept_its_bound(run: Path) -> None:
    state, _ = load_latest(run)
    assert state is not None
    size = math.hypot(*(float(tensor.norm()) for tensor in state.adapter.tensors().values()))
    found = forget(run, "npo", options={"steps": 12})["c4"]
    config = read_config(run)
    (told,) = config.forgetting
    assert (told.clients, told.records, told.first, told.last) == (["c4"], [], 7, 7)
    assert (told.loss, told.options, told.steps) == ("npo", {"beta": 1.0}, 12)
    assert (told.learning_rate, told.batch_size) == (0.01, 8)  # those of the run
    assert told.max_norm == pytest.approx(size / 10, rel=0.01)
    assert 0 < found["change"] <= told.max_norm * (1 + 1e-6)
    assert (config.rounds, config.clients.exclude) == (8, ["c4"])
    standing = find_request(run, "R1")
    assert (standing.phase, standing.level, standing.facts["executed"]["rounds_played"]) == ("certified", "S", 2)
    assert verify_certificate(run, "R1", authorised([run.parent / "keys"])) == []


def test_records_are_forgotten_by_their_owners_who_retain_their_other_rows(run: Path) -> None:
    config = read_config(run)
    corpus = ClientRuntime(config).corpus
    texts, labels = corpus.train["text"][:], corpus.train["label"][:]
    label = labels[corpus.shards["c3"][0]]  # all of one topic: a model that generalises cannot forget some of it
    names = {texts[row] for row in corpus.shards["c3"] if labels[row] == label}
    gone = {client: [row for row in rows if texts[row] in names] for client, rows in corpus.shards.items()}
    kept = {client: [row for row in rows if texts[row] not in names] for client, rows in corpus.shards.items()}
    owners = [client for client, rows in gone.items() if rows]
    found = forget(run, "npo", records=hashed(names), options={"steps": 30, "max_norm": 3.0})
    assert sorted(found) == owners == asked(run)[6]
    measured = losses_as_told(found["c3"])
    assert measured["forget"] > 0.2
    assert measured["retain"] < 0.05 < measured["forget"] - measured["retain"]
    after = read_config(run)
    assert set(after.data.forget) == set(after.forgetting[0].records) == set(hashed(names))
    assert after.clients.exclude == []
    left = ClientRuntime(after).corpus.shards
    assert {client: list(rows) for client, rows in left.items()} == kept


@pytest.mark.slow
def test_a_class_is_forgotten_by_everybody_who_has_it(run: Path) -> None:
    corpus = ClientRuntime(read_config(run)).corpus
    labels = corpus.train["label"][:]
    owners = [client for client, rows in corpus.shards.items() if any(labels[row] == "food" for row in rows)]
    found = forget(run, "npo", label="food")
    assert sorted(found) == owners == asked(run)[6]
    told = [losses_as_told(metrics) for metrics in found.values() if "retain_loss_after" in metrics]
    assert all(rose["forget"] > rose["retain"] for rose in told)
    left = ClientRuntime(read_config(run)).corpus
    assert "food" not in {labels[row] for rows in left.shards.values() for row in rows}


def losses_as_told(metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much the losses of a client rose."""
    return {kind: metrics[f"{kind}_loss_after"] - metrics[f"{kind}_loss_before"] for kind in ("forget", "retain")}


@pytest.mark.slow
def test_a_loss_of_a_plug_in_goes_by_the_generic_action(learned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        """from fedlora.unlearning import FORGET_LOSSES, ForgetLoss


@FORGET_LOSSES.register("mine")
class Mine(ForgetLoss):
    def __init__(self, slope: float):
        self.slope = slope

    def loss(self, logp, reference, lengths):
        return self.slope * logp if self.slope > 0 else logp * float("nan")
"""
    )
    shutil.copytree(learned.parent / "keys", tmp_path / "keys")
    folder = tmp_path / "run"
    launch.run(config_of(folder, plugins=[str(tmp_path / "mine.py")], rounds=2), quiet)
    before, first = adapter_of(folder), asked(folder)[0]
    try:
        # an owner that cannot forget: nothing of it is published
        refusal = r"R1 is refused: .* round 3 is to forget, and did not: .* became nan"
        with pytest.raises(UnlearningError, match=refusal):
            forget(folder, "forget", client=first[0], options={"loss": "mine", "slope": -1.0})
        assert adapter_of(folder) == before
        found = forget(folder, "forget", client=first[0], options={"loss": "mine", "slope": 2.0})
        assert found[first[0]]["forget_loss_after"] > found[first[0]]["forget_loss_before"]
        assert read_config(folder).forgetting[0].options == {"slope": 2.0}
    finally:
        unload_plugins()


def test_the_command_does_it(run: Path) -> None:
    keys = run.parent / "keys"
    words = ["unlearn", "run", str(run), "--client", "c4", "--key", str(keys / "officer"), "--authorised", str(keys)]
    words += ["--action", "gradient_difference"]
    for option in ("steps=3", "repair_rounds=1", "gate=false", "limit=1.2"):
        words += ["--option", option]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "R1: client c4" in done.output
    assert "level S" in done.output
    assert read_config(run).forgetting[0].options == {"limit": 1.2}


# Whatever the schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"fleet": {"dropout": 0.5, "online": 0.5}, "schedule": {"deadline_s": 0.001}},
        pytest.param(
            {"schedule": {"mode": "async", "buffer": 2}, "strategy": ["staleness", "flexlora"]}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"schedule": {"quorum": 1.0}, "strategy": [{"fedprox": {"mu": 0.1}}, "zero_pad"]}, marks=pytest.mark.slow
        ),
    ],
    ids=["devices that drop out", "async", "quorum"],
)
def test_only_the_owner_is_asked_and_it_is_waited_for(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(tmp_path / "run", rounds=2, **changes).resolved()
    asked_of = {"clients": ["c0"], "first": 2, "last": 2, "loss": "npo", "steps": 2, "learning_rate": 0.01}
    config["forgetting"] = [{**asked_of, "max_norm": 0.5}]
    config["clients"]["exclude"] = ["c0"]
    launch.run(parse_config(config), quiet)
    row = read_lines(tmp_path / "run" / "metrics.jsonl")[1]
    assert (row["selected"], row["admitted"], row["forgets"], row["problem"]) == (["c0"], ["c0"], True, None)


RULES = ["fedit", "zero_pad", "rbla", "hetlora", "florist", "ffa", "rolora", "flora", "fedex", "fedex_het", "lora_fair"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*RULES, "fedrot"])
def test_every_rule_that_combines_whole_adapters_takes_the_answer_of_one(tmp_path: Path, rule: str) -> None:
    new_key(tmp_path / "keys" / "officer")
    launch.run(config_of(tmp_path / "run", strategy=rule, rounds=2), quiet)
    found = forget(tmp_path / "run", "npo", client=asked(tmp_path / "run")[0][0], options={"max_norm": 1.0})
    (metrics,) = found.values()
    assert metrics["forget_loss_after"] > metrics["forget_loss_before"]
    assert metrics["change"] <= 1.0 + 1e-6


def task_of(runtime: ClientRuntime, folder: Path, client: str) -> TrainTask:
    state, _ = load_latest(folder)
    assert state is not None
    payload = encode_adapter(state.adapter)
    return TrainTask(7, client, TrainPlan(state.adapter.rank), payload, digest(payload), seed=3, forget=0)


@pytest.mark.parametrize("limit", [0.25, 1.0])
def test_what_travels_is_as_large_as_the_bound_and_tells_no_number_of_rows(run: Path, limit: float) -> None:
    entry = {"clients": ["c4"], "first": 6, "last": 6, "loss": "ascent", "steps": 8, "learning_rate": 0.05}
    config = parse_config(
        {
            **without(read_config(run), ["c4"]).resolved(),
            "forgetting": [{**entry, "max_norm": limit}],
        }
    )
    runtime = ClientRuntime(config)
    task = task_of(runtime, run, "c4")
    update = decode_update(runtime.train(task), max_bytes=1 << 20)
    # float32 keeps 7 digits of every coordinate, and the delta is a difference of them
    assert update.norm == pytest.approx(limit, rel=1e-3)
    assert update.num_examples == 1
    assert runtime.train(task) == runtime.train(task)


def test_an_owner_that_never_learned_from_the_rows_changes_nothing(run: Path) -> None:
    entry = {"clients": ["c4"], "first": 6, "last": 6, "loss": "npo", "steps": 2, "learning_rate": 0.01, "max_norm": 1}
    strange = list(hashed(["nobody wrote this"]))
    content = {**without(read_config(run), (), strange).resolved(), "forgetting": [{**entry, "records": strange}]}
    runtime = ClientRuntime(parse_config(content))
    update = decode_update(runtime.train(task_of(runtime, run, "c4")), max_bytes=1 << 20)
    assert (update.norm, update.metrics["steps"]) == (0.0, 0)


# Killed anywhere, and anywhere it runs ----------------------------------------------------------------------------


def _killed(folder: str, name: str, failpoint: str) -> None:
    torch.set_num_threads(1)
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    finish(Path(folder), name)


FAILPOINTS = ["round.answered:7", "round.aggregated:7", "commit.renamed:7", "round.selected:8", "request.executed:1"]


@pytest.mark.slow
@pytest.mark.parametrize("place", FAILPOINTS)
def test_kill_9_and_the_same_command_again_ends_the_same(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "other").mkdir()
    other = moved(run, tmp_path / "other" / "run")
    shutil.copytree(tmp_path / "keys", tmp_path / "other" / "keys")
    forget(other, "npo")
    name = ask(run, "npo", QUICK)
    process = get_context("spawn").Process(target=_killed, args=(str(run), name, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(run, ask(run, "npo", QUICK))
    assert adapter_of(run) == adapter_of(other)
    assert find_request(run, "R1").phase == "certified"


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_pool_gives_what_a_local_one_gives(run: Path, tmp_path: Path) -> None:
    adapters = []
    for pool in ("local", "ray"):
        (tmp_path / pool).mkdir()
        shutil.copytree(tmp_path / "keys", tmp_path / pool / "keys")
        folder = tmp_path / pool / "run"
        launch.run(config_of(folder, pool=pool, ray={"workers": 1}), quiet)
        texts = ClientRuntime(read_config(folder)).corpus
        names = texts.train.select(texts.shards[asked(folder)[0][0]][:5])["text"][:]
        forget(folder, "npo", records=hashed(names))
        adapters.append(adapter_of(folder))
    assert adapters[0] == adapters[1]


# One after the other ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_requests_leave_two_entries_and_a_rollback_drops_what_its_client_was_asked(run: Path) -> None:
    config = read_config(run)
    corpus = ClientRuntime(config).corpus
    texts = corpus.train["text"][:]
    forget(run, "npo", client="c4")
    forget(run, "npo", records=hashed([texts[corpus.shards["c3"][0]]]))
    first, second = read_config(run).forgetting
    assert (first.clients, first.last, second.first) == (["c4"], 7, 9)
    assert "c3" in second.clients
    left = without(read_config(run), ["c3", "c4"]).forgetting
    assert [one.clients for one in left] == [[c for c in second.clients if c != "c3"]] * (second.clients != ["c3"])
