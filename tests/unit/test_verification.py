"""engine/verification.py by behaviour: the first read of a file after a start is hashed alongside (INV-3)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from proxy.errors import Corrupt, Unavailable, UnknownManifest
from proxy.oci.digest import Digest, Verifier
from proxy.oci.names import Tag
from proxy.ports import LocalFile
from proxy.rules.transfer import HELD_BACK_BYTES
from proxy.store.memory import MemoryBlob, MemoryBlobs, MemoryStore
from tests.support import images
from tests.support.appliance import HastyClock
from tests.support.engine import Engine, FakeUpstream, engine, route, whole

BODY = os.urandom((2 << 20) + 12_345)
DIGEST = Digest.of(BODY)
IMAGE = images.manifest(images.Blob(b"{}"), [images.Blob(BODY)])


class GatedBlob(MemoryBlob):
    """An open blob whose reads the store counts and may hold up or fail."""

    __slots__ = ("store",)

    store: Gated

    async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
        """See ports.OpenBlob."""
        if self.store.gate is not None:
            await self.store.gate.acquire()
        if self.store.failure is not None:
            raise self.store.failure
        piece = await super().read(offset, limit, verifier)
        self.store.n_read += len(piece)
        return piece


class Gated(MemoryBlobs):
    """Counts the bytes that are read, and reads one MiB each time `gate` lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_read = 0
        self.gate: asyncio.Semaphore | None = None
        self.failure: Unavailable | None = None

    async def open(self, digest: Digest) -> MemoryBlob | None:
        """See ports.BlobStore."""
        blob = await super().open(digest)
        if blob is None:
            return None
        gated = GatedBlob(blob.fd)
        gated.store = self
        return gated


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    """A store with the image and its layer, written by an earlier process."""
    made = MemoryStore()
    made.blobs = Gated()
    upstream = FakeUpstream()
    upstream.put(IMAGE, "1")
    async with engine(upstream, store=made, clock=HastyClock()) as before:
        await before.tags.resolve(route(), before.origin(), Tag("1"))
        await before.read(DIGEST)
        await before.idle()
    made.blobs.n_read = 0
    yield made
    await made.aclose()


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream()
    found.put(IMAGE, "1")
    return found


@pytest.fixture
async def running(store: MemoryStore, upstream: FakeUpstream) -> AsyncIterator[Engine]:
    """Another process, which has verified nothing yet."""
    async with engine(upstream, store=store, clock=HastyClock()) as made:
        yield made


def gated(running: Engine) -> Gated:
    assert isinstance(running.store.blobs, Gated)
    return running.store.blobs


async def spoil(running: Engine, at: int) -> None:
    """Flip one byte of the stored file, behind everybody's back."""
    fd = gated(running)._kept[DIGEST]
    os.pwrite(fd, bytes([BODY[at] ^ 1]), at)


async def test_the_first_read_is_hashed_and_the_second_is_not(running: Engine, upstream: FakeUpstream) -> None:
    """product.md, promise 2: verified once since the start, it is served as it is until its inode, size or ctime
    change."""
    first = await running.open(DIGEST)
    assert not isinstance(first.source, LocalFile)
    assert (first.outcome, await whole(first)) == ("hit", BODY)
    assert gated(running).n_read == len(BODY)
    second = await running.open(DIGEST)
    assert isinstance(second.source, LocalFile)
    assert await whole(second) == BODY
    assert gated(running).n_read == len(BODY)
    assert upstream.asked == []


async def test_many_first_readers_cost_one_hashing(running: Engine) -> None:
    """Whole and ranged, at once."""
    opened = [await running.open(DIGEST) for _ in range(20)]
    found = await asyncio.gather(*(whole(each) for each in opened[:10]), *(whole(e, 1_000_000) for e in opened[10:]))
    assert set(found) == {BODY, BODY[1_000_000:]}
    assert gated(running).n_read == len(BODY)


async def test_a_range_of_the_first_read_waits_for_the_hashing_to_pass_it(running: Engine) -> None:
    """INV-3 and ranges: bytes as the frontier passes them, the last after the digest agrees."""
    gated(running).gate = gate = asyncio.Semaphore(1)
    opened = await running.open(DIGEST)
    assert not isinstance(opened.source, LocalFile)
    assert await opened.source.beyond(0) == 1 << 20
    ranged = asyncio.ensure_future(whole(await running.open(DIGEST), 1_500_000, 1_500_100))
    last = asyncio.ensure_future(whole(opened, len(BODY) - 1))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not ranged.done()
    gate.release()
    assert await ranged == BODY[1_500_000:1_500_100]
    assert not last.done(), "the end is held back"
    for _ in range(3):
        gate.release()
    assert await last == BODY[-1:]


@pytest.mark.parametrize("at", [0, 1 << 20, len(BODY) - 1], ids=["first byte", "middle", "last byte"])
async def test_rot_ends_short_is_quarantined_and_fetched_again(
    running: Engine, upstream: FakeUpstream, at: int
) -> None:
    """INV-3, promise 8: a damaged file never ends a body cleanly; the next request has it right, from upstream."""
    await spoil(running, at)
    opened = await asyncio.gather(*(running.open(DIGEST) for _ in range(5)))
    for each in opened:
        with pytest.raises(Corrupt):
            await whole(each)
    await running.idle()
    assert [digest for digest, _ in gated(running).quarantined] == [DIGEST]
    assert DIGEST not in running.ledger
    assert await running.read(DIGEST) == BODY
    assert upstream.count("blob") == 1
    await running.idle()
    assert await running.stored(DIGEST) == BODY


@pytest.mark.parametrize(
    "size",
    [0, 1000, len(BODY) - HELD_BACK_BYTES - 1, len(BODY) + 1],
    ids=["emptied", "cut off", "without its end", "extended"],
)
async def test_a_file_of_another_size_than_its_manifest_says_is_fetched_again_at_once(
    running: Engine, upstream: FakeUpstream, size: int
) -> None:
    """INV-3: an empty body would end cleanly before anything is hashed. Where the size tells, nobody ends short, either."""
    os.ftruncate(gated(running)._kept[DIGEST], size)
    opened = await running.open(DIGEST)
    assert (opened.size, opened.outcome, await whole(opened)) == (len(BODY), "miss", BODY)
    await running.idle()
    assert [digest for digest, _ in gated(running).quarantined] == [DIGEST]
    assert upstream.count("blob") == 1


async def test_a_head_says_the_size_that_the_manifest_says_until_the_file_is_known(running: Engine) -> None:
    """A client that is told a wrong length believes that the body it gets then is broken."""
    os.ftruncate(gated(running)._kept[DIGEST], 1000)
    assert await running.blobs.size(route(), running.origin(), DIGEST) == (len(BODY), "hit")


async def test_rot_is_found_although_only_a_part_was_wanted(running: Engine) -> None:
    """A range far from the damage is served right; the hashing goes on without its reader and finds it."""
    await spoil(running, len(BODY) - 1)
    assert await whole(await running.open(DIGEST), 0, 1000) == BODY[:1000]
    await running.idle()
    assert [digest for digest, _ in gated(running).quarantined] == [DIGEST]


async def test_a_file_that_cannot_be_read_is_condemned_too(running: Engine, upstream: FakeUpstream) -> None:
    """A bad sector must not answer short for ever: the next request is upstream's to answer."""
    gated(running).failure = Unavailable("Input/output error")
    opened = await running.open(DIGEST)
    with pytest.raises(Unavailable):
        await whole(opened)
    await running.idle()
    gated(running).failure = None
    assert await running.read(DIGEST) == BODY
    assert upstream.count("blob") == 1


async def test_what_is_sealed_and_cannot_be_read_now_stays_in_its_place(
    store: MemoryStore, upstream: FakeUpstream
) -> None:
    """The only copy of an air gap is not put away for a disk that fails for a moment."""
    async with engine(upstream, store=store, clock=HastyClock(), irreplaceable={DIGEST}) as running:
        gated(running).failure = Unavailable("Input/output error")
        with pytest.raises(Unavailable):
            await whole(await running.open(DIGEST))
        await running.idle()
        assert not gated(running).quarantined
        gated(running).failure = None
        assert await running.read(DIGEST) == BODY
        assert upstream.count("blob") == 0


async def test_what_came_from_upstream_was_hashed_on_its_way(upstream: FakeUpstream) -> None:
    """A file this process has written itself is not hashed again."""
    store = MemoryStore()
    store.blobs = blobs = Gated()
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        await running.read(DIGEST)
        await running.idle()
        assert isinstance((opened := await running.open(DIGEST)).source, LocalFile)
        assert await whole(opened) == BODY
        assert blobs.n_read == 0
    await store.aclose()


async def test_a_file_that_has_changed_since_is_hashed_again(running: Engine) -> None:
    """The verification was of that file, with that inode, size and ctime."""
    await running.read(DIGEST)
    await spoil(running, 5)  # the time of the last change of a memfd moves with the write
    opened = await running.open(DIGEST)
    assert not isinstance(opened.source, LocalFile)
    with pytest.raises(Corrupt):
        await whole(opened)
    await running.idle()


async def test_a_manifest_that_has_rotted_is_fetched_again(running: Engine, upstream: FakeUpstream) -> None:
    """INV-9: what is served hashes to its digest, also from a damaged store; asking again is not the client's job."""
    digest = Digest.parse(IMAGE.digest)
    os.pwrite(gated(running)._kept[digest], b"X", 3)
    held, outcome = await running.manifests.get(route(), running.origin(), digest)
    assert (held.body, outcome) == (IMAGE.body, "miss")
    assert [condemned for condemned, _ in gated(running).quarantined] == [digest]
    assert await running.stored(digest) == IMAGE.body
    upstream.remove(IMAGE.digest)
    with pytest.raises(UnknownManifest):
        await running.manifests.get(route(), running.origin(), Digest.of(b"another"))
