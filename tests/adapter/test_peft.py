"""In and out of PEFT models: tiny BERT, RoBERTa and Llama models built from a config."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora.adapter.directory import load_directory, save_directory, scale
from fedlora.adapter.peft import extract, insert, set_trainable
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import AdapterError

ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 11, 13, 15, 17]])


def bert() -> Any:
    return seeded(lambda: BertForSequenceClassification(BertConfig(**ENCODER)))


def roberta() -> Any:
    return seeded(lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=0)))


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # k_proj is 8 x 16: not square
        max_position_embeddings=20,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


TARGETS = {
    bert: (["query", "intermediate.dense"], "SEQ_CLS"),
    roberta: (["query"], "SEQ_CLS"),
    llama: (["k_proj", "down_proj"], "CAUSAL_LM"),
}
MODELS = pytest.mark.parametrize("build", list(TARGETS), ids=lambda build: build.__name__)


def adapted(build: Callable[[], Any], **options: Any) -> Any:
    """The model with one LoRA adapter called ``one``."""
    targets, task = TARGETS[build]
    settings = {"r": 2, "lora_alpha": 8, "target_modules": targets, "task_type": task, **options}
    if task == "SEQ_CLS":
        settings["modules_to_save"] = ["classifier"]
    return get_peft_model(build(), LoraConfig(**settings), adapter_name="one").eval()


def random_like(state: AdapterState, ranks: tuple[int, ...] | None = None, seed: int = 4) -> AdapterState:
    """Random values in the shapes of ``state``; ranks are dealt out to the modules in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    modules = {}
    for place, (path, update) in enumerate(sorted(state.modules.items())):
        rank = ranks[place % len(ranks)] if ranks else update.rank
        modules[path] = LowRank(draw(update.shape[0], rank), draw(rank, update.shape[1]))
    # magnitudes are norms, so they stay positive
    dense = {name: tensor + draw(*tensor.shape).abs() for name, tensor in state.dense.items()}
    return AdapterState(modules, dense)


@torch.no_grad()
def merged(build: Callable[[], Any], state: AdapterState) -> Any:
    """The base with the adapter added to its weights by hand; DoRA sets the norm of each row."""
    model = build()
    for path, update in state.modules.items():
        weight = model.get_submodule(path).weight
        weight += update.B @ update.A
        magnitude = state.dense.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None:
            weight *= (magnitude / weight.norm(dim=1))[:, None]
    for name, tensor in state.dense.items():
        if not name.endswith(".lora_magnitude_vector"):
            model.get_parameter(name).copy_(tensor)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


# Extract and insert -----------------------------------------------------------------------------------------


@MODELS
def test_what_is_inserted_can_be_extracted(build: Callable[[], Any]) -> None:
    model = adapted(build)
    state = random_like(extract(model, "one"))
    insert(model, "one", state)
    back = extract(model, "one").tensors()
    # alpha / r is 4: dividing and multiplying by it is exact
    assert list(back) == list(state.tensors())
    assert all(torch.equal(back[name], tensor) for name, tensor in state.tensors().items())


def test_paths_are_those_of_the_base_model() -> None:
    state = extract(adapted(bert), "one")
    assert sorted(state.modules) == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.intermediate.dense",
    ]
    assert state.modules["bert.encoder.layer.0.intermediate.dense"].shape == (24, 16)
    assert sorted(state.dense) == ["classifier.bias", "classifier.weight"]
    base = bert()
    for path in state.modules:
        assert base.get_submodule(path).weight.shape == state.modules[path].shape
    assert torch.equal(state.dense["classifier.weight"], base.classifier.weight)


@MODELS
@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_exactly_what_is_added_to_the_base_weight(build: Callable[[], Any], rslora: bool) -> None:
    model = adapted(build, use_rslora=rslora)
    state = random_like(extract(model, "one"))
    insert(model, "one", state)
    assert torch.allclose(logits(model), logits(merged(build, state)), atol=1e-5)
    assert not torch.allclose(logits(model), logits(build()), atol=1e-2)


@MODELS
@pytest.mark.parametrize(
    "options", [{"lora_alpha": 3}, {"use_rslora": True}, {"lora_alpha": 5, "use_rslora": True}], ids=str
)
def test_a_state_is_the_same_function_under_another_scaling(build: Callable[[], Any], options: dict) -> None:
    one, other = adapted(build), adapted(build, **options)
    state = random_like(extract(one, "one"))
    insert(one, "one", state)
    insert(other, "one", extract(one, "one"))
    assert torch.allclose(logits(one), logits(other), atol=1e-5)


def test_the_scale_is_that_of_peft() -> None:
    assert scale(8, 4, use_rslora=False) == 2.0
    assert scale(8, 4, use_rslora=True) == 4.0


def test_an_extracted_state_does_not_change_when_the_model_does() -> None:
    model = adapted(bert)
    state = random_like(extract(model, "one"))
    insert(model, "one", state)
    taken = extract(model, "one")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(taken.tensors()[name], tensor) for name, tensor in state.tensors().items())


def test_inserting_leaves_the_base_and_the_other_adapter_alone() -> None:
    model = adapted(bert)
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS"))
    before = copy.deepcopy(model.state_dict())
    insert(model, "one", random_like(extract(model, "one")))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".one." in name for name in changed)


def test_a_state_of_another_rank_or_model_is_refused_by_name() -> None:
    model = adapted(bert)
    state = extract(model, "one")
    path = "bert.encoder.layer.0.attention.self.query"
    wide = AdapterState({**state.modules, path: LowRank(torch.zeros(16, 3), torch.zeros(3, 16))}, state.dense)
    with pytest.raises(AdapterError, match=f"{path}: state of rank 3 for an adapter of rank 2"):
        insert(model, "one", wide)
    with pytest.raises(AdapterError, match="query: module of the state is missing"):
        insert(model, "one", extract(adapted(llama), "one"))


def test_a_refused_state_changes_nothing() -> None:
    model = adapted(bert)
    before = extract(model, "one")
    state = random_like(before, ranks=(2, 2, 2, 3))
    with pytest.raises(AdapterError, match="rank 3"):
        insert(model, "one", state)
    after = extract(model, "one").tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.tensors().items())


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "endings"),
    [
        ({"A"}, ("lora_A.one.weight",)),
        ({"B"}, ("lora_B.one.weight",)),
        ({"dense"}, ("classifier.modules_to_save.one.weight", "classifier.modules_to_save.one.bias")),
        ({"A", "B"}, ("lora_A.one.weight", "lora_B.one.weight")),
        (set(), ()),
    ],
    ids=lambda value: " ".join(sorted(value)) or "nothing",
)
def test_exactly_the_parts_asked_for_get_gradients(parts: set, endings: tuple) -> None:
    model = adapted(bert)
    # PEFT makes every activated adapter trainable
    model.add_adapter("two", LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    model.set_adapter("two")
    model.set_adapter("one")
    parameters = set_trainable(model, "one", frozenset(parts))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name for name, _ in model.named_parameters() if name.endswith(endings)} if endings else set()
    assert set(trainable) == expected
    assert {id(p) for p in parameters} == {id(p) for p in trainable.values()}
    assert len(parameters) == len(trainable)


def test_dora_magnitudes_are_dense_and_train_with_them() -> None:
    model = adapted(bert, use_dora=True)
    state = extract(model, "one")
    path = "bert.encoder.layer.0.attention.self.query"
    magnitude = state.dense[f"{path}.lora_magnitude_vector"]
    weight = bert().get_submodule(path).weight
    assert torch.allclose(magnitude, weight.norm(dim=1))  # one norm per output at the start
    set_trainable(model, "one", frozenset({"dense"}))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_magnitude_vector" in name for name in trainable) == 4
    assert sum("classifier" in name for name in trainable) == 2
    assert len(trainable) == 6


# Directories ------------------------------------------------------------------------------------------------


def loaded(build: Callable[[], Any], directory: Path) -> Any:
    """What a user gets from PEFT; it warns of every key that it misses or does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(build(), str(directory)).eval()


@MODELS
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("alpha", "use_rslora"), [(8, False), (3, True)])
def test_peft_loads_what_was_saved_with_the_same_logits(
    build: Callable[[], Any], use_dora: bool, alpha: float, use_rslora: bool, tmp_path: Path
) -> None:
    model = adapted(build, use_dora=use_dora)
    state = random_like(extract(model, "one"))
    insert(model, "one", state)
    save_directory(state, tmp_path / "adapter", "some/base", TARGETS[build][1], alpha, use_rslora)
    came, expected = logits(loaded(build, tmp_path / "adapter")), logits(model)
    assert torch.allclose(came, expected, atol=1e-5)
    if alpha == 8:  # the scale is a power of two, so dividing B by it is exact
        assert torch.equal(came, expected)


@MODELS
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_modules_may_have_different_ranks(
    build: Callable[[], Any], use_rslora: bool, use_dora: bool, tmp_path: Path
) -> None:
    state = random_like(extract(adapted(build, use_dora=use_dora), "one"), ranks=(4, 1, 2))
    assert len({update.rank for update in state.modules.values()}) > 1
    save_directory(state, tmp_path, "some/base", TARGETS[build][1], 8, use_rslora)
    model = loaded(build, tmp_path)
    assert torch.allclose(logits(model), logits(merged(build, state)), atol=1e-5)
    ranks = {path: update.rank for path, update in extract(model, "default").modules.items()}
    assert ranks == {path: update.rank for path, update in state.modules.items()}


def test_a_directory_comes_back_in_effective_units(tmp_path: Path) -> None:
    state = random_like(extract(adapted(bert, use_dora=True), "one"), ranks=(4, 1, 2))
    save_directory(state, tmp_path, "some/base", "SEQ_CLS", 8, use_rslora=False)
    back = load_directory(tmp_path).tensors()
    assert list(back) == list(state.tensors())
    for name, tensor in state.tensors().items():
        assert torch.allclose(back[name], tensor, rtol=1e-6), name


def test_the_saved_configuration_is_pefts_own(tmp_path: Path) -> None:
    state = extract(adapted(bert), "one")
    save_directory(state, tmp_path, "some/base", "SEQ_CLS", 8, use_rslora=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (2, 8, {})
    assert settings["base_model_name_or_path"] == "some/base"
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.use_dora) == (2, 8, False)
    assert config.inference_mode


def test_equal_states_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    state = extract(adapted(bert), "one")
    for name, same in (("one", state), ("other", AdapterState.from_tensors(dict(reversed(state.tensors().items()))))):
        save_directory(same, tmp_path / name, "some/base", "SEQ_CLS", 8, use_rslora=False)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", None),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b"[]"),
        ("adapter_model.safetensors", None),
        ("adapter_model.safetensors", b"\0" * 20),
    ],
)
def test_an_unreadable_directory_is_named(file: str, content: bytes | None, tmp_path: Path) -> None:
    save_directory(extract(adapted(bert), "one"), tmp_path, "some/base", "SEQ_CLS", 8, use_rslora=False)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(AdapterError, match=f"{tmp_path.name}.*: not a readable PEFT adapter"):
        load_directory(tmp_path)
