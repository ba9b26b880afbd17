"""Which descriptors make an image."""

from __future__ import annotations

import pytest

from proxy.oci.descriptor import Descriptor, Platform
from proxy.oci.digest import Digest
from proxy.oci.mediatypes import OCI_MANIFEST
from proxy.rules.closure import ATTESTED, Platforms, chosen, cosign_tags, is_carried


def child(name: str, platform: str = "", of: str = "") -> Descriptor:
    annotations = {ATTESTED: str(Digest.of(of.encode()))} if of else {}
    return Descriptor(
        OCI_MANIFEST,
        Digest.of(name.encode()),
        1,
        platform=Platform(*platform.split("/")) if platform else None,
        annotations=annotations,
    )


AMD, ARM, ARM7 = child("amd", "linux/amd64"), child("arm", "linux/arm64/v8"), child("arm7", "linux/arm/v7")
PLAIN = child("plain")
ABOUT_AMD, ABOUT_ARM = child("1", "unknown/unknown", "amd"), child("2", "unknown/unknown", "arm")
ALL = [AMD, ARM, ARM7, PLAIN, ABOUT_AMD, ABOUT_ARM]


@pytest.mark.parametrize(
    ("platforms", "attestations", "wanted"),
    [
        pytest.param("all", True, ALL, id="all"),
        pytest.param("all", False, ALL, id="all, attestations being children like others"),
        pytest.param("linux/amd64", True, [AMD, PLAIN, ABOUT_AMD], id="one, with what is attested of it"),
        pytest.param("linux/amd64", False, [AMD, PLAIN], id="one, bare"),
        pytest.param("linux/arm64, linux/amd64", False, [AMD, ARM, PLAIN], id="two"),
        pytest.param("linux/arm64/v8", False, [ARM, PLAIN], id="a variant"),
        pytest.param("linux/arm/v6", False, [PLAIN], id="a variant that is not there"),
        pytest.param("windows/amd64", True, [PLAIN], id="a system that is not there"),
    ],
)
def test_children_are_chosen_by_platform(platforms: str, attestations: bool, wanted: list[Descriptor]) -> None:
    """image-spec, image-index.md § platform; BuildKit's attestations go with their image."""
    taken, left = chosen(ALL, Platforms.parse(platforms), attestations=attestations)
    assert taken == wanted
    assert sorted(taken + left, key=lambda each: each.digest) == sorted(ALL, key=lambda each: each.digest)


def test_arm64_without_a_variant_is_v8() -> None:
    """image-spec, image-index.md § Platform Variants."""
    bare = child("bare", "linux/arm64")
    assert chosen([bare], Platforms.parse("linux/arm64/v8"), attestations=False)[0] == [bare]


@pytest.mark.parametrize("text", ["", "linux", "linux/", "linux/amd64,", "a/b/c/d", "all,linux/amd64"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    """A mistyped platform would carry nothing."""
    with pytest.raises(ValueError, match="is not a platform"):
        Platforms.parse(text)


def test_platforms_read_back() -> None:
    """What a report prints can be typed."""
    assert [str(Platforms.parse(text)) for text in ("all", "linux/amd64,linux/arm/v7")] == [
        "all",
        "linux/amd64,linux/arm/v7",
    ]


def test_foreign_layers_are_not_carried() -> None:
    """CVE-2020-15157: their urls are never followed, so nobody has them."""
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    assert not is_carried(Descriptor(foreign, Digest.of(b""), 0, urls=("https://a.test/",)))
    assert is_carried(Descriptor(foreign, Digest.of(b""), 0))
    assert is_carried(
        Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(b""), 0, urls=("https://a.test/",))
    )


def test_cosign_finds_its_tags() -> None:
    """cosign, SIGNATURE_SPEC.md § Discovery."""
    assert [tag.value for tag in cosign_tags(Digest("sha256", "0" * 64))] == [
        f"sha256-{'0' * 64}.{suffix}" for suffix in ("sig", "att", "sbom")
    ]
