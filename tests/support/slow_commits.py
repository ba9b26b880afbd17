"""Commits that take as long as those of a disk, in a store in memory."""

from __future__ import annotations

import asyncio

import pytest

from proxy.oci.digest import Digest, Verifier
from proxy.store.memory import MemoryBlobs, MemoryIngest


def slow_commits(blobs: MemoryBlobs, monkeypatch: pytest.MonkeyPatch, n_turns: int) -> asyncio.Event:
    """Have each commit take so many turns of the loop, as a thread would; the event is set once one has begun."""
    begun, ingest = asyncio.Event(), blobs.ingest

    async def slow(digest: Digest, verifier: Verifier) -> MemoryIngest:
        made = await ingest(digest, verifier)
        commit = made.commit

        async def in_its_thread() -> None:
            begun.set()
            for _ in range(n_turns):
                await asyncio.sleep(0)
            await commit()

        made.commit = in_its_thread  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(blobs, "ingest", slow)
    return begun
