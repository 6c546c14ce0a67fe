"""Packed values: how far off they may be, what they weigh, and that a hostile message is refused."""

import contextlib
import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapter.packing import Packing, pack, unpack
from fedlora.adapter.wire import decode_adapter, decode_update, encode_update
from fedlora.errors import WireError

QUIET = settings(deadline=None, derandomize=True, max_examples=200)
LEVELS = {"int8": 127, "int4": 7}
FORMS = [Packing("int8"), Packing("int4"), Packing("fp32", 0.1), Packing("int8", 0.1), Packing("int4", 0.25)]


def update(rank: int = 8, width: int = 384, seed: int = 0) -> dict[str, Tensor]:
    """The change of two layers and a head, as MiniLM's are."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        f"{layer}:{part}": shape for layer in "kq" for part, shape in (("A", (rank, width)), ("B", (width, rank)))
    }
    shapes |= {":head.weight": (150, width), ":head.bias": (150,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def sent(tensors: dict[str, Tensor], packing: Packing) -> dict[str, Tensor]:
    """As the server reads it."""
    return dict(decode_update(encode_update("c3", 1, "", tensors, 1, {}, packing=packing)).delta)


def scale_of(tensor: Tensor, values: str) -> Tensor:
    """Of each rank component or row: its largest size over the number of levels."""
    matrix = tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    dim = 1 if matrix.shape[0] <= matrix.shape[1] else 0
    scale: Tensor = (matrix.abs().amax(dim=dim, keepdim=True) / LEVELS[values]).expand_as(matrix)
    return scale.reshape(tensor.shape)


SHAPES = st.one_of(
    st.tuples(), st.tuples(st.integers(1, 9)), st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 3)] * 4)
)


# How far off ------------------------------------------------------------------------------------------------------


@QUIET
@given(shape=SHAPES, values=st.sampled_from(["int8", "int4"]), data=st.data())
def test_no_value_is_off_by_more_than_half_a_level_of_its_slice(shape: Any, values: str, data: st.DataObject) -> None:
    numel = math.prod(shape)
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=numel, max_size=numel))).reshape(shape)
    back = sent({"m:A": x}, Packing(values))["m:A"]
    scale = scale_of(x, values)
    assert back.shape == x.shape
    # the last terms: a quotient and a product are rounded to float32, and below about 1e-36 a scale loses its last bits
    assert bool(((x - back).abs() <= scale / 2 + 2e-7 * LEVELS[values] * scale + 1e-42).all())


def test_every_rank_component_has_a_scale_of_its_own() -> None:
    """A large component must not drown a small one: both of B's columns come back, though one is 1000 times larger."""
    B = torch.tensor([[1000.0, 1.0], [-500.0, 0.5], [250.0, -0.25]])
    back = sent({"m:B": B, "m:A": B.T}, Packing("int8"))
    assert torch.allclose(back["m:B"], B, rtol=0.01)
    assert torch.allclose(back["m:A"], B.T, rtol=0.01)
    assert pack({"m:B": B}, Packing("int8"))["scales"].tolist() == pytest.approx([1000 / 127, 1 / 127])


def test_int4_by_hand() -> None:
    x = torch.tensor([[7.0, -3.4, 0.0, 2.5], [0.0, 0.0, 0.0, 0.0]])  # the scale is 1; of two even ones the even code
    packed = pack({"m:A": x}, Packing("int4"))
    assert packed["codes"].tolist() == [8 + 7 | (8 - 3) << 4, 8 | (8 + 2) << 4, 0x88, 0x88]
    assert sent({"m:A": x}, Packing("int4"))["m:A"].tolist() == [[7, -3, 0, 2], [0, 0, 0, 0]]


def test_a_code_stays_within_its_bits_where_the_scale_has_lost_its_own() -> None:
    tiny = 2.0**-149
    back = sent({"m:A": torch.tensor([[190 * tiny, 1.0 * tiny]]), "m:B": torch.ones(2, 1)}, Packing("int8"))
    assert back["m:A"].tolist() == [[127 * tiny, tiny]]  # 190 / 127 levels is rounded to one


@pytest.mark.parametrize("packing", FORMS, ids=lambda p: p.form)
def test_zeros_and_empty_tensors_come_back_as_they_are(packing: Packing) -> None:
    tensors = {"m:A": torch.zeros(2, 5), "m:B": torch.zeros(0, 2), ":one": torch.tensor(0.0), ":none": torch.zeros(0)}
    for name, tensor in sent(tensors, packing).items():
        assert torch.equal(tensor, tensors[name])
    assert sent({}, packing) == {}


def test_of_the_values_only_the_largest_travel_and_of_equal_ones_the_first() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0], [2.0, 0.5, 4.0]])
    assert sent({"m:A": x}, Packing("fp32", 0.5))["m:A"].tolist() == [[0, -5, 2], [0, 0, 4]]
    assert int(sent({":b": torch.ones(1000)}, Packing("int8", 0.001))[":b"].sum()) == 1  # one at least


@QUIET
@given(top_k=st.floats(0.01, 0.99), numel=st.integers(1, 300), values=st.sampled_from(["fp32", "int8", "int4"]))
def test_top_k_keeps_the_share_that_was_asked_for(top_k: float, numel: int, values: str) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) + 10  # no code is 0
    back = sent({":b": x}, Packing(values, top_k))[":b"]
    assert int((back != 0).sum()) == max(1, math.ceil(top_k * numel - 1e-9))


@pytest.mark.parametrize("packing", FORMS, ids=lambda p: p.form)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_equal_updates_are_equal_bytes_however_they_were_built(packing: Packing, rank: int) -> None:
    tensors = update(rank, 20)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in reversed(tensors.items())}
    payloads = {encode_update("c3", 1, "", some, 1, {}, packing=packing) for some in (tensors, strided)}
    assert len(payloads) == 1
    (payload,) = payloads
    named, note = safetensors.torch.load(payload), {"__metadata__": None}
    length = int.from_bytes(payload[:8], "little")
    note = json.loads(payload[8 : 8 + length])["__metadata__"]
    assert payload == safetensors.torch.save(named, note)


def test_extra_tensors_and_an_unpacked_update_travel_as_they_are() -> None:
    extras = {"scaffold/m:A": torch.tensor([1 / 3, 1e-9])}
    for packing in FORMS:
        payload = encode_update("c3", 1, "", {"m:A": torch.ones(2, 2)}, 1, {}, extras, packing)
        assert torch.equal(decode_update(payload).extras["scaffold/m:A"], extras["scaffold/m:A"])
    plain = encode_update("c3", 1, "", update(), 1, {}, extras)
    assert plain == encode_update("c3", 1, "", update(), 1, {}, extras, Packing())


# What it weighs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "least"), [(4, 3.9), (8, 3.9), (16, 3.9)])
def test_int8_is_at_least_3_8_times_smaller_header_and_scales_included(rank: int, least: float) -> None:
    tensors = {f"layer.{i}.{name}": tensor for i in range(6) for name, tensor in update(rank).items() if name[0] != ":"}
    tensors |= {name: tensor for name, tensor in update().items() if name[0] == ":"}
    plain, packed = (len(encode_update("c3", 1, "ab" * 32, tensors, 1, {}, packing=p)) for p in (Packing(), FORMS[0]))
    assert plain / packed > least


@pytest.mark.parametrize("packing", FORMS, ids=lambda p: p.form)
def test_the_size_is_known_before_anything_is_packed(packing: Packing) -> None:
    tensors = update(3, 21)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert packing.num_bytes(shapes) == sum(part.nbytes for part in pack(tensors, packing).values())
    assert abs(packing.about_bytes(sum(map(math.prod, shapes.values()))) / packing.num_bytes(shapes) - 1) < 0.15


# Error feedback ---------------------------------------------------------------------------------------------------


@QUIET
@given(packing=st.sampled_from(FORMS), seed=st.integers(0, 99), rounds=st.integers(1, 6))
def test_what_was_sent_is_what_was_meant_but_for_what_is_still_unsent(packing: Packing, seed: int, rounds: int) -> None:
    meant, came, unsent = torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(4, 9)
    for number in range(rounds):
        change = torch.randn(4, 9, generator=torch.Generator().manual_seed(100 * seed + number))
        back = sent({"m:A": change + unsent}, packing)["m:A"]
        meant, came, unsent = meant + change, came + back, change + unsent - back
    torch.testing.assert_close(came, meant - unsent, rtol=1e-5, atol=1e-5)


# Hostile messages -------------------------------------------------------------------------------------------------


def hostile(form: object = "int8", shapes: object = None, **parts: Tensor) -> bytes:
    """A message whose packed values are what one likes; the others are those of ``m:A`` = [[1, -2, 3]]."""
    honest = pack({"m:A": torch.tensor([[1.0, -2.0, 3.0]])}, Packing("int8"))
    told = {"form": form, "shapes": {"m:A": [1, 3]} if shapes is None else shapes}
    note = {"schema": 1, "kind": "update", "client": "c3", "round": 1, "received": "", "num_examples": 1, "metrics": {}}
    tensors = {name: tensor for name, tensor in {**honest, **parts}.items() if tensor.numel() or name not in parts}
    return safetensors.torch.save(tensors, {"fedlora": json.dumps({**note, "packed": told})})


HOSTILE: dict[str, tuple[bytes, str]] = {
    "scale NaN": (hostile(scales=torch.tensor([math.nan])), "'m:A' has values that are not finite"),
    "scale infinite": (hostile(scales=torch.tensor([math.inf])), "'m:A' has values that are not finite"),
    "too few codes": (hostile(codes=torch.zeros(2, dtype=torch.int8)), r"codes of the packed values are int8 \[2\]"),
    "codes of another type": (hostile(codes=torch.zeros(3)), r"float32 \[3\]; expected int8 \[3\]"),
    "codes in two dimensions": (hostile(codes=torch.zeros(1, 3, dtype=torch.int8)), r"int8 \[1, 3\]; expected"),
    "no scales": (hostile(scales=torch.empty(0)), "lack their scales"),
    "a scale too many": (hostile(scales=torch.ones(2)), r"expected float32 \[1\]"),
    "a mask nobody asked for": (hostile(mask=torch.zeros(1, dtype=torch.uint8)), "'mask' has no place"),
    "no mask": (hostile("int8 top-k"), "lack their mask"),
    "a mask of more values than came": (
        hostile("int8 top-k", mask=torch.tensor([1], dtype=torch.uint8)),
        r"int8 \[3\]; expected int8 \[1\]",
    ),
    "a bomb": (hostile(shapes={"m:A": [1 << 30, 1 << 30]}), "expected int8"),
    "a sparse bomb": (hostile("int8 top-k", {"m:A": [1 << 30]}, mask=torch.zeros(9, dtype=torch.uint8)), "expected"),
    "an empty bomb": (hostile(shapes={"m:A": [1 << 39] * 7 + [0]}), "does not say what is packed"),
    "a negative size": (hostile(shapes={"m:A": [-1, -3]}), "does not say what is packed"),
    "no shapes": (hostile(shapes=[1, 3]), "does not say what is packed"),
    "an unknown form": (hostile("int2"), "packed as 'int2'"),
    "a form that is no word": (hostile({"a": 1}), "packed as"),
    "a plain tensor beside": (hostile(**{"m:B": torch.ones(2)}), "'m:B' lies beside packed values"),
    "whole numbers beside": (hostile(**{"+x": torch.ones(2, dtype=torch.int8)}), "has whole numbers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_refused_before_it_is_unpacked(name: str) -> None:
    payload, reason = HOSTILE[name]
    with pytest.raises(WireError, match=reason) as refusal:
        decode_update(payload)
    assert len(str(refusal.value)) < 500


def test_the_message_they_were_made_from_is_read() -> None:
    assert decode_update(hostile()).delta["m:A"].tolist() == [
        [pytest.approx(1, abs=0.02), pytest.approx(-2, abs=0.02), 3]
    ]


def test_a_message_that_is_packed_otherwise_than_asked_is_refused() -> None:
    for asked in (Packing(), Packing("int4"), Packing("int8", 0.5)):
        with pytest.raises(WireError, match=f"values came as 'int8'; expected {asked.form}"):
            decode_update(hostile(), packing=asked)
    with pytest.raises(WireError, match="values came as 'fp32'; expected int8"):
        decode_update(encode_update("c3", 1, "", {"m:A": torch.ones(1, 3)}, 1, {}), packing=Packing("int8"))


def test_no_adapter_is_packed() -> None:
    note = {"schema": 1, "kind": "adapter", "packed": {"form": "int8", "shapes": {}}}
    payload = safetensors.torch.save({"codes": torch.ones(2, dtype=torch.int8)}, {"fedlora": json.dumps(note)})
    with pytest.raises(WireError, match="has whole numbers"):
        decode_adapter(payload)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("packing", FORMS, ids=lambda p: p.form)
def test_a_client_whose_training_diverged_does_not_look_well(packing: Packing, value: float) -> None:
    tensors = update(2, 10)
    tensors["k:A"][1, 3] = value
    payload = encode_update("c3", 1, "", tensors, 1, {}, packing=packing)
    if packing.values == "fp32":
        assert not math.isfinite(decode_update(payload).norm)
    else:
        with pytest.raises(WireError, match="'k:A' has values that are not finite"):
            decode_update(payload)


@QUIET
@given(data=st.data(), packing=st.sampled_from(FORMS))
def test_whatever_bytes_are_changed_it_is_read_or_refused(data: st.DataObject, packing: Packing) -> None:
    payload = bytearray(encode_update("c3", 1, "", update(2, 6), 1, {}, packing=packing))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode_update(bytes(payload), packing=packing)


def test_unpacking_undoes_packing_up_to_rounding() -> None:
    tensors = update(2, 10)
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    back = unpack(pack(tensors, Packing("int8")), shapes, "int8")
    again = unpack(pack(back, Packing("int8")), shapes, "int8")
    for name, tensor in back.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)  # what fits the levels already stays
