"""Content digests (image-spec, descriptor.md § Digests) and their verification.

`Digest` is always a validated value: a registered algorithm and lower-case hex of exactly the right length, so it can
become a file name without further thought (CVE-2024-3727 is what happens otherwise).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Protocol

from proxy.errors import InvalidDigest

#: algorithm -> length of its hex. The spec's two registered algorithms; others are refused.
ALGORITHMS = {"sha256": 64, "sha512": 128}

_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """`algorithm` and lower-case `hex`. Make one with `Digest.parse` or `Digest.of`; both only give valid values."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """The digest that `text` spells. Raises InvalidDigest for anything else (image-spec § Digests)."""
        algorithm, colon, digits = text.partition(":")
        length = ALGORITHMS.get(algorithm)
        if not colon or length is None or len(digits) != length or not _HEX.fullmatch(digits):
            raise InvalidDigest(
                f"{text[:150]!r} is not a digest: expected sha256:<64 hex> or sha512:<128 hex>, lower case"
            )
        return cls(algorithm, digits)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of `content`."""
        return cls(algorithm, hashlib.new(algorithm, content).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class _Hash(Protocol):
    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class Verifier:
    """Hashes a body as it passes: `feed` the pieces in order, then ask `agrees`.

    `feed` releases the interpreter lock for large pieces, so it belongs in a worker thread, in pieces of 256 KiB or
    more.
    """

    __slots__ = ("_hash", "digest", "n_bytes")

    def __init__(self, digest: Digest) -> None:
        self.digest = digest
        self.n_bytes = 0
        self._hash: _Hash = hashlib.new(digest.algorithm)

    def feed(self, piece: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the body."""
        self._hash.update(piece)
        self.n_bytes += len(piece)

    def agrees(self) -> bool:
        """Whether all bytes fed so far hash to the digest."""
        return self._hash.hexdigest() == self.digest.hex
