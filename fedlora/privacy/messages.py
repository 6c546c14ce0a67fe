"""What server and clients say to each other around a secure sum: JSON, checked where it arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedlora.errors import WireError
from fedlora.privacy.fixed_point import MOST_WEIGHT, Ring
from fedlora.privacy.masks import KEY_BYTES, NONCE_BYTES
from fedlora.privacy.shamir import SHARE_BYTES

MAX_BYTES = 64 << 20
_TAG_BYTES = 16

PublicKey = Annotated[bytes, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Share = Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
SealedShares = Annotated[
    bytes,
    Field(min_length=NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES, max_length=NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES),
]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Message(BaseModel):
    """Frozen, with nothing in it that is not expected; bytes travel as base64."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    def encode(self) -> bytes:
        """Wire bytes."""
        return self.model_dump_json().encode()


class Keys(Message):
    """A client's public keys of one round: one to send it shares under, one to agree on masks with."""

    shares: PublicKey
    masks: PublicKey


class Session(Message):
    """One sum, as everybody in it sees it.

    Attributes:
        round, received: of the tasks whose answers are summed.
        threshold: clients without whom nothing is opened.
        heaviest: the largest weight that one of them may have; where that is 1, each has a weight of 1.
        clip: what values of a change are cut to.
        longest: Frobenius norm that a change is shortened to before; None for any.
        keys: of every client that is in it; their order is their places from 1 on.
    """

    round: Annotated[int, Field(ge=1)]
    received: Digest
    threshold: Annotated[int, Field(ge=1)]
    heaviest: Annotated[int, Field(ge=1)]
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    longest: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    keys: dict[str, Keys]

    @cached_property
    def id(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.encode()).hexdigest()

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Of every client, from 1 on."""
        return {client: place for place, client in enumerate(self.keys, 1)}

    @property
    def total(self) -> int:
        """The most that all weights come to."""
        return self.heaviest * len(self.keys)

    @model_validator(mode="after")
    def _check(self) -> Session:
        if self.total > MOST_WEIGHT:
            raise ValueError(f"weights of up to {self.total} are beyond {MOST_WEIGHT}")
        return self


class AskKeys(Message):
    """To every client that is to train: draw secrets for this task's answer."""

    stage: Literal["keys"] = "keys"
    round: Annotated[int, Field(ge=1)]
    received: Digest


class AskShares(Message):
    """To everybody who sent keys: deal shares of your secrets among these."""

    stage: Literal["shares"] = "shares"
    session: Session


class Sealed(Message):
    """Shares, each for the client that is named; only that one can read them."""

    shares: dict[str, SealedShares]


class AskMasked(Message):
    """Comes with the task: mask the answer with everybody these shares are from."""

    session: Digest
    shares: dict[str, SealedShares]


class AskOpened(Message):
    """To everybody whose masked answer came: help to open the sum of these."""

    stage: Literal["opened"] = "opened"
    session: Digest
    survivors: list[str]


class Opened(Message):
    """Shares of the own masks of those who are in the sum, and of the keys of those who are not."""

    seeds: dict[str, Share]
    keys: dict[str, Share]


Request = AskKeys | AskShares | AskOpened
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="stage")])
M = TypeVar("M", bound=Message)


def read(kind: type[M], payload: bytes | memoryview) -> M:
    """A message of this kind.

    Raises:
        WireError: if the bytes are not one.
    """
    return _read(TypeAdapter(kind), payload, kind.__name__)


def read_request(payload: bytes) -> Request:
    """What the server asks for between the tasks; raises as ``read`` does."""
    return _read(_REQUEST, payload, "request")


def encode_masked(session: str, numbers: Ring) -> bytes:
    """A masked answer: which sum it is for, and its numbers."""
    return bytes.fromhex(session) + numbers.astype("<u8", copy=False).tobytes()


def decode_masked(payload: bytes | memoryview, session: str, count: int) -> Ring:
    """The numbers of a masked answer to this session, as many as expected.

    Raises:
        WireError: for anything else.
    """
    start = len(session) // 2
    if len(payload) != start + 8 * count or bytes(payload[:start]) != bytes.fromhex(session):
        raise WireError(f"{len(payload)} bytes are not the masked answer of {count} numbers that was asked for")
    return np.frombuffer(payload, "<u8", offset=start).astype(np.uint64, copy=False)


def _read(adapter: TypeAdapter[M], payload: bytes | memoryview, name: str) -> M:
    if len(payload) > MAX_BYTES:
        raise WireError(f"message of {len(payload)} bytes; at most {MAX_BYTES} were expected")
    try:
        return adapter.validate_json(bytes(payload))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"not a message of a secure sum ({name}: {where[:80]}: {first['msg'][:80]})") from error
