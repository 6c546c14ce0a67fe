"""A node's policy: what a malicious server asks for, and the sentence it gets for an answer."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.policy import Policy, load_policy
from clients.recipe import recipe_of
from clients.records import Parcel, sha256, task_note
from clients.silo import Silo, read_settings
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.adapter.wire import digest, encode_adapter
from fedlora.errors import ConfigError
from fedlora.protocol import BaseInfo, ClientInfo, EvalTask, Method, Patch, TrainPlan, TrainTask
from tests.flower_grid import node_config
from tests.silos import served
from tests.unruly import Unruly


class Alone(Unruly):
    """Only the client that the node is."""

    def members(self) -> list[ClientInfo]:
        return [ClientInfo(self._config.name or "", 4, 16)]


class Server:
    """What somebody sends who need not keep to any rule."""

    def __init__(self, silo: Silo, base: BaseInfo, recipe: dict[str, Any]):
        self.silo, self.base, self.recipe = silo, base, recipe
        self.adapter = self.adapter_of(4)
        self.task = TrainTask(1, "amber", TrainPlan(4), self.adapter, digest(self.adapter), seed=0)

    def adapter_of(self, rank: int) -> bytes:
        sites = self.base.sites.items()
        return encode_adapter(
            AdapterState({path: LowRank(torch.zeros(out, rank), torch.ones(rank, into)) for path, (out, into) in sites})
        )

    def train(
        self, recipe: Any = None, cohort: Any = 3, base: str = "noop", seconds: Any = None, **changes: Any
    ) -> str:
        """The node's error to a task; empty for an update."""
        task = replace(self.task, **{"received": digest(changes.get("adapter", self.adapter)), **changes})
        note = {"recipe": json.dumps(recipe or self.recipe), "base": base, "cohort": cohort, "ledger": []}
        note["seconds"] = seconds
        answer = self.silo.train(Parcel({**note, "task": task_note(task)}, {sha256(task.adapter): task.adapter}))
        assert bool(answer.payloads) == ("error" not in answer.note)
        return str(answer.note.get("error", ""))

    def score(self, **changes: Any) -> str:
        task = replace(EvalTask("amber", self.adapter), **changes)
        note = {"recipe": json.dumps(self.recipe), "ledger": [], "tasks": [task_note(task)]}
        return str(self.silo.evaluate(Parcel(note, {sha256(task.adapter): task.adapter})).note.get("error", ""))

    def results(self) -> list[dict[str, Any]]:
        task = EvalTask("amber", self.adapter)
        note = {"recipe": json.dumps(self.recipe), "ledger": [], "tasks": [task_note(task)]}
        found: list[dict[str, Any]] = self.silo.evaluate(Parcel(note, {sha256(task.adapter): task.adapter})).note[
            "results"
        ]
        return found

    def with_keys(self, **changes: Any) -> dict[str, Any]:
        """The recipe with keys changed or added, sections by two underscores."""
        told = json.loads(json.dumps(self.recipe))
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = told
            for parent in parents:
                node = node[parent]
            node[last] = value
        return told


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Server]:
    def start(**rules: Any) -> Server:
        own = node_config(tmp_path / "node", "amber", "rows.jsonl", 4, rules)
        silo = Silo(read_settings(own), Alone)
        config = served(tmp_path / "run", None, strategy=[{"clip": {"max_norm": 1.0}}, "fedex_het"])
        return Server(silo, Alone(config, 1).base(), json.loads(recipe_of(config).model_dump_json()))

    return start


def test_an_ordinary_task_is_carried_out(serve) -> None:
    assert serve().train() == ""
    assert serve().score() == ""


def test_more_than_the_policy_allows_is_refused_with_the_name_of_the_rule(serve) -> None:
    server = serve(max_rank=16, max_steps=5, min_cohort=3, methods=["fedprox"])
    big = server.adapter_of(512)
    asked = server.train(plan=TrainPlan(512), adapter=big)
    assert asked == "refused by policy: max_rank is 16, the server asked for rank 512"
    assert server.train(adapter=big) == "refused by policy: max_rank is 16, the server sent rank 512"
    assert server.score(adapter=big) == "refused by policy: max_rank is 16, the server sent rank 512"
    many = server.with_keys(training__max_steps=6)
    assert server.train(many) == "refused by policy: max_steps is 5, the server asked for 6 steps"
    hidden = server.with_keys(training__gradient_accumulation_steps=1000)
    assert "max_steps is 5, the server asked for 2000 steps" in server.train(hidden)
    assert server.train(cohort=2) == "refused by policy: min_cohort is 3, the server asks 2 clients together"
    assert "asks 0 clients" in server.train(cohort="many")
    scaffold = TrainPlan(4, methods=(Method.of("scaffold"),))
    assert server.train(plan=scaffold) == "refused by policy: methods are fedprox, the server asked for scaffold"
    assert server.train() == ""


def test_a_run_outside_the_policy_is_refused_before_anything_is_loaded(serve) -> None:
    assert "strategies are fedex_het, the server's strategy has clip" in serve(strategies=["fedex_het"]).train()
    assert "require_dp is set, the server's strategy (clip, fedex_het) is not private" in serve(require_dp=True).train()
    private = serve(require_dp=True)
    assert private.train(private.with_keys(strategy=["dp", "fedit"])) == ""
    assert "max_rounds is 2, the server plans 3" in serve(max_rounds=2).train()


def test_what_would_tell_of_single_rows_or_spend_more_than_was_agreed_is_refused(serve: Callable[..., Server]) -> None:
    server = serve()
    assert server.train(round=4) == "refused: round 4 of a run of 3"
    assert server.train(received="0" * 64) == "the task is about another adapter than the one it came with"
    named = server.with_keys(data__forget=["0" * 64])
    assert "allow_forget is not set, the server names rows" in server.train(named)
    assert serve(allow_forget=True).train(named) == ""
    assert "too few rows for a score (min_score_rows)" in serve(min_score_rows=1000).results()[0]["error"]
    noise = {"clip": 1.0, "noise_multiplier": 0.5, "delta": 1e-5, "noise": "secret"}
    quiet = serve(require_local=True, min_noise=1.0)
    assert "min_noise is 1, the server asks for 0.5" in quiet.train(quiet.with_keys(privacy__local=noise))
    quiet.recipe = quiet.with_keys(privacy__local={**noise, "noise_multiplier": 1.0})
    assert quiet.train() == ""
    assert "require_local is set, the server asks for scores" in quiet.score()


def test_masks_and_noise_of_its_own_can_be_required(serve: Callable[..., Server]) -> None:
    server = serve(require_secure_sum=True)
    assert "require_secure_sum is set, the server asks for updates as they are" in server.train()
    assert not server.train(server.with_keys(privacy__secure_sum={"threshold": 0.66, "clip": 1.0}))
    server = serve(require_local=True)
    assert "require_local is set, the server asks for updates without noise" in server.train()
    noise = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "noise": "seeded"}
    assert "noise from the run's seed, which it knows" in server.train(server.with_keys(privacy__local=noise))
    assert not server.train(server.with_keys(privacy__local={**noise, "noise": "secret"}))


def test_another_base_model_is_refused(serve) -> None:
    assert "base_fingerprints" in serve(base_fingerprints=["0" * 64]).train()
    assert "the server's base model is feed, this node has noop" in serve().train(base="feed")
    assert serve(base_fingerprints=["noop"]).train() == ""


@pytest.mark.parametrize(
    "change",
    [
        {"model__name": "/etc"},
        {"data__train_file": "/etc/passwd"},
        {"data__client_files": {"amber": "/etc/passwd"}},
        {"data__test_file": "/etc/passwd"},
        {"plugins": ["evil.py"]},
        {"output_dir": "/root"},
        {"attack": {"name": "nan"}},
        {"store": {"redis": "redis://evil"}},
        {"lora__target_modules_": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_server_cannot_set_a_model_a_path_or_a_plug_in(serve, change: dict[str, Any]) -> None:
    server = serve()
    key = next(iter(change)).replace("__", ".")
    assert server.train(server.with_keys(**change)) == f"refused: {key} is not for a server to set"


def test_another_clients_work_a_few_rows_and_features_are_refused(serve) -> None:
    server = serve()
    assert server.train(client="birch") == "refused: this node is amber, not birch"
    assert server.score(subject="birch") == "refused: this node is amber, not birch"
    assert "tell of single rows" in server.score(num_shards=100, shard=7)
    assert "not features" in server.score(features=True)
    assert "no stream and no forget rounds" in server.train(forget=0)
    assert "no stream and no forget rounds" in server.train(stage=1)


def test_a_patch_cannot_name_a_path_and_what_is_torn_is_asked_for_again(serve, tmp_path: Path) -> None:
    server = serve()
    store = server.silo._patches
    note = {"recipe": json.dumps(server.recipe), "ledger": [["id", "../../../escape"]]}
    assert server.silo.describe(Parcel(note)).note["error"] == "the ledger is not a list of ids and hashes"
    key = sha256(b"patch")
    assert store.take([["id", key]], {}) == ((), [key])
    assert store.take([["id", key]], {key: b"patch"}) == ((Patch("id", b"patch"),), [])
    assert store.take([["id", key]], {}) == ((Patch("id", b"patch"),), [])
    (tmp_path / "node" / "state" / "patches" / key).write_bytes(b"pat")
    assert store.take([["id", key]], {}) == ((), [key])


def test_nonsense_is_answered_with_an_error_and_the_node_lives_on(serve) -> None:
    server = serve(tell_errors=True)
    for note in ({}, {"recipe": 3}, {"recipe": "{", "ledger": 5}, {"recipe": json.dumps(server.recipe), "task": []}):
        for what in (server.silo.describe, server.silo.train, server.silo.evaluate):
            answer = what(Parcel(note))
            assert "error" in answer.note or "member" in answer.note
    assert server.train() == ""


def test_an_error_that_may_quote_a_row_stays_on_the_node(serve) -> None:
    server = serve()
    server.silo._runtime(json.dumps(server.recipe)).train = fail  # type: ignore[method-assign]
    told = server.train()
    assert "Mrs Smith" not in told
    assert told.startswith("RuntimeError")


def test_a_node_stops_at_the_deadline_and_is_free_for_the_next_task(serve) -> None:
    server = serve()
    runtime = server.silo._runtime(json.dumps(server.recipe))
    runtime.train, honest = hang, runtime.train  # type: ignore[method-assign]
    assert server.train(seconds=0.2) == "had not answered at the deadline of 0.2 s and was stopped"
    runtime.train = honest  # type: ignore[method-assign]
    assert server.train(seconds="soon") == ""


def hang(task: TrainTask) -> bytes:
    while True:
        threading.Event().wait(0.01)


def fail(task: TrainTask) -> bytes:
    raise RuntimeError("row 7: Mrs Smith, 1954")


def test_a_policy_with_an_unknown_rule_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "client_policy.yaml"
    path.write_text("max_rnak: 8\n")
    with pytest.raises(ConfigError, match="max_rnak is not a rule; did you mean max_rank"):
        load_policy(path)
    path.write_text("")
    assert load_policy(path) == Policy()


def test_settings_name_every_key_that_is_missing() -> None:
    with pytest.raises(ConfigError) as refusal:
        read_settings({"client": "amber", "modle": "x"})
    told = str(refusal.value)
    assert "node-config: data: field required" in told
    assert "node-config: modle" in told
