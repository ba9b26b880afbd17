"""engine/remains.py: what a transfer left is gone on with, or swept; counted as long as it is there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from proxy.engine import remains as subject
from proxy.engine.remains import Remains
from proxy.errors import BreakwaterError, Timeout
from proxy.oci.digest import Digest, Verifier
from proxy.rules.ledger import on_disk
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT
from proxy.store.disk import DiskStore
from tests.support.appliance import HastyClock
from tests.support.engine import Engine, FakeUpstream, Script, engine

BODY = bytes(range(256)) * 800
DIGEST = Digest.of(BODY)
HALF = 100_000


@pytest.fixture(autouse=True)
def _small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "WORTH_BYTES", 1000)


@asynccontextmanager
async def life(
    path: Path, upstream: FakeUpstream, capacity: int = 1 << 30, quota: int | None = None
) -> AsyncIterator[tuple[Engine, Remains]]:
    """One life of the engine over the store at `path`."""
    allowances = {DEFAULT_PROJECT: Allowance(quota, "bypass")}
    clock = HastyClock()
    store = await DiskStore.open(path, clock=clock, report=print)
    try:
        async with engine(
            upstream, store=store, clock=clock, capacity=capacity, allowances=allowances, is_counted=False
        ) as running:
            kept = Remains(
                store.blobs, running.capacity, clock=clock, owner=running.owner, observe=running.events.append
            )
            object.__setattr__(running.blobs._work, "remains", kept)
            running.capacity.start()
            await running.capacity.mapped()
            yield running, kept
            await running.owner.aclose()
            await kept.let_go() if kept else None
    finally:
        await store.aclose()


async def left_behind(path: Path, content: bytes) -> None:
    """What a killed process leaves under ingest/."""
    store = await DiskStore.open(path, clock=HastyClock(), report=print)
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await ingest.write(content)
    await ingest.abort(keep=True)
    ingest.close()
    await store.aclose()


def in_ingest(path: Path) -> list[str]:
    return os.listdir(path / "breakwater" / "ingest")


async def test_a_transfer_goes_on_where_an_earlier_life_ended(tmp_path: Path) -> None:
    """The rest alone is asked for, and the whole is right."""
    upstream = FakeUpstream()
    upstream.put_blob(BODY)
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, upstream) as (running, kept):
        assert len(kept) == 1 and running.ledger.reserved == on_disk(HALF), "what is kept is counted"
        assert await running.read(DIGEST) == BODY
        await running.idle()
        assert [asked.offset for asked in upstream.asked if asked.kind == "blob"] == [HALF]
        assert await running.stored(DIGEST) == BODY
        assert running.ledger.reserved == 0
    assert in_ingest(tmp_path) == []


async def test_rotten_remains_blame_nobody_and_the_next_starts_over(tmp_path: Path) -> None:
    """They prove nothing until the whole agrees; INV-3: no reader ends cleanly."""
    upstream = FakeUpstream()
    upstream.put_blob(BODY)
    await left_behind(tmp_path, b"x" + BODY[1:HALF])
    async with life(tmp_path, upstream) as (running, _):
        with pytest.raises(BreakwaterError, match="starts over"):
            await running.read(DIGEST)
        await running.idle()
        assert await running.stored(DIGEST) is None
        assert await running.read(DIGEST) == BODY
        await running.idle()
    assert in_ingest(tmp_path) == []


async def test_what_is_not_worth_it_is_swept_at_the_start(tmp_path: Path) -> None:
    """And so is what there is no room for."""
    upstream = FakeUpstream()
    await left_behind(tmp_path, BODY[:999])
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, upstream, capacity=8192) as (running, kept):
        assert len(kept) == 0 and running.ledger.reserved == 0
        assert in_ingest(tmp_path) == []


async def test_room_that_is_wanted_is_taken_from_what_was_left(tmp_path: Path) -> None:
    """Before anything is evicted."""
    upstream = FakeUpstream()
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, upstream, capacity=on_disk(HALF) + 8192) as (running, kept):
        assert len(kept) == 1
        reservation = await running.capacity.reserve(on_disk(HALF))
        assert len(kept) == 0 and in_ingest(tmp_path) == []
        reservation.release()


async def test_a_transfer_that_lost_its_upstream_leaves_what_it_has(tmp_path: Path) -> None:
    """In the same life: the next one goes on."""
    upstream = FakeUpstream(piece_bytes=HALF)
    upstream.put_blob(BODY)
    upstream.scripts[DIGEST] = [
        Script(len(BODY), [BODY[:HALF], Timeout("slow", upstream="docker.io")], 0),
        *[Script(len(BODY), [Timeout("slow", upstream="docker.io")], HALF) for _ in range(9)],
    ]
    async with life(tmp_path, upstream) as (running, kept):
        with pytest.raises(BreakwaterError):
            await running.read(DIGEST)
        await running.idle()
        assert len(kept) == 1 and running.ledger.reserved == on_disk(HALF)
        upstream.scripts.clear()
        upstream.asked.clear()
        assert await running.read(DIGEST) == BODY
        await running.idle()
        assert [asked.offset for asked in upstream.asked if asked.kind == "blob"] == [HALF]


async def test_what_may_not_be_kept_any_more_is_passed_through_from_where_the_file_ends(tmp_path: Path) -> None:
    """INV-3: readers get the first half from the file that was left and the rest through memory, each byte at its place."""
    upstream = FakeUpstream(piece_bytes=10_000)
    upstream.put_blob(BODY)
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, upstream, quota=1000) as (running, kept):
        assert len(kept) == 1
        assert await running.read(DIGEST) == BODY
        await running.idle()
        assert [asked.offset for asked in upstream.asked if asked.kind == "blob"] == [HALF]
        assert await running.stored(DIGEST) is None
    assert in_ingest(tmp_path) == []


@pytest.mark.parametrize("n_turns", [1, 5, 50], ids=lambda n: f"after {n} turns")
async def test_whoever_leaves_while_it_is_hashed_again_leaves_nothing_behind(tmp_path: Path, n_turns: int) -> None:
    """INV-5: no promise, no descriptor and no file without an owner."""
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, FakeUpstream()) as (running, kept):
        asking = asyncio.create_task(kept.resume(DIGEST, Verifier(DIGEST), len(BODY)))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            if (found := await asking) is not None:  # it was sooner: then it is the asker's to end
                await found[0].abort()
                found[0].close()
                found[1].release()
        assert (len(kept), running.ledger.reserved) == (0, 0)
        assert isinstance(running.store, DiskStore)
        assert running.store.blobs.unfinished == set()
        assert in_ingest(tmp_path) == []


async def test_whoever_leaves_while_room_is_taken_from_what_was_left_leaves_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: what was let go of is free, whether or not somebody still wants it."""
    await left_behind(tmp_path, BODY[:HALF])
    async with life(tmp_path, FakeUpstream()) as (running, kept):
        assert isinstance(running.store, DiskStore)
        sweep, begun = running.store.blobs.sweep_ingest, asyncio.Event()

        async def slow(keep: Collection[str] = ()) -> int:
            begun.set()
            for _ in range(5):
                await asyncio.sleep(0)
            return await sweep(keep)

        monkeypatch.setattr(running.store.blobs, "sweep_ingest", slow)
        asking = asyncio.create_task(kept.let_go())
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (len(kept), running.ledger.reserved, in_ingest(tmp_path)) == (0, 0, [])
