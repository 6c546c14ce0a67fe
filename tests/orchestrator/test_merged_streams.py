"""Streams whose tasks are merged by a rule: what the ledger holds, and that all scores are those of what comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapter.state import LowRank
from fedlora.adapter.wire import encode_adapter
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.protocol import EvalTask
from orchestrator import launch
from orchestrator.artifacts import export, open_run
from orchestrator.checkpoint import load_latest
from orchestrator.pools.local import LocalPool
from orchestrator.results import whole_adapter
from orchestrator.state import RunState
from orchestrator.stores.files import read_lines
from orchestrator.validate import validate
from tests.conftest import quiet

Toy = Callable[..., RunConfig]
RULES: list[Any] = ["mean", {"ties": {"density": 0.5}}, {"dare": {"p": 0.3}}, "orthogonal", {"lines": {"alpha": 0.5}}]


def merged_stream(toy: Toy, merge: Any, **changes: Any) -> RunConfig:
    continual = {"split": 2, "rounds": 2, "merge": merge, **changes.pop("continual", {})}
    return toy(continual=continual, rounds=continual["split"] * continual["rounds"], **changes)


def played(config: RunConfig) -> tuple[dict[str, Any], RunState]:
    summary = launch.run(config, quiet, overwrite=True)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    return summary, state


def product(update: LowRank) -> Tensor:
    return update.B.double() @ update.A.double()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_scores_and_the_exported_adapter_are_those_of_the_merged_model(toy: Toy, tmp_path: Path, rule: Any) -> None:
    config = merged_stream(toy, rule)
    summary, state = played(config)
    assert [entry.kind for entry in state.ledger.entries] == ["merge", "merged", "merge", "merged"]
    assert [entry.kind for entry in state.ledger.active] == ["merged"]
    assert summary["stream"]["freezes"] == [2, 4]  # the end of the run is one
    pool, payload, patches = LocalPool(config), encode_adapter(state.adapter), state.ledger.patches()
    looks = [EvalTask("", payload, ledger=patches, stage=task, met=frozenset({0, 1})) for task in (0, 1)]
    found = pool.evaluate(looks)
    assert [result.accuracy for result in found] == summary["stream"]["rows"][-1]
    whole = found[0] + found[1]
    assert (whole.loss, whole.accuracy) == (summary["final"]["loss"], summary["final"]["accuracy"])
    # the same on the base as it was loaded
    alone = encode_adapter(whole_adapter(state))
    again = pool.evaluate([EvalTask("", alone, stage=task, met=frozenset({0, 1})) for task in (0, 1)])
    assert (again[0] + again[1]).loss == pytest.approx(whole.loss, abs=1e-5)
    assert export(open_run(Path(config.output_dir)), tmp_path / "peft", merge=False) < 1e-4


def test_a_merged_entry_is_the_rule_over_all_tasks_since_the_start_and_says_so(toy: Toy) -> None:
    _, state = played(merged_stream(toy, "mean", continual={"split": 3}))
    merges = state.ledger.of_kind("merge")
    for count, entry in enumerate(state.ledger.of_kind("merged"), start=1):
        note = entry.provenance
        assert (note["rule"], note["options"]) == ("mean", {})
        assert note["combines"] == [merge.id for merge in merges[:count]]
        assert note["relative_error"] < 1e-6
        assert note["max_rank"] == 8 * count
        for path, update in entry.modules().items():
            expected = sum(product(merge.modules()[path]) for merge in merges[:count]) / count
            assert torch.allclose(product(update), expected, atol=1e-6)


def test_what_is_trained_in_full_is_not_merged(toy: Toy) -> None:
    _, state = played(merged_stream(toy, "mean"))
    last = state.ledger.entries[-1].adapter().dense
    assert set(last) == set(state.adapter.dense)
    assert all(torch.equal(tensor, last[name]) for name, tensor in state.adapter.dense.items())


def test_lines_scales_the_sum_of_the_tasks_by_depth(toy: Toy) -> None:
    _, state = played(merged_stream(toy, {"lines": {"alpha": 0.5, "beta": 2.0}}))
    first, second = (entry.modules() for entry in state.ledger.of_kind("merge"))
    layers = {path: int(path.split(".layer.")[1].split(".")[0]) for path in first}
    for path, update in state.ledger.total().items():
        factor = 0.5 + 1.5 * layers[path] / max(layers.values())
        assert torch.allclose(product(update), factor * (product(first[path]) + product(second[path])), atol=1e-6)
    assert max(layers.values()) > 0  # the test is about something


def test_a_rank_budget_bounds_what_is_merged_and_leaves_the_tasks_whole(toy: Toy) -> None:
    _, state = played(merged_stream(toy, "mean", ledger__max_rank=3))
    last = state.ledger.entries[-1]
    assert max(last.ranks.values()) == 3
    assert 0 < last.provenance["relative_error"] < 1
    assert all(max(entry.ranks.values()) == 8 for entry in state.ledger.of_kind("merge"))
    assert whole_adapter(state).rank == 3  # the fresh pair beside it adds nothing


def test_any_policy_that_freezes_ends_in_a_merge(toy: Toy) -> None:
    config = merged_stream(toy, "mean", continual={"freeze": {"period": {"rounds": 3}}})
    summary, state = played(config)
    assert summary["stream"]["freezes"] == [3, 4]
    assert [entry.provenance["why"].get("end", False) for entry in state.ledger.of_kind("merge")] == [False, True]
    told = [line for line in read_lines(Path(config.output_dir) / "journal.jsonl") if line["event"] == "tasks_merged"]
    assert [(line["round"], line["tasks"]) for line in told] == [(3, 1), (4, 2)]


def test_o_lora_finds_the_directions_of_a_merged_base(toy: Toy) -> None:
    summary, _ = played(merged_stream(toy, "mean", strategy=["o_lora", "fedit"]))
    assert summary["status"] == "finished"


@pytest.mark.slow
def test_the_plain_sum_is_a_run_without_a_rule(toy: Toy) -> None:
    plain, named = (played(merged_stream(toy, merge)) for merge in ("sum", {"sum": None}))
    assert plain[0]["adapter_sha256"] == named[0]["adapter_sha256"]
    assert [entry.kind for entry in plain[1].ledger.entries] == ["merge"]
    assert plain[0]["stream"]["freezes"] == [2]


@pytest.mark.parametrize(
    ("merge", "changes", "message"),
    [
        ("tise", {}, "merge rule: tise is not known; did you mean ties"),
        ({"ties": {"density": 0}}, {}, "ties.density is a share"),
        ({"ties": {"name": 1}}, {}, "ties does not take these options"),
        ("lines", {}, "lines does not take these options: .*alpha"),
        ({"lines": {"alpha": 0.5, "layers": 1}}, {}, "lines.layers is at least 2"),
        ({"lines": {"alpha": "half"}}, {}, "lines.alpha must be a number, not 'half'"),
        ({"mean": {}, "ties": {}}, {}, "one rule with its options, not 2"),
        ("mean", {"continual": {"freeze": "never"}}, "continual.freeze is never"),
        ("mean", {"strategy": "flora"}, "flora patches the base in every round"),
        ("mean", {"strategy": "fedex_het"}, "fedex_het patches the base in every round"),
        ("mean", {"lora__use_dora": True}, "magnitudes of DoRA"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_validate_and_before_a_run(
    toy: Toy, merge: Any, changes: dict[str, Any], message: str
) -> None:
    config = merged_stream(toy, merge, **changes)
    _, problems = validate(config)
    assert len([problem for problem in problems if message.split(":")[0] in str(problem)]) >= 1
    with pytest.raises(ConfigError, match=message):
        launch.run(config, quiet)


def test_joint_training_has_nothing_to_merge(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="leave merge out"):
        merged_stream(toy, "mean", continual={"joint": True, "freeze": "never"})
