"""Corruptions of what is stored, by the hundred: files of blobs beneath the real process, and the facts.

    python -m tests.support.rot --files 500 --facts 500

Files are flipped, cut off, extended, emptied, swapped or replaced: before a start, under the running server, before a
scrub or `verify`. No complete body is wrong, each damaged blob is fetched again once at most, no other
is, and no record changes.
Facts are whatever diskcache has: after any damage to its files every blob, tag and link is there, without upstream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.ports import Use
from proxy.store.disk import DiskStore
from tests.support import images
from tests.support.appliance import ask
from tests.support.clock import ManualClock
from tests.support.engine import FakeUpstream, engine
from tests.support.failing import verified
from tests.support.process import Breakwater, eventually
from tests.support.registry import ScriptedRegistry

REPOSITORY = "library/alpine"


@dataclass(slots=True)
class Counts:
    """What happened."""

    corruptions: Counter[str] = field(default_factory=Counter)
    bodies: int = 0
    #: Ended short: how a reader learns of rot that is found while it reads.
    short_bodies: int = 0
    wrong_bodies: int = 0
    refetched: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything held."""
        return not (self.wrong_bodies or self.faults)


# -- files -------------------------------------------------------------------------------------------------------------


def _flipped(at: Path, _: Path, chance: random.Random) -> None:
    _overwrite(at, chance.randrange(at.stat().st_size), 1, lambda old: bytes([old[0] ^ 1 << chance.randrange(8)]))


def _overwritten(at: Path, _: Path, chance: random.Random) -> None:
    start = chance.randrange(at.stat().st_size)
    _overwrite(at, start, 4096, lambda old: bytes(byte ^ 0x55 for byte in old))


def _cut_off(at: Path, _: Path, chance: random.Random) -> None:
    os.truncate(at, chance.randrange(at.stat().st_size))


def _emptied(at: Path, _: Path, __: random.Random) -> None:
    os.truncate(at, 0)


def _extended(at: Path, _: Path, chance: random.Random) -> None:
    with at.open("ab") as file:
        file.write(chance.randbytes(chance.choice([1, 5000])))


def _swapped(at: Path, other: Path, _: random.Random) -> None:
    beside = at.with_name("beside")
    os.rename(at, beside)
    os.rename(other, at)
    os.rename(beside, other)


def _replaced(at: Path, _: Path, chance: random.Random) -> None:
    beside = at.with_name("beside")
    beside.write_bytes(chance.randbytes(at.stat().st_size))
    os.rename(beside, at)


def _overwrite(at: Path, start: int, n_bytes: int, change: Callable[[bytes], bytes]) -> None:
    fd = os.open(at, os.O_RDWR)
    try:
        os.pwrite(fd, change(os.pread(fd, n_bytes, start)), start)
    finally:
        os.close(fd)


HARMS = (_flipped, _overwritten, _cut_off, _emptied, _extended, _swapped, _replaced)
MOMENTS = ("before a start", "while it runs", "before verify", "before a scrub")


class Files:
    """A real server with a store of some hundred blobs, which are harmed in batches."""

    def __init__(self, scratch: Path, registry: ScriptedRegistry, chance: random.Random) -> None:
        self.counts = Counts()
        self._how: dict[str, str] = {}
        self._registry = registry
        self._chance = chance
        self._images = [images.image(n, (100_000 + 999 * n, 3_000 + n)) for n in range(25)]
        for n, image in enumerate(self._images):
            registry.put(REPOSITORY, image, str(n))
        self.process = Breakwater(
            scratch, {"upstreams": {"docker.io": {"url": registry.url}}, "log": {"level": "error"}}
        )

    async def fill(self) -> None:
        """Pull everything."""
        await asyncio.to_thread(self.process.start)
        await self._pull_all()

    async def batch(self, moment: str, n: int) -> None:
        """Harm `n` blobs at that moment, and pull everything twice."""
        if moment in ("before a start", "before a scrub"):
            await asyncio.to_thread(self.process.stop)
        records, n_asked = self._records(), len(self._registry.requests)
        harmed = self._harm(n)
        if moment == "before a start":
            await asyncio.to_thread(self.process.start)
        if moment == "before a scrub":
            with self.process.with_env(BREAKWATER_STORE__SCRUB_RATE="50MiB/s"):
                await asyncio.to_thread(self.process.start)
            await asyncio.to_thread(eventually, lambda: not harmed & self._stored(), "the scrub has found all of it")
        if moment == "before verify":
            report = await asyncio.to_thread(verified, self.process)
            found = {digest.partition(":")[2] for digest in report["rotten"]}
            self._expect(found <= harmed, f"verify took what was well: {found - harmed}")
            left = {path.name for path in self._blobs() if hashlib.sha256(path.read_bytes()).hexdigest() != path.name}
            self._expect(not left, f"verify left {self._describe(left)}")
        await self._pull_all()
        asked = Counter(
            request.path.rpartition(":")[2] for request in self._registry.requests[n_asked:] if request.method == "GET"
        )
        self.counts.refetched += sum(asked.values())
        again = [name for name, times in asked.items() if times > 1]
        self._expect(not again, f"{moment}: fetched more than once: {again}")
        unharmed = set(asked) - harmed
        self._expect(not unharmed, f"{moment}: fetched without need: {unharmed}")
        self._expect(self._records() == records, f"{moment}: a tag or a link has changed")
        # Manifests that are wanted are in memory, and nobody reads their files: these `verify` finds.
        report = await asyncio.to_thread(verified, self.process)
        found = {digest.partition(":")[2] for digest in report["rotten"]}
        self._expect(found <= {image.digest.partition(":")[2] for image in self._images}, f"{moment}: left: {found}")
        await asyncio.to_thread(self.process.stop)
        await asyncio.to_thread(self.process.start)
        await self._pull_all()
        report = await asyncio.to_thread(verified, self.process)
        self._expect(report["is_well"], f"{moment}: {report}")

    def _harm(self, n: int) -> set[str]:
        blobs = sorted(self._blobs())
        self._chance.shuffle(blobs)
        harmed: set[str] = set()
        while len(harmed) < n:
            at, harm = blobs.pop(), self._chance.choice(HARMS)
            other = blobs.pop() if harm is _swapped else at
            harm(at, other, self._chance)
            self._how |= {
                name: f"{harm.__name__}, now {self._size(path)}" for path in (at, other) for name in [path.name]
            }
            harmed |= {at.name, other.name}
            self.counts.corruptions[harm.__name__.strip("_")] += 1
        return harmed

    @staticmethod
    def _size(path: Path) -> int:
        return path.stat().st_size

    def _describe(self, names: set[str]) -> list[str]:
        return [f"{name}: {self._how.get(name)}" for name in names]

    def _blobs(self) -> Iterator[Path]:
        return (self.process.store / "breakwater" / "blobs" / "sha256").glob("*/*")

    def _stored(self) -> set[str]:
        return {path.name for path in self._blobs()}

    def _records(self) -> dict[str, bytes]:
        folder = self.process.store / "breakwater" / "records"
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    async def _pull_all(self) -> None:
        for n, image in enumerate(self._images):
            await self._get(f"manifests/{image.digest}", image.body)
            await self._get(f"manifests/{n}", image.body)
            for blob in image.blobs:
                await self._get(f"blobs/{blob.digest}", blob.content)

    async def _get(self, path: str, content: bytes) -> None:
        for _ in range(2):
            answer = await ask(self.process.port, f"/v2/{REPOSITORY}/{path}")
            if answer.status == 200 and answer.end == "whole":
                self.counts.bodies += 1
                self.counts.wrong_bodies += answer.body != content
                return
            self.counts.short_bodies += 1
        self.counts.faults.append(f"{path}: twice not served ({answer.status} {answer.end})")

    def _expect(self, is_so: bool, else_say: str) -> None:
        if not is_so:
            self.counts.faults.append(else_say)


async def harm_files(scratch: Path, seed: int, n: int, per_batch: int = 20) -> Counts:
    """`n` corruptions of blobs, in batches, at each moment in turn."""
    async with ScriptedRegistry() as registry:
        files = Files(scratch, registry, random.Random(seed))
        try:
            await files.fill()
            turn = 0
            while (left := n - files.counts.corruptions.total()) > 0:
                await files.batch(MOMENTS[turn % len(MOMENTS)], min(left, per_batch))
                turn += 1
        finally:
            files.process.close()
    return files.counts


# -- facts -------------------------------------------------------------------------------------------------------------


def _random_page(folder: Path, chance: random.Random, name: str = "cache.db") -> None:
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.seek(chance.randrange(max(1, size // 4096)) * 4096 + chance.choice([0, 0, 8, 100]))
        file.write(chance.randbytes(chance.choice([1, 40, 4096])))


def _random_page_of_the_wal(folder: Path, chance: random.Random) -> None:
    _random_page(folder, chance, "cache.db-wal")


def _truncated(folder: Path, chance: random.Random, name: str = "cache.db") -> None:
    os.truncate(folder / name, chance.randrange((folder / name).stat().st_size))


def _truncated_wal(folder: Path, chance: random.Random) -> None:
    _truncated(folder, chance, "cache.db-wal")


def _no_wal(folder: Path, _: random.Random) -> None:
    (folder / "cache.db-wal").unlink()


def _no_index_of_the_wal(folder: Path, _: random.Random) -> None:
    (folder / "cache.db-shm").unlink()


def _only_the_wal(folder: Path, _: random.Random) -> None:
    (folder / "cache.db").unlink()


def _deleted(folder: Path, _: random.Random) -> None:
    shutil.rmtree(folder)


def _no_database(folder: Path, chance: random.Random) -> None:
    (folder / "cache.db").write_bytes(chance.randbytes(20_000))


def _another_version(folder: Path, chance: random.Random) -> None:
    _sql(folder, "UPDATE Cache SET value = ? WHERE key = 'schema'", chance.choice([b"", b"0", b"2", b"99"]))


def _no_table(folder: Path, chance: random.Random) -> None:
    _sql(folder, f"DROP TABLE {chance.choice(['Cache', 'Settings'])}")


def _rows_mixed_up(folder: Path, chance: random.Random) -> None:
    _sql(folder, "UPDATE Cache SET value = ? WHERE rowid % 2", chance.randbytes(chance.choice([0, 5, 500])))


def _sql(folder: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(folder / "cache.db")) as connection:
        connection.execute(statement, values)
        connection.commit()


HARMS_OF_FACTS = (
    *(_random_page, _random_page_of_the_wal, _truncated, _truncated_wal, _no_wal, _no_index_of_the_wal, _only_the_wal),
    *(_deleted, _no_database, _another_version, _no_table, _rows_mixed_up),
)


class StoreWithFacts:
    """A store in which each life finds other facts than the last one has left."""

    def __init__(self, scratch: Path) -> None:
        self.counts = Counts()
        self._root = scratch / "store"
        self._pristine = scratch / "facts"
        self._images = [images.image(n, (5_000 + n, 300)) for n in range(5)]
        self._digests: dict[Digest, bytes] = {}
        self._facts = self._root / "breakwater" / "facts"

    async def fill(self) -> None:
        """Pull everything, and copy the facts as a kill would leave them: with a write-ahead log."""
        upstream = FakeUpstream()
        for n, image in enumerate(self._images):
            upstream.put(image, str(n))
            self._digests |= {Digest.parse(blob.digest): blob.content for blob in image.blobs}
        async with self._opened() as store, engine(upstream, store=store) as running:
            for n in range(len(self._images)):
                await running.pull.manifest(_asked(n))
            for digest in self._digests:
                await running.read(digest)
            await running.idle()
            await running.capacity.remember()
            many = [Use(Digest.of(b"%d" % n), n, 10_000 + n) for n in range(3000)]
            await store.facts.remember(many, [])
            await store.facts.remember([], [use.digest for use in many])
            shutil.copytree(self._facts, self._pristine)

    async def life(self, harm: Callable[[Path, random.Random], None], chance: random.Random) -> None:
        """A start with harmed facts and without upstream: all is here, and stays."""
        shutil.rmtree(self._facts, ignore_errors=True)
        shutil.copytree(self._pristine, self._facts)
        harm(self._facts, chance)
        self.counts.corruptions[harm.__name__.strip("_")] += 1
        upstream = FakeUpstream()
        async with self._opened() as store, engine(upstream, store=store) as running:
            for n, image in enumerate(self._images):
                held = (await running.pull.manifest(_asked(n))).held
                self._saw(held.body == image.body)
            for digest, content in self._digests.items():
                self._saw(await running.read(digest) == content)
            await running.idle()
            on_disk = {blob.digest: blob.size async for batch in store.blobs.scan() for blob in batch}
            counted = {digest: running.ledger.size_of(digest) for digest, _ in running.ledger}
            if counted != on_disk or len(on_disk) != len(self._digests) + len(self._images):
                self.counts.faults.append(f"{harm.__name__}: {len(counted)} counted, {len(on_disk)} on disk")
            if upstream.kinds():
                self.counts.faults.append(f"{harm.__name__}: upstream was asked for {upstream.kinds()}")
            await running.capacity.remember()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[DiskStore]:
        store = await DiskStore.open(self._root, clock=ManualClock(), report=lambda _: None)
        try:
            yield store
        finally:
            await store.aclose()

    def _saw(self, is_right: bool) -> None:
        self.counts.bodies += 1
        self.counts.wrong_bodies += not is_right


def _asked(n: int) -> ManifestGet:
    return ManifestGet(RepositoryPath(None, REPOSITORY), Tag(str(n)), None)


async def harm_facts(scratch: Path, seed: int, n: int) -> Counts:
    """`n` corruptions of facts, each kind in turn."""
    chance = random.Random(seed)
    store = StoreWithFacts(scratch)
    await store.fill()
    for turn in range(n):
        await store.life(HARMS_OF_FACTS[turn % len(HARMS_OF_FACTS)], chance)
    return store.counts


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--facts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    asked = parser.parse_args()
    is_clean = True
    for what, harm, n in (("files", harm_files, asked.files), ("facts", harm_facts, asked.facts)):
        if n:
            with tempfile.TemporaryDirectory(prefix="rot-") as scratch:
                counts = asyncio.run(harm(Path(scratch), asked.seed, n))
            print(f"{what}, seed {asked.seed}: {counts}")
            is_clean &= counts.is_clean
    sys.exit(not is_clean)


if __name__ == "__main__":
    main()
