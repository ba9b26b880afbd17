"""Detached signatures of a bundle's contents: Ed25519 (RFC 8032), keys in PEM as OpenSSL writes them.

What is signed is `breakwater.json`, byte for byte, which has the digest of everything else and comes first: so a bundle
is judged before anything of it is kept, whatever packs or splits it. `openssl pkeyutl -verify -rawin` checks the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from proxy.errors import BadArchive, BadRequest


def sign(contents: bytes, key: Path) -> bytes:
    """The signature: 64 bytes. Raises BadRequest for a file that is not an Ed25519 private key in PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(_read(key), password=None)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"{key} is not a private key in PEM without a password: {error}") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise BadRequest(f"{key} is not an Ed25519 key; make one with: openssl genpkey -algorithm ed25519 -out KEY")
    return loaded.sign(contents)


def check(contents: bytes, signature: bytes, key: Path) -> str:
    """Who signed: the public key's fingerprint. Raises BadArchive for a signature that is not this key's, BadRequest
    for a file that is not an Ed25519 public key in PEM."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        loaded = load_pem_public_key(_read(key))
    except ValueError as error:
        raise BadRequest(f"{key} is not a public key in PEM: {error}") from error
    if not isinstance(loaded, Ed25519PublicKey):
        raise BadRequest(f"{key} is not an Ed25519 key")
    try:
        loaded.verify(signature, contents)
    except InvalidSignature:
        raise BadArchive(f"the signature is not of this bundle, or not by {key}; nothing was read further") from None
    raw = loaded.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return f"ed25519:{hashlib.sha256(raw).hexdigest()[:16]}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRequest(f"cannot read the key {path}: {error.strerror}") from error
