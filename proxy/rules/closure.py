"""Which descriptors make an image for these platforms, and which tags belong to an image without being named by it.

An index is carried whole and never trimmed (product.md, promise 4): what is left out are children, by digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxy.oci.descriptor import Descriptor, Platform
from proxy.oci.digest import Digest
from proxy.oci.names import Tag

#: Where BuildKit says of which image an attestation is, in an index's descriptor of it.
ATTESTED = "vnd.docker.reference.digest"
#: What cosign appends to `sha256-<hex>` (its tag scheme, from before the referrers API).
COSIGN_SUFFIXES = ("sig", "att", "sbom")


@dataclass(frozen=True, slots=True)
class Platforms:
    """Platforms to take; none of them said means all there are."""

    wanted: tuple[Platform, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Platforms:
        """`all`, or `os/architecture[/variant]` separated by commas. Raises ValueError with a sentence."""
        if text.strip() == "all":
            return cls()
        wanted = []
        for entry in text.split(","):
            parts = entry.strip().split("/")
            if len(parts) not in (2, 3) or not all(part.replace("_", "").isalnum() for part in parts):
                raise ValueError(f"{entry.strip()!r} is not a platform: write os/architecture[/variant], or all")
            wanted.append(Platform(*parts))
        return cls(tuple(wanted))

    def __str__(self) -> str:
        return ",".join(map(str, self.wanted)) or "all"

    def takes(self, platform: Platform) -> bool:
        """Whether an image for `platform` is one of these. No variant said means any."""
        return not self.wanted or any(_fits(one, platform) for one in self.wanted)


def _fits(wanted: Platform, found: Platform) -> bool:
    if (wanted.os, wanted.architecture) != (found.os, found.architecture):
        return False
    if not wanted.variant or wanted.variant == found.variant:
        return True
    # arm64 without a variant is v8 (image-spec, image-index.md § Platform Variants).
    return not found.variant and (wanted.architecture, wanted.variant) == ("arm64", "v8")


def chosen(
    children: Iterable[Descriptor], platforms: Platforms, *, attestations: bool
) -> tuple[list[Descriptor], list[Descriptor]]:
    """The children of an index to take, and those to leave out.

    A child without a platform is taken: it may be anything. BuildKit's attestations have the platform unknown/unknown
    and go with the image they are of, where `attestations` are wanted.
    """
    taken: list[Descriptor] = []
    left: list[Descriptor] = []
    about: list[Descriptor] = []
    for child in children:
        if ATTESTED in child.annotations:
            about.append(child)
        elif child.platform is None or platforms.takes(child.platform):
            taken.append(child)
        else:
            left.append(child)
    digests = {str(child.digest) for child in taken}
    for child in about:
        goes = attestations and child.annotations[ATTESTED] in digests
        (taken if goes or not platforms.wanted else left).append(child)
    return taken, left


def is_carried(descriptor: Descriptor) -> bool:
    """Whether a registry is expected to have it: foreign layers live at their `urls`, which are never followed."""
    return not (descriptor.urls and ("foreign" in descriptor.media_type or "nondistributable" in descriptor.media_type))


def cosign_tags(digest: Digest) -> tuple[Tag, ...]:
    """The tags under which cosign keeps what it has to say of a digest."""
    return tuple(Tag(f"{digest.algorithm}-{digest.hex}.{suffix}") for suffix in COSIGN_SUFFIXES)
