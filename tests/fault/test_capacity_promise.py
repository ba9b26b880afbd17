"""Promise 5 as a walk over the folder: after every system call that changes it, everything in it is within the capacity.

Folders, records, journals, the order of use and what is in quarantine count like blobs do.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.errors import BreakwaterError, Unreachable
from proxy.oci.digest import Digest
from proxy.rules.ledger import Ledger, on_disk
from proxy.store.disk import DiskStore
from proxy.store.filesystem import FileSystem
from tests.support.appliance import HastyClock
from tests.support.clock import ManualClock
from tests.support.engine import Engine, FakeUpstream, Script, Step, engine, route, tag
from tests.support.images import Image, image

KIB, MIB = 1 << 10, 1 << 20
SIZES = (1, 1, 700, 4 * KIB, 9 * KIB, 40 * KIB, 130 * KIB)


def walked(folder: Path) -> int:
    """What `du` says: every file and folder, in blocks that the file system gave away."""
    n_bytes = 0
    for at, _, names in os.walk(folder):
        for name in (".", *names):
            try:
                n_bytes += os.lstat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # SQLite's own comings and goings
    return n_bytes


class Watched(FileSystem):
    """One changing call at a time, and a look at the whole folder after each."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self.ledger: Ledger | None = None
        self.turn = threading.Lock()
        self.n_looks = self.most = 0
        self.broken: list[str] = []

    def look_round(self, call: str) -> None:
        """Within the capacity, and within what the ledger says."""
        taken = walked(self.folder)
        self.n_looks += 1
        self.most = max(self.most, taken)
        if taken > self.capacity:
            self.broken.append(f"{call}: {taken} bytes of {self.capacity}")
        # The loop may be in the middle of moving bytes from one column to another.
        if self.ledger is not None and not any(taken <= self._held() for _ in range(20)):
            self.broken.append(f"{call}: {taken} bytes, and the ledger says {self.ledger!r}")

    def _held(self) -> int:
        assert self.ledger is not None
        held = self.ledger.held
        time.sleep(0.0002)
        return max(held, self.ledger.held)


def _watched(name: str) -> Callable[..., object]:
    real = getattr(FileSystem, name)

    def call(self: Watched, *args: object, **kwargs: object) -> object:
        with self.turn:
            try:
                return real(self, *args, **kwargs)
            finally:
                self.look_round(name)

    return call


for _name in ("create", "write", "truncate", "rename", "unlink", "make_folder"):
    setattr(Watched, _name, _watched(_name))


class Load:
    """Images of small and smaller blobs, pulled, abandoned, broken off, purged and found rotten, beside each other."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.upstream = FakeUpstream(piece_bytes=16 * KIB)
        self.images = [image(n, tuple(self.chance.choices(SIZES, k=3))) for n in range(40)]
        for n, one in enumerate(self.images):
            self.upstream.put(one, str(n))

    async def pull(self, running: Engine, n: int) -> None:
        """By tag, then its blobs; now and then upstream breaks off."""
        one = self.images[n]
        await running.tags.resolve(route(), running.origin(), tag(str(n)))
        for blob in one.blobs:
            digest = Digest.parse(blob.digest)
            if self.chance.random() < 0.1:
                steps: list[Step] = [blob.content[:100], *[Unreachable("cut", upstream="docker.io")] * 9]
                self.upstream.scripts[digest] = [Script(len(blob.content), steps)]
            try:
                assert await running.read(digest) == blob.content
            except BreakwaterError:
                continue
            finally:
                self.upstream.scripts.pop(digest, None)

    async def lose(self, running: Engine, one: Image) -> None:
        """A blob is found rotten."""
        digest = Digest.parse(one.blobs[-1].digest)
        if digest in running.ledger and running.capacity.may_go(digest):
            await running.store.blobs.quarantine(digest, "rotten")
            running.capacity.forget(digest)
            running.manifests.forget(digest)

    async def run(self, running: Engine, n_rounds: int) -> None:
        for _ in range(n_rounds):
            some = self.chance.sample(range(len(self.images)), 6)
            await asyncio.gather(*(self.pull(running, n) for n in some))
            await self.lose(running, self.chance.choice(self.images))
            await running.charges.write()
            await running.capacity.remember()
            await running.capacity.watch()
        await running.idle()


async def life(path: Path, fs: Watched, load: Load, n_rounds: int) -> None:
    """A start over what is there, a count, some load, and an end at which the books agree with the folder."""
    fs.ledger = None
    store = await DiskStore.open(path, clock=ManualClock(), report=lambda _: None, fs=fs)
    store.quarantine.max_bytes = fs.capacity // 8
    async with engine(
        load.upstream, store=store, capacity=fs.capacity, upkeep=store.upkeep, clock=HastyClock()
    ) as running:
        fs.ledger = running.ledger
        await running.capacity.mapped()
        if n_rounds == 0:  # nothing happens beside the count, so it is exact
            blobs = sum(on_disk(size) for _, size in running.ledger)
            assert running.ledger.committed == blobs
            assert blobs + store.upkeep.taken == walked(fs.folder)
        await load.run(running, n_rounds)
        await store.upkeep.measure()
        taken = walked(fs.folder)
        assert running.ledger.committed + store.upkeep.taken == taken, "quiet again: a recount finds what a walk finds"
        fs.ledger = None
    await store.aclose()


@pytest.mark.parametrize("seed", range(2))
async def test_the_whole_folder_stays_within_the_capacity_at_every_system_call(tmp_path: Path, seed: int) -> None:
    """Promise 5, INV-5: blobs down to one byte, transfers in flight, metadata and quarantine included; over two lives."""
    fs = Watched(tmp_path / "breakwater", 2 * MIB)
    load = Load(seed)
    await life(tmp_path, fs, load, 8)
    await life(tmp_path, fs, load, 0)
    await life(tmp_path, fs, load, 4)
    assert fs.broken == []
    assert fs.n_looks > 500
    assert fs.most > fs.capacity * 0.7, "the load was worth its name"
