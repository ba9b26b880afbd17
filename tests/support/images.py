"""Images made here, without a network: random layers in real tar archives that every client can unpack.

The same seed makes the same bytes. Nothing here knows the package under test; digests are plain `sha256:<hex>` strings.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

KIB, MIB = 1024, 1024 * 1024


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """`<algorithm>:<hex>` of these bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes with the media type under which a manifest names them."""

    content: bytes
    media_type: str = "application/octet-stream"

    @property
    def digest(self) -> str:
        """sha256:<hex> of the content."""
        return digest_of(self.content)

    @property
    def descriptor(self) -> dict[str, Any]:
        """As a manifest names it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.content)}


@dataclass(frozen=True, slots=True)
class Image:
    """A manifest or an index as bytes, with everything that it names."""

    body: bytes
    media_type: str
    blobs: tuple[Blob, ...] = ()
    children: tuple[Image, ...] = ()
    platform: str = ""

    @property
    def digest(self) -> str:
        """sha256:<hex> of the body."""
        return digest_of(self.body)

    @property
    def descriptor(self) -> dict[str, Any]:
        """As an index names it."""
        named: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.body)}
        if self.platform:
            named["platform"] = {"os": "linux", "architecture": self.platform}
        return named

    def manifests(self) -> Iterator[Image]:
        """Every manifest below this one, children first, then itself: the order in which they may be pushed."""
        for child in self.children:
            yield from child.manifests()
        yield self

    def all_blobs(self) -> list[Blob]:
        """Every config and layer of every manifest, each once."""
        return list({blob.digest: blob for manifest in self.manifests() for blob in manifest.blobs}.values())


def image(
    seed: int,
    layer_bytes: Sequence[int] = (300 * KIB, 2 * MIB, 40 * KIB),
    *,
    architecture: str = "amd64",
    docker: bool = False,
) -> Image:
    """An image for linux with one random, incompressible layer per entry of `layer_bytes`.

    With `docker` it has Docker's schema 2 media types, else OCI's.
    """
    chance = random.Random(f"{seed}/{architecture}")
    tars = [_layer_tar(chance, number, size) for number, size in enumerate(layer_bytes)]
    layers = [Blob(_gzipped(tar), DOCKER_LAYER if docker else OCI_LAYER) for tar in tars]
    document = {
        "created": "2026-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/layer-0"], "Env": ["PATH=/"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": f"layer {n}"} for n in range(len(tars))],
    }
    config = Blob(_json(document), DOCKER_CONFIG if docker else OCI_CONFIG)
    return manifest(config, layers, media_type=DOCKER_MANIFEST if docker else OCI_MANIFEST, architecture=architecture)


def manifest(
    config: Blob,
    layers: Sequence[Blob],
    *,
    media_type: str = OCI_MANIFEST,
    architecture: str = "",
    extra: dict[str, Any] | None = None,
) -> Image:
    """A manifest of these blobs; `extra` adds top-level fields such as subject, artifactType or annotations."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.descriptor,
        "layers": [layer.descriptor for layer in layers],
        **(extra or {}),
    }
    return Image(_json(document), media_type, (config, *layers), platform=architecture)


def index(children: Sequence[Image], *, docker: bool = False, extra: dict[str, Any] | None = None) -> Image:
    """An index of these manifests, or Docker's manifest list."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "manifests": [child.descriptor for child in children],
        **(extra or {}),
    }
    return Image(_json(document), media_type, children=tuple(children))


def multi_arch(seed: int, layer_bytes: Sequence[int] = (200 * KIB, 1 * MIB), *, docker: bool = False) -> Image:
    """An index of an amd64 and an arm64 image."""
    children = [image(seed, layer_bytes, architecture=name, docker=docker) for name in ("amd64", "arm64")]
    return index(children, docker=docker)


def artifact(subject: Image, artifact_type: str, content: bytes) -> Image:
    """A manifest that refers to `subject` (image-spec, "Guidelines for Artifact Usage")."""
    return manifest(
        Blob(b"{}", OCI_EMPTY),
        [Blob(content, "text/plain")],
        extra={"artifactType": artifact_type, "subject": subject.descriptor},
    )


# -- to a registry, or to a folder -------------------------------------------------------------------------------------


def push(registry_url: str, repository: str, tag: str | None, wanted: Image) -> None:
    """Put an image into a registry that takes pushes, byte for byte. Without `tag` only its digest names it."""
    for blob in wanted.all_blobs():
        push_blob(registry_url, repository, blob.content)
    for each in wanted.manifests():
        name = tag if each is wanted and tag else each.digest
        path = f"/v2/{repository}/manifests/{name}"
        _send(registry_url, "PUT", path, each.body, {"Content-Type": each.media_type}, 201)


def push_blob(registry_url: str, repository: str, content: bytes, algorithm: str = "sha256") -> str:
    """Put one blob into a registry and return its digest (distribution-spec, "POST then PUT")."""
    digest = digest_of(content, algorithm)
    started = _send(registry_url, "POST", f"/v2/{repository}/blobs/uploads/", b"", {}, 202)
    place = urlsplit(started["Location"])
    query = "&".join(part for part in (place.query, urlencode({"digest": digest})) if part)
    kind = {"Content-Type": "application/octet-stream"}
    _send(registry_url, "PUT", f"{place.path}?{query}", content, kind, 201)
    return digest


def write_layout(folder: Path, wanted: Image, tag: str) -> None:
    """Write an OCI image layout (image-spec, image-layout.md) with one tagged entry."""
    for body in [*(blob.content for blob in wanted.all_blobs()), *(each.body for each in wanted.manifests())]:
        path = folder / "blobs" / digest_of(body).replace(":", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    entry = {**wanted.descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}))


def _send(
    registry_url: str, method: str, target: str, body: bytes, headers: dict[str, str], expected: int
) -> http.client.HTTPMessage:
    address = urlsplit(registry_url).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == expected, f"{method} {target}: {response.status} {answer[:500]!r}"
        return response.headers
    finally:
        connection.close()


def _layer_tar(chance: random.Random, number: int, size: int) -> bytes:
    """One regular file of `size` random bytes in a directory, owned by root, at a fixed time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo(f"layer-{number}")
        folder.type, folder.mode, folder.mtime = tarfile.DIRTYPE, 0o755, 1_767_225_600
        tar.addfile(folder)
        entry = tarfile.TarInfo(f"layer-{number}/content")
        entry.size, entry.mode, entry.mtime = size, 0o644, 1_767_225_600
        tar.addfile(entry, io.BytesIO(chance.randbytes(size)))
    return out.getvalue()


def _gzipped(tar: bytes) -> bytes:
    return gzip.compress(tar, compresslevel=1, mtime=0)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
