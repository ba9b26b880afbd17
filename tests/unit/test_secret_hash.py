"""rules/secret_hash.py: what is written down of a secret."""

from __future__ import annotations

import hashlib

import pytest

from proxy.rules.secret_hash import SALT_BYTES, SecretHash

SALT = bytes(range(SALT_BYTES))


def test_a_hash_matches_its_secret_and_no_other() -> None:
    """Also after it was written down and read again."""
    one = SecretHash.parse(SecretHash.of("bw_secret", SALT).text)
    assert one.matches("bw_secret")
    assert not any(one.matches(other) for other in ("bw_Secret", "bw_secret ", "", "bw_secre"))


def test_the_hash_is_plain_scrypt_that_others_can_check() -> None:
    """RFC 7914, in the PHC string format."""
    text = SecretHash.of("x", SALT).text
    assert text.startswith("$scrypt$ln=14,r=8,p=1$AAECAwQFBgcICQoLDA0ODw$")
    raw = hashlib.scrypt(b"x", salt=SALT, n=1 << 14, r=8, p=1, maxmem=64 << 20, dklen=32)
    assert SecretHash.parse(text).hash == raw


def test_the_same_secret_with_another_salt_has_another_hash_and_mark() -> None:
    """Two robots with one secret cannot be told from the file."""
    one, other = SecretHash.of("x", SALT), SecretHash.of("x", SALT[::-1])
    assert one.text != other.text and one.mark != other.mark


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("hunter2", id="a secret in the open"),
        pytest.param("$2b$12$abcdefghijklmnopqrstuv", id="another kind of hash"),
        pytest.param("$scrypt$ln=30,r=8,p=1$AAECAwQFBgcICQoLDA0ODw$AAECAwQFBgcICQoLDA0ODw", id="would take a day"),
        pytest.param("$scrypt$ln=14,r=8,p=1$AAECAwQFBgcICQoLDA0ODw$", id="no hash"),
        pytest.param("$scrypt$ln=14,r=8,p=1$AAECAwQFBgcICQoLDA0ODwAAA$AAECAwQFBgcICQoLDA0ODw", id="no base64"),
    ],
)
def test_what_is_no_hash_is_refused_and_not_repeated(text: str) -> None:
    """The sentence goes into a log, and somebody may have put the secret itself there."""
    with pytest.raises(ValueError) as caught:
        SecretHash.parse(text)
    assert not text or text not in str(caught.value)
