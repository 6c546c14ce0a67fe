"""The base model: loading, finding sites, one copy under many ranks, NF4."""

import pytest
import torch

from fedlora.adapter.initial import check_rank, initial_adapter
from fedlora.adapter.peft import extract, insert, set_trainable
from fedlora.errors import ModelError
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
