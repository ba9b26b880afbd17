"""Manifests: what they are, what they name, and what is refused (INV-9, CVE-2021-41190)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.errors import InvalidManifest
from proxy.oci.descriptor import Platform
from proxy.oci.manifest import MAX_MANIFEST_BYTES, Manifest, read_object
from proxy.oci.mediatypes import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    KNOWN,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
)


def descriptor(n: int, media_type: str = "application/octet-stream", **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{n:064x}", "size": n, **more}


IMAGE: dict[str, Any] = {"schemaVersion": 2, "config": descriptor(1), "layers": [descriptor(2), descriptor(3)]}
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "manifests": [descriptor(4, OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64"}), descriptor(5)],
}


def parse(document: Any, content_type: str = "") -> Manifest:
    return Manifest.parse(json.dumps(document).encode(), content_type)


def sizes(manifest: Manifest) -> list[int]:
    return [named.size for named in manifest.names]


def test_an_image_manifest_names_its_config_and_layers() -> None:
    """image-spec, manifest.md: config first, then the layers in their order."""
    manifest = parse(IMAGE)
    assert sizes(manifest) == [1, 2, 3]
    assert not manifest.is_index
    assert manifest.children == ()


def test_an_index_names_its_children() -> None:
    """image-spec, image-index.md: manifests, with their platforms."""
    manifest = parse(INDEX)
    assert sizes(manifest) == [4, 5]
    assert manifest.is_index
    assert manifest.config is None
    assert manifest.children[0].platform == Platform("linux", "amd64")


def test_a_subject_is_known_but_not_part_of_the_image() -> None:
    """image-spec, manifest.md § subject: what it refers to need not exist."""
    manifest = parse({**IMAGE, "subject": descriptor(9, OCI_MANIFEST)})
    assert manifest.subject is not None
    assert manifest.subject.size == 9
    assert sizes(manifest) == [1, 2, 3]


@pytest.mark.parametrize("document", [IMAGE, INDEX], ids=["image", "index"])
def test_artifact_type_and_annotations_are_kept(document: dict[str, Any]) -> None:
    """distribution-spec § Listing Referrers: both are copied into the list."""
    manifest = parse({**document, "artifactType": "application/sbom", "annotations": {"a": "b", "n": 1}})
    assert manifest.artifact_type == manifest.referrer_type == "application/sbom"
    assert manifest.annotations == {"a": "b"}


def test_without_an_artifact_type_the_config_says_what_it_is() -> None:
    """distribution-spec § Listing Referrers: fall back to the config's media type; an index has none."""
    assert parse(IMAGE).referrer_type == "application/octet-stream"
    assert parse(IMAGE).artifact_type == ""
    assert parse(INDEX).referrer_type == ""


@pytest.mark.parametrize(
    ("document", "content_type", "expected"),
    [
        pytest.param({**IMAGE, "mediaType": DOCKER_MANIFEST}, "", DOCKER_MANIFEST, id="the document says"),
        pytest.param({**IMAGE, "mediaType": OCI_MANIFEST}, "text/plain", OCI_MANIFEST, id="over a useless header"),
        pytest.param({**INDEX, "mediaType": OCI_INDEX}, OCI_INDEX, OCI_INDEX, id="document and header agree"),
        pytest.param(IMAGE, DOCKER_MANIFEST, DOCKER_MANIFEST, id="the header says"),
        pytest.param(IMAGE, f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST, id="the header has parameters"),
        pytest.param(INDEX, OCI_INDEX.upper(), OCI_INDEX, id="the header is in upper case"),
        pytest.param({**INDEX, "mediaType": ""}, DOCKER_INDEX, DOCKER_INDEX, id="an empty mediaType is none"),
        pytest.param({**INDEX, "mediaType": None}, "", OCI_INDEX, id="a null mediaType is none"),
        pytest.param(IMAGE, "", OCI_MANIFEST, id="nobody says: an image by its shape"),
        pytest.param(INDEX, "application/json", OCI_INDEX, id="nobody says: an index by its shape"),
    ],
)
def test_the_document_then_the_header_then_the_shape_decide(
    document: dict[str, Any], content_type: str, expected: str
) -> None:
    """The type that is stored and served is one of the known ones, whatever upstream sent along."""
    assert parse(document, content_type).media_type == expected
    assert expected in KNOWN


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        pytest.param({**IMAGE, **INDEX}, "", id="manifests beside config and layers"),
        pytest.param({**INDEX, "layers": []}, "", id="manifests beside empty layers"),
        pytest.param({**IMAGE, "manifests": None}, "", id="manifests that are null beside a config"),
        pytest.param({**INDEX, "config": None}, "", id="a config that is null beside manifests"),
        pytest.param({**IMAGE, "mediaType": OCI_INDEX}, "", id="an image called an index"),
        pytest.param({**INDEX, "mediaType": OCI_MANIFEST}, "", id="an index called an image"),
        pytest.param(IMAGE, OCI_INDEX, id="an image sent as an index"),
        pytest.param(INDEX, DOCKER_MANIFEST, id="an index sent as an image"),
        pytest.param({**IMAGE, "mediaType": OCI_MANIFEST}, DOCKER_MANIFEST, id="OCI sent as Docker"),
        pytest.param({**IMAGE, "Manifests": []}, "", id="a key that Go would read without its case"),
        pytest.param({**IMAGE, "layerſ": []}, "", id="a key that Go would fold from Unicode"),
        pytest.param({**IMAGE, "config": {**descriptor(1), "Digest": "sha256:x"}}, "", id="the same in a descriptor"),
    ],
)
def test_a_document_that_readers_would_understand_differently_is_refused(
    document: dict[str, Any], content_type: str
) -> None:
    """CVE-2021-41190, GHSA-mc8v-mgrf-8f4m: one document, one meaning."""
    with pytest.raises(InvalidManifest):
        parse(document, content_type)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"schemaVersion":2,"manifests":[],"manifests":[]}', id="at the top"),
        pytest.param(b'{"schemaVersion":2,"manifests":[],"annotations":{"a":"b","a":"c"}}', id="further down"),
    ],
)
def test_a_key_given_twice_is_refused(body: bytes) -> None:
    """RFC 8259 §4: which of the two counts depends on the reader."""
    with pytest.raises(InvalidManifest, match="twice"):
        Manifest.parse(body, OCI_INDEX)


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        pytest.param({"schemaVersion": 1, "fsLayers": [], "history": []}, "", id="by its version"),
        pytest.param({"schemaVersion": 1}, DOCKER_SCHEMA1_SIGNED, id="by its header"),
        pytest.param({"schemaVersion": 1, "mediaType": DOCKER_SCHEMA1}, "", id="by its own type"),
        pytest.param({**IMAGE, "fsLayers": []}, "", id="by its layers, beside the new ones"),
    ],
)
def test_schema_1_is_refused_with_what_to_do(document: dict[str, Any], content_type: str) -> None:
    """Its digest is not that of its bytes, and people need to hear that pushing again is the way out."""
    with pytest.raises(InvalidManifest, match=r"schema 1 .* republish"):
        parse(document, content_type)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({}, id="nothing at all"),
        pytest.param({"schemaVersion": 2}, id="no shape"),
        pytest.param({**IMAGE, "schemaVersion": 3}, id="a later version"),
        pytest.param({**IMAGE, "schemaVersion": "2"}, id="a version in quotes"),
        pytest.param({**IMAGE, "schemaVersion": 2.0}, id="a fractional version"),
        pytest.param({**IMAGE, "schemaVersion": None}, id="no version"),
        pytest.param({**IMAGE, "mediaType": "application/vnd.oci.artifact.manifest.v1+json"}, id="a withdrawn type"),
        pytest.param({**IMAGE, "mediaType": "text/html"}, id="a type to trick a browser with"),
        pytest.param({**IMAGE, "mediaType": [OCI_MANIFEST]}, id="a list of types"),
        pytest.param({**IMAGE, "config": None}, id="no config"),
        pytest.param({**IMAGE, "config": []}, id="a list for a config"),
        pytest.param({**IMAGE, "layers": {}}, id="an object for layers"),
        pytest.param({**IMAGE, "layers": [None]}, id="a null layer"),
        pytest.param({**IMAGE, "layers": [{**descriptor(1), "digest": "sha256:../../x"}]}, id="a path for a digest"),
        pytest.param({**IMAGE, "layers": [{**descriptor(1), "size": -1}]}, id="a negative size"),
        pytest.param({**IMAGE, "subject": "sha256:x"}, id="a subject that is no descriptor"),
        pytest.param({**INDEX, "manifests": "x"}, id="a string for manifests"),
    ],
)
def test_what_is_no_manifest_is_refused_as_upstreams_fault(document: dict[str, Any]) -> None:
    """InvalidManifest and nothing else: a broken digest inside is not the client's bad request."""
    with pytest.raises(InvalidManifest):
        parse(document)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>", id="an error page"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}{}", id="two documents"),
        pytest.param(b'{"a":NaN}', id="NaN"),
        pytest.param(b'{"a":-Infinity}', id="Infinity"),
        pytest.param(b'{"a":"\xff"}', id="not UTF-8"),
        pytest.param(b"\xef\xbb\xbf{}", id="a byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"a":"\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"\\uDFFF":1}', id="half a surrogate pair in a key"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", id="a number too long to read"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="nested objects without end"),
        pytest.param(b"[" * 1_000_000, id="nested lists without end"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """T10: whatever comes from upstream, the answer is InvalidManifest."""
    with pytest.raises(InvalidManifest):
        read_object(body)


def test_escaped_characters_beyond_the_basic_plane_are_fine() -> None:
    """A whole surrogate pair is how JSON writers in ASCII spell an emoji."""
    assert read_object(b'{"a":"\\ud83d\\ude80"}') == {"a": "\N{ROCKET}"}


def test_the_largest_manifest_is_read_and_one_byte_more_is_not() -> None:
    """distribution-spec § Pushing Manifests: 4 MiB must work; we stop there."""
    room = MAX_MANIFEST_BYTES - len(json.dumps({**INDEX, "annotations": {"a": ""}}).encode())
    body = json.dumps({**INDEX, "annotations": {"a": "x" * room}}).encode()
    assert len(body) == MAX_MANIFEST_BYTES
    assert Manifest.parse(body, OCI_INDEX).is_index
    with pytest.raises(InvalidManifest, match="limit"):
        Manifest.parse(body + b" ", OCI_INDEX)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        pytest.param({**IMAGE, "layers": []}, [1], id="an image without layers"),
        pytest.param({**IMAGE, "layers": None}, [1], id="layers written as null"),
        pytest.param({"schemaVersion": 2, "config": descriptor(1)}, [1], id="no layers at all"),
        pytest.param({"schemaVersion": 2, "manifests": []}, [], id="an empty index"),
        pytest.param({"schemaVersion": 2, "manifests": None}, [], id="manifests written as null"),
        pytest.param({**IMAGE, "subject": None}, [1, 2, 3], id="a subject written as null"),
        pytest.param({**IMAGE, "org.example.extra": {"x": [1]}}, [1, 2, 3], id="fields we do not know"),
        pytest.param({**IMAGE, "annotations": []}, [1, 2, 3], id="annotations of the wrong type"),
        pytest.param({**IMAGE, "layers": [descriptor(2), descriptor(2)]}, [1, 2, 2], id="the same layer twice"),
        pytest.param({**IMAGE, "layers": [descriptor(2, data="aGk=")]}, [1, 2], id="embedded data"),
        pytest.param({**INDEX, "manifests": [descriptor(6, OCI_INDEX)]}, [6], id="an index in an index"),
        pytest.param({**IMAGE, "config": descriptor(1, OCI_EMPTY)}, [1, 2, 3], id="an artifact with an empty config"),
    ],
)
def test_unusual_but_lawful_documents_are_read(document: dict[str, Any], names: list[int]) -> None:
    """The data shapes of the conformance suite, and what Go writes for empty lists."""
    assert sizes(parse(document)) == names
