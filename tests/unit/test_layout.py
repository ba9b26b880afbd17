"""Documents of an image layout: what is written reads back, and what is none is refused."""

from __future__ import annotations

import json

import pytest

from proxy.errors import BadArchive
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.layout import Contents, DockerImage
from proxy.oci.mediatypes import OCI_INDEX, OCI_MANIFEST

ONE, TWO = Digest.of(b"one"), Digest.of(b"two", "sha512")


def test_blobs_are_named_after_their_digests() -> None:
    """image-layout.md § Blobs."""
    assert layout.blob_name(ONE) == f"blobs/sha256/{ONE.hex}"
    assert [layout.maybe_blob(layout.blob_name(digest)) for digest in (ONE, TWO)] == [ONE, TWO]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blobs",
        "blobs/sha256/",
        f"blobs/sha256/{ONE.hex}\n",
        f"blobs/sha256/{ONE.hex}/",
        f"blobs/sha256/{ONE.hex[:-1]}",
        f"blobs/sha256/{ONE.hex.upper()}",
        f"blobs/sha512/{ONE.hex}",
        f"blobs/md5/{ONE.hex}",
        f"/blobs/sha256/{ONE.hex}",
        f"x/../blobs/sha256/{ONE.hex}",
    ],
)
def test_other_names_are_no_blobs(name: str) -> None:
    """CVE-2024-3727: a digest that was not validated becomes a path."""
    assert layout.maybe_blob(name) is None


def test_an_index_reads_back() -> None:
    """image-layout.md § index.json file: descriptors with annotations, in order, the same bytes each time."""
    entries = (
        Descriptor(OCI_INDEX, ONE, 3, annotations={layout.REF_NAME: "registry.k8s.io/pause:3.10", "a": "ü"}),
        Descriptor(OCI_MANIFEST, TWO, 4),
    )
    body = layout.index_json(entries)
    assert layout.read_index(body) == entries
    assert layout.index_json(layout.read_index(body)) == body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"manifests": {}}',
        b'{"manifests": [1]}',
        b'{"manifests": [{"mediaType": "x", "digest": "sha256:../../etc", "size": 1}]}',
        b'{"manifests": [], "manifests": []}',
        b'{"manifests": ' + b"[" * 100_000,
    ],
)
def test_what_is_no_index_is_refused(body: bytes) -> None:
    """With a sentence, whatever it is."""
    with pytest.raises(BadArchive, match=r"index\.json"):
        layout.read_index(body)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"imageLayoutVersion": 1}', b'{"imageLayoutVersion": "2.0.0"}'])
def test_another_layout_is_refused(body: bytes) -> None:
    """image-layout.md § oci-layout file."""
    layout.check_layout(layout.LAYOUT)
    with pytest.raises(BadArchive, match="oci-layout"):
        layout.check_layout(body)


def test_contents_read_back() -> None:
    """What a signature is of."""
    contents = Contents({ONE: 3}, {TWO: 4}, frozenset({ONE}), {"index.json": ONE}, 1.5, 2)
    assert Contents.parse(contents.to_json()) == contents
    assert contents.n_bytes == 3


@pytest.mark.parametrize(
    "change",
    [
        {"breakwater": 2},
        {"members": {"sha256:x": 1}},
        {"members": {str(ONE): -1}},
        {"members": {str(ONE): True}},
        {"members": []},
        {"created_at": "soon"},
        {"images": 1e400},
        {"documents": {"index.json": 1}},
        {"left_out": None},
        {"members": {f"sha256:{n:064x}": 1 for n in range(layout.MAX_MEMBERS + 1)}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_contents_that_are_none_are_refused(change: dict[str, object]) -> None:
    """A document is data until it is read as something."""
    document = json.loads(Contents({ONE: 3}).to_json()) | change
    with pytest.raises(BadArchive):
        Contents.parse(json.dumps(document).encode())


def test_docker_images_read_back() -> None:
    """The manifest.json of docker save."""
    images = (DockerImage("config.json", ("a/layer.tar", "b/layer.tar"), ("docker.io/library/x:1",)),)
    assert layout.read_docker(layout.docker_json(images)) == images
    for body in (b"", b"{}", b"[1]", b'[{"Config": "x"}]', b'[{"Config": 1, "Layers": 2}]', b"[" * 100_000):
        if body != b"{}":
            with pytest.raises(BadArchive):
                layout.read_docker(body)
