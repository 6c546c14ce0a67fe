"""Certificates for a SuperLink and keys for SuperNodes, for those who have no authority of their own."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError, RunFolderError

CERTIFICATE_DAYS = 825


def write_certificates(folder: Path, hosts: list[str]) -> list[Path]:
    """An authority and a server certificate for these names and addresses: ``ca.crt``, ``server.pem``, ``server.key``.

    The authority's own key is not kept: nobody can sign another certificate with it.

    Raises:
        RunFolderError: if they cannot be written, or are there already.
    """
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora federation")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    root = (
        _signed(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    leaf = (
        _signed(issuer, subject, server.public_key())
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority, hashes.SHA384())
    )
    return _write(
        {
            folder / "ca.crt": root.public_bytes(Encoding.PEM),
            folder / "server.pem": leaf.public_bytes(Encoding.PEM),
            folder / "server.key": server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        }
    )


def write_node_key(path: Path) -> list[Path]:
    """A SuperNode's key pair: the private half at ``path``, the public one, to be registered, at ``path.pub``.

    Raises:
        RunFolderError: if they cannot be written, or are there already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return _write({path: private, path.with_name(f"{path.name}.pub"): public + b"\n"})


def read_keys(files: Mapping[str, str]) -> dict[str, bytes]:
    """Public keys in PEM, as Flower tells them of its nodes.

    Args:
        files: in OpenSSH's form or in PEM, by client.

    Raises:
        ConfigError: if one cannot be read.
    """
    keys = {}
    for client, name in files.items():
        try:
            content = Path(name).expanduser().read_bytes()
            key = load_pem_public_key(content) if b"-----BEGIN" in content else load_ssh_public_key(content)
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"flower.keys: {name}, the key of {client}, cannot be read: {error}") from error
        keys[client] = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return keys


def _signed(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
    builder = builder.not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(contents: dict[Path, bytes]) -> list[Path]:
    for path in contents:
        if path.exists():
            raise RunFolderError(f"{path} is there already; whoever uses it would be locked out, so delete it yourself")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # before the secret is in it
            path.write_bytes(content)
            if path.suffix in (".crt", ".pem", ".pub"):
                path.chmod(0o644)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    return list(contents)
