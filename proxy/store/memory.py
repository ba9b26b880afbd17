"""The store's ports in memory: the reference for what they mean, and the double that other tests use.

Nothing survives the process. Bytes are in anonymous files (memfd), so that a descriptor can be sent from as with a real
one. Everything is done at once on the loop, after one turn of it; only tests and demonstrations hold it that way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from proxy.errors import Corrupt, OutOfSpace, StoreError
from proxy.oci.digest import Digest, Verifier
from proxy.oci.names import Tag
from proxy.ports import FileIdentity, Holding, LinkRecord, Space, StoredBlob, TagRecord, Use


class MemoryBlob:
    """An open blob (ports.OpenBlob)."""

    __slots__ = ("_is_open", "fd", "identity", "size")

    def __init__(self, fd: int) -> None:
        found = os.fstat(fd)
        self.fd = fd
        self.size = found.st_size
        self.identity = FileIdentity(found.st_ino, found.st_size, found.st_ctime_ns)
        self._is_open = True

    async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
        """See ports.OpenBlob."""
        await asyncio.sleep(0)
        piece = os.pread(self.fd, limit, offset)
        if verifier is not None:
            verifier.feed(piece)
        return piece

    def close(self) -> None:
        """Give the descriptor back. May be called more than once."""
        if self._is_open:
            self._is_open = False
            os.close(self.fd)


class MemoryIngest:
    """An unfinished blob (ports.Ingest)."""

    def __init__(self, blobs: MemoryBlobs, digest: Digest, verifier: Verifier, fd: int) -> None:
        self.fd = fd
        self.n_bytes = 0
        self._blobs = blobs
        self._digest = digest
        self._verifier = verifier
        self._failure: StoreError | None = None
        self._has_ended = False
        self._is_open = True

    async def write(self, *pieces: bytes | bytearray | memoryview) -> None:
        """See ports.Ingest."""
        await asyncio.sleep(0)
        if self._has_ended or not self._is_open:
            raise ValueError("the ingest has ended")
        for piece in pieces:
            self._verifier.feed(piece)
        if self._failure is None and not self._blobs.has_room(sum(map(len, pieces))):
            self._failure = OutOfSpace(f"cannot write {self._digest}: no room")
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        for piece in pieces:
            os.pwrite(self.fd, piece, self.n_bytes)
            self.n_bytes += len(piece)
            self._blobs.n_bytes += len(piece)

    async def commit(self) -> None:
        """See ports.Ingest."""
        await asyncio.sleep(0)
        if self._has_ended:
            raise ValueError("the ingest has ended")
        if self._failure is not None or not self._verifier.agrees() or self._verifier.n_bytes != self.n_bytes:
            self._give_up()
            if self._failure is not None:
                raise self._failure
            raise Corrupt(f"what arrived for {self._digest} does not hash to it ({self._verifier.n_bytes} bytes)")
        self._has_ended = True
        self._blobs.unfinished.remove(self)
        self._blobs.keep(self._digest, os.dup(self.fd))

    async def abort(self, *, keep: bool = False) -> None:
        """See ports.Ingest.

        `keep` keeps nothing: memory does not outlive the process, and so there is nothing to resume.
        """
        await asyncio.sleep(0)
        self._give_up()

    def close(self) -> None:
        """Close `fd`."""
        if self._is_open:
            self._is_open = False
            os.close(self.fd)

    def _give_up(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._blobs.unfinished.remove(self)
            self._blobs.n_bytes -= self.n_bytes


class MemoryBlobs:
    """Blobs in anonymous files (ports.BlobStore). `total_bytes` is how much fits, unfinished blobs included."""

    def __init__(self, *, total_bytes: int = 1 << 62) -> None:
        self.total_bytes = total_bytes
        self.n_bytes = 0
        #: What was quarantined, and why.
        self.quarantined: list[tuple[Digest, str]] = []
        self.unfinished: list[MemoryIngest] = []
        self._kept: dict[Digest, int] = {}

    async def open(self, digest: Digest) -> MemoryBlob | None:
        """See ports.BlobStore."""
        await asyncio.sleep(0)
        fd = self._kept.get(digest)
        return None if fd is None else MemoryBlob(os.dup(fd))

    async def ingest(self, digest: Digest, verifier: Verifier) -> MemoryIngest:
        """See ports.BlobStore."""
        await asyncio.sleep(0)
        ingest = MemoryIngest(self, digest, verifier, os.memfd_create("ingest"))
        self.unfinished.append(ingest)
        return ingest

    async def delete(self, digests: Sequence[Digest]) -> None:
        """See ports.BlobStore."""
        await asyncio.sleep(0)
        for digest in digests:
            self._drop(digest)

    async def quarantine(self, digest: Digest, why: str, inode: int | None = None) -> bool:
        """See ports.BlobStore. Only the reason is kept."""
        await asyncio.sleep(0)
        fd = self._kept.get(digest)
        if fd is not None:
            if inode not in (None, os.fstat(fd).st_ino):
                return False
            self._drop(digest)
            self.quarantined.append((digest, why))
        return True

    async def scan(self) -> AsyncIterator[Sequence[StoredBlob]]:
        """See ports.BlobStore."""
        await asyncio.sleep(0)
        found = [(digest, os.fstat(fd)) for digest, fd in sorted(self._kept.items())]
        if found:
            yield [StoredBlob(digest, each.st_size, each.st_mtime) for digest, each in found]

    async def space(self) -> Space:
        """See ports.BlobStore."""
        await asyncio.sleep(0)
        return Space(self.total_bytes, max(0, self.total_bytes - self.n_bytes), 1 << 20, (1 << 20) - len(self._kept))

    async def aclose(self) -> None:
        """Let go of every blob. Open ones stay readable."""
        for digest in list(self._kept):
            self._drop(digest)

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes still fit."""
        return self.n_bytes + n_bytes <= self.total_bytes

    def keep(self, digest: Digest, fd: int) -> None:
        """Take over a descriptor whose bytes are verified and counted."""
        self._drop(digest)
        self._kept[digest] = fd

    def _drop(self, digest: Digest) -> None:
        fd = self._kept.pop(digest, None)
        if fd is not None:
            self.n_bytes -= os.fstat(fd).st_size
            os.close(fd)


@dataclass(slots=True)
class _Held:
    tags: dict[str, TagRecord] = field(default_factory=dict)
    links: dict[tuple[bool, Digest], LinkRecord] = field(default_factory=dict)


class MemoryRecords:
    """Tags and links in memory (ports.Records)."""

    def __init__(self) -> None:
        self._held: dict[Holding, _Held] = {}

    async def tag(self, holding: Holding, tag: Tag) -> TagRecord | None:
        """See ports.Records."""
        await asyncio.sleep(0)
        held = self._held.get(holding)
        return held.tags.get(tag.value) if held else None

    async def put_tag(self, holding: Holding, record: TagRecord) -> None:
        """See ports.Records."""
        await asyncio.sleep(0)
        self._of(holding).tags[Tag.parse(record.tag).value] = record

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        """See ports.Records."""
        await asyncio.sleep(0)
        held = self._held.get(holding)
        return _in_order(held) if held else []

    async def put_link(self, holding: Holding, record: LinkRecord) -> None:
        """See ports.Records."""
        await asyncio.sleep(0)
        self._of(holding).links[not record.is_manifest, record.descriptor.digest] = record

    async def remove(self, holding: Holding, *, tags: Iterable[Tag] = (), links: Iterable[Digest] = ()) -> None:
        """See ports.Records."""
        await asyncio.sleep(0)
        held = self._held.get(holding)
        if held is None:
            return
        for tag in tags:
            held.tags.pop(tag.value, None)
        for digest in links:
            held.links.pop((False, digest), None)
            held.links.pop((True, digest), None)

    async def scan(self) -> AsyncIterator[tuple[Holding, Sequence[TagRecord], Sequence[LinkRecord]]]:
        """See ports.Records."""
        await asyncio.sleep(0)
        for holding, held in sorted(self._held.items(), key=lambda item: item[0]):
            if held.tags or held.links:
                yield holding, [held.tags[name] for name in sorted(held.tags)], _in_order(held)

    def _of(self, holding: Holding) -> _Held:
        return self._held.setdefault(holding, _Held())


def _in_order(held: _Held) -> list[LinkRecord]:
    return [held.links[key] for key in sorted(held.links)]


class MemoryFacts:
    """Facts in memory (ports.Facts)."""

    def __init__(self) -> None:
        self._uses: dict[Digest, Use] = {}
        self._named: dict[str, bytes] = {}

    async def uses(self) -> AsyncIterator[Sequence[Use]]:
        """See ports.Facts."""
        await asyncio.sleep(0)
        if self._uses:
            yield sorted(self._uses.values(), key=lambda use: use.counter)

    async def remember(self, uses: Sequence[Use], forgotten: Sequence[Digest]) -> None:
        """See ports.Facts."""
        await asyncio.sleep(0)
        self._uses |= {use.digest: use for use in uses}
        for digest in forgotten:
            self._uses.pop(digest, None)

    async def get(self, key: str) -> bytes | None:
        """See ports.Facts."""
        await asyncio.sleep(0)
        return self._named.get(key)

    async def put(self, key: str, value: bytes) -> None:
        """See ports.Facts."""
        await asyncio.sleep(0)
        if value:
            self._named[key] = value
        else:
            self._named.pop(key, None)

    async def aclose(self) -> None:
        """See ports.Facts."""


class MemoryCharges:
    """Journals in dictionaries (ports.ChargeJournal)."""

    def __init__(self) -> None:
        self._charges: dict[str, dict[Digest, int]] = {}

    async def changes(self) -> AsyncIterator[tuple[str, Sequence[tuple[Digest, int | None]]]]:
        """See ports.ChargeJournal."""
        await asyncio.sleep(0)
        for project, charges in tuple(self._charges.items()):
            if charges:
                yield project, list(charges.items())

    async def append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
        """See ports.ChargeJournal."""
        await asyncio.sleep(0)
        charges = self._charges.setdefault(project, {})
        for digest, size in changes:
            if size is None:
                charges.pop(digest, None)
            else:
                charges[digest] = size

    async def rewrite(self, project: str, changes: Iterable[Sequence[tuple[Digest, int | None]]]) -> None:
        """See ports.ChargeJournal."""
        charges: dict[Digest, int] = {}
        for some in changes:
            await asyncio.sleep(0)
            for digest, size in some:
                charges.pop(digest, None)
                if size is not None:
                    charges[digest] = size
        self._charges[project] = charges


class MemoryNotes:
    """Notes in a dictionary (ports.Notes)."""

    def __init__(self) -> None:
        self._notes: dict[str, bytes] = {}

    async def get(self, name: str) -> bytes | None:
        """See ports.Notes."""
        await asyncio.sleep(0)
        return self._notes.get(name)

    async def put(self, name: str, body: bytes) -> None:
        """See ports.Notes."""
        await asyncio.sleep(0)
        self._notes[name] = body


class MemoryStore:
    """Everything at rest, in memory: `blobs`, `records`, `facts`, with the shape of `DiskStore`."""

    def __init__(self, *, total_bytes: int = 1 << 62) -> None:
        self.blobs = MemoryBlobs(total_bytes=total_bytes)
        self.records = MemoryRecords()
        self.charges = MemoryCharges()
        self.notes = MemoryNotes()
        self.facts = MemoryFacts()

    async def aclose(self) -> None:
        """Let go of everything."""
        await self.facts.aclose()
        await self.blobs.aclose()
