"""A store that is left in the middle of something: cancelled, closed, killed, started beside another.

After each, every name under blobs/ hashes to itself (INV-1), and what was acknowledged is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.errors import Corrupt, Unavailable
from proxy.oci.digest import Digest, Verifier
from proxy.store.blobs import DiskBlob
from proxy.store.disk import DiskStore
from proxy.store.filesystem import FileSystem
from tests.fault.test_store_faults import names_that_lie, opened
from tests.support.clock import ManualClock
from tests.support.left_behind import put

BODY = bytes(range(256)) * 400
DIGEST = Digest.of(BODY)


class Gated(FileSystem):
    """Holds calls of one name until it is told otherwise."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.is_held = threading.Event()
        self._may_go = threading.Event()

    def go(self) -> None:
        """Let them all pass, now and later."""
        self._may_go.set()

    def wait(self) -> None:
        """For a call that is being held."""
        self.is_held.set()
        self._may_go.wait(30)


def _gated(name: str) -> Callable[..., object]:
    real = getattr(FileSystem, name)

    def call(self: Gated, *args: object, **kwargs: object) -> object:
        if name == self._name and not self._may_go.is_set():
            self.wait()
        return real(self, *args, **kwargs)

    return call


for _name in ("open_file", "create", "write", "fsync"):
    setattr(Gated, _name, _gated(_name))


async def held(fs: Gated) -> None:
    """Until a call is being held."""
    while not fs.is_held.is_set():
        await asyncio.sleep(0)


async def kept(store: DiskStore, body: bytes = BODY) -> Digest:
    """Put `body` in."""
    return await put(store, body)


def body_of(blob: DiskBlob) -> bytes:
    """All of an open blob, which is closed."""
    body = os.pread(blob.fd, blob.size + 1, 0)
    blob.close()
    return body


def left_in_ingest(root: Path) -> list[str]:
    """Names of unfinished things."""
    return [path.name for path in (root / "breakwater" / "ingest").iterdir()]


# -- cancelled ---------------------------------------------------------------------------------------------------------


async def test_a_cancelled_open_leaks_nothing(tmp_path: Path) -> None:
    """The descriptor arrives when nobody wants it any more, and is given back."""
    fs = Gated("open_file")
    store = await opened(tmp_path)
    await kept(store)
    await store.aclose()
    fs._name = ""
    store = await opened(tmp_path, fs)
    fs._name = "open_file"
    task = asyncio.create_task(store.blobs.open(DIGEST))
    await held(fs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fs.go()
    await store.aclose()


async def test_a_cancelled_ingest_leaks_nothing(tmp_path: Path) -> None:
    """The file arrives when nobody wants it any more; the next sweep removes it."""
    fs = Gated("create")
    fs.go()
    store = await opened(tmp_path, fs)
    fs._may_go.clear()
    task = asyncio.create_task(store.blobs.ingest(DIGEST, Verifier(DIGEST)))
    await held(fs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fs.go()
    await store.aclose()
    store = await opened(tmp_path)
    await store.blobs.sweep_ingest()
    assert left_in_ingest(tmp_path) == []
    await store.aclose()


@pytest.mark.parametrize("is_kept", [False, True], ids=["forgotten", "kept"])
async def test_an_abort_waits_for_a_cancelled_write(tmp_path: Path, is_kept: bool) -> None:
    """The thread still writes to the descriptor: nothing may be closed beneath it."""
    fs = Gated("write")
    fs.go()
    store = await opened(tmp_path, fs)
    fs._may_go.clear()
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    task = asyncio.create_task(ingest.write(BODY))
    await held(fs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ending = asyncio.create_task(ingest.abort(keep=is_kept))
    await asyncio.sleep(0)
    assert not ending.done()
    fs.go()
    await ending
    assert os.pread(ingest.fd, len(BODY), 0) == BODY
    ingest.close()
    assert len(left_in_ingest(tmp_path)) == is_kept
    await store.aclose()


async def test_a_close_waits_for_a_cancelled_write(tmp_path: Path) -> None:
    """A descriptor closed too early would be somebody else's when the thread writes to its number."""
    fs = Gated("write")
    fs.go()
    store = await opened(tmp_path, fs)
    fs._may_go.clear()
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    task = asyncio.create_task(ingest.write(BODY))
    await held(fs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ingest.close()
    assert os.fstat(ingest.fd).st_size == 0
    fs.go()
    await store.aclose()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ingest.fd)


async def test_a_cancelled_commit_is_whole_or_nothing(tmp_path: Path) -> None:
    """The thread goes on to the end: the name is there with every byte."""
    fs = Gated("fsync")
    fs.go()
    store = await opened(tmp_path, fs)
    fs._may_go.clear()
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await ingest.write(BODY)
    task = asyncio.create_task(ingest.commit())
    await held(fs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fs.go()
    await ingest.abort()
    ingest.close()
    blob = await store.blobs.open(DIGEST)
    assert blob is not None
    assert body_of(blob) == BODY
    await store.aclose()


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    """What comes too late raises Unavailable; an abort still never raises, and open files can be given back."""
    store = await opened(tmp_path)
    await kept(store)
    blob = await store.blobs.open(DIGEST)
    assert blob is not None
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await store.aclose()
    with pytest.raises(Unavailable):
        await store.blobs.open(DIGEST)
    with pytest.raises(Unavailable):
        await ingest.write(BODY)
    await ingest.abort()
    ingest.close()
    assert body_of(blob) == BODY


# -- interrupted and resumed -------------------------------------------------------------------------------------------


async def test_a_kept_ingest_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Its bytes are hashed again, and the longest is taken."""
    store = await opened(tmp_path)
    for n_bytes in (100, 70_000, 3_000):
        ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY[:n_bytes])
        await ingest.abort(keep=True)
        ingest.close()
    await store.aclose()
    store = await opened(tmp_path)
    assert [(each.digest, each.n_bytes) for each in await store.blobs.kept_ingests()] == [
        (DIGEST, 70_000),
        (DIGEST, 3_000),
        (DIGEST, 100),
    ]
    verifier = Verifier(DIGEST)
    resumed = await store.blobs.resume_ingest(DIGEST, verifier)
    assert resumed is not None
    assert resumed.n_bytes == verifier.n_bytes == 70_000
    assert [each.n_bytes for each in await store.blobs.kept_ingests()] == [3_000, 100]
    await resumed.write(BODY[70_000:])
    await resumed.commit()
    resumed.close()
    assert await store.blobs.sweep_ingest() > 0
    assert left_in_ingest(tmp_path) == []
    blob = await store.blobs.open(DIGEST)
    assert blob is not None
    assert body_of(blob) == BODY
    assert await store.blobs.resume_ingest(DIGEST, Verifier(DIGEST)) is None
    await store.aclose()


async def test_a_kept_ingest_that_rotted_gets_no_name(tmp_path: Path) -> None:
    """INV-1: what is under ingest/ proves nothing by being there."""
    store = await opened(tmp_path)
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await ingest.write(BODY[:1000])
    await ingest.abort(keep=True)
    ingest.close()
    [name] = left_in_ingest(tmp_path)
    (tmp_path / "breakwater" / "ingest" / name).write_bytes(b"?" * 1000)
    resumed = await store.blobs.resume_ingest(DIGEST, Verifier(DIGEST))
    assert resumed is not None
    await resumed.write(BODY[1000:])
    with pytest.raises(Corrupt):
        await resumed.commit()
    resumed.close()
    assert left_in_ingest(tmp_path) == []
    assert names_that_lie(tmp_path) == []
    assert await store.blobs.open(DIGEST) is None
    await store.aclose()


async def test_a_sweep_leaves_running_transfers_alone(tmp_path: Path) -> None:
    """Only what nobody works on goes, and what is asked for stays."""
    store = await opened(tmp_path)
    running = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await running.write(BODY)
    ingest_folder = tmp_path / "breakwater" / "ingest"
    (ingest_folder / "record.00000000").write_bytes(b"left by an earlier process")
    (ingest_folder / f"sha256-{'0' * 64}.00000000").write_bytes(b"likewise")
    (ingest_folder / f"sha256-{'1' * 64}.00000000").write_bytes(b"to be kept")
    await store.blobs.sweep_ingest(keep=[f"sha256-{'1' * 64}.00000000"])
    assert sorted(left_in_ingest(tmp_path)) == sorted([running.name, f"sha256-{'1' * 64}.00000000"])
    await running.commit()
    running.close()
    await store.aclose()


# -- two servers -------------------------------------------------------------------------------------------------------


async def test_the_second_server_waits_for_the_first(tmp_path: Path) -> None:
    """A restart: the old one drains, the new one has patience."""
    first, clock = await opened(tmp_path), ManualClock()
    second = asyncio.create_task(DiskStore.open(tmp_path, clock=clock, report=print))
    while not clock.sleepers:
        await asyncio.sleep(0)
    await first.aclose()
    await clock.advance(0.25)
    store = await second
    await kept(store)
    await store.aclose()


async def test_the_second_server_gives_up_in_a_sentence(tmp_path: Path) -> None:
    """After 30 s it names the process that has the store, and leaves it unharmed."""
    first, clock = await opened(tmp_path), ManualClock()
    began = clock.monotonic()
    second = asyncio.create_task(DiskStore.open(tmp_path, clock=clock, report=print))
    while not second.done():
        await asyncio.sleep(0)
        if clock.sleepers:
            await clock.advance(0.25)
    with pytest.raises(Unavailable, match=rf"in use by process {os.getpid()}, still after 30 s"):
        await second
    assert clock.monotonic() - began == 30
    await kept(first)
    await first.aclose()


# -- killed ------------------------------------------------------------------------------------------------------------

_VICTIM = """
import asyncio, os, random, sys
from pathlib import Path
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.ports import Holding, TagRecord, Use
from proxy.store.disk import DiskStore
from tests.support.clock import ManualClock

async def main(root, seed):
    chance = random.Random(seed)
    store = await DiskStore.open(Path(root), clock=ManualClock(), report=print)
    n = 0
    while True:
        n += 1
        body = chance.randbytes(chance.choice([0, 1, 5_000, 300_000]))
        digest = Digest.of(body)
        ingest = await store.blobs.ingest(digest, Verifier(digest))
        for start in range(0, len(body), 65_536):
            await ingest.write(body[start : start + 65_536])
        await ingest.commit()
        ingest.close()
        await store.records.put_tag(Holding("p", "h.test", "r"), TagRecord("v1", Descriptor("m", digest, n), float(n)))
        await store.facts.remember([Use(digest, len(body), n)], [])
        os.write(1, f"{digest} {n}\\n".encode())

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("seed", range(8))
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    """INV-1, INV-2: a real process, killed while it writes; it starts again, and a successor finds all of it."""
    said: list[bytes] = []
    for life in range(2):
        said += await asyncio.to_thread(_killed, tmp_path, seed * 2 + life, random.Random(seed + life).randrange(1, 25))
    assert names_that_lie(tmp_path) == []
    reports: list[str] = []
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=reports.append, patience_s=0)
    for line in said:
        digest = Digest.parse(line.split()[0].decode())
        blob = await store.blobs.open(digest)
        assert blob is not None, f"the acknowledged {digest} is gone"
        assert Digest.of(body_of(blob)) == digest
    known = {use.digest async for batch in store.facts.uses() for use in batch}
    assert {Digest.parse(line.split()[0].decode()) for line in said} <= known
    [(_, tags, _)] = [each async for each in store.records.scan()]
    assert [tag.validated_at >= float(said[-1].split()[1]) for tag in tags] == [True]
    await store.blobs.sweep_ingest()
    assert left_in_ingest(tmp_path) == []
    await store.aclose()
    assert reports == []


def _killed(root: Path, seed: int, after: int) -> list[bytes]:
    """Run the victim, kill it once it has said `after` lines, and return every whole line."""
    command = [sys.executable, "-c", _VICTIM, str(root), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as victim:
        assert victim.stdout is not None
        try:
            lines = [victim.stdout.readline() for _ in range(after)]
        finally:
            with contextlib.suppress(ProcessLookupError):
                victim.send_signal(signal.SIGKILL)
        lines += victim.stdout.read().splitlines(keepends=True)
    assert lines[0], "the victim did not start"
    return [line for line in lines if line.endswith(b"\n")]
