"""A merge changes nothing: the trained pair goes into the base ledger, a fresh one starts, the function stays.

Every law holds for each kind of base and for ranks 1 to 64. How exactly depends on what the base computes in, and is
written at ``bound``. The ledger itself is float32 everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.ledger import BaseLedger
from fedlora.adapter.peft import insert
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.training.base_patches import base_layer
from fedlora.training.builtin import resolve
from fedlora.training.methods import name_parameters
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base, quiet_transformers

IDS = {"input_ids": torch.arange(2, 26).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
PAIR = frozenset({"A", "B"})
WIDTH = 64  # wide enough for rank 64


@dataclass(frozen=True)
class Kind:
    """A kind of base, and what its layers are called."""

    architecture: str
    targets: tuple[str, ...]
    dtype: str = "float32"
    quantization: str = "none"
    use_dora: bool = False

    @property
    def task(self) -> str:
        return "sequence-classification" if self.architecture == "bert" else "causal-lm"


BERT, LLAMA = ("query", "value", "output.dense"), ("q_proj", "v_proj", "down_proj")
KINDS = {
    "bert-fp32": Kind("bert", BERT),
    "llama-fp32": Kind("llama", LLAMA),
    "gpt2-fp32": Kind("gpt2", ("c_attn", "mlp.c_proj")),  # its layers keep their weights transposed
    "dora-fp32": Kind("llama", LLAMA, use_dora=True),
    "bert-bf16": Kind("bert", BERT, dtype="bfloat16"),
    "llama-bf16": Kind("llama", LLAMA, dtype="bfloat16"),
    "bert-nf4": Kind("bert", BERT, quantization="nf4"),
    "llama-nf4": Kind("llama", LLAMA, quantization="nf4"),
}
EACH_KIND = pytest.mark.parametrize("name", KINDS)
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2},
}


def bound(model: AdaptedModel, outputs: Tensor) -> float:
    """Largest difference that a merge may make to these logits.

    float32: sums of 64 to 128 products are off by about 1e-6 after two layers; 1e-5 leaves a factor of ten.
    NF4 on a CPU decodes its weights to float32 and computes in it, with the patches beside them: the same.
    bfloat16: the patches are beside the weights in float32 too, but a layer rounds its output to 8 bits: once the base
    with its patches, once the pair on top. A merge moves the pair from the second rounding to the first, so that
    each adapted layer's output may move by three times 2^-8 of itself, and all of them together by their sum.
    """
    if model.base.spec.dtype == "bfloat16":
        return len(model.info().sites) * 3 * 2.0**-8 * float(outputs.abs().max())
    return 1e-5


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AdaptedModel]:
    """A model of a kind, as a client loads it; its folder is written once."""
    root = tmp_path_factory.mktemp("models")

    def adapted(name: str) -> AdaptedModel:
        kind = KINDS[name]
        folder = root / kind.architecture
        if not folder.exists():
            save(kind.architecture, folder)
        labels = ("a", "b", "c") if kind.architecture == "bert" else ()
        spec = BaseSpec(str(folder), kind.task, labels, kind.dtype, kind.quantization, device="cpu")
        return AdaptedModel(load_base(spec), AdapterSpec(kind.targets, scaling=2.0, use_dora=kind.use_dora))

    return adapted


def save(architecture: str, folder: Path) -> None:
    """A random model whose activations and logits are about 1."""
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=258,
        initializer_range=0.1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **SIZES[architecture],
    )
    kind: Any = transformers.AutoModel if architecture == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with quiet_transformers():
            kind.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(resolve("builtin:tiny-bert")).save_pretrained(folder)


def fresh(model: AdaptedModel, rank: int, seed: int = 99, dense: Any = None) -> AdapterState:
    """The pair that starts after a merge: B = 0, and what is trained in full as it was."""
    info = model.info()
    return initial_adapter(info.sites, info.dense if dense is None else dense, rank, seed)


def trained(model: AdaptedModel, rank: int, seed: int, dense: Any = None) -> AdapterState:
    """A pair whose product is about a third of the base's weights, at every rank."""
    draw = torch.Generator().manual_seed(seed)
    start = fresh(model, rank, seed, dense)
    size = 0.5 / rank**0.5
    moved = {key: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=draw)) for key, tensor in start.dense.items()}
    pairs = start.map(lambda u: LowRank(size * torch.randn(u.B.shape, generator=draw), u.A))
    return AdapterState(pairs.modules, moved)


def merged(ledger: BaseLedger, adapter: AdapterState) -> BaseLedger:
    return ledger.append(adapter.modules, "merge", {"round": len(ledger.entries) + 1}, dense=adapter.dense)


def ledger_of(model: AdaptedModel, rank: int, count: int) -> BaseLedger:
    ledger = BaseLedger()
    for seed in range(count):
        ledger = merged(ledger, trained(model, rank, seed))
    return ledger


@torch.no_grad()
def output(model: AdaptedModel, adapter: AdapterState) -> Tensor:
    peft = model.at_rank(adapter.rank)
    insert(peft, f"r{adapter.rank}", adapter)
    return peft.eval()(**IDS).logits.double()


@torch.no_grad()
def oracle(model: AdaptedModel, updates: Sequence[AdapterState], dense: Any) -> Tensor:
    """The base with ``sum B @ A`` added to its weights, everything in float64."""
    spec = model.base.spec
    plain = load_base(BaseSpec(spec.name, spec.task, spec.labels, "float32", device="cpu")).model
    for path, module in plain.named_modules():
        if not isinstance(module, nn.Embedding) and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.copy_(weight_of(base_layer(model.base.model, path)))
    plain = plain.double()
    for state in updates:
        for path, update in state.modules.items():
            layer = plain.get_submodule(path)
            product = update.B.double() @ update.A.double()
            layer.weight.add_(product if isinstance(layer, nn.Linear) else product.T)
    for key, tensor in dense.items():
        plain.get_parameter(key).copy_(tensor)
    return plain.eval()(**IDS).logits


def weight_of(layer: Any) -> Tensor:
    """A layer's weights as it computes with them."""
    layer = getattr(layer, "original_module", layer)
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.float()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@EACH_KIND
@pytest.mark.parametrize("rank", [1, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (3, 16)), 64])
def test_a_merge_changes_no_output(build: Callable[[str], AdaptedModel], name: str, rank: int) -> None:
    model = build(name)
    adapter = trained(model, rank, seed=1)
    before = output(model, adapter)
    start = fresh(model, rank, dense=adapter.dense)
    assert apart(output(model, start), before) > 0.1  # there is something to lose
    model.patch_base(merged(BaseLedger(), adapter).patches())
    assert apart(output(model, start), before) < bound(model, before)


@EACH_KIND
@pytest.mark.parametrize("rank", [1, 64])
def test_no_merge_of_ten_in_a_row_changes_an_output(build: Callable[[str], AdaptedModel], name: str, rank: int) -> None:
    model, ledger, dense = build(name), BaseLedger(), None
    for seed in range(10):
        adapter = trained(model, rank, seed, dense)
        dense = adapter.dense
        before = output(model, adapter)
        ledger = merged(ledger, adapter)
        model.patch_base(ledger.patches())
        assert apart(output(model, fresh(model, rank, seed + 1, dense)), before) < bound(model, before)


@pytest.mark.parametrize("name", [name for name in KINDS if not KINDS[name].use_dora])
@pytest.mark.parametrize("rank", [1, 64])
def test_after_ten_merges_the_function_is_that_of_the_base_plus_all_products(
    build: Callable[[str], AdaptedModel], name: str, rank: int
) -> None:
    model = build(name)
    updates = [trained(model, rank, seed) for seed in range(10)]
    ledger = BaseLedger()
    for update in updates:
        ledger = merged(ledger, update)
    start = fresh(model, rank, dense=updates[-1].dense)
    rounding = apart(output(model, start), oracle(model, [], start.dense))
    expected = oracle(model, updates, start.dense)
    assert apart(expected, oracle(model, updates[:-1], start.dense)) > 0.1
    model.patch_base(ledger.patches())
    # in bfloat16 the base alone is off by what its outputs lose; ten patches must not add up to more
    allowed = 3 * rounding if KINDS[name].dtype == "bfloat16" else bound(model, expected)
    assert apart(output(model, start), expected) < allowed


@EACH_KIND
@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 64])
def test_the_pair_after_a_merge_learns(build: Callable[[str], AdaptedModel], name: str, rank: int) -> None:
    model = build(name)
    adapter = trained(model, rank, seed=1)
    model.patch_base(merged(BaseLedger(), adapter).patches())
    peft = model.at_rank(rank)
    insert(peft, f"r{rank}", fresh(model, rank, dense=adapter.dense))
    parameters = name_parameters(model.at_rank(rank), f"r{rank}", PAIR)

    def gradients() -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        peft.eval()(**IDS).logits.float().square().sum().backward()
        return {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}

    first = gradients()
    assert set(first) == set(parameters)
    for key, gradient in first.items():
        # B = 0 hides A from the loss; B itself sees it through A
        assert bool(gradient.any()) == key.endswith(":B"), key
    with torch.no_grad():
        for key, gradient in first.items():
            parameters[key] -= 0.1 * gradient / gradient.norm().clamp(min=1e-9)
    assert all(gradient.any() for gradient in gradients().values())


def base_bytes(model: AdaptedModel) -> dict[str, Tensor]:
    return {path: base_layer(model.base.model, path).weight.detach().clone() for path in model.info().sites}


@EACH_KIND
@pytest.mark.parametrize("skipped", [1, 6])
def test_whoever_skipped_merges_ends_on_the_same_bytes(
    build: Callable[[str], AdaptedModel], name: str, skipped: int
) -> None:
    steady, absent = build(name), build(name)
    ledger = ledger_of(steady, 3, 6)
    have = BaseLedger(ledger.entries[: 6 - skipped])
    for count in range(1, 7):
        steady.patch_base(BaseLedger(ledger.entries[:count]).patches())
    absent.patch_base(have.patches())
    # what it was sent before, and what it is sent now
    absent.patch_base((*have.patches(), *ledger.missing(have.head)))
    start = fresh(steady, 3)
    assert torch.equal(output(steady, start), output(absent, start))
    mine, other = base_bytes(steady), base_bytes(absent)
    assert all(torch.equal(mine[path], other[path]) for path in mine)


@EACH_KIND
@pytest.mark.parametrize("had", [0, 2])
def test_a_compaction_while_a_client_was_away_makes_no_difference_to_it(
    build: Callable[[str], AdaptedModel], name: str, had: int
) -> None:
    steady, absent = build(name), build(name)
    four = ledger_of(steady, 3, 4)
    compacted, _ = four.compacted(8, {"round": 4})
    ledger = compacted
    for seed in (10, 11):
        ledger = merged(ledger, trained(steady, 3, seed))
    for entries in (four.entries[:2], four.entries, compacted.entries, ledger.entries[:-1], ledger.entries):
        steady.patch_base(BaseLedger(entries).patches())
    absent.patch_base(BaseLedger(four.entries[:had]).patches())
    missing = ledger.missing(BaseLedger(four.entries[:had]).head)
    assert [patch.id for patch in missing] == [entry.id for entry in ledger.entries[4:]]
    absent.patch_base(missing)  # the compaction stands in for whatever it had
    start = fresh(steady, 3)
    assert torch.equal(output(steady, start), output(absent, start))
    mine, other = base_bytes(steady), base_bytes(absent)
    assert all(torch.equal(mine[path], other[path]) for path in mine)


@EACH_KIND
def test_a_compaction_to_the_size_of_the_layers_changes_no_output(
    build: Callable[[str], AdaptedModel], name: str
) -> None:
    model = build(name)
    ledger = ledger_of(model, 16, 6)
    assert ledger.rank() == 96
    compacted, error = ledger.compacted(WIDTH, {"round": 6})
    assert error < 1e-6  # rounding of float32 factors
    dense = trained(model, 16, 5).dense
    start = fresh(model, 16, dense=dense)
    model.patch_base(ledger.patches())
    before = output(model, start)
    model.patch_base(compacted.patches())
    assert apart(output(model, start), before) < bound(model, before)


# The budget: nothing but factors, so one kind of base is enough -----------------------------------------------------


def products(modules: Any) -> dict[str, Tensor]:
    return {path: update.B.double() @ update.A.double() for path, update in modules.items()}


def size(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("budget", [1, 5, 32, 64])
def test_a_recompressed_ledger_has_the_error_it_reports_and_no_ledger_of_its_rank_has_less(
    build: Callable[[str], AdaptedModel], rank: int, budget: int
) -> None:
    model = build("bert-fp32")
    ledger = ledger_of(model, rank, 6)
    some = dict(list(trained(model, rank, 7).modules.items())[:2])
    ledger = ledger.append(some, "merge", {"round": 7})  # what was not trained is not part of an entry
    compacted, error = ledger.compacted(budget, {"round": 7})
    before, after = products(ledger.total()), products(compacted.total())
    lost = size([before[path] - after[path] for path in before])
    assert error == pytest.approx(lost / size(list(before.values())), rel=1e-4, abs=1e-6)
    assert compacted.entries[-1].provenance["relative_error"] == error
    assert compacted.rank() <= budget
    best = size([torch.linalg.svdvals(tensor)[budget:] for tensor in before.values()])
    assert lost == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_every_compaction_reports_what_it_lost_of_what_was_left(build: Callable[[str], AdaptedModel]) -> None:
    model = build("bert-fp32")
    ledger = ledger_of(model, 8, 3)
    for seed in range(3, 8):
        ledger = merged(ledger, trained(model, 8, seed))
        before = products(ledger.total())
        ledger, error = ledger.compacted(12, {"round": seed})
        after = products(ledger.total())
        lost = size([before[path] - after[path] for path in before])
        assert error == pytest.approx(lost / size(list(before.values())), rel=1e-4)
        assert ledger.rank() == 12
        assert len(ledger.active) == 1


@pytest.mark.slow
def test_a_real_language_model_in_nf4_does_not_notice_three_merges() -> None:
    spec = BaseSpec("builtin:smollm2-135m", "causal-lm", quantization="nf4", device="cpu")
    model, ledger = AdaptedModel(load_base(spec), AdapterSpec(("q_proj", "v_proj"), scaling=2.0)), BaseLedger()
    rank, moved, merges = 8, [], []
    for seed in range(3):
        adapter = trained(model, rank, seed)
        before, start = output(model, adapter), fresh(model, rank, seed + 1)
        merges.append(adapter)
        ledger = merged(ledger, adapter)
        assert apart(output(model, start), before) > 0.1
        model.patch_base(ledger.patches())
        after = output(model, start)
        moved.append(apart(after, before))
    other = BaseLedger()
    for adapter in reversed(merges):
        other = merged(other, adapter)
    model.patch_base(other.patches())
    rounding = apart(output(model, start), after)
    # 30 layers of float32 and logits of about 30: a merge moves them as little as adding the same patches in another
    # order does, and by less than 1e-4 of the largest
    assert max(moved) < 5 * rounding
    assert rounding < 1e-4 * float(after.abs().max())
