"""Bundles into the store: members of an OCI layout are verified, judged, kept, and linked at the end.

An import commits each blob the way a transfer does (reserved, hashed, synced, then named), and images are linked only
when all of them is there: kill it anywhere, and what is linked is whole, and what has come is not written again. What
is refused leaves nothing.

What cannot fit is refused before it is written. Manifests say what images need, and they are small: they wait in memory
until all of them are known, the room and the quotas are judged, and only then anything is kept. In our bundles they come
first, and archives/files.py puts them first in those of other tools, with a note of what comes. An archive that is sent
to the admin API as its tool wrote it has no such note: it waits as long as there is room, and then every blob that a
manifest names is taken to come. One with too much before its manifests is judged at its end, and what was written by then
goes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.engine.brought import Brought
from proxy.engine.bundle import PIECE_BYTES, Parts, Tell
from proxy.engine.capacity import Reservation
from proxy.engine.manifests import Held, held_of
from proxy.errors import BadArchive, BreakwaterError, InvalidManifest, OutOfSpace, Overloaded, StoreError
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.layout import Contents, blob_name, maybe_blob
from proxy.oci.manifest import MAX_MANIFEST_BYTES
from proxy.ports import Ingest, Member

#: What waits in memory at most, in bytes, until all manifests are known: those of some ten thousand images.
MAX_WAITING_BYTES = 32 << 20
#: Stored blobs looked at in one turn of the loop, to see what room there could be.
LOOKED_AT_ONCE = 1_000


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

        Raises BadArchive for an archive that is refused and OutOfSpace for one that cannot fit (the capacity, a
        project's quota, or with `terms.pin` the pins), and then nothing of it stays; Unavailable when the store cannot be
        counted. Cancelled or killed, what has come stays, linked to nothing, for the next try.
        """
        await self._parts.capacity.counted()
        await self._parts.charges.read()
        taking = _Taking(self._parts, terms, tell)
        try:
            async for member in members:
                await taking.take(member)
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
        self._has_ended = False
        #: Before anything is kept; None once it has been judged.
        self._waiting: _Waiting | None = _Waiting()
        self._brought: Brought | None = None
        #: Everything that came, with sizes; and of it what was not here before.
        self._arrived: dict[Digest, int] = {}
        self._added: dict[Digest, int] = {}
        self._held: list[Digest] = []
        #: Promised for what the contents say is still to come.
        self._room: Reservation | None = None

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
            await self._take_index(await asyncio.to_thread(layout.read_index, body))
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
        await self._check_room(self._n_wanted())

    async def _take_index(self, index: tuple[Descriptor, ...]) -> None:
        self._index = index
        if self._waiting is not None:
            await self._wait_for(self._waiting, [entry.digest for entry in index])

    async def _take_blob(self, digest: Digest, member: Member) -> None:
        if self._contents is not None and self._contents.members.get(digest) != member.size:
            raise BadArchive(f"{member.name} of {member.size} bytes is not among the contents")
        self._hold(digest)
        if self._waiting is not None and not self._waiting.has_room(member.size):
            await self._begin()
        if self._waiting is None:
            await self._keep(digest, member)
            return
        body = await _whole(member, MAX_MANIFEST_BYTES)
        if Digest.of(body, digest.algorithm) != digest:
            raise BadArchive(f"{member.name} does not hash to its name")
        self._arrived[digest] = member.size
        self._waiting.bodies[digest] = body
        self._waiting.n_bytes += len(body)
        if self._index is not None:
            await self._wait_for(self._waiting, [digest] if digest in self._waiting.unseen else [])

    async def _keep(self, digest: Digest, member: Member) -> None:
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
        owner, reservation = self._parts.owner, await self._reserved(digest, member.size)
        try:
            ingest = await self._parts.blobs.ingest(digest, verifier)
            try:
                async for piece in _gathered(member.pieces):
                    await owner.uninterrupted(ingest.write(piece), "write an imported blob")
                    reservation.wrote(ingest.n_bytes)
                if not verifier.agrees():
                    raise BadArchive(f"{member.name} does not hash to its name")
                await owner.uninterrupted(self._commit(digest, ingest, reservation), "commit an imported blob")
            except BaseException:
                await owner.uninterrupted(ingest.abort(), "abort an imported blob")
                raise
            finally:
                ingest.close()
        finally:
            reservation.release()

    async def _commit(self, digest: Digest, ingest: Ingest, reservation: Reservation) -> None:
        """What has its name is counted, whether or not somebody still waits for it."""
        await ingest.commit()
        reservation.settle(digest, ingest.n_bytes)
        self._added[digest] = ingest.n_bytes

    def _hold(self, digest: Digest) -> None:
        """Neither what is here nor what comes may be evicted before it is linked."""
        self._parts.capacity.hold(digest)
        self._held.append(digest)

    # -- before anything is kept ------------------------------------------------------------------------------------

    async def _wait_for(self, waiting: _Waiting, named: Sequence[Digest]) -> None:
        """Follow what was named as far as it has come. Once that is all that is to come, judge and begin.

        Where nobody says what comes, more can be known as long as there is room to wait.
        """
        todo = list(named)
        while todo:
            digest = todo.pop()
            if digest in waiting.manifests:
                continue
            held = await self._at_hand(waiting, digest)
            if held is not None:
                waiting.manifests[digest] = held
                waiting.unseen.discard(digest)
                todo += [child.digest for child in held.manifest.children]
            elif digest not in waiting.bodies and self._may_come(digest):
                waiting.unseen.add(digest)
        if self._contents is not None and not waiting.unseen:
            await self._begin()

    def _may_come(self, digest: Digest) -> bool:
        return self._contents is None or digest in self._contents.members

    async def _at_hand(self, waiting: _Waiting, digest: Digest) -> Held | None:
        body = waiting.bodies.get(digest)
        if body is None:
            return await self._parts.manifests.local(Descriptor("", digest, 0))
        try:
            return await held_of(body, digest, "")
        except InvalidManifest:
            return None  # named as a manifest and none: its image will be missing it

    async def _begin(self) -> None:
        """Judge, promise the room, and keep what has waited. Raises OutOfSpace, and then nothing has been written."""
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        if self._index is not None and not waiting.unseen:
            await self._judge(waiting.manifests)
        if self._contents is not None:
            await self._check_room(n_wanted := self._n_wanted())
            self._room = await self._parts.capacity.reserve(n_wanted)
        for digest, body in waiting.bodies.items():
            await self._keep(digest, Member(blob_name(digest), len(body), _once(body)))

    async def _judge(self, manifests: Mapping[Digest, Held]) -> None:
        """Raises OutOfSpace when a project's quota, or the pins, have no room for the images that will be whole."""
        assert self._index is not None
        terms = self._terms
        self._brought = Brought(self._parts, self._contents, self._index, terms.name, terms.project, pin=terms.pin)
        await self._brought.find_room(manifests, self._is_coming)

    def _is_coming(self, digest: Digest, size: int) -> bool:
        """Where nobody says what comes, all that is named does: to refuse an import too many is better than to write
        what has no room."""
        if self._contents is None and not self._has_ended:
            return True
        members = self._contents.members if self._contents is not None else self._arrived
        return members.get(digest) == size or self._parts.is_here(digest, size)

    def _n_wanted(self) -> int:
        """What the archive will take of the disk beyond what is here, in bytes, once its contents are known."""
        members = self._contents.members if self._contents is not None else {}
        ledger = self._parts.capacity.ledger
        return sum(ledger.on_disk(size) for digest, size in members.items() if ledger.size_of(digest) != size)

    async def _check_room(self, n_bytes: int) -> None:
        """Raises OutOfSpace where no eviction that may be would make room for `n_bytes`. Evicts nothing."""
        capacity, gives = self._parts.capacity, 0
        batches = capacity.ledger.batches(LOOKED_AT_ONCE)
        while n_bytes > (room := capacity.ledger.free + gives):
            batch = next(batches, None)
            if batch is None:
                raise OutOfSpace(
                    f"the import needs {n_bytes} bytes, and there is room for {max(room, 0)} of a capacity of "
                    f"{capacity.ledger.capacity}: raise store.capacity; nothing was written"
                )
            gives += sum(capacity.ledger.on_disk(size) for digest, size in batch if capacity.may_go(digest))
            await asyncio.sleep(0)

    async def _reserved(self, digest: Digest, size: int) -> Reservation:
        """Room for a blob: of what was promised for all of them, where the contents say what comes. Raises OutOfSpace."""
        n_bytes = self._parts.capacity.ledger.on_disk(size)
        if self._room is not None and n_bytes <= self._room.n_bytes:
            return self._room.part(n_bytes)
        await self._check_room(n_bytes)
        return await self._parts.capacity.reserve(size, digest)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def link(self) -> list[dict[str, Any]]:
        """The archive has ended: link every image that is whole, then let go of what nothing links to.

        Raises BadArchive when something is not in it that should be, or OutOfSpace where that is only known now.
        """
        self._has_ended = True
        if self._index is None:
            raise BadArchive(f"the archive has no {layout.INDEX_FILE}: it is no image layout")
        if not self._has_layout:
            raise BadArchive(f"the archive has no {layout.LAYOUT_FILE}: it is no image layout")
        for digest in self._contents.members if self._contents is not None else ():
            if digest not in self._arrived:
                raise BadArchive(f"{digest} is among the contents and not in the archive")
        if self._waiting is not None:
            self._waiting.unseen.clear()  # nothing more will come
            await self._begin()
        if self._brought is None:
            await self._judge({})
        assert self._brought is not None
        images = await self._brought.link(self._arrived, self._tell)
        await self._drop([digest for digest in self._added if digest not in self._brought.linked])
        return images

    async def undo(self) -> None:
        """Refused: what this import has added goes again, unless something was linked to it meanwhile."""
        linked = self._brought.linked if self._brought is not None else ()
        await self._drop([digest for digest in self._added if digest not in linked])

    async def _drop(self, digests: Sequence[Digest]) -> None:
        if not digests:
            return
        try:
            await self._parts.owner.uninterrupted(self._delete(digests), "delete what an import has brought")
        except (StoreError, Overloaded):
            pass  # they stay, linked to nothing, and are evicted like anything else

    async def _delete(self, digests: Sequence[Digest]) -> None:
        await self._parts.blobs.delete(digests)
        for digest in digests:
            self._parts.capacity.forget(digest)
            self._parts.manifests.forget(digest)

    def release(self) -> None:
        """Promises and holds end with the import."""
        if self._room is not None:
            self._room.release()
        if self._brought is not None:
            self._brought.release()
        for digest in self._held:
            self._parts.capacity.unhold(digest)
        self._held.clear()

    def summary(self) -> dict[str, Any]:
        """What the seal remembers of this import."""
        contents = self._contents
        linked = self._brought.linked if self._brought is not None else ()
        return {
            "digest": str(self._contents_digest) if self._contents_digest and contents and contents.n_images else "",
            "created_at": contents.created_at if contents else 0.0,
            "imported_at": round(self._parts.clock.wall(), 3),
            "signed_by": self._terms.signed_by,
            "n_blobs": len(self._arrived),
            "n_bytes": sum(self._arrived.values()),
            "new_bytes": sum(size for digest, size in self._added.items() if digest in linked),
        }


class _Waiting:
    """What has come and is not kept yet. `manifests` are those of `bodies`, and of the store, that something names."""

    def __init__(self) -> None:
        self.bodies: dict[Digest, bytes] = {}
        self.n_bytes = 0
        self.manifests: dict[Digest, Held] = {}
        #: Named as manifests, and still to come.
        self.unseen: set[Digest] = set()

    def has_room(self, size: int) -> bool:
        """Whether a member of `size` bytes may wait here: it could be a manifest, and memory stays bounded."""
        return size <= MAX_MANIFEST_BYTES and self.n_bytes + size <= MAX_WAITING_BYTES


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


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
