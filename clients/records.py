"""Tasks and answers as Flower's messages carry them: JSON in a config record, our bytes in an array record.

Nothing here is pickled, and nothing that arrives is trusted: both sides check what they read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import TypeAdapter, ValidationError

from fedlora.errors import WireError
from fedlora.protocol import ClientInfo, EvalResult, EvalTask, Patch, TrainTask, WorkerStats

T = TypeVar("T")
_NOTE, _BYTES, _FORM = "fedlora", "fedlora.bytes", "fedlora.safetensors"
MAX_NOTE_BYTES = 16 << 20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Parcel:
    """A message between server and node.

    Attributes:
        note: plain JSON.
        payloads: wire bytes by their SHA-256; a payload that several parts of the note name travels once.
    """

    note: Mapping[str, Any]
    payloads: Mapping[str, bytes] = field(default_factory=dict)

    def to_records(self) -> RecordDict:
        """As Flower carries it; bytes go in arrays, which travel in pieces."""
        arrays = {
            key: Array(dtype="uint8", shape=(len(payload),), stype=_FORM, data=bytes(payload))
            for key, payload in self.payloads.items()
        }
        note = ConfigRecord({"json": json.dumps(self.note)})
        return RecordDict({_NOTE: note, **({_BYTES: ArrayRecord(arrays)} if arrays else {})})

    def payload(self, key: str) -> bytes:
        """The bytes of this SHA-256.

        Raises:
            WireError: if they did not come.
        """
        if key not in self.payloads:
            raise WireError(f"the message lacks the bytes {key:.12}")
        return self.payloads[key]


def parcel_of(records: RecordDict) -> Parcel:
    """What came, with every payload under the hash that it really has.

    Raises:
        WireError: if it is not a message of ours.
    """
    try:
        text = records.config_records[_NOTE]["json"]
        if not isinstance(text, str) or len(text) > MAX_NOTE_BYTES:
            raise WireError("the message's note is not text, or too long")
        note = json.loads(text)
        arrays = records.array_records.get(_BYTES, {})
        payloads = {sha256(array.data): bytes(array.data) for array in arrays.values()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a message of fedlora ({type(error).__name__})") from error
    if not isinstance(note, dict):
        raise WireError("the message's note is not an object")
    return Parcel(note, payloads)


def sha256(payload: bytes | memoryview) -> str:
    """Of bytes, in hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


def is_sha256(text: object) -> bool:
    """Whether this is a hash, and so safe as the name of a file."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= _HEX


def task_note(task: TrainTask | EvalTask) -> dict[str, Any]:
    """A task as JSON: bytes by their hashes, patches as pairs of id and hash."""
    bare = asdict(replace(task, adapter=b"", ledger=()))
    ledger = [[patch.id, sha256(patch.payload)] for patch in task.ledger]
    return json.loads(json.dumps(bare | {"adapter": sha256(task.adapter), "ledger": ledger}, default=_plain))


def read_task(kind: type[T], note: Any, adapter: bytes, ledger: Sequence[Patch]) -> T:
    """The task a note describes, with its bytes.

    Raises:
        WireError: for fields of the wrong type.
    """
    if not isinstance(note, dict):
        raise WireError("a task is not an object")
    return read(kind, {**note, "adapter": adapter, "ledger": tuple(ledger)})


def read(kind: type[T], content: Any) -> T:
    """One of ours from plain data.

    Raises:
        WireError: for fields of the wrong type.
    """
    try:
        return _ADAPTERS[kind].validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"{kind.__name__}: {where:.80}: {first['msg']:.120}") from None


def write(value: Any) -> Any:
    """A frozen dataclass of the protocol as plain data."""
    return json.loads(json.dumps(asdict(value), default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, bytes):
        return ""
    return dict(value)


_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (TrainTask, EvalTask, EvalResult, ClientInfo, WorkerStats)
}
