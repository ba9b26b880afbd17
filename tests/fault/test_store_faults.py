"""The store's disk fails at the n-th call, for n = 1, 2, 3 … until a run completes (SQLite's method).

Once and from then on, for each errno that a full, failing or read-only disk says, and for a power cut. After each
run every name under blobs/ hashes to itself (INV-1), nothing unfinished is outside ingest/ (INV-2), and what was
acknowledged is there.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from proxy.errors import OutOfSpace, Overloaded, StoreError, Unavailable
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, TagRecord
from proxy.store.disk import DiskStore
from proxy.store.filesystem import FileSystem
from tests.support.clock import ManualClock
from tests.support.lossy import CALLS, WORLDS, Faulty, Lossy, PowerCut, World

HOLDING = Holding("platform", "registry.test:5000", "team/web")
#: Three in one shard and one elsewhere, so that some commits make folders and some do not.
BODIES = [b"first" * 3000, b"second" * 50, b"", b"fourth"]
ALGORITHMS = ["sha256", "sha256", "sha256", "sha512"]
LEFT = b"left behind, then gone on with"
DELETED = b"here today"

#: What can say that there is no room, and what can say that nothing may be written.
WRITING = frozenset(
    {"make_folder", "create", "write", "protect", "fsync", "fsync_folder", "rename", "unlink", "truncate"}
)
FAULTS = {
    "ENOSPC": (errno.ENOSPC, WRITING),
    "EDQUOT": (errno.EDQUOT, WRITING),
    "EIO": (errno.EIO, frozenset(CALLS)),
    "EROFS": (errno.EROFS, WRITING),
    "EMFILE": (errno.EMFILE, frozenset({"open_folder", "open_file", "create"})),
}


@dataclass
class Promised:
    """What the store has acknowledged."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    tags: dict[str, float] = field(default_factory=dict)
    #: Validation times that were asked for without an answer: either may be found.
    tags_in_doubt: dict[str, set[float]] = field(default_factory=dict)
    links: set[Digest] = field(default_factory=set)
    n_failures: int = 0


async def work(store: DiskStore, promised: Promised) -> None:
    """Something of everything that writes. Failures are counted, and the next thing is done all the same."""
    for body, algorithm in zip(BODIES, ALGORITHMS, strict=True):
        await _committed(store, promised, body, algorithm)
    await _committed(store, promised, BODIES[0])  # once more, over what is there
    for at in (1.0, 2.0):
        promised.tags_in_doubt.setdefault("v1", set()).add(at)
        try:
            await store.records.put_tag(HOLDING, TagRecord("v1", Descriptor("m", Digest.of(BODIES[0]), 1), at))
            promised.tags["v1"] = at
            promised.tags_in_doubt["v1"] = {at}
        except (StoreError, Overloaded):
            promised.n_failures += 1
    digest = Digest.of(BODIES[1])
    try:
        await store.records.put_link(HOLDING, LinkRecord(Descriptor("m", digest, 1)))
        promised.links.add(digest)
    except (StoreError, Overloaded):
        promised.n_failures += 1
    await _interrupted_and_resumed(store, promised)
    await _committed(store, promised, DELETED)
    try:
        gone = Digest.of(DELETED)
        promised.blobs.pop(gone, None)
        await store.blobs.delete([gone])
        assert [blob async for batch in store.blobs.scan() for blob in batch if blob.digest == gone] == []
    except (StoreError, Overloaded):
        promised.n_failures += 1


async def _committed(store: DiskStore, promised: Promised, body: bytes, algorithm: str = "sha256") -> None:
    digest = Digest.of(body, algorithm)
    try:
        ingest = await store.blobs.ingest(digest, Verifier(digest))
    except (StoreError, Overloaded):
        promised.n_failures += 1
        return
    with closing(ingest):
        try:
            for start in range(0, len(body), 4096):
                await ingest.write(body[start : start + 4096])
            await ingest.commit()
            promised.blobs[digest] = body
        except (StoreError, Overloaded):
            promised.n_failures += 1
            await ingest.abort()


async def _interrupted_and_resumed(store: DiskStore, promised: Promised) -> None:
    digest = Digest.of(LEFT)
    try:
        with closing(await store.blobs.ingest(digest, Verifier(digest))) as ingest:
            await ingest.write(LEFT[:9])
            await ingest.abort(keep=True)
        resumed = await store.blobs.resume_ingest(digest, Verifier(digest))
        assert resumed is not None
        with closing(resumed):
            await resumed.write(LEFT[resumed.n_bytes :])
            await resumed.commit()
            promised.blobs[digest] = LEFT
        await store.blobs.sweep_ingest()
    except (StoreError, Overloaded):
        promised.n_failures += 1


def names_that_lie(root: Path) -> list[str]:
    """INV-1: what is under blobs/ and does not hash to its name, or is in the wrong place."""
    lies = []
    for path in (root / "breakwater" / "blobs").rglob("*"):
        if path.is_dir():
            continue
        algorithm, shard, name = path.parts[-3:]
        if hashlib.new(algorithm, path.read_bytes()).hexdigest() != name or not name.startswith(shard):
            lies.append(str(path.relative_to(root)))
    return lies


def outside_ingest(root: Path) -> list[str]:
    """INV-2: what is anywhere but where a finished thing belongs."""
    known = {"blobs", "ingest", "records", "charges", "quarantine", "facts", "layout.json", "lock"}
    ours = root / "breakwater"
    return sorted({path.name for path in ours.iterdir()} - known) if ours.exists() else []


async def kept_promises(store: DiskStore, promised: Promised) -> None:
    """Everything acknowledged is there, and right."""
    for digest, body in promised.blobs.items():
        blob = await store.blobs.open(digest)
        assert blob is not None, f"the acknowledged {digest} is gone"
        assert os.pread(blob.fd, len(body) + 1, 0) == body
        blob.close()
    tag = await store.records.tag(HOLDING, Tag("v1"))
    if promised.tags:
        assert tag is not None and tag.validated_at in promised.tags_in_doubt["v1"] | {promised.tags["v1"]}
    assert promised.links <= {link.descriptor.digest for link in await store.records.links(HOLDING)}


async def opened(root: Path, fs: FileSystem | None = None) -> DiskStore:
    """The store, at once."""
    return await DiskStore.open(root, clock=ManualClock(), report=lambda _: None, fs=fs, patience_s=0)


def fresh(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """1, 2, 3 … with an empty folder each."""
    for n in count(1):
        root = tmp_path / str(n)
        root.mkdir()
        yield n, root


# -- errors of the disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", FAULTS)
async def test_no_failing_call_breaks_a_promise(tmp_path: Path, name: str, is_lasting: bool) -> None:
    """INV-1, INV-2: fail the n-th call; no name lies, the acknowledged is there, and it recovers without a restart."""
    code, only = FAULTS[name]
    for n, root in fresh(tmp_path):
        fs = Faulty(n, code, is_lasting=is_lasting, only=only)
        promised = Promised()
        try:
            store = await opened(root, fs)
        except (StoreError, Overloaded):
            assert fs.has_fired
            store = await opened(root)  # nothing of the failed start is in the way
        await work(store, promised)
        fs.is_counting = False
        assert names_that_lie(root) == []
        assert outside_ingest(root) == []
        await kept_promises(store, promised)
        # The disk is well again, and what a failure left unfinished can go: the same store does everything.
        again = Promised()
        await work(store, again)
        assert again.n_failures == 0
        await kept_promises(store, again)
        await store.blobs.sweep_ingest()
        assert list((root / "breakwater" / "ingest").iterdir()) == []
        await store.aclose()
        if not fs.has_fired:
            assert promised.n_failures == 0
            return


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.EIO, Unavailable),
        (errno.EROFS, Unavailable),
        (errno.EACCES, Unavailable),
        (errno.EMFILE, Overloaded),
        (errno.ENFILE, Overloaded),
    ],
    ids=["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EMFILE", "ENFILE"],
)
async def test_what_an_errno_means(tmp_path: Path, code: int, meaning: type[Exception]) -> None:
    """One table (house.md §6.3 errors by meaning): no room, not available, too much to do."""
    fs = Faulty(1, code, is_lasting=True, only=frozenset({"create"}))
    fs.is_counting = False
    store = await opened(tmp_path, fs)
    fs.is_counting = True
    digest = Digest.of(b"x")
    with pytest.raises(meaning, match=str(digest)):
        await store.blobs.ingest(digest, Verifier(digest))
    await store.aclose()


async def test_hits_go_on_when_nothing_can_be_written(tmp_path: Path) -> None:
    """reliability.md §3 (read-only fs): hits work, also after a start on a file system gone read-only."""
    store = await opened(tmp_path)
    promised = Promised()
    await work(store, promised)
    await store.aclose()
    store = await opened(tmp_path, Faulty(1, errno.EROFS, is_lasting=True, only=WRITING))
    await kept_promises(store, promised)
    with pytest.raises(Unavailable):
        await store.blobs.ingest(Digest.of(b"new"), Verifier(Digest.of(b"new")))
    await store.aclose()


async def test_a_failed_write_is_hashed_and_never_committed(tmp_path: Path) -> None:
    """ports.Ingest: the verifier goes on so that the transfer can; the file has a hole, and gets no name."""
    fs = Faulty(2, errno.ENOSPC, is_lasting=False, only=frozenset({"write"}))
    fs.is_counting = False
    store = await opened(tmp_path, fs)
    fs.is_counting = True
    body = b"abc"
    digest = Digest.of(body)
    verifier = Verifier(digest)
    ingest = await store.blobs.ingest(digest, verifier)
    await ingest.write(b"a")
    for piece in (b"b", b"c"):
        with pytest.raises(OutOfSpace):
            await ingest.write(piece)
    assert verifier.agrees()
    assert ingest.n_bytes == 1
    with pytest.raises(OutOfSpace):
        await ingest.commit()
    ingest.close()
    assert names_that_lie(tmp_path) == []
    assert await store.blobs.open(digest) is None
    await store.aclose()


async def test_a_failed_fsync_is_never_tried_again(tmp_path: Path) -> None:
    """Rebello et al., ATC'20: after a failed fsync the pages are clean and lost, and a second one would succeed."""
    fs = Faulty(1, errno.EIO, is_lasting=False, only=frozenset({"fsync"}))
    fs.is_counting = False
    store = await opened(tmp_path, fs)
    fs.is_counting = True
    digest = Digest.of(b"x")
    ingest = await store.blobs.ingest(digest, Verifier(digest))
    await ingest.write(b"x")
    with pytest.raises(Unavailable):
        await ingest.commit()
    with pytest.raises(ValueError, match="ended"):
        await ingest.commit()
    ingest.close()
    assert list((tmp_path / "breakwater" / "ingest").iterdir()) == []
    assert await store.blobs.open(digest) is None
    await store.aclose()


async def test_a_sync_that_fails_behind_the_writer_is_a_write_that_failed(tmp_path: Path) -> None:
    """A long ingest is synced in steps. The kernel tells of lost pages once, so the fsync of the commit, which would
    succeed, must not make them a blob."""
    fs = Faulty(1, errno.EIO, is_lasting=False, only=frozenset({"fsync"}))
    fs.is_counting = False
    store = await opened(tmp_path, fs)
    fs.is_counting = True
    step = bytes(1 << 20)
    digest = Digest.of(step * 17)
    ingest = await store.blobs.ingest(digest, Verifier(digest))
    for _ in range(16):
        await ingest.write(step)
    while not fs.has_fired:
        await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await ingest.write(step)
        await ingest.commit()
    ingest.close()
    assert names_that_lie(tmp_path) == []
    assert await store.blobs.open(digest) is None
    await store.aclose()


async def test_an_ingest_that_is_closed_while_it_is_synced_closes_its_file_afterwards(tmp_path: Path) -> None:
    """A thread holds the descriptor: its number must not become another file's beneath it."""
    started, released = threading.Event(), threading.Event()
    synced: list[int] = []
    body = bytes(16 << 20)

    class Slow(FileSystem):
        def fsync(self, fd: int) -> None:
            if os.fstat(fd).st_size < len(body):
                return  # the store's own small files
            started.set()
            assert released.wait(30)
            synced.append(os.fstat(fd).st_size)

    store = await opened(tmp_path, Slow())
    digest = Digest.of(b"never whole")
    ingest = await store.blobs.ingest(digest, Verifier(digest))
    await ingest.write(body)
    while not started.is_set():
        await asyncio.sleep(0)
    ingest.close()
    os.fstat(ingest.fd)
    released.set()
    await store.aclose()
    assert synced == [16 << 20]


# -- power cuts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
async def test_no_power_cut_breaks_a_promise(tmp_path: Path, world: World) -> None:
    """INV-1, INV-2: cut before the n-th call, in every world that may then be on the platter."""
    for n, root in fresh(tmp_path):
        if await _cut(root, n, world) is None:
            assert n > 100, "the work was cut short by something else"
            return


@pytest.mark.parametrize("forgets", ["fsync", "fsync_folder"])
async def test_a_store_that_forgets_to_sync_is_found_out(tmp_path: Path, forgets: str) -> None:
    """The loop above is worth something: without either sync it fails."""
    with pytest.raises(AssertionError, match=r"is gone|lies|set aside"):
        for n, root in fresh(tmp_path):
            if await _cut(root, n, "names lost", forgets=forgets) is None:
                return


async def _cut(root: Path, n: int, world: World, *, forgets: str = "") -> Promised | None:
    """Work until the power goes before call `n`, and look at what is left. None when the work was done before that."""
    live = root / "live"
    live.mkdir()
    fs = Lossy(live, n, forgets=forgets)
    promised = Promised()
    store = None
    try:
        store = await opened(live, fs)
        await work(store, promised)
    except PowerCut:
        pass
    if store is not None:
        await store.aclose()
    left = fs.after_cut(root / "left", world)
    assert names_that_lie(left) == [], f"cut before call {n}: a name lies"
    assert outside_ingest(left) == []
    after = await opened(left)
    try:
        await kept_promises(after, promised)
        set_aside = os.listdir(left / "breakwater" / "quarantine")
        assert set_aside == [], f"cut before call {n}: a file that we wrote had to be set aside"
        if n % 4 == 0:  # going on takes the time, and shows little that the errors above do not
            await after.blobs.sweep_ingest()
            again = Promised()
            await work(after, again)
            assert again.n_failures == 0
    finally:
        await after.aclose()
    return promised if fs.is_cut else None
