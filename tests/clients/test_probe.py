"""General ability: rows that nobody trains on, scored as the model changes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.wire import encode_adapter
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, DataError
from fedlora.protocol import EvalTask
from fedlora.training.features import features
from orchestrator import launch
from orchestrator.stores.files import read_lines
from tests.conftest import quiet

Toy = Callable[..., RunConfig]
CLASSES: dict[str, Any] = {"evaluation__probe": {"name": "builtin:toy", "max_train_rows": 60, "max_test_rows": 20}}
TALK = {"name": "builtin:chatterbot", "max_length": 48, "max_train_rows": 40, "max_test_rows": 12}
LANGUAGE: dict[str, Any] = {
    "model": {"name": "builtin:tiny-llama"},
    "data": TALK,
    "clients": {"count": 2},
    "lora": {"r": 2, "target_modules": ["q_proj"]},
    "rounds": 1,
}


def look(runtime: ClientRuntime) -> Any:
    base = runtime.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 2, 0))
    return runtime.evaluate(EvalTask("", payload, probe=True))


def test_of_a_classifier_the_features_are_asked(toy: Toy) -> None:
    """B = 0, so the features are those of the base: nearest class mean by hand."""
    runtime = ClientRuntime(toy(**CLASSES))
    found = look(runtime)
    adapted = runtime._model()
    rows, model = runtime._probe._known, adapted.at_rank(2)
    shown = {
        kind: features(model, rows[kind], 8, adapted.base.tokenizer.pad_token_id, adapted.base.device) for kind in rows
    }
    labels = torch.tensor([int(example.labels) for example in rows["train"]])  # type: ignore[arg-type]
    means = torch.stack([shown["train"][labels == label].mean(0) for label in labels.unique()])
    near = torch.nn.functional.cosine_similarity(shown["test"][:, None], means[None], dim=2).argmax(1)
    right = sum(int(labels.unique()[n]) == example.labels for n, example in zip(near, rows["test"], strict=True))
    assert (found.num_correct, found.num_examples) == (right, 20)


def test_of_a_language_model_the_perplexity_is_told_before_and_after(toy: Toy) -> None:
    config = toy(evaluation__probe={**TALK, "max_test_rows": 5}, **LANGUAGE)
    told: list[Any] = []
    summary = launch.run(config, lambda event, fields: told.append((event, fields)))
    assert summary["initial"]["probe_perplexity"] > 1
    assert math.isfinite(summary["final"]["probe_perplexity"])
    assert look(ClientRuntime(config)).loss == pytest.approx(math.log(summary["initial"]["probe_perplexity"]))


def test_a_stream_is_probed_whenever_it_is_scored(toy: Toy) -> None:
    config = toy(continual={"split": 2, "rounds": 1}, rounds=2, **CLASSES)
    launch.run(config, quiet)
    rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
    assert all(0 <= row["eval"]["probe_accuracy"] <= 1 for row in rows)


def test_rows_of_another_form_are_refused(toy: Toy) -> None:
    with pytest.raises(DataError, match=r"evaluation.probe: the rows are .*, and the model is a sequence-class"):
        launch.run(toy(evaluation__probe=TALK), quiet)


def test_personal_models_have_no_general_ability_in_common(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="evaluation.probe scores one global model"):
        launch.run(toy(strategy="fedsa", **CLASSES), quiet)
