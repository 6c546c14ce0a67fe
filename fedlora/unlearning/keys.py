"""Ed25519 keys: who may ask for a removal, and who vouches for it. The mathematics is ``cryptography``'s."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.errors import ConfigError
from fedlora.unlearning.canonical import canonical

PASSWORD = "FEDLORA_KEY_PASSWORD"  # the environment variable that a key file's password is in

Keys: TypeAlias = Mapping[str, Ed25519PublicKey]


def new_key(path: Path) -> str:
    """Write a private key that only its owner can read, and beside it ``<path>.pub``; both in PEM.

    The private key is encrypted if the environment variable ``FEDLORA_KEY_PASSWORD`` is set.

    Returns:
        The key's fingerprint.

    Raises:
        ConfigError: if one of the files is there already, or cannot be written.
    """
    key, public = Ed25519PrivateKey.generate(), path.with_name(path.name + ".pub")
    if taken := [str(file) for file in (path, public) if file.exists()]:
        raise ConfigError(f"key: {taken[0]} is there already, and a key is never replaced; choose another name")
    password = os.environ.get(PASSWORD, "").encode()
    lock = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock)
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # created with its mode: between a creation and a later chmod others could open it
        for file, content, mode in ((path, secret, 0o600), (public, shown, 0o644)):
            with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
    except OSError as error:
        raise ConfigError(f"key: cannot write {path}: {error.strerror or error}; choose another place") from error
    return fingerprint(key.public_key())


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ConfigError: no such file, not an Ed25519 private key, or a password that is missing or wrong.
    """
    data, password = _read(path), os.environ.get(PASSWORD, "").encode() or None
    if b"ENCRYPTED" not in data.partition(b"\n")[0]:
        password = None  # the variable may be meant for another key
    elif password is None:
        raise ConfigError(f"key: {path} is encrypted; put its password into the environment variable {PASSWORD}")
    try:
        key = pem.load_pem_private_key(data, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = f"the password in {PASSWORD} does not open it" if password else "it is no private key in PEM"
        raise ConfigError(f"key: {path} cannot be read: {why}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"key: {path} holds a key of another kind; Ed25519 is needed, fedlora makes one")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        ConfigError: no such file, or not an Ed25519 public key.
    """
    data = _read(path)
    try:
        key = pem.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = "; it is a private key: give its .pub" if b"PRIVATE KEY" in data else ""
        raise ConfigError(f"key: {path} is no public key in PEM{hint}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"key: {path} holds a public key of another kind; Ed25519 is needed")
    return key


def authorised(places: Iterable[Path]) -> Keys:
    """Public keys by fingerprint, from files and from folders of ``*.pub`` files.

    Raises:
        ConfigError: if a place is not there, a file holds no such key, or there is none at all.
    """
    found: dict[str, Ed25519PublicKey] = {}
    listed = list(places)
    for place in listed:
        for path in sorted(place.glob("*.pub")) if place.is_dir() else [place]:
            key = load_public(path)
            found[fingerprint(key)] = key
    if not found:
        where = ", ".join(map(str, listed)) or "no place was given"
        raise ConfigError(f"key: there is no authorised key ({where}); give public keys (*.pub) or a folder of them")
    return found


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def sign(key: Ed25519PrivateKey, value: Any) -> str:
    """Signature over the canonical JSON of a value, in hex."""
    return key.sign(canonical(value)).hex()


def is_signed(key: Ed25519PublicKey, signature: str, value: Any) -> bool:
    """Whether this is that key's signature over the value."""
    try:
        key.verify(bytes.fromhex(signature), canonical(value))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"key: {path} cannot be read: {error.strerror or error}") from error
