"""engine/blobs.py and engine/pump.py by behaviour: one transfer for many, with a file and without (INV-3, INV-4)."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Literal

import pytest

from proxy.engine.blobs import Limits, Opened
from proxy.engine.pump import LAGGARD_PATIENCE_S
from proxy.engine.transfers import RING_BYTES, OnLastReaderGone, keeps_going
from proxy.errors import (
    BreakwaterError,
    Misbehaved,
    OutOfSpace,
    Overloaded,
    Unavailable,
    UnknownBlob,
    Unreachable,
)
from proxy.events import TransferEnded
from proxy.oci.digest import Digest, Verifier
from proxy.ports import LocalFile, Tail
from proxy.rules.backoff import BAD_FOR_S, MAX_RESUMES_WITHOUT_PROGRESS
from proxy.rules.ledger import BLOCK_BYTES
from proxy.rules.transfer import HELD_BACK_BYTES
from proxy.store.memory import MemoryBlobs, MemoryIngest, MemoryStore
from tests.support.appliance import HastyClock
from tests.support.engine import ALPINE, HOST, Engine, FakeUpstream, Script, engine, route, tasks_of, whole

BODY = os.urandom(300_000)
DIGEST = Digest.of(BODY)
HALF = len(BODY) // 2


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream(piece_bytes=20_000)
    found.put_blob(BODY)
    return found


@pytest.fixture
async def running(upstream: FakeUpstream) -> AsyncIterator[Engine]:
    async with engine(upstream, clock=HastyClock()) as made:
        yield made


async def turns(n: int = 60) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def tail_of(opened: Opened) -> Tail:
    assert not isinstance(opened.source, LocalFile)
    return opened.source


def paused(upstream: FakeUpstream, at: int = HALF) -> asyncio.Event:
    """The next GET stops at a byte until the event is set."""
    gate = asyncio.Event()
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:at], gate, BODY[at:]])]
    return gate


# -- one for many ------------------------------------------------------------------------------------------------------


async def test_a_hundred_readers_cost_one_get(running: Engine, upstream: FakeUpstream) -> None:
    """INV-4: registered before the first await, so that nothing leaks past it."""
    opened = await asyncio.gather(*(running.open(DIGEST) for _ in range(100)))
    assert Counter(each.outcome for each in opened) == {"miss": 1, "coalesced": 99}
    assert set(await asyncio.gather(*(whole(each) for each in opened))) == {BODY}
    assert upstream.count("blob") == 1
    assert await running.stored(DIGEST) == BODY


async def test_bytes_reach_readers_while_the_transfer_runs(running: Engine, upstream: FakeUpstream) -> None:
    """Promise 1: everybody receives bytes while it runs, whoever came first."""
    gate = paused(upstream)
    first, second = await running.open(DIGEST), await running.open(DIGEST)
    assert await tail_of(first).beyond(0) == HALF
    assert await tail_of(second).beyond(0) == HALF
    gate.set()
    assert await whole(first) == await whole(second) == BODY


async def test_the_end_is_held_back_until_the_digest_agrees(running: Engine, upstream: FakeUpstream) -> None:
    """INV-3: with all bytes here but not all known to be right, the last of them stay."""
    gate = asyncio.Event()
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:-1], gate, BODY[-1:]])]
    opened = await running.open(DIGEST)
    tail, reached = tail_of(opened), 0
    while reached < len(BODY) - HELD_BACK_BYTES:
        reached = await tail.beyond(reached)
    waiting = asyncio.ensure_future(tail.beyond(reached))
    await turns()
    assert not waiting.done()
    gate.set()
    assert await waiting == len(BODY)
    tail.leave()


async def test_a_body_that_does_not_hash_ends_short_for_every_reader(running: Engine, upstream: FakeUpstream) -> None:
    """INV-3, INV-1: nobody sees its end, nothing is kept, and the digest is bad for half a minute."""
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:-1] + b"?"])]
    opened = await asyncio.gather(*(running.open(DIGEST) for _ in range(5)))
    for each in opened:
        with pytest.raises(Misbehaved):
            await whole(each)
    await running.idle()
    assert await running.stored(DIGEST) is None
    with pytest.raises(Misbehaved, match="not asked again"):
        await running.open(DIGEST)
    await running.clock.advance(BAD_FOR_S)
    assert await running.read(DIGEST) == BODY
    assert upstream.count("blob") == 2


async def test_a_few_bytes_with_each_answer_are_no_progress(running: Engine, upstream: FakeUpstream) -> None:
    """Else an upstream that gives 100 bytes and breaks off is asked thousands of times for one layer."""
    broken = Unreachable("broke off", upstream=HOST)
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[at : at + 100], broken], at) for at in range(0, len(BODY), 100)]
    opened = await running.open(DIGEST)
    reading = asyncio.ensure_future(whole(opened))
    while not reading.done():
        await turns()
        await running.clock.advance(5.0)
    with pytest.raises(Misbehaved, match="breaks off at byte 400 each time"):
        await reading
    assert upstream.count("blob") == 1 + MAX_RESUMES_WITHOUT_PROGRESS


async def test_a_failure_keeps_nobodys_frames_alive(running: Engine, upstream: FakeUpstream) -> None:
    """One exception for all readers: its traceback must not grow by the frames of each."""
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:-1] + b"?"])]
    failures = []
    for each in [await running.open(DIGEST) for _ in range(20)]:
        with pytest.raises(Misbehaved) as caught:
            await whole(each)
        failures.append(caught.value)
    assert len(set(map(id, failures))) == 1
    depth, frame = 0, failures[0].__traceback__
    while frame is not None:
        depth, frame = depth + 1, frame.tb_next
    assert depth < 6


async def test_what_is_bad_in_one_repository_is_asked_for_in_another(upstream: FakeUpstream) -> None:
    """A broken upstream must not make content unavailable that another one has."""
    other = FakeUpstream("quay.io")
    other.put_blob(BODY)
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:-1] + b"?"])]
    async with engine(upstream, other, clock=HastyClock()) as running:
        with pytest.raises(Misbehaved):
            await running.read(DIGEST)
        assert await running.read(DIGEST, host="quay.io") == BODY
        assert await running.read(DIGEST) == BODY, "it is here now, and right"


@pytest.mark.parametrize(
    "failure", [UnknownBlob("gone there"), Unreachable("down", upstream=HOST)], ids=["absent there", "down there"]
)
async def test_another_repositorys_trouble_is_not_this_ones(upstream: FakeUpstream, failure: BreakwaterError) -> None:
    """Who joined a transfer from elsewhere and gets its failure before any byte asks for itself: no false 404."""
    other = FakeUpstream("quay.io")
    other.put_blob(BODY)
    async with engine(upstream, other, clock=HastyClock()) as running:
        await running.blobs.size(route(), running.origin(), DIGEST)
        await running.blobs.size(route(host="quay.io"), running.origin("quay.io"), DIGEST)
        upstream.gate = asyncio.Event()
        first = asyncio.create_task(running.read(DIGEST))
        await turns()
        second = asyncio.create_task(running.read(DIGEST, host="quay.io"))
        await turns()
        upstream.failure = failure
        upstream.gate.set()
        with pytest.raises(type(failure)):
            await first
        assert await second == BODY


async def test_what_contradicts_the_manifest_is_not_begun(running: Engine, upstream: FakeUpstream) -> None:
    """A page for people in place of a blob: its length tells before a header leaves, and the reader gets a 502."""
    await running.blobs.size(route(), running.origin(), DIGEST)
    upstream.scripts[DIGEST] = [Script(12, [b"<html></html>"[:12]])]
    with pytest.raises(Misbehaved, match="12 bytes"):
        await running.open(DIGEST)


async def test_the_look_at_the_store_and_at_the_table_leave_no_gap(upstream: FakeUpstream) -> None:
    """INV-4: a transfer that ends between the two looks is found in the store, not fetched again."""
    store = MemoryStore()
    look, looked = asyncio.Event(), asyncio.Event()

    class SlowLook(MemoryBlobs):
        async def open(self, digest: Digest):  # type: ignore[no-untyped-def]
            found = await super().open(digest)
            if looked.is_set():
                return found
            looked.set()
            await look.wait()
            return found

    store.blobs = SlowLook()
    gate = paused(upstream)
    gate.set()
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        late = asyncio.create_task(running.read(DIGEST))
        await looked.wait()  # it has seen that the store has nothing
        assert await running.read(DIGEST) == BODY
        await running.idle()
        look.set()
        assert await late == BODY
        assert upstream.count("blob") == 1
    await store.aclose()


# -- broken bodies -----------------------------------------------------------------------------------------------------


def broken(at: int) -> Script:
    return Script(len(BODY), [BODY[:at], Unreachable("broke off", upstream=HOST)])


async def test_a_broken_body_is_resumed_where_it_stopped(running: Engine, upstream: FakeUpstream) -> None:
    """Readers see nothing of it, and upstream sends no byte twice."""
    upstream.scripts[DIGEST] = [
        broken(100_000),
        Script(len(BODY), [BODY[100_000:200_000], Unreachable("again", upstream=HOST)], 100_000),
    ]
    assert await running.read(DIGEST) == BODY
    assert [one.offset for one in upstream.asked if one.kind == "blob"] == [0, 100_000, 200_000]


async def test_an_upstream_that_ignores_the_range_costs_bytes_and_nothing_else(
    running: Engine, upstream: FakeUpstream
) -> None:
    """What comes twice is thrown away, though it breaks off again on the way."""
    upstream.scripts[DIGEST] = [broken(100_000), broken(50_000), Script(len(BODY), [BODY])]
    assert await running.read(DIGEST) == BODY
    assert not any(upstream.open_bodies.values())


async def test_an_upstream_that_cannot_be_reached_for_a_moment_is_tried_again(
    running: Engine, upstream: FakeUpstream
) -> None:
    """A restart upstream, in the middle of a layer: the connection is refused twice, and then it goes on."""
    gate = paused(upstream)
    upstream.scripts[DIGEST][0] = Script(len(BODY), [BODY[:HALF], gate, Unreachable("reset", upstream=HOST)])
    reading = asyncio.create_task(running.read(DIGEST))
    await turns()
    upstream.failure = Unreachable("refused", upstream=HOST)
    gate.set()
    while upstream.count("blob") < 3:
        await asyncio.sleep(0)
    upstream.failure = None
    assert await reading == BODY


async def test_after_three_resumes_without_a_byte_it_is_over(running: Engine, upstream: FakeUpstream) -> None:
    """A body that breaks off at one byte each time is a lie, and marked; an upstream that is down is not."""
    upstream.scripts[DIGEST] = [broken(100_000)] + [
        Script(len(BODY), [Unreachable("again", upstream=HOST)], 100_000) for _ in range(9)
    ]
    with pytest.raises(Misbehaved, match="byte 100000 each time"):
        await running.read(DIGEST)
    assert upstream.count("blob") == 4
    with pytest.raises(Misbehaved):
        await running.open(DIGEST)
    assert upstream.count("blob") == 4


async def test_an_outage_in_the_middle_leaves_no_mark(running: Engine, upstream: FakeUpstream) -> None:
    """Who asks once upstream is back gets the blob at once."""
    upstream.scripts[DIGEST] = [broken(100_000)]
    reading = asyncio.create_task(running.read(DIGEST))
    while upstream.count("blob") < 1:
        await asyncio.sleep(0)
    await turns(4)
    upstream.failure = Unreachable("refused", upstream=HOST)
    with pytest.raises(Unreachable):
        await reading
    upstream.failure = None
    assert await running.read(DIGEST) == BODY


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(Script(len(BODY) - 1, [BODY[100_000:-1]], 100_000), id="another size"),
        pytest.param(Script(len(BODY), [BODY[:50_000]]), id="less than before"),
        pytest.param(Script(len(BODY), [BODY[100_000:], b"!"], 100_000), id="more than announced"),
        pytest.param(Script(len(BODY), [BODY[200_000:]], 200_000 - 100_000), id="a hole in the middle"),
    ],
)
async def test_a_second_body_that_contradicts_the_first_is_a_lie(
    running: Engine, upstream: FakeUpstream, second: Script
) -> None:
    """INV-3: whatever is put together from several answers is judged as one."""
    upstream.scripts[DIGEST] = [broken(100_000), second]
    with pytest.raises(Misbehaved):
        await running.read(DIGEST)
    await running.idle()
    assert not any(upstream.open_bodies.values())
    assert await running.stored(DIGEST) is None


# -- the last reader has gone ------------------------------------------------------------------------------------------

Fate = Literal["finished", "stopped"]


@pytest.mark.parametrize(
    ("policy", "at", "fate"),
    [
        ("finish", 10_000, "finished"),
        ("finish", HALF, "finished"),
        ("abort", 10_000, "stopped"),
        ("abort", 290_000, "stopped"),
        ("finish_when_near", 10_000, "finished"),  # of so small a blob never much is missing
    ],
)
async def test_what_becomes_of_a_transfer_that_nobody_reads_is_a_setting(
    upstream: FakeUpstream, policy: OnLastReaderGone, at: int, fate: Fate
) -> None:
    """INV-4: a leaving reader does not end it; the last one may, by `transfers.on_last_reader_gone`."""
    gate = paused(upstream, at)
    async with engine(upstream, clock=HastyClock(), policy=policy) as running:
        opened = await running.open(DIGEST)
        other = await running.open(DIGEST)
        while next(running.blobs.running()).received < at:
            await asyncio.sleep(0)
        tail_of(other).leave()
        await turns()
        assert len(list(running.blobs.running())) == 1, "not the last"
        tail_of(opened).leave()
        await turns()
        assert bool(list(running.blobs.running())) is (fate == "finished")
        gate.set()
        await running.idle()
        assert await running.stored(DIGEST) == (BODY if fate == "finished" else None)
        assert running.ledger.reserved == 0


@pytest.mark.parametrize(
    ("received", "size", "goes_on"),
    [
        (0, 16 << 20, True),
        (0, (16 << 20) + 1, False),
        (95, 100, True),
        (950 << 20, 1000 << 20, True),
        (949 << 20, 1000 << 20, False),
        (1 << 30, None, False),
    ],
)
def test_near_its_end_means_16_mib_or_a_twentieth(received: int, size: int | None, goes_on: bool) -> None:
    """Squid's quick_abort, in our numbers."""
    assert keeps_going("finish_when_near", received=received, size=size) is goes_on


# -- without a file ----------------------------------------------------------------------------------------------------


class SickBlobs(MemoryBlobs):
    """Begins, writes and commits as `fails` says: called with what is about to happen and after how many bytes."""

    def __init__(self, fails: Callable[[str, int], BreakwaterError | None]) -> None:
        super().__init__()
        self.fails = fails

    def check(self, what: str, n_bytes: int) -> None:
        if (failure := self.fails(what, n_bytes)) is not None:
            raise failure

    async def ingest(self, digest: Digest, verifier: Verifier) -> MemoryIngest:
        self.check("ingest", 0)
        begun = await super().ingest(digest, verifier)
        write, commit = begun.write, begun.commit

        async def sick_write(*pieces: bytes | bytearray | memoryview) -> None:
            if self.fails("write", begun.n_bytes) is not None:
                for piece in pieces:
                    verifier.feed(piece)  # as the port says: taken, though not written
                self.check("write", begun.n_bytes)
            await write(*pieces)

        async def sick_commit() -> None:
            if self.fails("commit", begun.n_bytes) is not None:
                await begun.abort()
                self.check("commit", begun.n_bytes)
            await commit()

        begun.write, begun.commit = sick_write, sick_commit  # type: ignore[method-assign]
        return begun


def at(what: str, n_bytes: int, failure: BreakwaterError) -> Callable[[str, int], BreakwaterError | None]:
    return lambda now, n: failure if now == what and n >= n_bytes else None


FULL, SICK = OutOfSpace("no room on the device"), Unavailable("Input/output error")
LARGE = os.urandom(3 << 20)


@pytest.mark.parametrize("n_readers", [1, 5])
@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(at("ingest", 0, FULL), id="no room from the start"),
        pytest.param(at("ingest", 0, SICK), id="a disk that cannot be written"),
        pytest.param(at("write", 0, FULL), id="full at the first piece"),
        pytest.param(at("write", 1 << 20, FULL), id="full in the middle"),
        pytest.param(at("write", 1 << 20, SICK), id="failing in the middle"),
        pytest.param(at("commit", 0, SICK), id="failing at the last step"),
    ],
)
async def test_a_disk_that_fails_costs_readers_nothing(
    fails: Callable[[str, int], BreakwaterError | None], n_readers: int
) -> None:
    """INV-4 without a file: every reader gets every byte, nothing is kept, and readiness says why with a 200."""
    upstream, store = FakeUpstream(piece_bytes=100_000), MemoryStore()
    digest = upstream.put_blob(LARGE)
    store.blobs = sick = SickBlobs(fails)
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        found = await asyncio.gather(*(running.read(digest) for _ in range(n_readers)))
        assert set(found) == {LARGE}
        await running.idle()
        assert upstream.count("blob") == 1
        assert await running.stored(digest) is None
        assert sick.unfinished == []
        assert running.capacity.degraded in (str(FULL), str(SICK))
        assert running.notices
        sick.fails = lambda *_: None
        assert await running.read(digest) == LARGE
        await running.idle()
        assert await running.stored(digest) == LARGE
        assert running.capacity.degraded == ""
    await store.aclose()


async def test_what_is_larger_than_the_whole_capacity_passes_through(upstream: FakeUpstream) -> None:
    """INV-5: what cannot be reserved is not written, and is served all the same."""
    async with engine(upstream, capacity=100_000, clock=HastyClock()) as running:
        assert await running.read(DIGEST) == BODY
        assert await running.stored(DIGEST) is None
        assert running.ledger.committed == 0


async def test_a_body_of_unknown_size_that_outgrows_its_room_passes_through(upstream: FakeUpstream) -> None:
    """INV-5: room is reserved step by step; where there is no more, the rest goes through memory."""
    upstream.says_size = False
    async with engine(upstream, capacity=100_000, clock=HastyClock()) as running:
        assert await running.read(DIGEST) == BODY
        await running.idle()
        assert await running.stored(DIGEST) is None


async def test_room_that_runs_out_on_the_way_costs_readers_nothing(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: a body of unknown size reserves step by step; at the first step that is refused the file ends, and the
    rest goes on through memory, hashed all the same."""
    monkeypatch.setattr("proxy.engine.capacity.STEP_BYTES", 40 * BLOCK_BYTES)
    upstream.says_size = False
    limit = 60 * BLOCK_BYTES
    async with engine(upstream, capacity=limit, clock=HastyClock()) as running:
        reading = [asyncio.create_task(running.read(DIGEST)) for _ in range(3)]
        while not all(task.done() for task in reading):
            assert running.ledger.committed + running.ledger.reserved <= limit
            assert all(ingest.n_bytes <= limit for ingest in running.store.blobs.unfinished)  # type: ignore[union-attr]
            await asyncio.sleep(0)
        assert {task.result() for task in reading} == {BODY}
        await running.idle()
        assert await running.stored(DIGEST) is None
        assert upstream.count("blob") == 1


@pytest.mark.parametrize(
    "fails", [at("ingest", 0, FULL), at("write", 100_000, FULL)], ids=["no file at all", "no file from the middle on"]
)
async def test_a_wrong_body_ends_short_without_a_file_too(
    upstream: FakeUpstream, fails: Callable[[str, int], BreakwaterError | None]
) -> None:
    """INV-3 without a file: the end is held back until the digest agrees, whether or not anything is kept."""
    upstream.scripts[DIGEST] = [Script(len(BODY), [BODY[:100_000], BODY[100_000:-1], b"?"])]
    store = MemoryStore()
    store.blobs = SickBlobs(fails)
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        with pytest.raises(Misbehaved):
            await running.read(DIGEST)
        await running.idle()
    await store.aclose()


async def test_a_transfer_without_a_file_ends_with_its_last_reader(upstream: FakeUpstream) -> None:
    """Whatever the setting: nothing would be kept, so nobody is served by going on."""
    gate = paused(upstream)
    async with engine(upstream, capacity=0, clock=HastyClock()) as running:
        opened = await running.open(DIGEST)
        await turns()
        tail_of(opened).leave()
        await running.idle()
        assert not any(upstream.open_bodies.values())
        gate.set()


async def test_a_blob_is_not_evicted_under_the_readers_of_its_transfer(upstream: FakeUpstream) -> None:
    """It has its name, and somebody still reads the file that was being filled."""
    other = upstream.put_blob(os.urandom(200_000))
    async with engine(upstream, capacity=400_000, clock=HastyClock()) as running:
        slow = await running.open(DIGEST)
        assert await running.read(DIGEST) == BODY
        await running.idle()
        assert len(await running.read(other)) == 200_000
        await running.idle()
        assert await running.stored(other) is None
        assert await whole(slow) == BODY
        await running.read(other)
        await running.idle()
        assert await running.stored(other) is not None


async def test_a_transfer_without_a_file_waits_for_a_slow_reader_and_then_goes_on_without_it() -> None:
    """A reader that has stalled is cut short after its patience, once, and does not slow the others down."""
    body = os.urandom(RING_BYTES + (6 << 20))
    upstream, store = FakeUpstream(), MemoryStore(total_bytes=0)
    digest = upstream.put_blob(body)
    async with engine(upstream, store=store) as running:
        stalled, brisk = await running.open(digest), await running.open(digest)
        reading = asyncio.create_task(whole(brisk))
        await _until(lambda: any(task.get_name() == "deadline" for task in tasks_of(running.owner)))
        await turns(2)  # a task that was just made looks at the clock in its first turn, not before
        assert not reading.done(), "the ring is full, and one has not begun"
        await running.clock.advance(LAGGARD_PATIENCE_S)
        assert await reading == body, "the one that stalled is waited for once: nobody moves the clock again"
        with pytest.raises(Overloaded):
            await whole(stalled)
        await running.idle()
    await store.aclose()


async def test_late_readers_of_a_transfer_without_a_file_start_another(upstream: FakeUpstream) -> None:
    """INV-4 without a file: once its start is let go, whoever comes is served by a counted request of its own."""
    body = os.urandom(RING_BYTES + (4 << 20))
    other = FakeUpstream()
    digest = other.put_blob(body)
    gate = asyncio.Event()
    other.scripts[digest] = [
        Script(len(body), [*(body[i : i + (1 << 20)] for i in range(0, len(body) - 10, 1 << 20)), gate])
    ]
    store = MemoryStore(total_bytes=0)
    async with engine(other, store=store) as running:
        first = asyncio.create_task(running.read(digest))
        await _until(lambda: next(running.blobs.running(), None) is not None)
        transfer = next(running.blobs.running())
        await _until(lambda: not transfer.is_joinable)
        late = await running.open(digest)
        assert late.outcome == "miss"
        assert await whole(late) == body
        gate.set()
        assert await first == body
        assert other.count("blob") == 2
        await running.idle()
    await store.aclose()


async def _until(true: Callable[[], bool]) -> None:
    """Give turns to the loop, and to the worker thread that hashes, until it is true."""
    while not true():
        await asyncio.sleep(0)
        await asyncio.to_thread(int)


# -- turns, and what is said -------------------------------------------------------------------------------------------


async def test_who_waits_too_long_for_a_turn_is_told_to_come_back(upstream: FakeUpstream) -> None:
    """Promise 3: a request queues for at most 20 seconds; 503 with Retry-After, never a wait without an end."""
    second = upstream.put_blob(b"second")
    gate = paused(upstream)
    async with engine(upstream, limits=Limits(1, 1, 20.0)) as running:
        first = asyncio.create_task(running.read(DIGEST))
        await turns()
        waiting = asyncio.create_task(running.open(second))
        await turns()
        await running.clock.advance(20.0)
        with pytest.raises(Overloaded):
            await waiting
        gate.set()
        assert await first == BODY
        assert await running.read(second) == b"second"


async def test_a_head_of_an_uncached_blob_costs_a_head(running: Engine, upstream: FakeUpstream) -> None:
    """Not a download, and not a 404; linked or not, one HEAD for all who ask at once."""
    found = await asyncio.gather(*(running.blobs.size(route(), running.origin(), DIGEST) for _ in range(20)))
    assert set(found) == {(len(BODY), "miss")}
    assert upstream.kinds() == ["blob head"]
    assert await running.blobs.size(route(), running.origin(), DIGEST) == (len(BODY), "miss")
    assert upstream.kinds() == ["blob head", "blob head"]
    await running.read(DIGEST)
    await running.idle()
    upstream.asked.clear()
    assert await running.blobs.size(route(), running.origin(), DIGEST) == (len(BODY), "hit")
    assert upstream.kinds() == []


async def test_a_head_while_the_transfer_runs_takes_its_word(running: Engine, upstream: FakeUpstream) -> None:
    """The size is known: upstream need not be asked."""
    gate = paused(upstream)
    opened = await running.open(DIGEST)
    upstream.asked.clear()
    assert await running.blobs.size(route(), running.origin(), DIGEST) == (len(BODY), "coalesced")
    assert upstream.kinds() == []
    gate.set()
    await whole(opened)


async def test_each_transfer_says_how_it_ended(running: Engine, upstream: FakeUpstream) -> None:
    """One event, with its bytes and why it failed."""
    await running.read(DIGEST)
    bad = upstream.put_blob(b"bad")
    upstream.scripts[bad] = [Script(3, [b"sad"])]
    with pytest.raises(Misbehaved):
        await running.read(bad)
    await running.idle()
    ended = [event for event in running.events if isinstance(event, TransferEnded)]
    assert [(event.digest, event.n_bytes, bool(event.failure)) for event in ended] == [
        (str(DIGEST), len(BODY), False),
        (str(bad), 3, True),
    ]
    assert ended[0].repository == ALPINE.value and HOST in ended[1].failure


async def test_what_is_being_read_is_not_evicted(upstream: FakeUpstream) -> None:
    """A blob under its own readers stays; the other one goes through memory."""
    other = os.urandom(200_000)
    second = upstream.put_blob(other)
    async with engine(upstream, capacity=400_000, clock=HastyClock()) as running:
        await running.read(DIGEST)
        held = await running.open(DIGEST)
        assert await running.read(second) == other
        await running.idle()
        assert await running.stored(second) is None
        assert await whole(held) == BODY
        assert await running.read(second) == other
        await running.idle()
        assert await running.stored(second) == other
        assert await running.stored(DIGEST) is None


async def test_no_descriptor_left_to_look_at_what_was_stored_is_no_failure(upstream: FakeUpstream) -> None:
    """Then it is hashed once more at its first read."""
    store = MemoryStore()
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        opened = await running.open(DIGEST)

        async def none_left(_: Digest) -> None:
            raise Overloaded("too many open files")

        store.blobs.open, before = none_left, store.blobs.open  # type: ignore[assignment, method-assign]
        assert await whole(opened) == BODY
        await running.idle()
        assert running.reports == []
        store.blobs.open = before  # type: ignore[method-assign]
        assert await running.stored(DIGEST) == BODY
    await store.aclose()


@pytest.mark.parametrize("n_turns", range(12))
async def test_a_reader_that_goes_on_from_upstream_waits_for_the_end_of_a_transfer_that_was_given_up(
    upstream: FakeUpstream, n_turns: int
) -> None:
    """INV-4: never two requests at once, whenever the last reader of the running one leaves."""
    gate = paused(upstream)
    async with engine(upstream, clock=HastyClock(), policy="abort") as running:
        left = await running.open(DIGEST)
        await tail_of(left).beyond(0)
        running.links._indexes.clear()
        asking = asyncio.create_task(running.blobs.instead(route(), running.origin(), DIGEST))
        await turns(n_turns)
        tail_of(left).leave()
        await turns()
        gate.set()  # for what was joined in time, and so goes on
        assert await whole(await asking) == BODY
        await running.idle()
        assert upstream.most_at_once == 1
