"""Shamir's secret sharing: any ``threshold`` shares give a secret back, and fewer say nothing about it."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from math import prod

from fedlora.errors import SecureSumError

PRIME = 2**521 - 1  # a Mersenne prime, above every secret of SECRET_BYTES
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret at the places 1 to ``count``.

    Args:
        secret: SECRET_BYTES long.
        threshold: shares that give it back, 1 to ``count``.

    Returns:
        Values of a random polynomial of degree ``threshold - 1`` whose value at 0 is the secret, SHARE_BYTES each.

    Source: Shamir, "How to share a secret", CACM 22 (1979).
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= count
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, place).to_bytes(SHARE_BYTES) for place in range(1, count + 1)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret that these shares, by place, belong to. There have to be as many as its threshold, or more.

    Raises:
        SecureSumError: if they give nothing that could be a secret. Too few of them, or false ones, nearly always do.
    """
    factors = _factors(tuple(shares))
    secret = sum(int.from_bytes(share) * factor for share, factor in zip(shares.values(), factors, strict=True)) % PRIME
    if secret >= 1 << 8 * SECRET_BYTES:
        raise SecureSumError(f"{len(shares)} shares do not fit together")
    return secret.to_bytes(SECRET_BYTES)


def _value(coefficients: list[int], place: int) -> int:
    """Of the polynomial, by Horner's rule."""
    return functools.reduce(lambda value, coefficient: (value * place + coefficient) % PRIME, reversed(coefficients), 0)


@functools.lru_cache(64)
def _factors(places: tuple[int, ...]) -> list[int]:
    """What the value at each place counts for in that at 0 (Lagrange); a round joins many secrets at the same ones."""
    above = {place: prod(other for other in places if other != place) for place in places}
    below = {place: prod(other - place for other in places if other != place) for place in places}
    return [above[place] * pow(below[place], -1, PRIME) % PRIME for place in places]
