"""A real file system of 64 MiB that somebody else fills (product.md, promise 5): cold blobs go until `min_free` is back.

A node's kubelet evicts pods when its disk runs full, so the mirror on it must shrink first.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.engine.capacity import WATCH_EVERY_S
from proxy.oci.digest import Digest
from proxy.store.disk import DiskStore
from tests.support.clock import ManualClock
from tests.support.engine import Engine, FakeUpstream, engine

MIB = 1 << 20
SIZE, N_INODES = 64 * MIB, 2000
N_BLOBS, BLOB = 40, 256 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, others' files and the store side by side."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    at = tmp_path / "disk"
    at.mkdir()
    options = f"size={SIZE},nr_inodes={N_INODES}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], stderr=subprocess.PIPE).returncode:
        pytest.skip("this sandbox may not mount")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.fixture
async def store(disk: Path) -> AsyncIterator[DiskStore]:
    made = await DiskStore.open(disk, clock=ManualClock(), report=print)
    yield made
    await made.aclose()


async def filled(running: Engine, upstream: FakeUpstream) -> list[Digest]:
    """Pulled in this order, so that the first is the coldest."""
    digests = [upstream.put_blob(bytes([n]) * BLOB) for n in range(N_BLOBS)]
    for digest in digests:
        await running.read(digest)
    await running.idle()
    return digests


async def watched(running: Engine) -> None:
    """Ten seconds go by."""
    for _ in range(4):
        await running.clock.advance(WATCH_EVERY_S)
        for _ in range(50):
            await asyncio.sleep(0.001)  # turns for the threads that delete; nothing is measured by it


async def test_bytes_that_others_take_are_given_back(disk: Path, store: DiskStore) -> None:
    """The coldest go, as many as must, and the others stay."""
    upstream = FakeUpstream()
    async with engine(upstream, store=store, min_free=lambda total: total // 4) as running:
        digests = await filled(running, upstream)
        (disk / "theirs").write_bytes(bytes(SIZE * 3 // 4 - 5 * MIB))
        assert os.statvfs(disk).f_bavail * 4096 < SIZE // 4
        await watched(running)
        free = os.statvfs(disk).f_bavail * 4096
        assert SIZE // 4 <= free < SIZE // 4 + 3 * MIB
        kept = [digest in running.ledger for digest in digests]
        assert kept == sorted(kept) and 0 < sum(kept) < N_BLOBS, "the coldest went, the warmest stayed"
        assert [await running.stored(digest) is not None for digest in digests] == kept


async def test_inodes_that_others_take_are_given_back(disk: Path, store: DiskStore) -> None:
    """A disk without inodes is as full as one without bytes."""
    upstream = FakeUpstream()
    async with engine(upstream, store=store, min_free_inodes=lambda total: total // 4) as running:
        digests = await filled(running, upstream)
        for n in range(os.statvfs(disk).f_favail - N_INODES // 4 + 10):
            (disk / f"theirs {n}").touch()
        assert os.statvfs(disk).f_favail == N_INODES // 4 - 10
        await watched(running)
        assert os.statvfs(disk).f_favail >= N_INODES // 4
        kept = [digest in running.ledger for digest in digests]
        assert kept == sorted(kept) and sum(kept) == N_BLOBS - 10


async def test_we_never_write_below_min_free(disk: Path, store: DiskStore) -> None:
    """What others leave too little room for passes through, and what is read stays readable."""
    upstream = FakeUpstream()
    async with engine(upstream, store=store, min_free=lambda total: total // 4) as running:
        (disk / "theirs").write_bytes(bytes(SIZE * 3 // 4 - 3 * BLOB))
        for n in range(10):
            body = bytes([n]) * BLOB
            assert await running.read(upstream.put_blob(body)) == body
            await running.idle()
            assert os.statvfs(disk).f_bavail * 4096 >= SIZE // 4
        assert 0 < len(running.ledger) <= 3
        (disk / "theirs more").write_bytes(bytes(4 * BLOB))
        await watched(running)
        body = b"last" * 1000
        assert await running.read(upstream.put_blob(body)) == body
        await running.idle()
        assert len(running.ledger) == 0 and "min_free" in running.capacity.degraded
        (disk / "theirs more").unlink()
        await watched(running)
        assert running.capacity.degraded == "", "well again by itself"
