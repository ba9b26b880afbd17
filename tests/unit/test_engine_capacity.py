"""engine/capacity.py: promises kept at every moment, images evicted whole, a start that waits for nothing."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.engine.bound import NOTE
from proxy.engine.capacity import STEP_BYTES, WATCH_EVERY_S, Capacity
from proxy.engine.tasks import TaskOwner
from proxy.errors import OutOfSpace, Unavailable
from proxy.events import Event
from proxy.oci.digest import Digest, Verifier
from proxy.ports import Space, StoredBlob
from proxy.rules.ledger import BLOCK_BYTES, Ledger, on_disk
from proxy.store.disk import DiskStore
from proxy.store.memory import MemoryBlobs, MemoryStore
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.engine import FakeUpstream, engine, route, tag

KIB = 1024


class Shared(MemoryBlobs):
    """A store on a file system that others fill: `theirs` bytes and `their_inodes` of it."""

    theirs = 0
    their_inodes = 0
    is_dark = False

    async def space(self) -> Space:
        if self.is_dark:
            raise Unavailable("EIO")
        space = await super().space()
        return replace(
            space, free_bytes=space.free_bytes - self.theirs, free_inodes=space.free_inodes - self.their_inodes
        )


class Made:
    """A capacity over a store in memory."""

    def __init__(self, store: MemoryStore, capacity: int, *, min_free: int = 0, min_inodes: int = 0) -> None:
        self.store = store
        self.clock = ManualClock()
        self.reports: list[str] = []
        self.events: list[Event] = []
        self.owner = TaskOwner(self.reports.append)
        self.of = Capacity(
            Ledger(capacity),
            store.blobs,
            store.facts,
            min_free_bytes=lambda _: min_free,
            min_free_inodes=lambda _: min_inodes,
            clock=self.clock,
            owner=self.owner,
            observe=self.events.append,
            notes=store.notes,
            records=store.records,
        )

    async def __aenter__(self) -> Made:
        await self.of.prepare()
        return self

    async def counted(self) -> Made:
        self.of.start()
        await self.of.mapped()
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.owner.aclose()
        assert self.reports == []

    async def keep(self, content: bytes) -> Digest:
        """Commit a blob as a transfer does."""
        digest = Digest.of(content)
        reservation = await self.of.reserve(len(content), digest)
        ingest = await self.store.blobs.ingest(digest, Verifier(digest))
        await ingest.write(content)
        reservation.wrote(len(content))
        await ingest.commit()
        ingest.close()
        reservation.settle(digest, len(content))
        return digest


def store_of(*contents: bytes, total_bytes: int = 1 << 30) -> MemoryStore:
    store = MemoryStore()
    store.blobs = Shared(total_bytes=total_bytes)
    for content in contents:
        fd = os.memfd_create("blob")
        os.write(fd, content)
        store.blobs.keep(Digest.of(content), fd)
        store.blobs.n_bytes += len(content)
    return store


def bodies(n: int, size: int = 4 * KIB, seed: int = 0) -> list[bytes]:
    return [(b"%d %d " % (seed, i)).ljust(size, b".") for i in range(n)]


# -- a start -----------------------------------------------------------------------------------------------------------


async def test_a_miss_right_after_a_start_is_kept_beside_the_bound() -> None:
    """The bound of the last life stands in for the count: what fits beside it need not wait."""
    store = store_of(*bodies(4))
    await store.notes.put(NOTE, json.dumps({"version": 1, "n_bytes": 20 * KIB}).encode())
    async with Made(store, 64 * KIB) as made:
        assert made.of.ledger.uncounted == 16 * KIB, "what the file system says is closer"
        await made.keep(b"new")
        assert not made.of.is_counted
        await made.counted()
        assert made.of.ledger.uncounted == 0
        assert made.of.ledger.committed == 5 * BLOCK_BYTES
    await store.aclose()


async def test_what_does_not_fit_beside_the_bound_is_not_kept() -> None:
    """Promise 5 before the count: rather nothing kept than too much."""
    store = store_of(*bodies(4))
    async with Made(store, 18 * KIB) as made:
        asking = asyncio.create_task(made.of.reserve(4 * KIB))
        while not made.clock.sleepers:
            await asyncio.sleep(0)
        await made.clock.advance(5)
        with pytest.raises(OutOfSpace, match="counted"):
            await asking
    await store.aclose()


@pytest.mark.parametrize("note", [b"{", b'{"version": 2, "n_bytes": 0}', b'{"version": 1, "n_bytes": -5}', b"[]"])
async def test_a_lost_bound_is_no_licence(note: bytes) -> None:
    """Without a note that makes sense, all that the file system has in use counts."""
    store = store_of(*bodies(4))
    await store.notes.put(NOTE, note)
    async with Made(store, 64 * KIB) as made:
        assert made.of.ledger.uncounted == 16 * KIB
    await store.aclose()


async def test_the_bound_is_written_before_it_is_used() -> None:
    """A process that is killed at any moment leaves a bound that is true."""
    store = store_of()
    async with Made(store, 1 << 30) as made:
        await made.counted()
        for content in bodies(3, 300 * KIB):
            await made.keep(content)
            note = json.loads(await store.notes.get(NOTE) or b"")
            assert note["n_bytes"] >= made.of.ledger.committed + made.of.ledger.reserved
        await made.of.aclose()
    await store.aclose()


async def test_what_is_deleted_while_it_is_counted_is_not_counted() -> None:
    """The scan may have seen it before."""
    contents = bodies(3)
    store = store_of(*contents)
    async with Made(store, 1 << 20) as made:
        gone = Digest.of(contents[0])
        made.of.forget(gone)
        await made.counted()
        assert gone not in made.of.ledger and len(made.of.ledger) == 2
    await store.aclose()


# -- others on the disk ------------------------------------------------------------------------------------------------


async def test_cold_blobs_go_when_others_fill_the_disk() -> None:
    """Promise 5: min_free is restored within 10 s, by as much as is missing and not more."""
    contents = bodies(20)
    store = store_of(total_bytes=1 << 20)
    assert isinstance(store.blobs, Shared)
    async with Made(store, 1 << 20, min_free=100 * KIB) as made:
        await made.counted()
        digests = [await made.keep(content) for content in contents]
        store.blobs.theirs = (1 << 20) - 80 * KIB - 88 * KIB
        assert WATCH_EVERY_S < 10
        await made.clock.advance(WATCH_EVERY_S)
        for _ in range(50):
            await asyncio.sleep(0)
        space = await store.blobs.space()
        assert space.free_bytes == 100 * KIB
        assert digests[:3] == [digest for digest in digests if digest not in made.of.ledger]
    await store.aclose()


async def test_inodes_count_as_bytes_do() -> None:
    """A file system can be full of names."""
    store = store_of()
    assert isinstance(store.blobs, Shared)
    async with Made(store, 1 << 20, min_inodes=10) as made:
        await made.counted()
        for content in bodies(20):
            await made.keep(content)
        store.blobs.their_inodes = (await store.blobs.space()).free_inodes - 5
        await made.of.watch()
        assert (await store.blobs.space()).free_inodes == 10
        assert len(made.of.ledger) == 15
    await store.aclose()


async def test_what_is_written_is_not_counted_twice() -> None:
    """The file system's free bytes lack it already."""
    store = store_of(total_bytes=1 << 20)
    async with Made(store, 1 << 20, min_free=100 * KIB) as made:
        await made.counted()
        first = await made.of.reserve(500 * KIB)
        assert isinstance(store.blobs, Shared)
        store.blobs.theirs = 500 * KIB  # that is us
        first.wrote(500 * KIB)
        (await made.of.reserve(400 * KIB)).release()
        with pytest.raises(OutOfSpace):
            await made.of.reserve(500 * KIB)
        first.release()
    await store.aclose()


async def test_a_degraded_store_recovers_by_itself() -> None:
    """No restart, no request: the watcher finds out that the disk takes bytes again."""
    store = store_of()
    assert isinstance(store.blobs, Shared)
    async with Made(store, 1 << 20) as made:
        await made.counted()
        store.blobs.is_dark = True
        await made.of.watch()
        assert made.of.degraded
        store.blobs.is_dark = False
        await made.of.watch()
        assert made.of.degraded == ""
    await store.aclose()


async def test_no_inodes_at_all_is_no_shortage() -> None:
    """Some file systems say 0 of 0."""
    store = store_of()
    assert isinstance(store.blobs, Shared)
    async with Made(store, 1 << 20) as made:
        await made.counted()
        assert made.of._short_of(Space(1 << 30, 1 << 30, 0, 0), 4096) == 0
    await store.aclose()


# -- room --------------------------------------------------------------------------------------------------------------


async def test_unknown_lengths_reserve_in_steps_and_never_more_than_fits() -> None:
    """A step that does not fit shrinks to what is needed."""
    store = store_of()
    async with Made(store, STEP_BYTES) as made:
        await made.counted()
        reservation = await made.of.reserve(None)
        assert reservation.n_bytes == STEP_BYTES // 8
        await reservation.cover(STEP_BYTES // 2)
        assert reservation.n_bytes == STEP_BYTES // 2
        with pytest.raises(OutOfSpace):
            await reservation.cover(STEP_BYTES + 1)
        reservation.release()
        assert made.of.ledger.reserved == 0
    await store.aclose()


async def test_what_is_being_deleted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is committed under a name that is being deleted would go with it, and nobody would know."""
    store = store_of()
    async with Made(store, 1 << 20) as made:
        await made.counted()
        (content,) = bodies(1)
        digest = await made.keep(content)
        may_go, plain = asyncio.Event(), store.blobs.delete

        async def slow(digests: Sequence[Digest]) -> None:
            await may_go.wait()
            await plain(digests)

        monkeypatch.setattr(store.blobs, "delete", slow)
        evicting = asyncio.create_task(made.of.evict([digest]))
        await asyncio.sleep(0)
        keeping = asyncio.create_task(made.keep(content))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not keeping.done()
        may_go.set()
        await evicting
        await keeping
        assert digest in made.of.ledger
        blob = await store.blobs.open(digest)
        assert blob is not None
        blob.close()
    await store.aclose()


async def test_a_cancelled_eviction_counts_what_it_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger says what is on disk, whoever gives up."""
    store = store_of()
    async with Made(store, 1 << 20) as made:
        await made.counted()
        digests = [await made.keep(content) for content in bodies(3)]
        plain, is_done = store.blobs.delete, asyncio.Event()

        async def slow(digests: Sequence[Digest]) -> None:
            await plain(digests)
            is_done.set()
            await asyncio.sleep(0)

        monkeypatch.setattr(store.blobs, "delete", slow)
        evicting = asyncio.create_task(made.of.evict(digests))
        await is_done.wait()
        evicting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await evicting
        assert len(made.of.ledger) == len([b async for batch in store.blobs.scan() for b in batch])
    await store.aclose()


# -- images through the whole engine -----------------------------------------------------------------------------------


async def test_an_image_is_evicted_whole_and_none_is_left_in_parts(tmp_path: Path) -> None:
    """A cached manifest never outlives what it names, not even in memory."""
    upstream = FakeUpstream()
    first, second = images.image(1, (40 * KIB, 40 * KIB)), images.image(2, (40 * KIB, 40 * KIB))
    upstream.put(first, "first")
    upstream.put(second, "second")
    need = sum(on_disk(len(blob.content)) for blob in first.blobs) + on_disk(len(first.body))
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
    async with engine(upstream, store=store, capacity=need + 20 * KIB) as running:
        await running.tags.resolve(route(), running.origin(), tag("first"))
        for blob in first.blobs:
            await running.read(Digest.parse(blob.digest))
        await running.idle()
        await running.tags.resolve(route(), running.origin(), tag("second"))
        for blob in second.blobs:
            await running.read(Digest.parse(blob.digest))
            await running.idle()
        assert Digest.parse(second.digest) in running.ledger
        for blob in first.blobs:
            assert Digest.parse(blob.digest) not in running.ledger
        assert Digest.parse(first.digest) not in running.ledger
        assert not running.manifests.is_at_hand(Digest.parse(first.digest))
        assert await running.stored(Digest.parse(first.digest)) is None
    await store.aclose()


async def test_what_names_what_is_known_after_a_restart(tmp_path: Path) -> None:
    """Links say it; until they are read nothing is evicted."""
    upstream = FakeUpstream()
    image = images.image(1, (40 * KIB,))
    upstream.put(image, "1")
    for _ in range(2):
        store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
        async with engine(upstream, store=store) as running:
            await running.capacity.mapped()
            if running.ledger.committed:
                assert running.ledger.knows_names_of(Digest.parse(image.digest))
            await running.tags.resolve(route(), running.origin(), tag("1"))
            for blob in image.blobs:
                await running.read(Digest.parse(blob.digest))
            await running.idle()
        await store.aclose()
    assert upstream.count("blob") == len(image.blobs)


async def test_a_store_that_cannot_be_counted_is_said_and_not_waited_for() -> None:
    """An import or an export of such a store ends with a reason, and not never."""
    store = store_of(*bodies(1))
    blobs = store.blobs

    async def broken() -> AsyncIterator[Sequence[StoredBlob]]:
        raise Unavailable("Input/output error")
        yield []

    blobs.scan = broken  # type: ignore[method-assign]
    async with Made(store, 64 * KIB) as made:
        made.of.start()
        with pytest.raises(Unavailable, match="cannot count the store"):
            await made.of.counted()
        assert not made.of.is_counted
    await store.aclose()


async def test_a_bound_that_nobody_waits_for_any_more_does_not_come_after_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INV-5 after a kill: what is written last allows all that was promised."""
    store = store_of(total_bytes=1 << 45)
    async with Made(store, 1 << 40) as made:
        await made.counted()
        put = store.notes.put
        written: list[int] = []
        turns = iter((20, 1, 1, 1))  # the first takes longest

        async def slow(name: str, body: bytes) -> None:
            for _ in range(next(turns)):
                await asyncio.sleep(0)
            written.append(json.loads(body)["n_bytes"])
            await put(name, body)

        async def in_its_thread(name: str, body: bytes) -> None:
            await asyncio.shield(made.owner.spawn(slow(name, body), "a thread, which cannot be cancelled"))

        monkeypatch.setattr(store.notes, "put", in_its_thread)
        first = asyncio.create_task(made.of.reserve(1 << 36))
        while not any(task.get_name().startswith("a thread") for task in made.owner._tasks):
            await asyncio.sleep(0)
        first.cancel()
        second = await made.of.reserve(1 << 37)
        with pytest.raises(asyncio.CancelledError):
            await first
        while any(task.get_name().startswith("a thread") for task in made.owner._tasks):
            await asyncio.sleep(0)
        assert written[-1] >= made.of.ledger.held == 1 << 37
        second.release()
    await store.aclose()
