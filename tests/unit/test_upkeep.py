"""What is on disk and is no blob: claimed before it is written, counted as it is, made room for like a transfer."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proxy.engine.capacity import MIN_UPKEEP_STEP
from proxy.errors import OutOfSpace
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.ports import Holding, TagRecord
from proxy.store.disk import DiskStore
from proxy.store.filesystem import FileSystem
from proxy.store.upkeep import MARGIN_BYTES
from tests.support.appliance import HastyClock
from tests.support.clock import ManualClock
from tests.support.engine import FakeUpstream, engine

MIB = 1 << 20
HOLDING = Holding("default", "docker.io", "library/alpine")


def record(n: int) -> TagRecord:
    return TagRecord(f"v{n}", Descriptor("m", Digest.of(b"x"), 1), 1.0, source="s" * 3000)


async def opened(path: Path) -> DiskStore:
    return await DiskStore.open(path, clock=ManualClock(), report=print)


async def test_a_store_that_nobody_counts_writes_as_it_likes(tmp_path: Path) -> None:
    """Without an engine there is nobody to ask."""
    store = await opened(tmp_path)
    await store.records.put_tag(HOLDING, record(1))
    assert store.upkeep.taken > 0
    await store.aclose()


async def test_records_make_room_by_evicting(tmp_path: Path) -> None:
    """Promise 5: a thousand tags take as much of the capacity as a layer does."""
    store, upstream = await opened(tmp_path), FakeUpstream()
    async with engine(upstream, store=store, capacity=3 * MIB, upkeep=store.upkeep, clock=HastyClock()) as running:
        for n in range(8):
            await running.read(upstream.put_blob(bytes([n]) * (256 << 10)))
        await running.idle()
        n_before = len(running.ledger)
        for n in range(200):
            await store.records.put_tag(HOLDING, record(n))
        assert len(running.ledger) < n_before
        assert running.ledger.held <= 3 * MIB
        assert running.ledger.upkeep >= store.upkeep.needed
    await store.aclose()


async def test_a_record_for_which_no_room_can_be_made_is_refused(tmp_path: Path) -> None:
    """As on a disk that is full; what is there stands, and blobs are read on."""
    store, upstream = await opened(tmp_path), FakeUpstream()
    async with engine(upstream, store=store, capacity=2 * MIB, upkeep=store.upkeep, clock=HastyClock()) as running:
        digest = upstream.put_blob(b"pinned" * 200_000)
        await running.read(digest)
        await running.idle()
        running.capacity.pinned = {digest}
        with pytest.raises(OutOfSpace):
            for n in range(400):
                await store.records.put_tag(HOLDING, record(n))
        assert running.ledger.held <= 2 * MIB
        assert await running.read(digest) == b"pinned" * 200_000
    await store.aclose()


async def test_what_is_needed_no_more_is_given_back(tmp_path: Path) -> None:
    """Records come and go, and their room with them."""
    store = await opened(tmp_path)
    async with engine(FakeUpstream(), store=store, capacity=8 * MIB, upkeep=store.upkeep) as running:
        for n in range(300):
            await store.records.put_tag(HOLDING, record(n))
        most = running.ledger.upkeep
        await store.records.remove(HOLDING, tags=[Tag(f"v{n}") for n in range(300)])
        await running.capacity.watch()
        assert running.ledger.upkeep <= most - MIB
        assert running.ledger.upkeep == store.upkeep.needed + MIN_UPKEEP_STEP
    await store.aclose()


async def test_a_claim_ends_with_its_thread(tmp_path: Path) -> None:
    """Whoever gives up waiting: the write goes on, and so does what it may take."""
    store = await opened(tmp_path)
    idle = store.upkeep.needed
    writing = asyncio.create_task(store.records.put_tag(HOLDING, record(1)))
    while store.upkeep.needed == idle:
        await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await store.aclose()
    assert store.upkeep.needed == store.upkeep.taken + MARGIN_BYTES
    assert os.listdir(tmp_path / "breakwater" / "records")


async def test_what_goes_to_quarantine_counts_on(tmp_path: Path) -> None:
    """Moved is not gone: the ledger holds as much as before, until it is trimmed."""
    store, upstream = await opened(tmp_path), FakeUpstream()
    async with engine(upstream, store=store, capacity=8 * MIB, upkeep=store.upkeep, clock=HastyClock()) as running:
        digest = upstream.put_blob(b"rotten" * 200_000)
        await running.read(digest)
        await running.idle()
        before = store.upkeep.taken
        await store.blobs.quarantine(digest, "rotten")
        running.capacity.forget(digest)
        assert running.ledger.committed == 0
        assert store.upkeep.taken >= before + len(b"rotten" * 200_000)
        assert running.ledger.upkeep >= store.upkeep.needed
    await store.aclose()


async def test_what_is_moved_away_while_all_is_counted_stops_no_counting(tmp_path: Path) -> None:
    """Facts that are damaged go to quarantine at any time; a start that could not count would keep nothing."""

    class Moving(FileSystem):
        def names(self, at: int) -> list[str]:
            return [*super().names(at), "gone"]

    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
    await store.aclose()
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print, fs=Moving())
    await store.upkeep.measure()
    assert store.upkeep.taken > 0
    await store.aclose()
