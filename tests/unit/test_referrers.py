"""The referrers list (distribution-spec § Listing Referrers)."""

from __future__ import annotations

import json

import pytest

from proxy.errors import InvalidManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.mediatypes import OCI_INDEX, OCI_MANIFEST
from proxy.oci.names import Tag
from proxy.oci.referrers import build, descriptors_of, fallback_tag, filtered, merge


def referrer(n: int, artifact_type: str = "application/sbom", **annotations: str) -> Descriptor:
    return Descriptor(
        OCI_MANIFEST, Digest("sha256", f"{n:064x}"), n, artifact_type=artifact_type, annotations=annotations
    )


@pytest.mark.parametrize(
    ("digest", "tag"),
    [
        (Digest("sha256", "a" * 64), "sha256-" + "a" * 64),
        (Digest("sha512", "a" * 64 + "b" * 64), "sha512-" + "a" * 64),
    ],
    ids=["sha256", "sha512 is cut"],
)
def test_the_fallback_tag_is_the_digest_cut_to_what_a_tag_may_be(digest: Digest, tag: str) -> None:
    """distribution-spec § Referrers Tag Schema."""
    assert fallback_tag(digest) == Tag(tag)


def test_a_list_is_an_index_and_reads_back() -> None:
    """distribution-spec § Listing Referrers: an image index with artifactType and annotations."""
    listed = (referrer(1, a="b"), referrer(2, "application/signature"))
    body = build(listed)
    assert descriptors_of(body) == listed
    assert Manifest.parse(body, OCI_INDEX).children == listed


def test_no_referrers_are_an_empty_list() -> None:
    """distribution-spec: 200 with an empty index, never 404."""
    assert json.loads(build(())) == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    assert descriptors_of(build(())) == ()


@pytest.mark.parametrize("body", [b'{"manifests":null}', b'{"schemaVersion":2}'], ids=["null", "absent"])
def test_an_empty_list_may_be_written_in_other_ways(body: bytes) -> None:
    """Go writes null for a list that was never filled."""
    assert descriptors_of(body) == ()


def test_one_bad_entry_does_not_hide_the_others() -> None:
    """A broken descriptor is left out."""
    good = referrer(1).to_json()
    body = json.dumps({"manifests": [{}, good, None, {**good, "digest": "x"}, {**good, "size": -1}]}).encode()
    assert descriptors_of(body) == (referrer(1),)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"manifests":{}}', b'{"manifests":"x"}', b"[" * 100_000])
def test_what_is_no_list_is_refused(body: bytes) -> None:
    """An error page is not an empty list: "absent" and "could not find out" differ."""
    with pytest.raises(InvalidManifest):
        descriptors_of(body)


def test_a_filter_keeps_one_type_and_no_filter_keeps_all() -> None:
    """distribution-spec § Listing Referrers, artifactType."""
    listed = (referrer(1, "a/b"), referrer(2, "c/d"), referrer(3, "a/b"))
    assert filtered(listed, "a/b") == (listed[0], listed[2])
    assert filtered(listed, "x/y") == ()
    assert filtered(listed, "") == listed


def test_lists_are_merged_by_digest_and_the_first_counts() -> None:
    """Upstream's list and what is known here name the same referrer once."""
    assert merge((referrer(1), referrer(2)), (referrer(2, "other"), referrer(3)), ()) == (
        referrer(1),
        referrer(2),
        referrer(3),
    )
    assert merge() == ()
