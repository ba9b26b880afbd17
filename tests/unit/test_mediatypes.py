"""Media types: the closed list."""

from __future__ import annotations

import pytest

from proxy.oci import mediatypes
from proxy.oci.mediatypes import ACCEPT, INDEX_TYPES, KNOWN, MANIFEST_TYPES, SCHEMA1_TYPES, bare, is_index, is_manifest


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ""),
        ("application/json", "application/json"),
        ("Application/JSON; charset=utf-8", "application/json"),
        ("  text/plain ;x", "text/plain"),
        (";", ""),
    ],
)
def test_parameters_and_case_do_not_make_a_type(header: str, expected: str) -> None:
    """RFC 9110 §8.3.1: types compare without case; some servers append a charset."""
    assert bare(header) == expected


def test_we_ask_for_exactly_what_we_can_serve() -> None:
    """An upstream that honours Accept never sends what would be refused."""
    assert set(ACCEPT.split(", ")) == KNOWN
    assert "*/*" not in ACCEPT
    assert not SCHEMA1_TYPES & KNOWN


def test_every_known_type_is_an_index_or_a_manifest() -> None:
    """No type is both (CVE-2021-41190)."""
    assert MANIFEST_TYPES | INDEX_TYPES == KNOWN
    assert not MANIFEST_TYPES & INDEX_TYPES
    assert all(is_index(found) for found in INDEX_TYPES)
    assert not any(is_index(found) for found in MANIFEST_TYPES)
    assert all(is_manifest(found) for found in KNOWN)
    assert not is_manifest(mediatypes.OCI_EMPTY)
