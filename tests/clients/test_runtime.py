"""The runtime shared by all pools: clients do not reach into each other, or into the server's rows."""

import json
from pathlib import Path

import pytest

from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.state import AdapterState
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.errors import FedLoRAError, ModelError
from fedlora.protocol import EvalTask, TrainPlan, TrainTask
from tests.conftest import toy_config


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
