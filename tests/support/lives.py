"""One store, many lives of the real process, each ended without warning; and what must hold after each.

    python -m tests.support.lives --random 500 --exact 500       kill -9 at random moments, and at exact system calls
    python -m tests.support.lives --cuts 300                     power cuts: ext4 on a loop device, shut down (root)

Prints its seed and its counts. Between two lives every file under blobs/ is hashed here. A life begins with `verify`,
asked of the server itself: nothing is rotten, and the count equals a recount. Then clients pull more than fits, and every
complete body must be right, until the life is ended: by kill -9 at a random moment of the load, or of the start (such a
life has no time for `verify`; the next one has); by a kill at the n-th call of one kind, delivered by strace; or with
the power of the file system beneath it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import images
from tests.support.appliance import read_answer
from tests.support.disks import LoopDisk
from tests.support.process import Breakwater, program
from tests.support.registry import ScriptedRegistry
from tests.support.tracing import attached

#: System calls at which a life may end under load: those that change the store, its facts (fdatasync) or look it up.
CALLS = ("pwrite64", "fsync", "fdatasync", "renameat", "unlinkat", "fchmod", "mkdirat", "openat", "ftruncate")
#: Those at which it may end while it starts. Not openat: nearly all of these are Python's imports.
CALLS_OF_A_START = ("pwrite64", "fsync", "fdatasync", "renameat", "unlinkat", "mkdirat", "ftruncate")
#: How long the load goes on at most for the n-th call to come.
PATIENCE_S = 1.0


@dataclass(slots=True)
class Counts:
    """What happened."""

    #: Kills at a random moment, kills by strace at an exact call, and power cuts.
    kills: int = 0
    exact: int = 0
    cuts: int = 0
    #: Of all of these, those before the server answered.
    in_the_start: int = 0
    verified: int = 0
    bodies: int = 0
    wrong_bodies: int = 0
    #: Cut off by the end of the life.
    short_bodies: int = 0
    #: Answers with another status than 200, though upstream is well.
    refused: int = 0
    wrong_files: int = 0
    miscounted: int = 0
    slowest_start_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything held."""
        return not (self.wrong_bodies or self.refused or self.wrong_files or self.miscounted or self.faults)


class Lives:
    """A store in `scratch`, and the process that has it."""

    def __init__(self, scratch: Path, registry: ScriptedRegistry, chance: random.Random) -> None:
        self.counts = Counts()
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

    # -- a life -------------------------------------------------------------------------------------------------------

    async def live(self, end: Callable[[], Awaitable[None]]) -> None:
        """A life that is verified, then under load until `end` returns."""
        await asyncio.to_thread(self.hash_files)
        before = time.monotonic()
        await asyncio.to_thread(self.process.start)
        self.counts.slowest_start_s = max(self.counts.slowest_start_s, time.monotonic() - before)
        try:
            if self._chance.random() < 0.5:  # else every file is verified before its first reader comes
                await self._pull(self._chance.randrange(len(self._images)))
            await asyncio.to_thread(self._verify)
            clients = [asyncio.create_task(self._client()) for _ in range(4)]
            try:
                await end()
            finally:
                self.process.kill()
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        finally:
            self.process.kill()
        if (self.counts.verified % 50) == 0:
            print(self.counts, file=sys.stderr, flush=True)

    def hash_files(self) -> None:
        """INV-1, without asking the server."""
        for path in (self.process.store / "breakwater" / "blobs").glob("*/*/*"):
            if hashlib.new(path.parts[-3], path.read_bytes()).hexdigest() != path.name:
                self.counts.wrong_files += 1

    def _verify(self) -> None:
        """`breakwater verify`, without the second or so that a command takes to start."""
        token = (self.process.store / "breakwater" / "admin-token").read_text().strip()
        connection = http.client.HTTPConnection("127.0.0.1", self.process.admin_port, timeout=60)
        try:
            asked = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
            connection.request("POST", "/api/v1/verify", b"", asked)
            report = json.loads(connection.getresponse().read().splitlines()[-1])
        finally:
            connection.close()
        if report.get("event") != "report":
            self.counts.faults.append(str(report))
            return
        self.counts.verified += 1
        self.counts.wrong_files += len(report["rotten"])
        self.counts.miscounted += len(report["miscounted"])
        self.counts.faults.extend(report["unreadable"].values())
        status = self.process.admin("/api/v1/status")["store"]
        if status["used_bytes"] + status["reserved_bytes"] > status["capacity_bytes"]:
            self.counts.faults.append(f"overflow: {status}")

    async def _client(self) -> None:
        while True:
            await self._pull(self._chance.randrange(len(self._images)))

    async def _pull(self, n: int) -> None:
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
        if answer.end != "whole":
            self.counts.short_bodies += 1
        elif answer.status != 200:
            self.counts.refused += 1
            self.counts.faults.append(f"{target}: {answer.status} {answer.body[:300]!r}")
        else:
            self.counts.bodies += 1
            self.counts.wrong_bodies += images.digest_of(answer.body) != digest

    # -- ways to end --------------------------------------------------------------------------------------------------

    async def ended_at_random(self) -> None:
        """kill -9 within the first half second of load; one in four within the first second of a start."""
        self.counts.kills += 1
        if self._chance.random() >= 0.25:
            await self.live(lambda: asyncio.sleep(self._chance.uniform(0.0, 0.5)))
            return
        self.counts.in_the_start += 1
        await self._start_and_kill(self._plain, self._chance.uniform(0.0, 1.0))

    async def ended_at_a_call(self) -> bool:
        """Killed at the n-th call of one kind under load, one in four in the start; False when that never came."""
        is_start = self._chance.random() < 0.25
        calls = self._chance.choice(CALLS_OF_A_START if is_start else CALLS)
        n = min(int(self._chance.paretovariate(0.8)), 12 if is_start else 100)
        inject = f"inject={calls}:signal=SIGKILL:when={n}"
        if is_start:
            # With the filter in the kernel only these calls stop, and a start takes hardly longer.
            prefix = [
                program("strace"),
                "-f",
                "--seccomp-bpf",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                f"trace={calls}",
                "-e",
                inject,
            ]
            is_dead = await self._start_and_kill([*prefix, *self._plain], PATIENCE_S + 2)
        else:
            is_dead = await self._load_until(calls, inject)
        self.counts.exact += is_dead
        self.counts.in_the_start += is_start and is_dead
        return is_dead

    async def _load_until(self, calls: str, inject: str) -> bool:
        found = False

        async def end() -> None:
            nonlocal found
            async with attached(self.process.pid, "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject):
                found = await self._dies_within(PATIENCE_S)

        await self.live(end)
        return found

    async def _start_and_kill(self, command: list[str], after_s: float) -> bool:
        """A life that is over before it serves anybody. Whether it died before it was killed."""
        log = self.process.log_path.open("ab")
        child = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        try:
            await asyncio.wait_for(child.wait(), after_s)
            return True
        except TimeoutError:
            return False
        finally:
            try:
                os.killpg(child.pid, 9)
            except ProcessLookupError:
                pass  # it has ended, with all of its group
            await child.wait()

    async def _dies_within(self, patience_s: float) -> bool:
        give_up_at = time.monotonic() + patience_s
        while self.process.is_running:
            if time.monotonic() > give_up_at:
                return False
            await asyncio.sleep(0.01)
        return True

    async def cut(self, disk: LoopDisk) -> None:
        """The power goes while the process runs."""
        await asyncio.sleep(self._chance.uniform(0.0, 0.5))
        disk.cut()
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


async def run_kills(
    scratch: Path, seed: int, n_random: int, n_exact: int, *, at_most_s: float = float("inf")
) -> Counts:
    """So many lives of each kind, or as many as there is time for, and one more that looks at what the last has left."""
    until = time.monotonic() + at_most_s
    async with lives(scratch, seed) as made:
        while (made.counts.kills < n_random or made.counts.exact < n_exact) and time.monotonic() < until:
            if made.counts.kills < n_random:
                await made.ended_at_random()
            if made.counts.exact < n_exact:
                await made.ended_at_a_call()
        await made.live(_at_once)
        return made.counts


async def run_cuts(scratch: Path, seed: int, n_cuts: int, *, at_most_s: float = float("inf")) -> Counts:
    """So many power cuts, or as many as there is time for, and a look at what the last has left.

    Needs root and loop devices; the store is on a file system of its own.
    """
    until = time.monotonic() + at_most_s
    with LoopDisk(scratch) as disk:
        async with lives(disk.mount, seed) as made:
            keep = {path.name: path.read_bytes() for path in disk.mount.iterdir() if path.is_file()}
            while made.counts.cuts < n_cuts and time.monotonic() < until:
                await made.live(lambda: made.cut(disk))
                disk.detach()
                disk.attach()
                for name, content in keep.items():
                    (disk.mount / name).write_bytes(content)
            await made.live(_at_once)
            return made.counts


async def _at_once() -> None:
    """An end without any load."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--exact", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--at-most-s", type=float, default=float("inf"), help="end earlier, with what there is by then")
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="lives-"))
    work = (
        run_cuts(scratch, asked.seed, asked.cuts, at_most_s=asked.at_most_s)
        if asked.cuts
        else run_kills(scratch, asked.seed, asked.random, asked.exact, at_most_s=asked.at_most_s)
    )
    try:
        counts = asyncio.run(work)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"seed {asked.seed}: {counts}")
    sys.exit(not counts.is_clean)


if __name__ == "__main__":
    main()
