"""A durable upper bound of what the store holds, for the time after a start in which it has not been counted yet.

A note of the store (ports.Notes) that is moved up in steps *before* what it allows is promised, so that it is true
whenever the process is killed. Where the note is lost or damaged, what the file system says is used stands in: the
store cannot hold more than all files together.

Rejected: a named fact, which goes with a damaged database; and waiting for the count, which takes longer the more there
is to lose by not keeping what is fetched meanwhile.
"""

from __future__ import annotations

import json

from proxy.engine.tasks import TaskOwner
from proxy.errors import StoreError
from proxy.ports import BlobStore, Notes

#: The note's name, and the version of what it says.
NOTE, VERSION = "bound", 1
#: It is moved up by this many bytes at least, so that few transfers wait for it.
MIN_STEP_BYTES = 64 << 20


class Bound:
    """What the store may hold at most, in bytes on disk. True for this process, which holds the store's lock."""

    def __init__(self, notes: Notes, capacity: int, owner: TaskOwner) -> None:
        self._notes = notes
        self._owner = owner
        self._step = max(MIN_STEP_BYTES, capacity // 64)
        self._capacity = capacity
        self.n_bytes = 0

    async def load(self, blobs: BlobStore) -> int:
        """The bound that an earlier process left, or one from the file system. Raises Unavailable."""
        space = await blobs.space()
        at_most = space.total_bytes - space.free_bytes
        noted = await self._noted()
        self.n_bytes = 0 if noted is None else noted
        return at_most if noted is None else min(noted, at_most)

    async def _noted(self) -> int | None:
        try:
            body = await self._notes.get(NOTE)
            document = json.loads(body) if body is not None else None
            if document is None or document["version"] != VERSION or document["n_bytes"] < 0:
                return None
            return int(document["n_bytes"])
        except (StoreError, ValueError, KeyError, TypeError):
            return None  # the file system's word stands in

    async def cover(self, n_bytes: int) -> None:
        """Make it true for `n_bytes`; durable when it returns. Raises OutOfSpace or Unavailable."""
        if n_bytes > self.n_bytes:
            await self.write(max(n_bytes, min(n_bytes + self._step, self._capacity)))

    async def write(self, n_bytes: int) -> None:
        """Say `n_bytes`, more or less than before; also a proof that the disk takes anything. Raises like `cover`."""
        body = json.dumps({"version": VERSION, "n_bytes": n_bytes}).encode()
        # Whatever fails below, no more than the smaller number may be relied on.
        self.n_bytes = min(self.n_bytes, n_bytes)
        # To its end, whoever asked: a later bound must not be overtaken by this one.
        await self._owner.uninterrupted(self._notes.put(NOTE, body), "write the bound")
        self.n_bytes = n_bytes

    async def lower(self, n_bytes: int) -> None:
        """Come down to what is really there, a step above. Raises like `cover`."""
        wanted = min(n_bytes + self._step, self._capacity)
        if wanted < self.n_bytes:
            await self.write(wanted)
