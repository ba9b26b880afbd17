"""Images out of the store, as members of an OCI layout: planned first and written then.

Nothing is written when anything is missing. A plan is what a signature will be of: once made, it does not change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.engine.bundle import PIECE_BYTES, Parts, Tell
from proxy.engine.manifests import Held
from proxy.engine.shelf import Shelf
from proxy.engine.walk import Closure, Scope, closure_of
from proxy.errors import BreakwaterError, StoreError
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.layout import Contents, DockerImage, blob_name
from proxy.oci.names import Reference, Repository, SourceHost, Tag
from proxy.ports import Member, OpenBlob


@dataclass(slots=True)
class Plan:
    """A bundle before it is written: its documents, and the blobs in their order."""

    images: list[dict[str, Any]] = field(default_factory=list)
    contents: Contents = field(default_factory=lambda: Contents({}))
    documents: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing of any image."""
        return not any(image["missing"] for image in self.images)


class Export:
    """Bundles out of this store. True for this process."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def references_of(self, project: str) -> list[Reference]:
        """Every tag that a project holds, cosign's and other tags made of digests left to their images."""
        found = []
        async for holding, tags, _ in self._parts.records.scan():
            if holding.project == project:
                host, repository = SourceHost(holding.host), Repository(holding.repository)
                for tag in tags:
                    if not tag.tag.startswith(("sha256-", "sha512-")):
                        found.append(Reference(host, repository, Tag(tag.tag)))
        return found

    async def plan(
        self,
        references: Sequence[Reference],
        scope: Scope,
        *,
        project: str | None = None,
        since: Iterable[Contents] = (),
    ) -> Plan:
        """What a bundle of these holds. What one of them lacks its entry of `images` says. Raises Unavailable when the
        store cannot be counted."""
        await self._parts.capacity.counted()
        made = _Making(self._parts, scope, project)
        for reference in dict.fromkeys(references):
            await made.add(reference)
        known: dict[Digest, int] = {}
        for earlier in since:
            known |= {**earlier.members, **earlier.elsewhere}
        return made.plan(known)

    async def members(self, plan: Plan, tell: Tell) -> AsyncIterator[Member]:
        """The bundle: the contents first, so that a reader can judge before it keeps anything.

        Raises StoreError when a blob goes away meanwhile or is damaged; what was written by then is worthless.
        """
        held = list(plan.contents.members)
        for digest in held:
            self._parts.capacity.hold(digest)
        try:
            yield _document(layout.CONTENTS_FILE, plan.contents.to_json())
            for name, body in plan.documents.items():
                yield _document(name, body)
            for digest, size in plan.contents.members.items():
                yield Member(blob_name(digest), size, self._pieces(digest, size))
                tell({"event": "step", "what": "bytes", "reference": "bundle", "n_bytes": size})
        finally:
            for digest in held:
                self._parts.capacity.unhold(digest)

    async def _pieces(self, digest: Digest, size: int) -> AsyncIterator[bytes]:
        """The blob, hashed on its way: a rotten file must not be carried over the gap."""
        gone = f"{digest} went away while it was exported; prefetch it and export again"
        blob = await self._parts.blobs.open(digest)
        if blob is None:
            raise StoreError(gone)
        verifier = Verifier(digest)
        try:
            if blob.size != size:
                raise StoreError(gone)
            while piece := await self._read(blob, verifier):
                yield piece
            if not verifier.agrees():
                why = f"the stored file of {digest} does not hash to its name"
                await self._parts.verification.condemn(digest, why, blob)
                raise StoreError(f"{digest} is damaged and was moved to quarantine; prefetch it and export again")
        finally:
            blob.close()

    async def _read(self, blob: OpenBlob, verifier: Verifier) -> bytes:
        hop = blob.read(verifier.n_bytes, PIECE_BYTES, verifier)
        return await self._parts.owner.uninterrupted(hop, "read a blob for export")


class _Making:
    """Gathers closures into one bundle."""

    def __init__(self, parts: Parts, scope: Scope, project: str | None) -> None:
        self._parts = parts
        self._scope = scope
        self._project = project
        self._images: list[dict[str, Any]] = []
        self._entries: dict[tuple[Digest, str], Descriptor] = {}
        self._manifests: dict[Digest, int] = {}
        self._blobs: dict[Digest, int] = {}
        self._left_out: set[Digest] = set()
        self._docker: list[DockerImage] = []

    async def add(self, reference: Reference) -> None:
        """One image, if all of it is here."""
        name = str(reference)
        image: dict[str, Any] = {"reference": name, "digest": "", "n_bytes": 0, "n_referrers": 0, "missing": {}}
        self._images.append(image)
        try:
            shelf = self._parts.shelf(self._parts.route(reference, self._project))
            closure = await closure_of(shelf, reference.target, self._scope)
        except BreakwaterError as error:
            image["missing"][name] = str(error)
            return
        missing = dict(closure.missing)
        for digest, size in closure.digests().items():
            if not self._parts.is_here(digest, size):
                missing[str(digest)] = "it is not in this store; prefetch it first"
        image |= {
            "digest": str(closure.top.descriptor.digest),
            "n_bytes": closure.n_bytes,
            "n_referrers": len(closure.referrers),
            "missing": missing,
        }
        if not missing:
            self._take(reference, closure, shelf)

    def _take(self, reference: Reference, closure: Closure, shelf: Shelf) -> None:
        self._manifests |= {digest: held.descriptor.size for digest, held in closure.manifests.items()}
        self._blobs |= {digest: blob.size for digest, blob in closure.blobs.items()}
        self._left_out |= closure.left_out.keys()
        self._name(reference, closure.top, shelf)
        named = {closure.top.descriptor.digest}
        for tag, digest in closure.tags.items():
            self._name(replace(reference, target=tag), closure.manifests[digest], shelf)
            named.add(digest)
        for digest in closure.referrers:
            if digest not in named:
                self._entries.setdefault((digest, ""), closure.manifests[digest].descriptor)
        self._for_docker(reference, closure)

    def _name(self, reference: Reference, held: Held, shelf: Shelf) -> None:
        name = str(reference)
        annotations = {layout.REF_NAME: name, layout.IMAGE_NAME: name, layout.REFERENCE: name}
        record = shelf.tags.get(reference.target) if isinstance(reference.target, Tag) else None
        if record is not None:
            annotations |= {layout.VALIDATED_AT: f"{record.validated_at:.3f}", layout.SOURCE: record.source}
        self._entries[held.descriptor.digest, name] = replace(held.descriptor, annotations=annotations)

    def _for_docker(self, reference: Reference, closure: Closure) -> None:
        """`docker load` knows one platform for a name: this machine's kind of Linux first, else the first there is."""
        if isinstance(reference.target, Digest):
            return
        images = [closure.top] if not closure.top.manifest.is_index else []
        for child in closure.top.manifest.children:
            held = closure.manifests.get(child.digest)
            if held is None or held.manifest.is_index or child.platform is None or child.platform.os == "unknown":
                continue
            is_first = (child.platform.os, child.platform.architecture) == ("linux", "amd64")
            images.insert(0 if is_first else len(images), held)
        if images and images[0].manifest.config is not None and images[0].manifest.layers:
            manifest = images[0].manifest
            assert manifest.config is not None
            layers = tuple(blob_name(layer.digest) for layer in manifest.layers)
            self._docker.append(DockerImage(blob_name(manifest.config.digest), layers, (str(reference),)))

    def plan(self, known: Mapping[Digest, int]) -> Plan:
        """The bundle. `known`: what the other side has already."""
        needed = self._manifests | self._blobs
        documents = {
            layout.LAYOUT_FILE: layout.LAYOUT,
            layout.INDEX_FILE: layout.index_json(self._entries.values()),
            layout.DOCKER_FILE: layout.docker_json(self._docker),
        }
        contents = Contents(
            members={digest: size for digest, size in needed.items() if digest not in known},
            elsewhere={digest: size for digest, size in needed.items() if digest in known},
            left_out=frozenset(self._left_out),
            documents={name: Digest.of(body) for name, body in documents.items()},
            created_at=round(self._parts.clock.wall(), 3),
            n_images=len(self._images),
        )
        return Plan(self._images, contents, documents)


def _document(name: str, body: bytes) -> Member:
    async def pieces() -> AsyncIterator[bytes]:
        yield body

    return Member(name, len(body), pieces())
