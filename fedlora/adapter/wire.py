"""Adapters as bytes: safetensors with a JSON note, the only thing that crosses a trust boundary.

A message is hostile until proved otherwise: its header is read and checked by hand before any
tensor is built, and nothing is ever unpickled.
"""

import hashlib
import json
import math
import struct
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.adapter.packing import PACKED, PLAIN, Packing, Shapes, pack, unpack
from fedlora.adapter.state import AdapterState
from fedlora.errors import AdapterError, WireError
from fedlora.protocol import ClientUpdate

SCHEMA = 1
MAX_HEADER_BYTES = 8 << 20
_EXTRA = "+"  # no module path starts with it
# in the order in which safetensors writes them: the widest first, so that every value is aligned
_DTYPES = {"F64": (torch.float64, 8), "F32": (torch.float32, 4), "BF16": (torch.bfloat16, 2), "F16": (torch.float16, 2)}
_CODES = {"I8": (torch.int8, 1), "U8": (torch.uint8, 1)}  # of packed values only
_PLACES = {dtype: (place, name) for place, (name, (dtype, _)) in enumerate((_DTYPES | _CODES).items())}

with warnings.catch_warnings():
    # said once per process: that a message is read-only, which is as it should be
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0000", dtype=torch.float32)


class _Entry(NamedTuple):
    """Where a tensor lies in a message."""

    dtype: torch.dtype
    numel: int
    shape: tuple[int, ...]
    start: int


def encode_adapter(state: AdapterState, extras: Mapping[str, Tensor] | None = None) -> bytes:
    """Wire bytes of an adapter, with extra tensors of a strategy. Equal states give equal bytes."""
    return _encode({**state.tensors(), **_marked(extras or {})}, {"kind": "adapter"})


def decode_adapter(payload: bytes) -> AdapterState:
    """The adapter in a message of ``encode_adapter``; see ``decode_parcel``."""
    return decode_parcel(payload)[0]


def decode_parcel(payload: bytes) -> tuple[AdapterState, dict[str, Tensor]]:
    """Inverse of ``encode_adapter``: the adapter and the extra tensors.

    Raises:
        WireError: if the bytes are not an adapter message of a known schema.
    """
    _, entries = _decode(payload, "adapter")
    tensors, extras = _parted({name: view.clone() for name, view in _split(_runs(payload, entries), entries).items()})
    try:
        return AdapterState.from_tensors(tensors), extras
    except AdapterError as error:
        raise WireError(str(error)) from error


def encode_update(
    client: str,
    round: int,
    received: str,
    delta: Mapping[str, Tensor],
    num_examples: int,
    metrics: Mapping[str, float],
    extras: Mapping[str, Tensor] | None = None,
    packing: Packing = PLAIN,
) -> bytes:
    """Wire bytes of a client's answer.

    Args:
        packing: of the delta. Extra tensors travel as they are: they are books that server and client keep together,
            such as control variates, and what one side rounds the other would miss for good.
    """
    note: dict[str, Any] = {
        "kind": "update",
        "client": client,
        "round": round,
        "received": received,
        "num_examples": num_examples,
        "metrics": dict(metrics),
    }
    tensors = delta
    if not packing.plain:
        tensors = pack(delta, packing)
        note["packed"] = {"form": packing.form, "shapes": {name: list(tensor.shape) for name, tensor in delta.items()}}
    return _encode({**tensors, **_marked(extras or {})}, note)


def decode_update(
    payload: bytes | memoryview, max_bytes: int | None = None, packing: Packing | None = None
) -> ClientUpdate:
    """Parse an answer and check its form; whether it fits the round is for admission to say.

    Its tensors may be views of the message: they are not to be changed in place.

    Args:
        packing: how its values have to be packed; None for any way.

    Raises:
        WireError: too large, not safetensors, another schema, or a field of the wrong type.
    """
    if max_bytes is not None and len(payload) > max_bytes:
        raise WireError(f"message of {len(payload)} bytes; at most {max_bytes} were expected")
    note, entries = _decode(payload, "update")
    form, shapes = _packed(note)
    if packing is not None and form != packing.form:
        raise WireError(f"values came as {form!r:.80}; expected {packing.form} (wire.up and wire.top_k)")
    for key, kind in (
        ("client", str),
        ("round", int),
        ("received", str),
        ("num_examples", int),
        ("metrics", dict),
    ):
        if not isinstance(note.get(key), kind) or isinstance(note.get(key), bool):
            raise WireError(f"{key} is {note.get(key)!r:.80}; expected {kind.__name__}")
    for key, value in note["metrics"].items():
        # math.isfinite raises for an integer that no float can hold
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise WireError(f"metric {key!r:.80} is {value!r:.80}; expected a finite number")
    runs = list(_runs(payload, entries, skip=() if shapes is None else PACKED))
    delta, extras = _parted(_split(runs, entries))
    norms = [torch.linalg.vector_norm(flat) for _, flat in runs]
    if shapes is not None:
        if delta:
            raise WireError(f"{min(delta)!r:.80} lies beside packed values; expected extra tensors only")
        delta = unpack(_raw(payload, entries), shapes, form)
        norms += [torch.linalg.vector_norm(tensor) for tensor in delta.values()]
    return ClientUpdate(
        client=note["client"],
        round=note["round"],
        received=note["received"],
        delta=delta,
        num_examples=note["num_examples"],
        metrics=note["metrics"],
        wire_bytes=len(payload),
        norm=math.hypot(*map(float, norms)),
        extras=extras,
    )


def digest(payload: bytes) -> str:
    """SHA-256 of a message, in hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


def _marked(extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_EXTRA + name: tensor for name, tensor in extras.items()}


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the adapter, and the extra ones without their mark."""
    extras = {name.removeprefix(_EXTRA): t for name, t in tensors.items() if name.startswith(_EXTRA)}
    return {name: t for name, t in tensors.items() if not name.startswith(_EXTRA)}, extras


def _encode(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> bytes:
    """The bytes of ``safetensors.torch.save``, whose own writer copies every value three times on the way."""
    header: dict[str, Any] = {"__metadata__": {"fedlora": json.dumps({"schema": SCHEMA, **note}, sort_keys=True)}}
    values, end = [], 0
    floats = {dtype for dtype, _ in _DTYPES.values()}
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in floats and name not in PACKED]:
        raise WireError(f"{strange[0]}: tensors of {tensors[strange[0]].dtype} do not travel; make it float32")
    for name, tensor in sorted(tensors.items(), key=lambda item: (_PLACES[item[1].dtype], item[0])):
        start, end = end, end + tensor.element_size() * tensor.numel()
        header[name] = {"dtype": _PLACES[tensor.dtype][1], "shape": list(tensor.shape), "data_offsets": [start, end]}
        # as bytes, since numpy lacks bfloat16
        values.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *values])


def _decode(payload: bytes | memoryview, kind: str) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """The note, and where each tensor lies."""
    note, entries = _read_header(payload)
    if note.get("schema") != SCHEMA:
        raise WireError(f"message has schema {note.get('schema')!r:.80}; this version of fedlora reads {SCHEMA}")
    if note.get("kind") != kind:
        raise WireError(f"message is of kind {note.get('kind')!r:.80}; expected {kind}")
    for name, entry in entries.items():
        if not entry.dtype.is_floating_point and not (kind == "update" and "packed" in note and name in PACKED):
            raise WireError(f"{name!r:.80} has whole numbers; expected {', '.join(_DTYPES)}")
    return note, entries


def _packed(note: Mapping[str, Any]) -> tuple[str, Shapes | None]:
    """How the values of an update travel, and the shapes of the tensors they belong to; None where these travel."""
    if "packed" not in note:
        return PLAIN.form, None
    try:
        told, form = note["packed"]["shapes"], str(note["packed"]["form"])
        return form, {name: tuple(shape) for name, shape in sorted(told.items()) if _count(shape) >= 0}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"header does not say what is packed ({type(error).__name__})") from error


def _raw(payload: bytes | memoryview, entries: Mapping[str, _Entry]) -> dict[str, Tensor]:
    """The flat tensors of packed values, as they came."""
    found = {}
    for name, (dtype, count, shape, start) in entries.items():
        if name in PACKED:
            flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
            found[name] = flat.to(dtype).view(shape)
    return found


def _runs(
    payload: bytes | memoryview, entries: Mapping[str, _Entry], skip: Collection[str] = ()
) -> Iterator[tuple[list[str], Tensor]]:
    """Tensors of one precision lie one after the other: their names, and all their values [n] in float32.

    Without a copy if they came so. The header has been checked.
    """
    for (dtype, skipped), group in groupby(entries, key=lambda name: (entries[name].dtype, name in skip)):
        if skipped:
            continue
        names = list(group)
        count, start = sum(entries[name].numel for name in names), entries[names[0]].start
        # torch refuses a buffer without values
        flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
        yield names, flat.to(torch.float32)


def _split(runs: Iterable[tuple[list[str], Tensor]], entries: Mapping[str, _Entry]) -> dict[str, Tensor]:
    """The single tensors: views of the runs."""
    views = {}
    for names, flat in runs:
        for name, part in zip(names, torch.split(flat, [entries[name].numel for name in names]), strict=True):
            views[name] = part.view(entries[name].shape)
    return views


def _count(shape: Any) -> int:
    """Values in a tensor of this shape. A product of anything else can overflow, or take minutes."""
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError("not a shape")
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 40:
            raise ValueError("not a shape")
    if math.prod(max(size, 1) for size in shape) >= 1 << 62:
        raise ValueError("not a shape")  # though it may be empty: torch counts in 64 bits
    return math.prod(shape)


def _read_header(payload: bytes | memoryview) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """Bounds, types and sizes, before any memory is set aside for tensors."""
    if len(payload) < 8:
        raise WireError(f"message of {len(payload)} bytes is too short")
    (length,) = struct.unpack("<Q", payload[:8])
    if length > min(MAX_HEADER_BYTES, len(payload) - 8):
        raise WireError("header is longer than the message or the limit; the message is truncated or not safetensors")
    entries, begin, end = {}, 8 + length, 0
    try:
        header = json.loads(bytes(payload[8:begin]))
        note = json.loads(header.pop("__metadata__")["fedlora"])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            count, (dtype, width) = _count(entry["shape"]), (_DTYPES | _CODES)[entry["dtype"]]
            if type(start) is not int or start != end or stop - start != count * width:
                raise WireError(f"{name!r:.80}: tensor of {count * width} bytes does not lie where the one before ends")
            entries[name], end = _Entry(dtype, count, tuple(entry["shape"]), begin + start), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"header is not a fedlora message ({type(error).__name__})") from error
    if not isinstance(note, dict):
        raise WireError("header is not a fedlora message (the note is not an object)")
    if begin + end != len(payload):
        raise WireError(f"message of {len(payload)} bytes; its header describes {begin + end}")
    return note, entries
