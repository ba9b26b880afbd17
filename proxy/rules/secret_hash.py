"""Secrets of robots, as they may be written down: scrypt (RFC 7914) in the PHC string format.

    $scrypt$ln=14,r=8,p=1$<salt>$<hash>        base64 without padding

Slow on purpose, some 50 ms and 16 MiB a guess, so it belongs in a worker thread and its answers are worth remembering.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass

#: The cost of new hashes: RFC 7914's for a log-in, with 16 MiB. Secrets are made here, with 256 bits of chance: more
#: would only cost the nodes.
LOG_N, R, P = 14, 8, 1
#: The length of salts and hashes, in bytes.
SALT_BYTES, HASH_BYTES = 16, 32
#: Costs beyond these would let a settings file stall the process.
MAX_LOG_N, MAX_R, MAX_P = 20, 32, 16

_PHC = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{16,88})\$([A-Za-z0-9+/]{22,88})")


@dataclass(frozen=True, slots=True, repr=False)
class SecretHash:
    """One hash. `text` is how it is written; `mark` tells two apart without giving either away."""

    text: str
    log_n: int
    r: int
    p: int
    salt: bytes
    hash: bytes

    @classmethod
    def parse(cls, text: str) -> SecretHash:
        """The hash that `text` spells. Raises ValueError with a sentence that does not repeat it."""
        found = _PHC.fullmatch(text)
        if found is None:
            raise ValueError("this is not a hash of a secret; `breakwater robot create` makes one: $scrypt$ln=…")
        log_n, r, p = (int(number) for number in found.groups()[:3])
        if not (1 <= log_n <= MAX_LOG_N and 1 <= r <= MAX_R and 1 <= p <= MAX_P):
            raise ValueError(f"the costs of this hash are out of bounds: at most ln={MAX_LOG_N}, r={MAX_R}, p={MAX_P}")
        return cls(text, log_n, r, p, _decoded(found[4]), _decoded(found[5]))

    @classmethod
    def of(cls, secret: str, salt: bytes) -> SecretHash:
        """The hash of `secret`. `salt` is chance from outside, SALT_BYTES of it."""
        hashed = _scrypt(secret, salt, LOG_N, R, P, HASH_BYTES)
        text = f"$scrypt$ln={LOG_N},r={R},p={P}${_encoded(salt)}${_encoded(hashed)}"
        return cls(text, LOG_N, R, P, salt, hashed)

    @property
    def mark(self) -> str:
        """A few letters that change with the hash: a token that carries them dies with the secret it was given for."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def matches(self, secret: str) -> bool:
        """Whether this is the secret. Slow; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(_scrypt(secret, self.salt, self.log_n, self.r, self.p, len(self.hash)), self.hash)


def _scrypt(secret: str, salt: bytes, log_n: int, r: int, p: int, length: int) -> bytes:
    needed = 128 * r * ((1 << log_n) + p + 2)
    return hashlib.scrypt(
        secret.encode("utf-8", "surrogatepass"), salt=salt, n=1 << log_n, r=r, p=p, maxmem=2 * needed, dklen=length
    )


def _encoded(some: bytes) -> str:
    return base64.b64encode(some).decode("ascii").rstrip("=")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError("the salt or the hash is not base64") from None
