"""Keys that two clients agree on without meeting, messages only the other one can read, and streams that hide numbers.

All of it is ``cryptography``'s: X25519, HKDF-SHA256, ChaCha20-Poly1305 and AES-256 in counter mode.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.errors import SecureSumError
from fedlora.privacy.fixed_point import Ring

KEY_BYTES, NONCE_BYTES = 32, 12
_CHUNK = 1 << 17  # numbers of a stream at a time: they stay in the cache


def new_key() -> bytes:
    """A private key, from the operating system's randomness."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(key: bytes) -> bytes:
    """What others may know of a private key."""
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def agree(key: bytes, other: bytes, about: bytes) -> bytes:
    """A secret of two, the same from either side: of one's own private and the other's public key.

    Args:
        about: what it is for. Secrets for different ends say nothing about each other.

    Raises:
        SecureSumError: for a public key that would make everybody's secret the same.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(key).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise SecureSumError("a public key that is no point of the curve, or a weak one") from error
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=about).derive(shared)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """The text for whoever has the key; ``about`` has to be the same when it is opened."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Inverse of ``seal``.

    Raises:
        SecureSumError: if it was sealed with another key, about something else, or changed on the way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise SecureSumError("a sealed message that does not open: it is somebody else's, or was changed") from error


def add_stream(numbers: Ring, seed: bytes, sign: int = 1) -> None:
    """Add to every number, in place, one that looks random without the seed; a sign of -1 takes it off again.

    Args:
        seed: KEY_BYTES, never used for two streams that are both kept: its counter starts at 0.
    """
    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK]
        drawn = np.frombuffer(stream.update(bytes(8 * len(part))), "<u8")
        if sign > 0:
            part += drawn
        else:
            part -= drawn
