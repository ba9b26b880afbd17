"""Media types: which bytes are a manifest, which an index, and what we ask upstream for.

The list is closed on purpose. A type outside `KNOWN` is never stored, served or echoed (CVE-2021-41190: a document
whose type depends on who reads it).
"""

from __future__ import annotations

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"

#: Docker's schema 1, refused with a sentence of its own: its digest is not that of the bytes on the wire (the signature
#: is left out), so it could not be kept by content.
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"

#: The config of an artifact that has none (image-spec, manifest.md § Guidance for an Empty Descriptor).
OCI_EMPTY = "application/vnd.oci.empty.v1+json"

#: A manifest of one image or artifact: config and layers.
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
#: A manifest of manifests.
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
#: Everything that is a manifest to us.
KNOWN = MANIFEST_TYPES | INDEX_TYPES
#: Both spellings of Docker's schema 1.
SCHEMA1_TYPES = frozenset({DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED})

#: The Accept header of every manifest request to an upstream. Neither `*/*` nor schema 1 is in it: both invite a
#: registry to answer with, or to convert to, what we must then refuse. Nor is the OCI artifact manifest, which
#: image-spec 1.1 withdrew before its release.
ACCEPT = ", ".join((OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST))


def bare(content_type: str) -> str:
    """The media type of a Content-Type header, without parameters, in lower case (RFC 9110 §8.3.1); "" for none."""
    return content_type.partition(";")[0].strip().lower()


def is_index(media_type: str) -> bool:
    """Whether a manifest of this type names other manifests."""
    return media_type in INDEX_TYPES


def is_manifest(media_type: str) -> bool:
    """Whether content of this type is fetched from /manifests/ and not from /blobs/."""
    return media_type in KNOWN
