"""Descriptors (image-spec, descriptor.md)."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import InvalidDigest, InvalidManifest
from proxy.oci.descriptor import Descriptor, Platform
from proxy.oci.digest import Digest
from proxy.oci.mediatypes import OCI_MANIFEST

HEX = "0" * 64
PLAIN: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{HEX}", "size": 7}
FULL: dict[str, Any] = {
    **PLAIN,
    "platform": {"architecture": "arm64", "os": "linux", "variant": "v8"},
    "artifactType": "application/x",
    "annotations": {"a": "b"},
    "urls": ["https://elsewhere.test/x"],
}


def test_every_field_is_read() -> None:
    """image-spec, descriptor.md § Properties."""
    assert Descriptor.from_json(FULL) == Descriptor(
        media_type=OCI_MANIFEST,
        digest=Digest("sha256", HEX),
        size=7,
        platform=Platform("linux", "arm64", "v8"),
        artifact_type="application/x",
        annotations={"a": "b"},
        urls=("https://elsewhere.test/x",),
    )


@pytest.mark.parametrize("value", [PLAIN, FULL], ids=["plain", "full"])
def test_what_is_written_is_what_was_read(value: dict[str, Any]) -> None:
    """to_json is the inverse of from_json and leaves out what says nothing."""
    assert Descriptor.from_json(value).to_json() == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="null"),
        pytest.param([], id="a list"),
        pytest.param("sha256:x", id="a string"),
        pytest.param({}, id="an empty object"),
        pytest.param({**PLAIN, "mediaType": 1}, id="a number for the media type"),
        pytest.param({**PLAIN, "digest": None}, id="no digest"),
        pytest.param({**PLAIN, "digest": "sha256:zz"}, id="a broken digest"),
        pytest.param({**PLAIN, "size": None}, id="no size"),
        pytest.param({**PLAIN, "size": -1}, id="a negative size"),
        pytest.param({**PLAIN, "size": 1.0}, id="a fractional size"),
        pytest.param({**PLAIN, "size": True}, id="a boolean size"),
        pytest.param({**PLAIN, "size": "7"}, id="a size in quotes"),
        pytest.param({**PLAIN, "size": 1 << 63}, id="a size beyond int64"),
    ],
)
def test_what_lacks_type_digest_or_size_is_no_descriptor(value: Any) -> None:
    """image-spec, descriptor.md: the three are REQUIRED."""
    with pytest.raises((InvalidManifest, InvalidDigest)):
        Descriptor.from_json(value)


def test_optional_fields_of_the_wrong_type_are_left_out() -> None:
    """Nothing that only decorates makes content unusable."""
    odd = {**PLAIN, "platform": "linux", "artifactType": 1, "annotations": {"a": 1, "b": "c"}, "urls": [1, "u"]}
    found = Descriptor.from_json(odd)
    assert (found.platform, found.artifact_type, found.annotations, found.urls) == (None, "", {"b": "c"}, ("u",))


@pytest.mark.parametrize(
    ("platform", "text"),
    [(Platform("linux", "amd64"), "linux/amd64"), (Platform("linux", "arm64", "v8"), "linux/arm64/v8")],
)
def test_a_platform_is_shown_as_people_write_it(platform: Platform, text: str) -> None:
    """`--platform linux/arm64/v8`."""
    assert str(platform) == text


def test_a_platform_of_odd_words_is_empty_words() -> None:
    """A platform that is not made of strings matches nothing rather than failing."""
    assert Descriptor.from_json({**PLAIN, "platform": {"os": 1}}).platform == Platform("", "")
