"""Bundles: images out of the store and into another one, as members of an OCI layout.

Export plans first and writes then: nothing is written when anything is missing. Import commits each blob the way a
transfer does (reserved, hashed, synced, then named), and links an image only when all of it is there, its tag last:
kill it anywhere, and what is linked is whole, and what has come is not asked for again. What is refused leaves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.manifests import Held, Manifests, holding_of
from proxy.engine.pins import Pins
from proxy.engine.pull import Pull
from proxy.engine.shelf import Arrived, Shelf
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.walk import Closure, Scope, closure_of
from proxy.errors import BadArchive, BreakwaterError, OutOfSpace, Overloaded, StoreError
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.endpoints import RepositoryPath
from proxy.oci.layout import Contents, DockerImage, blob_name, maybe_blob
from proxy.oci.names import Reference, Repository, SourceHost, Tag
from proxy.ports import BlobStore, Clock, Member, OpenBlob, Records, TagRecord
from proxy.rules.closure import Platforms
from proxy.rules.ledger import on_disk
from proxy.rules.routes import Route

#: What is read and written in one hop.
PIECE_BYTES = 1 << 20

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What both directions need."""

    pull: Pull
    blobs: BlobStore
    records: Records
    links: Links
    manifests: Manifests
    tags: Tags
    capacity: Capacity
    charges: Charges
    pins: Pins
    clock: Clock
    owner: TaskOwner

    def shelf(self, route: Route) -> Shelf:
        """A repository as it is here."""
        rules = self.pull.plan.rules[route.project]
        return Shelf(route, rules, records=self.records, links=self.links, manifests=self.manifests)

    def route(self, reference: Reference, project: str | None) -> Route:
        """Where a reference belongs. Raises UnknownName for an upstream or a project that is not configured."""
        return self.pull.plan.routes.route(RepositoryPath(project, reference.repository.value), reference.host.value)

    def is_here(self, digest: Digest, size: int) -> bool:
        """Whether the store has it, in this size."""
        return self.capacity.ledger.size_of(digest) == size


# -- out ---------------------------------------------------------------------------------------------------------------


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
        """What a bundle of these holds. Raises nothing for what one of them lacks: its entry of `images` says it."""
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

        Raises Unavailable or Corrupt when a blob goes away meanwhile; what was written by then is worthless.
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
        blob = await self._parts.blobs.open(digest)
        if blob is None or blob.size != size:
            raise StoreError(f"{digest} went away while it was exported; prefetch it and export again")
        verifier = Verifier(digest)
        try:
            while piece := await self._read(blob, verifier):
                yield piece
            if not verifier.agrees():
                await self._parts.blobs.quarantine(digest, "the stored file does not hash to its name")
                self._parts.capacity.forget(digest)
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


# -- in ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What an import is held to, and what it may add."""

    #: The digest that breakwater.json must have: whoever asks has checked a signature of it.
    contents: Digest | None = None
    signed_by: str = ""
    #: The name for an archive's image that has none, or only a tag.
    name: str = ""
    project: str | None = None
    pin: bool = False


class Import:
    """Bundles into this store. True for this process."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def run(self, members: AsyncIterator[Member], terms: Terms, tell: Tell) -> dict[str, Any]:
        """Take all images that are whole. The report says of each what it is, or what is missing.

        Raises BadArchive for an archive that is refused and OutOfSpace for one that cannot fit, and then nothing of it
        stays. Cancelled or killed, what has come stays, linked to nothing, for the next try.
        """
        await self._parts.capacity.counted()
        taking = _Taking(self._parts, terms, tell)
        try:
            async for member in members:
                await taking.take(member)
            await taking.check_complete()
            images = await taking.link()
        except BreakwaterError:
            await taking.undo()
            raise
        finally:
            taking.release()
        return {"images": images, "contents": taking.summary()}


class _Taking:
    """One import on its way."""

    def __init__(self, parts: Parts, terms: Terms, tell: Tell) -> None:
        self._parts = parts
        self._terms = terms
        self._tell = tell
        self._contents: Contents | None = None
        self._contents_digest: Digest | None = None
        self._index: tuple[Descriptor, ...] | None = None
        self._has_layout = False
        #: Everything that came, with sizes; and of it what was not here before.
        self._arrived: dict[Digest, int] = {}
        self._added: dict[Digest, int] = {}
        self._held: list[Digest] = []
        self._n_reserved = 0
        self._linked: set[Digest] = set()

    # -- members ----------------------------------------------------------------------------------------------------

    async def take(self, member: Member) -> None:
        """One member of the archive. Raises BadArchive, OutOfSpace or Unavailable."""
        if member.name == layout.CONTENTS_FILE:
            await self._take_contents(await _whole(member, layout.MAX_CONTENTS_BYTES))
        elif self._terms.contents is not None and self._contents is None:
            raise BadArchive(f"the bundle does not begin with {layout.CONTENTS_FILE}, which its signature is of")
        elif member.name == layout.LAYOUT_FILE:
            layout.check_layout(self._checked(member.name, await _whole(member, 4096)))
            self._has_layout = True
        elif member.name == layout.INDEX_FILE:
            body = self._checked(member.name, await _whole(member, layout.MAX_INDEX_BYTES))
            self._index = await asyncio.to_thread(layout.read_index, body)
        elif member.name in (layout.DOCKER_FILE, "repositories"):
            self._checked(member.name, await _whole(member, layout.MAX_INDEX_BYTES))
        elif (digest := maybe_blob(member.name)) is not None:
            await self._take_blob(digest, member)
        else:
            raise BadArchive(f"{member.name[:150]!r} is nothing that an image layout has")

    def _checked(self, name: str, body: bytes) -> bytes:
        if self._contents is not None:
            wanted = self._contents.documents.get(name)
            if wanted is not None and Digest.of(body) != wanted:
                raise BadArchive(f"{name} is not what {layout.CONTENTS_FILE} says")
            if wanted is None and self._terms.contents is not None:
                raise BadArchive(f"{name} is not among the contents, which the signature is of")
        return body

    async def _take_contents(self, body: bytes) -> None:
        if self._contents is not None or self._index is not None or self._arrived:
            raise BadArchive(f"{layout.CONTENTS_FILE} is not the first member")
        self._contents_digest = Digest.of(body)
        if self._terms.contents not in (None, self._contents_digest):
            raise BadArchive(f"{layout.CONTENTS_FILE} is not the one whose signature was checked")
        self._contents = contents = await asyncio.to_thread(Contents.parse, body)
        self._tell({"event": "step", "what": "resolved", "reference": "bundle", "of_bytes": contents.n_bytes})
        for digest in (*contents.members, *contents.elsewhere):
            self._hold(digest)
        absent = [digest for digest, size in contents.elsewhere.items() if not self._parts.is_here(digest, size)]
        if absent:
            raise BadArchive(
                f"this bundle builds on an earlier one that was not imported here: {len(absent)} blobs are missing, "
                f"{absent[0]} among them"
            )
        await self._reserve(
            sum(on_disk(size) for digest, size in contents.members.items() if not self._parts.is_here(digest, size))
        )

    async def _reserve(self, n_bytes: int) -> None:
        """Room for all of it before any of it is written. Raises OutOfSpace, nothing having been evicted."""
        capacity = self._parts.capacity
        gives = capacity.ledger.free + sum(on_disk(size) for digest, size in capacity.ledger if capacity.may_go(digest))
        if n_bytes > gives:
            raise OutOfSpace(
                f"the import needs {n_bytes} bytes, and there is room for {max(gives, 0)} of a capacity of "
                f"{capacity.ledger.capacity}: raise store.capacity; nothing was written"
            )
        await capacity.make_room(n_bytes)
        self._n_reserved += n_bytes

    async def _take_blob(self, digest: Digest, member: Member) -> None:
        if self._contents is not None and self._contents.members.get(digest) != member.size:
            raise BadArchive(f"{member.name} of {member.size} bytes is not among the contents")
        self._hold(digest)
        verifier = Verifier(digest)
        if self._parts.is_here(digest, member.size):
            async for piece in _gathered(member.pieces):
                await asyncio.to_thread(verifier.feed, piece)
            if not verifier.agrees():
                raise BadArchive(f"{member.name} does not hash to its name")
        else:
            await self._store(digest, member, verifier)
        self._arrived[digest] = member.size
        self._tell({"event": "step", "what": "bytes", "reference": "bundle", "n_bytes": member.size})

    async def _store(self, digest: Digest, member: Member, verifier: Verifier) -> None:
        """The same way that a transfer's bytes take: reserved, hashed, synced, named (INV-1, INV-2, INV-5)."""
        parts, n_bytes = self._parts, on_disk(member.size)
        if self._contents is None:
            await self._reserve(n_bytes)
        ingest = await parts.blobs.ingest(digest, verifier)
        try:
            async for piece in _gathered(member.pieces):
                await parts.owner.uninterrupted(ingest.write(piece), "write an imported blob")
            if not verifier.agrees():
                raise BadArchive(f"{member.name} does not hash to its name")
            await parts.owner.uninterrupted(ingest.commit(), "commit an imported blob")
        except BaseException:
            await parts.owner.uninterrupted(ingest.abort(), "abort an imported blob")
            raise
        finally:
            ingest.close()
        parts.capacity.settle(digest, member.size, n_bytes)
        self._n_reserved -= n_bytes
        self._added[digest] = member.size

    def _hold(self, digest: Digest) -> None:
        """Neither what is here nor what comes may be evicted before it is linked."""
        self._parts.capacity.hold(digest)
        self._held.append(digest)

    async def check_complete(self) -> None:
        """The archive has ended. Raises BadArchive when something is not in it that should be."""
        if self._index is None:
            raise BadArchive(f"the archive has no {layout.INDEX_FILE}: it is no image layout")
        if not self._has_layout:
            raise BadArchive(f"the archive has no {layout.LAYOUT_FILE}: it is no image layout")
        if self._contents is not None:
            for digest in self._contents.members:
                if digest not in self._arrived:
                    raise BadArchive(f"{digest} is among the contents and not in the archive")

    # -- linking ----------------------------------------------------------------------------------------------------

    async def link(self) -> list[dict[str, Any]]:
        """Link every image that is whole; then let go of what nothing links to."""
        assert self._index is not None
        named: list[tuple[Descriptor, Reference]] = []
        unnamed: list[Descriptor] = []
        images: list[dict[str, Any]] = []
        for entry in self._index:
            reference, why = _reference_of(entry, self._terms.name, alone=len(self._index) == 1)
            if reference is not None:
                named.append((entry, reference))
            elif why:
                images.append(_image(str(entry.digest), missing={"name": why}))
            else:
                unnamed.append(entry)
        referring = await self._referring([*unnamed, *(entry for entry, _ in named)])
        arrived = Arrived(self._parts.manifests, referring)
        for entry, reference in named:
            images.append(await self._link_one(entry, reference, arrived))
        # A referrer goes with its subject, and so do the words about it; one whose subject never came is told.
        going_along = {found.digest for subject in self._arrived for found in referring.get(subject, ())}
        for entry in unnamed:
            if entry.digest not in self._linked | going_along:
                images.append(_image(str(entry.digest), missing={"name": "it has no name: give it one with --name"}))
        await self._drop([digest for digest in self._added if digest not in self._linked])
        return images

    async def _referring(self, entries: Iterable[Descriptor]) -> dict[Digest, list[Descriptor]]:
        referring: dict[Digest, list[Descriptor]] = {}
        for entry in entries:
            held = await self._parts.manifests.local(replace(entry, media_type=""))
            if held is not None and held.manifest.subject is not None:
                referring.setdefault(held.manifest.subject.digest, []).append(held.descriptor)
        return referring

    async def _link_one(self, entry: Descriptor, reference: Reference, arrived: Arrived) -> dict[str, Any]:
        name, parts = str(reference), self._parts
        try:
            route = parts.route(reference, self._terms.project)
            rules = parts.pull.plan.rules[route.project]
            if isinstance(reference.target, Tag):
                rules.check_tag(route.reference, reference.target)
            else:
                rules.check_repository(route.reference)
            closure = await closure_of(arrived, entry.digest, Scope(Platforms()))
            missing = self._missing(closure)
            for digest in closure.digests():
                rules.check_content(route.reference, digest)
            if not missing:
                await self._publish(route, reference, entry, closure)
                self._linked |= closure.digests().keys()
        except (BadArchive, OutOfSpace):
            raise
        except BreakwaterError as error:
            closure, missing = None, {name: str(error)}
        image = _image(name, str(entry.digest), closure, missing)
        self._tell({"event": "step", "what": "missing" if missing else "done", "reference": name})
        return image

    def _missing(self, closure: Closure) -> dict[str, str]:
        """What an image cannot do without: every blob of every manifest that is there, and one child of an index."""
        left_out = self._contents.left_out if self._contents is not None else frozenset()
        missing: dict[str, str] = {}
        for held in closure.manifests.values():
            children = held.manifest.children
            gone = [child.digest for child in children if child.digest not in closure.manifests]
            if children and len(gone) == len(children):
                missing[str(held.descriptor.digest)] = "none of its children is in the bundle or here"
            elif self._contents is not None and self._contents.n_images:
                missing |= {str(d): "it is neither in the bundle nor here" for d in gone if d not in left_out}
        for digest, blob in closure.blobs.items():
            if not self._parts.is_here(digest, blob.size):
                missing[str(digest)] = "it is neither in the bundle nor here"
        return missing

    async def _publish(self, route: Route, reference: Reference, entry: Descriptor, closure: Closure) -> None:
        """Links first, children before parents; the tag's record last: nobody sees an image that is not whole."""
        parts, holding = self._parts, holding_of(route)
        sizes = closure.digests()
        self._pay(route.project, sizes)
        if self._terms.pin:
            await parts.pins.add(str(reference), self._terms.project or "", sizes)
        if parts.pull.plan.origins.of(route).tag_policy.sealed:
            parts.pins.keep_sealed(sizes)
        tag = reference.target if isinstance(reference.target, Tag) else None
        for digest, held in closure.manifests.items():
            is_top = digest == closure.top.descriptor.digest
            await parts.links.put_manifest(holding, held.descriptor, held.manifest, tag if is_top else None)
        parts.manifests.learned(holding, [*closure.manifests, *((tag,) if tag else ())])
        if tag is not None:
            await parts.tags.learn(holding, self._record(tag, entry, closure.top))

    def _pay(self, project: str, sizes: Mapping[Digest, int]) -> None:
        """The project pays for the image, all of it or none. Raises OutOfSpace when its quota does not reach."""
        charges = self._parts.charges
        unpaid = sum(size for digest, size in sizes.items() if charges.book.of(project).size_of(digest) is None)
        if not charges.reserve(project, unpaid):
            raise StoreError(f"the quota of project {project!r} has no room for it")
        charges.book.release(project, unpaid)
        for digest in sizes:
            charges.use(project, digest)

    def _record(self, tag: Tag, entry: Descriptor, top: Held) -> TagRecord:
        try:
            validated_at = float(entry.annotations.get(layout.VALIDATED_AT, ""))
        except ValueError:
            validated_at = self._parts.clock.wall()
        source = entry.annotations.get(layout.SOURCE, "")[:200] or "an imported archive"
        return TagRecord(tag.value, top.descriptor, min(validated_at, self._parts.clock.wall()), source)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def undo(self) -> None:
        """Refused: what this import has added goes again, unless something was linked to it meanwhile."""
        await self._drop([digest for digest in self._added if digest not in self._linked])

    async def _drop(self, digests: Sequence[Digest]) -> None:
        if not digests:
            return
        try:
            await self._parts.blobs.delete(digests)
        except (StoreError, Overloaded):
            return  # they stay, linked to nothing, and are evicted like anything else
        for digest in digests:
            self._parts.capacity.forget(digest)
            self._parts.manifests.forget(digest)

    def release(self) -> None:
        """Promises and holds end with the import."""
        self._parts.capacity.ledger.release(self._n_reserved)
        self._n_reserved = 0
        for digest in self._held:
            self._parts.capacity.unhold(digest)
        self._held.clear()

    def summary(self) -> dict[str, Any]:
        """What the seal remembers of this import."""
        contents = self._contents
        return {
            "digest": str(self._contents_digest) if self._contents_digest and contents and contents.n_images else "",
            "created_at": contents.created_at if contents else 0.0,
            "imported_at": round(self._parts.clock.wall(), 3),
            "signed_by": self._terms.signed_by,
            "n_blobs": len(self._arrived),
            "n_bytes": sum(self._arrived.values()),
            "new_bytes": sum(size for digest, size in self._added.items() if digest in self._linked),
        }


def _image(
    name: str, digest: str = "", closure: Closure | None = None, missing: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return {
        "reference": name,
        "digest": digest,
        "n_manifests": len(closure.manifests) if closure else 0,
        "n_blobs": len(closure.blobs) if closure else 0,
        "n_bytes": closure.n_bytes if closure else 0,
        "n_referrers": len(closure.referrers) if closure else 0,
        "missing": dict(missing or {}),
    }


def _reference_of(entry: Descriptor, name: str, *, alone: bool) -> tuple[Reference | None, str]:
    """What an entry of index.json is called, and why it is called nothing when it has a name that is none.

    Ours, then containerd's, then the layout's own, which many tools give a bare tag: then `name` says the repository.
    """
    annotations = entry.annotations
    full = annotations.get(layout.REFERENCE) or annotations.get(layout.IMAGE_NAME) or ""
    text = annotations.get(layout.REF_NAME, "")
    if not full and "/" in text:
        full = text
    if not full and name and (text or alone):
        has_tag = ":" in name.rpartition("/")[2] or "@" in name
        full = name if has_tag or not text else f"{name}:{text}"
    if not full:
        return None, f"its name is only {text!r}: say the repository with --name" if text else ""
    try:
        return Reference.parse(full), ""
    except BreakwaterError as error:
        return None, str(error)


async def _whole(member: Member, most: int) -> bytes:
    """A document, within its limit. Raises BadArchive beyond it, before reading any."""
    if member.size > most:
        raise BadArchive(f"{member.name} of {member.size} bytes is longer than any: {most} at most")
    pieces = [piece async for piece in member.pieces]
    return b"".join(pieces)


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a hop to a thread."""
    waiting: list[bytes] = []
    n_bytes = 0
    async for piece in pieces:
        waiting.append(piece)
        n_bytes += len(piece)
        if n_bytes >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting, n_bytes = [], 0
    if waiting:
        yield b"".join(waiting)
