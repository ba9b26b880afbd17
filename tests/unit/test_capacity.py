"""engine/capacity.py by behaviour: room before bytes, who goes first, what is remembered (INV-5)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence

import pytest

from proxy.engine.capacity import COUNT_PATIENCE_S, REMEMBER_EVERY_S, STEP_BYTES
from proxy.errors import OutOfSpace, Unavailable
from proxy.events import Evicted
from proxy.oci.digest import Digest
from proxy.ports import Space
from proxy.rules.ledger import BLOCK_BYTES, on_disk
from proxy.store.memory import MemoryBlobs, MemoryStore
from tests.support.appliance import HastyClock
from tests.support.engine import Engine, FakeUpstream, engine
from tests.support.left_behind import SlowScan, put

BLOCK = BLOCK_BYTES


async def kept(running: Engine, *names: bytes) -> list[Digest]:
    """Blobs of one block each, had from upstream in this order."""
    upstream = next(iter(running.upstreams.values()))
    assert isinstance(upstream, FakeUpstream)
    found = []
    for name in names:
        found.append(upstream.put_blob(name))
        await running.read(found[-1])
        await running.idle()
    return found


def names(running: Engine) -> list[Digest]:
    return [digest for digest, _ in running.ledger]


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    made = MemoryStore()
    yield made
    await made.aclose()


# -- room --------------------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_makes_room() -> None:
    """A hit makes it young again; what goes is told."""
    async with engine(FakeUpstream(), capacity=3 * BLOCK, clock=HastyClock()) as running:
        a, b, c = await kept(running, b"a", b"b", b"c")
        await running.read(a)
        (d,) = await kept(running, b"d")
        assert names(running) == [c, a, d]
        assert await running.stored(b) is None
        assert [event for event in running.events if isinstance(event, Evicted)] == [Evicted(1, 1)]
        assert running.capacity.evicted_bytes == 1


async def test_a_reservation_ends_once(store: MemoryStore) -> None:
    """INV-5: settled or released; released again it gives back nothing more."""
    async with engine(FakeUpstream(), store=store, capacity=10 * BLOCK) as running:
        reservation = await running.capacity.reserve(5 * BLOCK)
        assert running.ledger.reserved == 5 * BLOCK
        reservation.settle(Digest.of(b"x"), 100)
        reservation.release()
        assert (running.ledger.reserved, running.ledger.committed) == (0, BLOCK)


async def test_an_unknown_length_reserves_in_steps(store: MemoryStore) -> None:
    """Each step is made room for before its bytes come."""
    async with engine(FakeUpstream(), store=store) as running:
        reservation = await running.capacity.reserve(None)
        assert running.ledger.reserved == STEP_BYTES
        await reservation.cover(STEP_BYTES)
        assert running.ledger.reserved == STEP_BYTES
        await reservation.cover(STEP_BYTES + 1)
        assert running.ledger.reserved == 2 * STEP_BYTES
        await reservation.cover(4 * STEP_BYTES)
        assert running.ledger.reserved == on_disk(4 * STEP_BYTES)
        reservation.release()


async def test_what_cannot_fit_evicts_nothing() -> None:
    """Larger than the whole store: refused before anything goes for it."""
    async with engine(FakeUpstream(), capacity=3 * BLOCK, clock=HastyClock()) as running:
        found = await kept(running, b"a", b"b")
        with pytest.raises(OutOfSpace, match="whole capacity"):
            await running.capacity.reserve(4 * BLOCK)
        assert names(running) == found


async def test_many_at_once_never_promise_more_than_there_is() -> None:
    """INV-5 at every await: reservations made beside each other are made one after the other."""
    async with engine(FakeUpstream(), capacity=4 * BLOCK, clock=HastyClock()) as running:
        await kept(running, b"a", b"b", b"c")

        async def one() -> bool:
            try:
                reservation = await running.capacity.reserve(2 * BLOCK)
            except OutOfSpace:
                return False
            assert running.ledger.committed + running.ledger.reserved <= running.ledger.capacity
            await asyncio.sleep(0)
            reservation.release()
            return True

        assert any(await asyncio.gather(*(one() for _ in range(10))))


class TightDisk(MemoryBlobs):
    """A file system that somebody else fills: so much of it is free beside our own blobs."""

    def __init__(self) -> None:
        super().__init__()
        self.others_bytes = 0
        self.total = 100 * BLOCK
        self.free_inodes = 1000
        self.is_broken = False
        self.cannot_delete = False

    async def space(self) -> Space:
        if self.is_broken:
            raise Unavailable("Input/output error")
        ours = sum(on_disk(os.fstat(fd).st_size) for fd in self._kept.values())
        return Space(self.total, self.total - self.others_bytes - ours, 1000, self.free_inodes)

    async def delete(self, digests: Sequence[Digest]) -> None:
        if self.cannot_delete:
            raise Unavailable("Read-only file system")
        await super().delete(digests)


async def test_min_free_is_kept_whoever_fills_the_disk(store: MemoryStore) -> None:
    """Promise 5: we never write below min_free; cold blobs go for it."""
    store.blobs = disk = TightDisk()
    async with engine(FakeUpstream(), store=store, min_free=lambda total: total // 10, clock=HastyClock()) as running:
        a, b, c = await kept(running, b"a", b"b", b"c")
        disk.others_bytes = 88 * BLOCK  # of 100; 10 stay free, and ours take 3
        (d,) = await kept(running, b"d")
        assert names(running) == [c, d]
        disk.others_bytes = 95 * BLOCK
        assert await running.read(await _new(running, b"e")) == b"e"
        await running.idle()
        assert names(running) == []
        assert "min_free" in running.capacity.degraded
        assert {a, b} & set(names(running)) == set()


async def _new(running: Engine, body: bytes) -> Digest:
    upstream = next(iter(running.upstreams.values()))
    assert isinstance(upstream, FakeUpstream)
    return upstream.put_blob(body)


@pytest.mark.parametrize("sickness", ["is_broken", "cannot_delete"])
async def test_a_disk_that_cannot_be_asked_or_emptied_keeps_nothing_new(store: MemoryStore, sickness: str) -> None:
    """Everything is served all the same, and the ledger still counts what is really there."""
    store.blobs = disk = TightDisk()
    async with engine(FakeUpstream(), store=store, capacity=2 * BLOCK, clock=HastyClock()) as running:
        found = await kept(running, b"a", b"b")
        setattr(disk, sickness, True)
        assert await running.read(await _new(running, b"c")) == b"c"
        await running.idle()
        assert names(running) == found
        assert running.ledger.reserved == 0


# -- after a start -----------------------------------------------------------------------------------------------------


async def test_the_order_of_use_outlives_the_process(store: MemoryStore) -> None:
    """Files are the truth, the remembered order sorts them; what it does not know comes first."""
    async with engine(FakeUpstream(), store=store, clock=HastyClock()) as running:
        a, b, c = await kept(running, b"a", b"b", b"c")
        await running.read(a)
        await running.clock.advance(REMEMBER_EVERY_S)
    unknown = await put(store, b"unknown")
    async with engine(FakeUpstream(), store=store) as running:
        assert names(running) == [unknown, b, c, a]
        assert running.ledger.committed == 4 * BLOCK


async def test_a_lowered_capacity_holds_from_the_start(store: MemoryStore) -> None:
    """What is too much goes, the coldest first."""
    async with engine(FakeUpstream(), store=store, clock=HastyClock()) as running:
        found = await kept(running, b"a", b"b", b"c")
    async with engine(FakeUpstream(), store=store, capacity=BLOCK) as running:
        while len(running.ledger) > 1:
            await asyncio.sleep(0)
        assert names(running) == found[-1:]


async def test_misses_wait_for_the_count_but_not_for_ever(store: MemoryStore) -> None:
    """INV-5 after a start: what is not counted cannot be promised; after the patience misses pass through, hits never
    waited."""
    store.blobs = slow = SlowScan()
    old = await put(store, b"old")
    upstream = FakeUpstream()
    upstream.put_blob(b"old")
    async with engine(upstream, store=store, is_counted=False) as running:
        running.capacity.start()
        assert await running.read(old) == b"old"
        waiting = asyncio.create_task(running.read(await _new(running, b"new")))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not waiting.done()
        await running.clock.advance(COUNT_PATIENCE_S)
        assert await waiting == b"new"
        assert await running.read(await _new(running, b"newer")) == b"newer", "and nobody else waits"
        slow.gate.set()
        while not running.capacity.is_counted:
            await asyncio.sleep(0)
        await kept(running, b"newest")
        assert len(running.ledger) == 2


async def test_a_store_that_cannot_be_counted_makes_nobody_wait(store: MemoryStore) -> None:
    """Nothing new is kept, everything is served, and an operator reads why."""
    store.blobs = sick = SlowScan()
    sick.is_broken = True
    sick.gate.set()
    async with engine(FakeUpstream(), store=store, is_counted=False) as running:
        running.capacity.start()
        while not running.notices:
            await asyncio.sleep(0)
        assert await running.read(await _new(running, b"new")) == b"new"
        assert "cannot count" in running.capacity.degraded


async def test_what_goes_while_the_store_is_counted_is_not_counted(store: MemoryStore) -> None:
    """A file that was found rotten meanwhile must not be promised to anybody as room that is taken."""
    store.blobs = slow = SlowScan()
    gone = await put(store, b"gone")
    async with engine(FakeUpstream(), store=store, is_counted=False) as running:
        running.capacity.start()
        for _ in range(10):
            await asyncio.sleep(0)
        await store.blobs.quarantine(gone, "rotten")
        running.capacity.forget(gone)
        slow.gate.set()
        while not running.capacity.is_counted:
            await asyncio.sleep(0)
        assert running.ledger.committed == 0


class SlowDeletion(MemoryBlobs):
    """Deletes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()
        self.is_asked = asyncio.Event()

    async def delete(self, digests: Sequence[Digest]) -> None:
        self.is_asked.set()
        await self.may_go.wait()
        await super().delete(digests)


async def test_hits_never_wait_for_eviction(store: MemoryStore) -> None:
    """Whatever the disk takes to let go of what is cold, what is warm is served meanwhile, and so is a miss's first byte
    of what needs no room."""
    store.blobs = slow = SlowDeletion()
    async with engine(FakeUpstream(), store=store, capacity=3 * BLOCK, clock=HastyClock()) as running:
        a, b, c = await kept(running, b"a", b"b", b"c")
        missing = asyncio.create_task(running.read(await _new(running, b"d")))
        await slow.is_asked.wait()
        for digest, body in ((b, b"b"), (c, b"c"), (b, b"b")):
            assert await running.read(digest) == body
        assert not missing.done(), "it does wait for the room"
        slow.may_go.set()
        assert await missing == b"d"
        await running.idle()
        assert await running.stored(a) is None
