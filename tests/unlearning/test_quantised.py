"""Rounded weights: what the levels are, what is rounded, and that everything comes back."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from transformers import GPT2Config, GPT2LMHeadModel

from fedlora.adapter.peft import extract, insert
from fedlora.adapter.state import LowRank
from fedlora.errors import VerificationError
from fedlora.training.base_patches import SideUpdates
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base
from fedlora.unlearning.quantised import merged_weight, quantised, to_int8, to_nf4
from tests.unlearning.worlds import Trained, blank

IDS = {"input_ids": torch.arange(2, 14).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
VALUE = "bert.encoder.layer.0.attention.self.value"


@pytest.fixture
def model() -> Trained:
    """A tiny classifier whose adapter and head are random."""
    made = blank(BaseSpec("builtin:tiny-bert", "sequence-classification", ("a", "b", "c"), device="cpu"), seed=0)
    draw = torch.Generator().manual_seed(0)
    insert(
        made.peft, "r8", extract(made.peft, "r8").map(lambda u: LowRank(torch.randn(u.B.shape, generator=draw), u.A))
    )
    return made


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(**IDS).logits


def test_int8_has_127_steps_to_each_side_of_every_row() -> None:
    weight = torch.tensor([[1.27, 0.004, -0.633], [0.0, 0.0, 0.0], [254.0, 3.1, -254.0]])
    expected = torch.tensor([[1.27, 0.0, -0.63], [0.0, 0.0, 0.0], [254.0, 4.0, -254.0]])
    torch.testing.assert_close(to_int8(weight), expected)


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (5, 7), (3, 96)])
def test_nf4_takes_the_nearest_level_of_each_64_weights_whatever_the_shape(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    levels = get_4bit_type("nf4", device="cpu")
    blocks = [block / block.abs().max() for block in weight.flatten().split(64)]
    nearest = [levels[(block[:, None] - levels).abs().argmin(dim=1)] for block in blocks]
    expected = torch.cat([n * b.abs().max() for n, b in zip(nearest, weight.flatten().split(64), strict=True)])
    torch.testing.assert_close(to_nf4(weight), expected.reshape(shape))


@pytest.mark.parametrize("rounding", [to_int8, to_nf4])
def test_rounding_twice_is_rounding_once(rounding) -> None:
    once = rounding(torch.randn(32, 48, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(rounding(once), once)


def test_an_edit_smaller_than_half_a_level_is_rounded_away() -> None:
    weight = to_nf4(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    edit = 0.01 * torch.sign(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    edit[weight.abs() > 1] = 0  # the scales stay
    assert torch.equal(to_nf4(weight + edit), weight)


def test_the_merged_weight_is_the_base_and_the_adapter(model: Trained) -> None:
    layer = model.peft.get_submodule(f"base_model.model.{VALUE}")
    update = extract(model.peft, "r8").modules[VALUE]
    weight, bias = merged_weight(layer.eval())
    torch.testing.assert_close(weight, layer.base_layer.weight + update.B @ update.A)
    torch.testing.assert_close(bias, layer.base_layer.bias)


def test_what_lies_beside_a_weight_counts(model: Trained) -> None:
    layer = model.peft.get_submodule(f"base_model.model.{VALUE}").eval()
    before, _ = merged_weight(layer)
    B, A = torch.randn(32, 2), torch.randn(2, 32)
    SideUpdates(model.peft.get_base_model()).put({VALUE: LowRank(B, A)})
    torch.testing.assert_close(merged_weight(layer)[0], before + B @ A)


def test_layers_that_keep_their_weight_transposed_are_rounded_too() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    layer = gpt.transformer.h[0].attn.c_attn
    torch.testing.assert_close(merged_weight(layer)[0], layer.weight.T)
    with quantised(gpt, "int8"):
        torch.testing.assert_close(gpt.transformer.h[0].attn.c_attn.weight, to_int8(layer.weight.T))
        assert gpt.lm_head.weight is gpt.transformer.wte.weight


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_model_computes_with_rounded_merged_weights_and_comes_back_as_it_was(model: Trained, precision) -> None:
    rounding = {"int8": to_int8, "nf4": to_nf4}[precision]
    before, modules = logits(model.peft), dict(model.peft.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.peft.state_dict().items()}
    with quantised(model.peft, precision):
        inside = logits(model.peft)
    assert dict(model.peft.named_modules()) == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.peft.state_dict().items())
    assert torch.equal(logits(model.peft), before)

    merged = model.peft.merge_and_unload()
    for name, layer in merged.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.startswith("classifier"):
            layer.weight.data = rounding(layer.weight.data)
    torch.testing.assert_close(inside, logits(merged), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(inside, before, atol=1e-4)


def test_a_base_that_is_nf4_already_rounds_to_itself() -> None:
    spec = BaseSpec("builtin:tiny-bert", "sequence-classification", ("a", "b"), quantization="nf4", device="cpu")
    adapted = AdaptedModel(load_base(spec), AdapterSpec(("query", "value"), scaling=1.0)).at_rank(4)
    before = logits(adapted)
    with quantised(adapted, "nf4"):
        torch.testing.assert_close(logits(adapted), before)


def test_modules_are_back_after_an_error_and_keep_their_mode(model: Trained) -> None:
    modules = dict(model.peft.train().named_modules())
    with pytest.raises(ZeroDivisionError), quantised(model.peft, "nf4"):
        raise ZeroDivisionError
    assert dict(model.peft.named_modules()) == modules
    assert all(module.training for module in modules.values())


def test_an_unknown_precision_is_refused(model: Trained) -> None:
    with (
        pytest.raises(VerificationError, match=r"int9 is not known; did you mean int8\? \(int8, nf4\)"),
        quantised(model.peft, "int9"),
    ):
        pass
