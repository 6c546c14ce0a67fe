"""The base model: loading, finding sites, one copy under many ranks, NF4."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter.initial import check_rank, initial_adapter
from fedlora.adapter.peft import extract, insert, set_trainable
from fedlora.errors import ModelError
from fedlora.training.heads import CosineLinear
from fedlora.training.model import (
    AdaptedModel,
    AdapterSpec,
    BaseSpec,
    find_sites,
    fingerprint,
    load_base,
    outline,
)

BERT = BaseSpec("builtin:tiny-bert", "sequence-classification", ("a", "b", "c"))
LLAMA = BaseSpec("builtin:tiny-llama", "causal-lm")
COSINE = replace(BERT, head="cosine")


def test_the_new_head_is_the_same_in_every_worker_and_depends_on_the_seed() -> None:
    first, again, other = (
        load_base(spec).model.classifier.weight for spec in (BERT, BERT, BaseSpec(**{**vars(BERT), "seed": 1}))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_fingerprint_sees_the_base_and_not_the_head() -> None:
    model = load_base(BERT).model
    before = fingerprint(model)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("spec", [BERT, LLAMA], ids=["bert", "llama"])
def test_the_outline_has_the_sites_of_the_loaded_model(spec: BaseSpec) -> None:
    assert find_sites(outline(spec), "all-linear") == find_sites(load_base(spec).model, "all-linear")


def test_all_linear_leaves_out_the_heads() -> None:
    assert not [path for path in find_sites(outline(LLAMA), "all-linear") if "lm_head" in path]
    assert not [path for path in find_sites(outline(BERT), "all-linear") if "classifier" in path]


def test_sites_are_named_by_suffix_or_by_pattern() -> None:
    model = outline(BERT)
    assert len(find_sites(model, ["query", "value"])) == 4
    assert list(find_sites(model, r".*layer\.0\.attention\.self\.query")) == [
        "bert.encoder.layer.0.attention.self.query"
    ]


def test_an_unknown_module_lists_near_names() -> None:
    with pytest.raises(ModelError, match="no linear layer is called q_prj; did you mean q_proj"):
        find_sites(outline(LLAMA), ["q_prj"])
    with pytest.raises(ModelError, match="matches no linear layer"):
        find_sites(outline(LLAMA), "nothing.*")


def test_a_rank_above_a_layer_names_the_layer() -> None:
    with pytest.raises(ModelError, match=r"k_proj: rank 17 is larger than the layer \(16 x 32\); use at most 16"):
        check_rank(find_sites(outline(LLAMA), ["k_proj"]), 17)


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="cannot load no/such-model"):
        load_base(BaseSpec("no/such-model", "causal-lm"))
    with pytest.raises(ModelError, match="did you mean builtin:minilm"):
        load_base(BaseSpec("builtin:minilmm", "causal-lm"))


def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="no GPU"):
        load_base(BaseSpec("builtin:tiny-llama", "causal-lm", device="cuda"))


def test_ranks_share_one_base_and_only_the_asked_parts_train() -> None:
    adapted = AdaptedModel(load_base(BERT), AdapterSpec(("query", "value"), 2.0))
    info = adapted.info()
    weight = adapted.base.model.bert.encoder.layer[0].attention.self.query.base_layer.weight
    for rank in (2, 4):
        model = adapted.at_rank(rank)
        assert not [name for name, p in model.named_parameters() if p.requires_grad]
        state = initial_adapter(info.sites, info.dense, rank, 0)
        insert(model, f"r{rank}", state)
        assert all(torch.equal(t, state.tensors()[n]) for n, t in extract(model, f"r{rank}").tensors().items())
        set_trainable(model, f"r{rank}", frozenset({"B"}))
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f"lora_B.r{rank}" in name for name in trainable)
    assert weight is adapted.base.model.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert info.num_parameters < sum(p.numel() for p in adapted.base.model.parameters())


def test_nf4_trains_the_same_before_and_after_an_evaluation() -> None:
    """bitsandbytes repacks weights for a bf16 kernel at the first CPU evaluation unless it is told not to."""
    base = load_base(BaseSpec("builtin:tiny-llama", "causal-lm", quantization="nf4"))
    ids = torch.tensor([[5, 6, 7, 8]])
    base.model.train()
    before = base.model(ids).logits
    with torch.no_grad():
        base.model.eval()
        base.model(ids)
    base.model.train()
    assert torch.equal(base.model(ids).logits, before)
    assert base.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


# Cosine heads ------------------------------------------------------------------------------------------------


def test_a_cosine_head_scores_the_angle_to_every_row() -> None:
    plain = torch.nn.Linear(2, 3)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.1], [0.0, 0.0]]))
    head = CosineLinear(plain)
    # (10, 0) has the cosine 3/5 to the first row, 0 to the second; a row of zeros gets the lowest there is
    assert_close(head(torch.tensor([[10.0, 0.0]])) / head.scale, torch.tensor([[0.6, 0.0, -1.0]]))
    assert sorted(name for name, _ in head.named_parameters()) == ["scale", "weight"]


def test_a_cosine_head_learns_its_rows_and_its_scale() -> None:
    head = CosineLinear(torch.nn.Linear(4, 2))
    head(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).logsumexp(dim=1).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any()
    assert head.scale.grad is not None
    assert head.scale.grad.any()


def test_a_cosine_head_changes_neither_the_base_nor_the_drawn_rows() -> None:
    linear, cosine = load_base(BERT), load_base(COSINE)
    assert isinstance(cosine.model.classifier, CosineLinear)
    assert type(linear.model.classifier) is torch.nn.Linear
    assert cosine.fingerprint == linear.fingerprint
    assert torch.equal(cosine.model.classifier.weight, linear.model.classifier.weight)
    assert find_sites(cosine.model, "all-linear") == find_sites(outline(COSINE), "all-linear")
    names = [{name for name, _ in model.named_parameters()} for model in (cosine.model, outline(COSINE))]
    assert names[0] == names[1]


def test_every_adapter_has_a_cosine_head_of_its_own() -> None:
    adapted = AdaptedModel(load_base(COSINE), AdapterSpec(("query",), 2.0))
    info = adapted.info()
    assert {name: tuple(t.shape) for name, t in info.dense.items()} == {
        "classifier.weight": (3, 32),
        "classifier.scale": (1,),
    }
    state = initial_adapter(info.sites, {**info.dense, "classifier.scale": torch.tensor([2.0])}, 2, 0)
    model = adapted.at_rank(2).eval()
    insert(model, "r2", state)
    with torch.no_grad():
        logits = model(torch.tensor([[2, 3, 4]])).logits
        pooled = model.base_model.model.bert(torch.tensor([[2, 3, 4]])).pooler_output
    assert_close(logits, 2.0 * torch.cosine_similarity(pooled, state.dense["classifier.weight"])[None])


@pytest.mark.parametrize("read", [load_base, outline])
def test_a_cosine_head_for_a_language_model_is_refused(read) -> None:
    with pytest.raises(ModelError, match="model.head: cosine is for classifiers, and builtin:tiny-llama is used as a"):
        read(replace(LLAMA, head="cosine"))


def test_a_classifier_without_a_bias_gets_a_cosine_head_too() -> None:
    model = load_base(BaseSpec("builtin:tiny-llama", "sequence-classification", ("a", "b"), head="cosine")).model
    assert isinstance(model.score, CosineLinear)
