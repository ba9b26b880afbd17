"""The referrers list (distribution-spec § Listing Referrers): reading, merging, filtering and writing it.

The one document that Breakwater writes itself: it is a registry's answer and has no digest to keep, so INV-9 does not
apply.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from proxy.errors import InvalidDigest, InvalidManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import read_object
from proxy.oci.mediatypes import OCI_INDEX
from proxy.oci.names import Tag


def fallback_tag(digest: Digest) -> Tag:
    """The tag under which a registry without the referrers API keeps the list (§ Referrers Tag Schema).

    The algorithm is cut to 32 characters and the hash to 64, so a sha512 loses its second half.
    """
    return Tag.parse(f"{digest.algorithm[:32]}-{digest.hex[:64]}")


def build(descriptors: Iterable[Descriptor]) -> bytes:
    """The response body: an OCI index of `descriptors` in the order given. An empty list is an answer, not a 404."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [descriptor.to_json() for descriptor in descriptors],
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def descriptors_of(index_body: bytes) -> tuple[Descriptor, ...]:
    """The descriptors of a referrers list as a registry sent it.

    An entry that is not a descriptor is left out, as one bad signature must not hide the others. Raises InvalidManifest
    when the whole is not an object with a list of manifests.
    """
    manifests = read_object(index_body).get("manifests")
    if manifests is None:  # absent, or what Go writes for an empty list
        return ()
    if not isinstance(manifests, list):
        raise InvalidManifest("the referrers list has no list of manifests")
    found: list[Descriptor] = []
    for value in manifests:
        try:
            found.append(Descriptor.from_json(value))
        except (InvalidManifest, InvalidDigest):
            continue
    return tuple(found)


def filtered(descriptors: Iterable[Descriptor], artifact_type: str) -> tuple[Descriptor, ...]:
    """Those of `artifact_type`, or all of them for "" (then OCI-Filters-Applied must not be sent)."""
    return tuple(found for found in descriptors if not artifact_type or found.artifact_type == artifact_type)


def merge(*lists: Iterable[Descriptor]) -> tuple[Descriptor, ...]:
    """Every digest once, where it first comes; what an earlier list says of it counts."""
    found: dict[Digest, Descriptor] = {}
    for descriptors in lists:
        for descriptor in descriptors:
            found.setdefault(descriptor.digest, descriptor)
    return tuple(found.values())
