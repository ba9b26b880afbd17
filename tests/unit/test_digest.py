"""Digests: only valid values exist, and only whole bodies agree (INV-1, INV-3)."""

from __future__ import annotations

import hashlib

import pytest

from proxy.errors import BadRequest, InvalidDigest
from proxy.oci.digest import ALGORITHMS, Digest, Verifier

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_a_registered_digest_is_read_and_written_the_same() -> None:
    """image-spec § Digests: algorithm, colon, lower-case hex."""
    digest = Digest.parse(f"sha256:{HELLO}")
    assert (digest.algorithm, digest.hex, str(digest)) == ("sha256", HELLO, f"sha256:{HELLO}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_registered_algorithm_can_be_computed_and_parsed(algorithm: str) -> None:
    """image-spec § Registered algorithms: sha256 and sha512."""
    digest = Digest.of(b"hello", algorithm)
    assert Digest.parse(str(digest)) == digest
    assert digest.hex == hashlib.new(algorithm, b"hello").hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("sha256", id="an algorithm alone"),
        pytest.param("sha256:", id="no hex"),
        pytest.param(HELLO, id="hex alone"),
        pytest.param(f"sha256-{HELLO}", id="a dash for the colon"),
        pytest.param(f"sha256:{HELLO[:-1]}", id="one digit short"),
        pytest.param(f"sha256:{HELLO}0", id="one digit long"),
        pytest.param(f"sha256:{HELLO.upper()}", id="upper-case hex"),
        pytest.param(f"SHA256:{HELLO}", id="upper-case algorithm"),
        pytest.param(f"sha512:{HELLO}", id="the length of another algorithm"),
        pytest.param(f"md5:{HELLO[:32]}", id="an algorithm that is not registered"),
        pytest.param(f"sha256:{HELLO}\n", id="a trailing newline"),
        pytest.param(f"sha256:{HELLO[:-1]}\n", id="a newline for the last digit"),
        pytest.param(f"sha256:../../../../{'0' * 52}", id="a path for hex (CVE-2024-3727)"),
        pytest.param("sha256:" + "٠" * 64, id="digits of another script"),
        pytest.param(f"sha256:{HELLO[:-1]}\0", id="a NUL for the last digit"),
        pytest.param(f"sha256::{HELLO[:-1]}", id="two colons"),
    ],
)
def test_anything_else_is_not_a_digest(text: str) -> None:
    """A digest becomes a file name without further thought, so nothing else may pass (CVE-2024-3727)."""
    with pytest.raises(InvalidDigest) as caught:
        Digest.parse(text)
    assert isinstance(caught.value, BadRequest)


def test_the_sentence_about_a_huge_digest_is_short() -> None:
    """What a client sends comes back cut: an error is not an amplifier."""
    with pytest.raises(InvalidDigest) as caught:
        Digest.parse("sha256:" + "x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("pieces", [[b"hello"], [b"he", b"", b"llo"], [bytearray(b"hel"), memoryview(b"lo")]])
def test_a_verifier_agrees_after_all_bytes_however_cut(pieces: list[bytes]) -> None:
    """INV-3: agreement is about the whole body."""
    verifier = Verifier(Digest.of(b"hello"))
    for piece in pieces:
        verifier.feed(piece)
    assert verifier.agrees()
    assert verifier.n_bytes == 5


@pytest.mark.parametrize("body", [b"", b"hell", b"hellO", b"hello!"], ids=["empty", "short", "altered", "trailing"])
def test_a_verifier_does_not_agree_with_other_bytes(body: bytes) -> None:
    """INV-3: a short, altered or longer body is not the blob."""
    verifier = Verifier(Digest.of(b"hello"))
    verifier.feed(body)
    assert not verifier.agrees()


def test_a_verifier_may_be_asked_on_the_way() -> None:
    """Asking does not end the hash."""
    verifier = Verifier(Digest.of(b"hello"))
    verifier.feed(b"hel")
    assert not verifier.agrees()
    verifier.feed(b"lo")
    assert verifier.agrees()
