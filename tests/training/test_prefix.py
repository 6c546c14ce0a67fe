"""Frozen lower layers are computed once per row, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.runtime import ClientRuntime
from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import train_mode
from fedlora.adapter.wire import decode_update, digest, encode_adapter
from fedlora.config import RunConfig
from fedlora.protocol import TrainPlan, TrainTask
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from tests.conftest import toy_config

KINDS = {
    "classifier": (BaseSpec("builtin:tiny-bert", "sequence-classification", ("a", "b"), device="cpu"), "bert.encoder."),
    "writer": (BaseSpec("builtin:tiny-llama", "causal-lm", device="cpu"), "model."),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 7, 0, 0], [4, 4, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
UPPER = {"lora__target_modules": r".*layer\.1\..*(query|value)", "training__base_dropout": False}


class Watched:
    """An adapted model, and how many rows its lowest layer was given."""

    def __init__(
        self, kind: str, layer: int = 1, budget: float = 2**20, tokens: int = 4, saved: tuple[str, ...] | None = None
    ):
        spec, stack = KINDS[kind]
        base, self.kind, self.rows = load_base(spec), kind, 0
        lowest = next(
            m for name, m in base.model.named_modules() if name.startswith(f"{stack}layer") and type(m) is nn.Linear
        )
        lowest.register_forward_hook(self._count)
        self.adapted = AdaptedModel(
            base, AdapterSpec(rf".*layers?\.{layer}\..*(query|q_proj)", 2.0, modules_to_save=saved), budget, tokens
        )
        self.model = self.adapted.at_rank(2)
        self.model.eval()
        self.rows = 0

    def _count(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.rows += len(output)

    @torch.no_grad()
    def logits(self, mask: Tensor = MASK) -> Tensor:
        """Of the positions that are there."""
        options = {"use_cache": False} if self.kind == "writer" else {}
        found: Tensor = self.model(input_ids=IDS, attention_mask=mask, **options).logits
        return found[mask.bool()] if self.kind == "writer" else found


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_passes_the_lower_layers_once(kind: str) -> None:
    plain, watched = Watched(kind, budget=0), Watched(kind)
    expected = plain.logits()
    assert plain.rows == 3
    for seen in (3, 3):
        torch.testing.assert_close(watched.logits(), expected, rtol=1e-5, atol=1e-6)
        assert watched.rows == seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_that_is_full_costs_time_only(kind: str) -> None:
    plain, watched = Watched(kind, budget=0), Watched(kind, budget=1000, tokens=2)
    for _ in range(2):
        torch.testing.assert_close(watched.logits(), plain.logits(), rtol=1e-5, atol=1e-6)
    assert 3 < watched.rows <= 6


def test_where_the_lowest_layer_is_adapted_there_is_nothing_to_keep() -> None:
    watched = Watched("classifier", layer=0)
    assert watched.adapted.prefix is None
    watched.logits()
    watched.logits()
    assert watched.rows == 6


def test_without_room_for_all_rows_nothing_is_kept() -> None:
    assert Watched("classifier", budget=1000, tokens=200).adapted.prefix is None


@pytest.mark.parametrize(("saved", "kept"), [("word_embeddings", False), ("LayerNorm", False), ("pooler", True)])
def test_layers_below_that_are_trained_run_every_time(saved: str, kept: bool) -> None:
    assert (Watched("classifier", saved=("classifier", saved)).adapted.prefix is not None) == kept


def test_a_pass_that_was_stopped_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    def stopped(*_: Any) -> None:
        raise Stop

    watched, plain = Watched("classifier"), Watched("classifier", budget=0)
    handle = watched.adapted.base.model.bert.encoder.layer[1].register_forward_pre_hook(stopped)
    for _ in range(2):
        with pytest.raises(Stop):
            watched.logits()
    handle.remove()
    torch.testing.assert_close(watched.logits(), plain.logits(), rtol=1e-5, atol=1e-6)


def test_with_dropout_in_training_the_layers_run() -> None:
    watched = Watched("classifier")
    train_mode(watched.model, base_dropout=True)
    watched.logits()
    watched.logits()
    assert watched.rows == 6
    train_mode(watched.model, base_dropout=False)
    watched.logits()
    watched.logits()
    assert watched.rows == 9


def test_a_model_that_goes_on_writing_uses_its_own_layers() -> None:
    watched, plain = Watched("writer"), Watched("writer", budget=0)
    watched.logits()
    asked = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(watched.model.generate(**asked), plain.model.generate(**asked))


def task_of(runtime: ClientRuntime, client: str) -> TrainTask:
    base = runtime.base()
    payload = encode_adapter(initial_adapter(base.sites, base.dense, 4, seed=0))
    return TrainTask(1, client, TrainPlan(4), payload, digest(payload), seed=3)


def test_what_was_seen_before_changes_no_byte(tmp_path: Path) -> None:
    config = toy_config(tmp_path, clients__ranks=[4], **UPPER)
    warm, cold = ClientRuntime(config, 1), ClientRuntime(config, 1)
    for client in ("c1", "c0"):
        warm.train(task_of(warm, client))
    assert warm.train(task_of(warm, "c0")) == cold.train(task_of(cold, "c0"))


def test_a_client_comes_to_the_same_with_and_without(tmp_path: Path) -> None:
    with_it, without = (delta_of(toy_config(tmp_path, training__prefix_cache_gb=gb, **UPPER)) for gb in (1.0, 0.0))
    for name, tensor in without.items():
        assert float((with_it[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()) + 1e-7, name


def delta_of(config: RunConfig) -> Any:
    runtime = ClientRuntime(config, 1)
    return decode_update(runtime.train(task_of(runtime, "c0"))).delta
