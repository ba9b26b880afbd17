"""Walks: everything that makes an image, once, and no further than an image goes."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from proxy.engine.manifests import Held
from proxy.engine.walk import MAX_DEPTH, Scope, closure_of
from proxy.errors import InvalidManifest, UnknownManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.mediatypes import OCI_INDEX, OCI_MANIFEST
from proxy.oci.names import Tag, TagOrDigest
from proxy.rules.closure import Platforms


class Repository:
    """A walk's source in memory, that counts what it is asked for."""

    def __init__(self) -> None:
        self.held: dict[Digest, Held] = {}
        self.tags: dict[Tag, Digest] = {}
        self.asked: list[TagOrDigest] = []

    def put(self, document: dict[str, object], media_type: str) -> Descriptor:
        body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **document}).encode()
        descriptor = Descriptor(media_type, Digest.of(body), len(body))
        self.held[descriptor.digest] = Held(descriptor, body, Manifest.parse(body, media_type))
        return descriptor

    def image(self, name: str, subject: Descriptor | None = None) -> Descriptor:
        blobs = [Descriptor("application/x", Digest.of(f"{name}{n}".encode()), n + 1).to_json() for n in range(2)]
        more = {"subject": subject.to_json()} if subject else {}
        return self.put({"config": blobs[0], "layers": blobs[1:], **more}, OCI_MANIFEST)

    def index(self, *children: Descriptor, platform: str = "amd64") -> Descriptor:
        entries = [{**child.to_json(), "platform": {"os": "linux", "architecture": platform}} for child in children]
        return self.put({"manifests": entries}, OCI_INDEX)

    async def manifest(self, target: TagOrDigest) -> Held:
        self.asked.append(target)
        digest = self.tags.get(target) if isinstance(target, Tag) else target
        if digest not in self.held:
            raise UnknownManifest(f"no {target}")
        assert digest is not None
        return self.held[digest]

    async def referrers(self, digest: Digest) -> Iterable[Descriptor]:
        subjects = ((held.manifest.subject, held.descriptor) for held in self.held.values())
        return [descriptor for subject, descriptor in subjects if subject is not None and subject.digest == digest]


async def test_children_come_before_what_names_them() -> None:
    """So that a link is never of something that is not there yet."""
    there = Repository()
    one, two = there.image("one"), there.image("two")
    top = there.index(there.index(one), two, one)
    closure = await closure_of(there, top.digest, Scope(referrers=False))
    order = list(closure.manifests)
    assert order[-1] == top.digest
    assert order.index(one.digest) < order.index(top.digest)
    assert len(order) == 4
    assert len(closure.blobs) == 4
    assert len(there.asked) == len(set(there.asked)), "each once"


async def test_referrers_and_what_refers_to_them_come_along() -> None:
    """A signature of an SBOM; cosign's tag scheme beside the API."""
    there = Repository()
    top = there.image("app")
    sbom = there.image("sbom", subject=top)
    signature = there.image("signature", subject=sbom)
    tagged = there.image("cosign")
    there.tags[Tag(f"sha256-{top.digest.hex}.sig")] = tagged.digest
    closure = await closure_of(there, top.digest, Scope())
    assert set(closure.referrers) == {sbom.digest, signature.digest, tagged.digest}
    assert closure.tags == {Tag(f"sha256-{top.digest.hex}.sig"): tagged.digest}
    assert (await closure_of(there, top.digest, Scope(referrers=False))).referrers == []


async def test_what_cannot_be_had_is_reported_and_not_raised() -> None:
    """The report of a list says what is missing, of everything at once."""
    there = Repository()
    gone = there.image("gone")
    top = there.index(gone, there.image("here"))
    del there.held[gone.digest]
    closure = await closure_of(there, top.digest, Scope())
    assert closure.missing == {str(gone.digest): f"no {gone.digest}"}
    with pytest.raises(UnknownManifest):
        await closure_of(there, Tag("none"), Scope())


async def test_an_index_without_the_platform_says_which_it_has() -> None:
    """Otherwise nothing would be carried, in silence."""
    there = Repository()
    top = there.index(there.image("app"))
    closure = await closure_of(there, top.digest, Scope(Platforms.parse("linux/s390x")))
    assert closure.missing == {str(top.digest): "no child is for linux/s390x; there are linux/amd64"}


async def test_indexes_in_indexes_end() -> None:
    """A document of somebody else's decides how deep: up to a bound."""
    there = Repository()
    top = there.image("core")
    for _ in range(MAX_DEPTH + 1):
        top = there.index(top)
    with pytest.raises(InvalidManifest, match="deeper"):
        await closure_of(there, top.digest, Scope())
