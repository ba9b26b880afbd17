"""OCI image layouts (image-spec, image-layout.md) as documents: oci-layout, index.json, and our note of the contents.

A bundle is a layout in a tar. Any tool that reads layouts reads it; `breakwater.json`, which says what is in it and is
what a signature is of, is to them one file more. Nothing here re-serialises a manifest: index.json is the bundle's own
document, the indexes it names are blobs like others (INV-9).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import BadArchive, InvalidDigest, InvalidManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import read_object
from proxy.oci.mediatypes import OCI_INDEX

LAYOUT_FILE, INDEX_FILE, CONTENTS_FILE, DOCKER_FILE = "oci-layout", "index.json", "breakwater.json", "manifest.json"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'

#: image-spec, annotations.md: the name of an entry. Podman and skopeo look for the full reference here.
REF_NAME = "org.opencontainers.image.ref.name"
#: Where containerd (and ctr, nerdctl, BuildKit) keep the full reference.
IMAGE_NAME = "io.containerd.image.name"
#: Ours: the full reference; when the tag was last vouched for (seconds since 1970) and by which upstream.
REFERENCE, VALIDATED_AT, SOURCE = (
    "io.breakwater.reference",
    "io.breakwater.validated-at",
    "io.breakwater.source",
)

#: Limits of the documents, in bytes: index.json of ten thousand images, contents of a hundred thousand members.
MAX_INDEX_BYTES, MAX_CONTENTS_BYTES = 8 << 20, 16 << 20
#: Members of an archive. Ten Kubernetes releases with all platforms have some thousand.
MAX_MEMBERS = 100_000

_BLOB = re.compile(r"blobs/(sha256|sha512)/([0-9a-f]+)")


def blob_name(digest: Digest) -> str:
    """Where a layout keeps a blob."""
    return f"blobs/{digest.algorithm}/{digest.hex}"


def maybe_blob(name: str) -> Digest | None:
    """The digest of a blob's name, or None for anything else (CVE-2024-3727: fullmatch, and a length that fits)."""
    match = _BLOB.fullmatch(name)
    try:
        return Digest.parse(f"{match[1]}:{match[2]}") if match else None
    except InvalidDigest:
        return None


# -- index.json --------------------------------------------------------------------------------------------------------


def index_json(entries: Iterable[Descriptor]) -> bytes:
    """The bundle's index.json, the same bytes for the same entries."""
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry.to_json() for entry in entries]}
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()


def read_index(body: bytes) -> tuple[Descriptor, ...]:
    """The entries of an index.json. Raises BadArchive for anything that is not one."""
    try:
        document = read_object(body)
        values = document.get("manifests")
        if not isinstance(values, list):
            raise BadArchive(f"{INDEX_FILE} has no list of manifests")
        return tuple(Descriptor.from_json(value) for value in values)
    except (InvalidManifest, InvalidDigest) as error:
        raise BadArchive(f"{INDEX_FILE}: {error}") from None


def check_layout(body: bytes) -> None:
    """Raises BadArchive unless this is the oci-layout file of a layout we read: version 1 (image-layout.md)."""
    try:
        version = read_object(body).get("imageLayoutVersion")
    except InvalidManifest as error:
        raise BadArchive(f"{LAYOUT_FILE}: {error}") from None
    if not isinstance(version, str) or not version.startswith("1."):
        raise BadArchive(f"{LAYOUT_FILE} has version {str(version)[:40]!r}; 1.0.0 is read here")


# -- breakwater.json ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a bundle. `members`: blobs in the archive and their sizes in bytes, in the archive's order.

    `elsewhere`: blobs that its images need and that an earlier bundle has brought (`--since`). `left_out`: children of
    its indexes that were not asked for. `documents`: name -> digest of index.json and the like.
    """

    members: Mapping[Digest, int]
    elsewhere: Mapping[Digest, int] = field(default_factory=dict)
    left_out: frozenset[Digest] = frozenset()
    documents: Mapping[str, Digest] = field(default_factory=dict)
    created_at: float = 0.0
    #: How many images, for people.
    n_images: int = 0

    @property
    def n_bytes(self) -> int:
        """The blobs in the archive together."""
        return sum(self.members.values())

    def to_json(self) -> bytes:
        """What `parse` reads back."""
        document = {
            "breakwater": 1,
            "created_at": self.created_at,
            "images": self.n_images,
            "documents": {name: str(digest) for name, digest in sorted(self.documents.items())},
            "members": {str(digest): size for digest, size in self.members.items()},
            "elsewhere": {str(digest): size for digest, size in self.elsewhere.items()},
            "left_out": sorted(map(str, self.left_out)),
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, body: bytes) -> Contents:
        """Raises BadArchive for anything that is not a note of contents, or one with too many members."""
        try:
            document = read_object(body)
            if document.get("breakwater") != 1:
                raise BadArchive(f"{CONTENTS_FILE} has version {str(document.get('breakwater'))[:40]}; 1 is read here")
            members, elsewhere = _sizes(document["members"]), _sizes(document["elsewhere"])
            if len(members) + len(elsewhere) > MAX_MEMBERS:
                raise BadArchive(f"{CONTENTS_FILE} lists more than {MAX_MEMBERS} members")
            return cls(
                members,
                elsewhere,
                frozenset(map(Digest.parse, document["left_out"])),
                {str(name): Digest.parse(text) for name, text in document["documents"].items()},
                float(document["created_at"]),
                int(document["images"]),
            )
        except (
            InvalidManifest,
            InvalidDigest,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
        ) as error:
            raise BadArchive(f"{CONTENTS_FILE}: {str(error)[:200]}") from None


def _sizes(value: Any) -> dict[Digest, int]:
    sizes = {}
    for text, size in value.items():
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise ValueError(f"{text[:80]} has no usable size")
        sizes[Digest.parse(text)] = size
    return sizes


# -- manifest.json, as `docker save` writes it -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DockerImage:
    """One image of a docker-save archive: names of the config's member and of the layers', and its full references."""

    config: str
    layers: tuple[str, ...]
    references: tuple[str, ...]


def docker_json(images: Iterable[DockerImage]) -> bytes:
    """The manifest.json of `docker save`, for tools that read nothing else."""
    document = [
        {"Config": image.config, "RepoTags": list(image.references), "Layers": list(image.layers)} for image in images
    ]
    return json.dumps(document, separators=(",", ":")).encode()


def read_docker(body: bytes) -> tuple[DockerImage, ...]:
    """The images of a manifest.json. Raises BadArchive for anything that is not one."""
    try:
        values = json.loads(body.decode())
        return tuple(
            DockerImage(
                str(value["Config"]),
                tuple(map(str, value["Layers"])),
                tuple(map(str, value.get("RepoTags") or ())),
            )
            for value in values
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadArchive(f"{DOCKER_FILE}: {str(error)[:200]}") from None
