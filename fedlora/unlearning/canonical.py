"""One string of bytes per JSON value, so that it can be hashed and signed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedlora.errors import UnlearningError


def canonical(value: Any) -> bytes:
    """The value as JSON in ASCII: sorted keys, no spaces.

    Raises:
        UnlearningError: for what JSON cannot hold, such as a tensor or a number that is not finite.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UnlearningError(
            f"this cannot be hashed or signed ({error}); give text, finite numbers and lists"
        ) from error


def digest(value: Any) -> str:
    """SHA-256 of the canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()
