"""One store, many lives of the real process, each ended without warning; and what must hold after each.

    python -m tests.support.lives --random 500 --exact 500       kill -9 at random moments, and at exact system calls
    python -m tests.support.lives --cuts 300                     power cuts: ext4 on a loop device, shut down (root)

Prints its seed and its counts. After each life: every file under blobs/ hashes to its name, the next start answers, no
complete body that was served is wrong, and the count equals a recount (`breakwater verify`).
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import images
from tests.support.appliance import read_answer
from tests.support.process import Breakwater
from tests.support.registry import ScriptedRegistry

#: System calls at which a life may end: those that change the store.
CALLS = ("pwrite64", "fsync", "renameat,rename", "unlinkat,unlink", "fchmod", "mkdirat,mkdir", "openat")
#: EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: nothing more reaches the disk, the journal neither.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


@dataclass(slots=True)
class Counts:
    """What happened."""

    kills: int = 0
    exact: int = 0
    cuts: int = 0
    bodies: int = 0
    wrong_bodies: int = 0
    short_bodies: int = 0
    wrong_files: int = 0
    miscounted: int = 0
    slowest_start_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything held."""
        return not (self.wrong_bodies or self.wrong_files or self.miscounted or self.faults)


class Lives:
    """A store in `scratch`, and the process that has it."""

    def __init__(self, scratch: Path, registry: ScriptedRegistry, chance: random.Random) -> None:
        self.counts = Counts()
        self._registry = registry
        self._chance = chance
        self._images = [images.image(n, (60_000 + 977 * n, 1_500_000)) for n in range(6)]
        for n, image in enumerate(self._images):
            registry.put("library/alpine", image, str(n))
        settings = {
            "upstreams": {"docker.io": {"url": registry.url}},
            # Room for four of the six images, so that something is always evicted.
            "store": {"capacity": "7MiB", "min_free": "1MiB", "scrub_rate": "50MiB/s"},
            "log": {"level": "warning"},
        }
        self.process = Breakwater(scratch, settings)
        self._plain = list(self.process.command)

    async def live(self, end: Callable[[], Awaitable[None]], *, prefix: list[str] | None = None) -> None:
        """One life under load, ended by `end`, or by itself where `prefix` (a strace) kills it first."""
        self.process.command = [*(prefix or []), *self._plain]
        before = time.monotonic()
        try:
            await asyncio.to_thread(self.process.start)
        except AssertionError:
            if not prefix:
                raise
        else:
            if not prefix:
                self.counts.slowest_start_s = max(self.counts.slowest_start_s, time.monotonic() - before)
            clients = [asyncio.create_task(self._client()) for _ in range(4)]
            try:
                await end()
            finally:
                self.process.kill()
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        self.process.kill()

    async def after(self) -> None:
        """What must hold now."""
        await asyncio.to_thread(self._hash_files)
        await self.live(self._verify)

    async def _verify(self) -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "proxy", "verify", "--json", "--config", str(self.process.settings_path)],
            capture_output=True,
            check=False,
        )
        try:
            report = json.loads(done.stdout)
        except ValueError:
            self.counts.faults.append(done.stderr.decode()[-300:])
            return
        self.counts.wrong_files += len(report["rotten"])
        self.counts.miscounted += len(report["miscounted"])
        self.counts.faults.extend(report["unreadable"].values())
        status = self.process.admin("/api/v1/status")["store"]
        if status["used_bytes"] + status["reserved_bytes"] > status["capacity_bytes"]:
            self.counts.faults.append(f"overflow: {status}")

    def _hash_files(self) -> None:
        for path in (self.process.store / "breakwater" / "blobs").glob("*/*/*"):
            if hashlib.new(path.parts[-3], path.read_bytes()).hexdigest() != path.name:
                self.counts.wrong_files += 1

    async def _client(self) -> None:
        while True:
            n = self._chance.randrange(len(self._images))
            image = self._images[n]
            await self._get(f"/v2/library/alpine/manifests/{n}", image.digest)
            for blob in image.blobs:
                await self._get(f"/v2/library/alpine/blobs/{blob.digest}", blob.digest)

    async def _get(self, target: str, digest: str) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.process.port)
        except OSError:
            await asyncio.sleep(0.05)
            return
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = await read_answer(reader)
        finally:
            writer.close()
        if answer.end != "whole" or answer.status != 200:
            self.counts.short_bodies += 1
            return
        self.counts.bodies += 1
        if images.digest_of(answer.body) != digest:
            self.counts.wrong_bodies += 1

    # -- ways to end --------------------------------------------------------------------------------------------------

    async def at_a_random_moment(self) -> None:
        """kill -9 within the first second of load."""
        await asyncio.sleep(self._chance.uniform(0.0, 1.0))
        self.counts.kills += 1

    async def at_a_call(self) -> None:
        """A life that is killed at the n-th call of one kind."""
        calls, n = self._chance.choice(CALLS), int(self._chance.paretovariate(0.6)) + 1
        inject = f"inject={calls}:signal=SIGKILL:when={min(n, 400)}"
        self.counts.exact += 1
        await self.live(
            self._until_dead, prefix=["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
        )

    async def _until_dead(self) -> None:
        give_up_at = time.monotonic() + 3
        while self.process.is_running and time.monotonic() < give_up_at:
            await asyncio.sleep(0.02)

    async def cut(self, mount: Path) -> None:
        """The power goes while the process runs."""
        await asyncio.sleep(self._chance.uniform(0.0, 1.0))
        at = os.open(mount, os.O_RDONLY)
        try:
            fcntl.ioctl(at, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(at)
        self.counts.cuts += 1


@asynccontextmanager
async def lives(scratch: Path, seed: int) -> AsyncIterator[Lives]:
    """A registry, and lives of a store before it."""
    async with ScriptedRegistry() as registry:
        made = Lives(scratch, registry, random.Random(seed))
        try:
            yield made
        finally:
            made.process.close()


async def run_kills(scratch: Path, seed: int, n_random: int, n_exact: int) -> Counts:
    """So many lives, each followed by a look."""
    async with lives(scratch, seed) as made:
        for n in range(max(n_random, n_exact)):
            if n < n_random:
                await made.live(made.at_a_random_moment)
                await made.after()
            if n < n_exact:
                await made.at_a_call()
                await made.after()
        return made.counts


async def run_cuts(scratch: Path, seed: int, n_cuts: int) -> Counts:
    """So many power cuts. Needs root and loop devices; the store is on a file system of its own."""
    image, mount = scratch / "disk.img", scratch / "life"
    with image.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount.mkdir()
    async with lives(mount, seed) as made:
        keep = {path.name: path.read_bytes() for path in mount.iterdir() if path.is_file()}
        for n in range(n_cuts + 1):
            subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
            try:
                for name, content in keep.items():
                    (mount / name).write_bytes(content)
                if n:
                    await made.after()
                if n < n_cuts:
                    await made.live(lambda: made.cut(mount))
            finally:
                made.process.kill() if made.process.is_running else None
                subprocess.run(["umount", str(mount)], check=True)
        return made.counts


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--exact", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="lives-"))
    work = (
        run_cuts(scratch, asked.seed, asked.cuts)
        if asked.cuts
        else run_kills(scratch, asked.seed, asked.random, asked.exact)
    )
    try:
        counts = asyncio.run(work)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"seed {asked.seed}: {counts}")
    sys.exit(not counts.is_clean)


if __name__ == "__main__":
    main()
