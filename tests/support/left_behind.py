"""A store in memory that an earlier process has left, and one whose scan takes as long as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from proxy.errors import Unavailable
from proxy.oci.digest import Digest, Verifier
from proxy.ports import StoredBlob
from proxy.store.disk import DiskStore
from proxy.store.memory import MemoryBlobs, MemoryStore


class SlowScan(MemoryBlobs):
    """A scan that waits for its gate, or fails then with Unavailable."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.is_broken = False

    async def scan(self) -> AsyncIterator[Sequence[StoredBlob]]:
        """See ports.BlobStore."""
        found = [batch async for batch in super().scan()]
        await self.gate.wait()
        if self.is_broken:
            raise Unavailable("Input/output error")
        for batch in found:
            yield batch


async def put(store: MemoryStore | DiskStore, body: bytes) -> Digest:
    """A blob that an earlier process has left."""
    digest = Digest.of(body)
    ingest = await store.blobs.ingest(digest, Verifier(digest))
    await ingest.write(body)
    await ingest.commit()
    ingest.close()
    return digest
