"""What is asked: a target, what to do with it, and the signature of who asks."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.errors import UnlearningError
from fedlora.unlearning.keys import is_signed, sign

KINDS = ("client", "task", "records", "class", "data")
_HASHED = ("records", "data")


@dataclass(frozen=True)
class Request:
    """One removal.

    Attributes:
        kind: of the target, see ``KINDS``.
        target: client ids, names of tasks, labels; of records and data SHA-256 hashes only, see ``hashed``.
        action: the name of an unlearning action; ``""`` leaves the choice to the plan.
        now: contain first, erase after.
        options: of the action, plain JSON data.

    Raises:
        UnlearningError: for a kind that does not exist, an empty target, or a plain id where a hash belongs.
    """

    kind: str
    target: tuple[str, ...]
    action: str = ""
    now: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnlearningError(f"an unlearning request is about one of {', '.join(KINDS)}, not {self.kind!r}")
        if not self.target:
            raise UnlearningError(f"an unlearning request names at least one {self.kind}; this one names none")
        if self.kind in _HASHED and not all(map(_is_hash, self.target)):
            # the log is kept and copied for years: an id in it would outlive what it belongs to
            raise UnlearningError(
                f"{self.kind} are named by the SHA-256 of their ids, never by the ids; use hashed(ids)"
            )
        object.__setattr__(self, "target", tuple(sorted(set(self.target))))

    def content(self, run: str) -> dict[str, Any]:
        """What is signed: the request, and the run it is for, so that it cannot be played to another one."""
        target = list(self.target)
        asked = {"kind": self.kind, "target": target, "action": self.action, "now": self.now, "run": run}
        return asked | ({"options": dict(self.options)} if self.options else {})

    @staticmethod
    def of(content: Mapping[str, Any]) -> Request:
        """Inverse of ``content``. Raises KeyError or TypeError for anything else."""
        asked = content["kind"], tuple(content["target"]), content["action"], content["now"]
        return Request(*asked, content.get("options", {}))

    def __str__(self) -> str:
        shown = [name[:12] if self.kind in _HASHED else name for name in self.target[:5]]
        more = f" and {len(self.target) - 5} more" if len(self.target) > 5 else ""
        return f"{self.kind} {', '.join(shown)}{more}"


@dataclass(frozen=True)
class SignedRequest:
    """A request as it travels.

    Attributes:
        run: identity of the run it is for.
        public_key: raw, in hex.
        signature: over the content, in hex.
    """

    request: Request
    run: str
    public_key: str
    signature: str

    @property
    def content(self) -> dict[str, Any]:
        """What is signed."""
        return self.request.content(self.run)

    @property
    def signer(self) -> str:
        """Fingerprint of the key."""
        return hashlib.sha256(bytes.fromhex(self.public_key)).hexdigest()

    def is_genuine(self) -> bool:
        """Whether the signature is that of the key over the request. Says nothing about who may ask."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public_key))
        except ValueError:
            return False
        return is_signed(key, self.signature, self.content)

    def note(self) -> dict[str, Any]:
        """Plain JSON data."""
        who = {"public_key": self.public_key, "fingerprint": self.signer, "signature": self.signature}
        return {"asked": self.content, "by": who}

    @staticmethod
    def of(note: Mapping[str, Any]) -> SignedRequest:
        """Inverse of ``note``. Raises KeyError or TypeError for anything else."""
        asked, by = note["asked"], note["by"]
        return SignedRequest(Request.of(asked), asked["run"], by["public_key"], by["signature"])


def sign_request(request: Request, run: str, key: Ed25519PrivateKey) -> SignedRequest:
    """The request with the signature of who asks.

    Args:
        run: identity of the run, see ``orchestrator.unlearning.requests.identity``.
    """
    public = key.public_key()
    return SignedRequest(request, run, public.public_bytes_raw().hex(), sign(key, request.content(run)))


def hashed(ids: Iterable[str]) -> tuple[str, ...]:
    """SHA-256 of each id in UTF-8, sorted, each once. Clients compare them with those of their own rows."""
    return tuple(sorted({hashlib.sha256(name.encode()).hexdigest() for name in ids}))


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set(string.hexdigits.lower())
