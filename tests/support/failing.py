"""The real process, and single system calls of it that fail: the n-th, once or from then on, for n = 1, 2, 3 …

    python -m tests.support.failing [--only WORD …]      every call, errno and n, until a round completes unharmed

A round: strace attaches to the running server with one fault, clients pull an image that is here and one that is not,
strace lets go. Every answer in it is whole and right (where not even sendfile works any more it may end short; wrong it
never is). After it the same server, not restarted, keeps what is new again, and its count equals what is on disk. The loop
over n ends when nothing was left to fail.

With `--starts` the fault is there from the first instruction of a start on. Where nothing can be written it starts all
the same and serves; where the disk fails it may refuse, in a sentence, and the next start is well.

strace counts calls for each thread by itself, so one n fails the n-th call of every thread that comes that far.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

from tests.support import images
from tests.support.appliance import ask
from tests.support.images import Image
from tests.support.process import Breakwater, DidNotStart, eventually, program
from tests.support.registry import ScriptedRegistry
from tests.support.tracing import attached

#: What a full or read-only file system says, and where it can say it. Python's openat is both reading and making.
WRITES = ("pwrite64", "fsync", "renameat", "unlinkat", "mkdirat", "fchmod")
NO_WRITING = ("ENOSPC", "EDQUOT", "EROFS")
#: What a failing disk fails besides these.
READS = ("pread64", "preadv2", "sendfile", "openat", "newfstatat", "getdents64", "fstatfs")

REPOSITORY = "library/alpine"


@dataclass(frozen=True, slots=True)
class Fault:
    """One way for calls of a process to fail."""

    calls: str
    error: str
    is_lasting: bool

    def __str__(self) -> str:
        return f"{self.calls} says {self.error} {'from then on' if self.is_lasting else 'once'}"

    @property
    def spares_hits(self) -> bool:
        """Whether what is here can be read all the same, so that nothing of it may be asked upstream."""
        return self.calls in WRITES

    @property
    def blinds(self) -> bool:
        """Whether not even what was written a moment ago can be sent on: then bodies end short. Wrong they never are."""
        return self.calls == "sendfile" and self.is_lasting

    def options(self, n: int, log: Path) -> list[str]:
        """For strace."""
        when = f"{n}+" if self.is_lasting else f"{n}"
        inject = f"inject={self.calls}:error={self.error}:when={when}"
        return ["-o", str(log), "-e", f"trace={self.calls}", "-e", inject]


def faults_of_a_start() -> Iterator[Fault]:
    """Not of openat and reading: nearly all of these are Python's own imports."""
    for is_lasting in (False, True):
        for calls in (*WRITES, "ftruncate"):
            for error in (*NO_WRITING, "EIO") if is_lasting else ("ENOSPC", "EIO"):
                yield Fault(calls, error, is_lasting)


def faults() -> Iterator[Fault]:
    """All of them, while it runs."""
    for is_lasting in (False, True):
        for calls in WRITES:
            for error in (*NO_WRITING, "EIO"):
                yield Fault(calls, error, is_lasting)
        for calls in READS:
            yield Fault(calls, "EIO", is_lasting)
        for error in NO_WRITING:
            yield Fault("openat", error, is_lasting)


class Failing:
    """A server with one image that everybody wants and room for few others."""

    def __init__(self, scratch: Path, registry: ScriptedRegistry, store: Path | None = None) -> None:
        """With the store in `store`, where it is not to be on the disk that `scratch` is on."""
        self._registry = registry
        self._log = scratch / "strace.log"
        self._hot = images.image(0, (90_000, 3_000))
        others = [images.image(n, (700_000 + n, 2_000)) for n in range(1, 13)]
        for n, image in enumerate([self._hot, *others]):
            registry.put(REPOSITORY, image, str(n))
        #: With room for about six of them, the next one has always been evicted by the time it comes round.
        self._others = cycle(enumerate(others, start=1))
        settings: dict[str, Any] = {
            "upstreams": {"docker.io": {"url": registry.url}},
            "store": {"capacity": "5MiB", "min_free": "1MiB", "scrub_rate": "50MiB/s"},
            "log": {"level": "warning"},
        }
        if store is not None:
            settings["store"]["path"] = str(store)
        self.process = Breakwater(scratch, settings)
        self.process.store = store or self.process.store
        self.n_rounds = self.n_answers = 0

    async def start(self) -> None:
        """Until it has served everything once: what is loaded when it is first wanted is loaded."""
        await asyncio.to_thread(self.process.start)
        for _ in range(10):
            await self._pull(0, self._hot)
            await self._pull(*next(self._others))
        await self.is_well("at first")

    # -- while it runs ------------------------------------------------------------------------------------------------

    async def rounds(self, fault: Fault) -> int:
        """One round for each n, until two of them are unharmed; how many calls can fail. Raises AssertionError."""
        last = 0
        for n in count(1):
            if await self.round(fault, n):
                last = n
            elif n > last + 1:  # which thread does what is not the same each time
                break
        return last

    async def round(self, fault: Fault, n: int) -> bool:
        """Fail the n-th call. Whether there was one to fail."""
        self._log.write_bytes(b"")
        self.n_rounds += 1
        async with attached(self.process.pid, *fault.options(n, self._log)):
            await self.serves(f"{fault}, n = {n}", spares_hits=fault.spares_hits, may_end_short=fault.blinds)
        has_fired = b"(INJECTED)" in self._log.read_bytes()
        await self._pull(0, self._hot)
        await self.is_well(f"{fault}, n = {n}")
        return has_fired

    # -- in a start ---------------------------------------------------------------------------------------------------

    async def starts(self, fault: Fault) -> int:
        """A start for each n, until one is unharmed; the last n that failed. Raises AssertionError.

        What lasts is begun at 1, 2, 4, 8 …: the calls between are those that fail then anyway.
        """
        last = 0
        for n in (1 << k for k in count()) if fault.is_lasting else count(1):
            if not await self.start_with(fault, n):
                break
            last = n
        return last

    async def start_with(self, fault: Fault, n: int) -> bool:
        """Start with the n-th call failing. Whether there was one to fail."""
        self._log.write_bytes(b"")
        self.n_rounds += 1
        plain = self.process.command
        await asyncio.to_thread(self.process.stop)
        self.process.log_path.write_bytes(b"")
        # With the filter in the kernel only these calls stop, and the start takes hardly longer.
        self.process.command = [program("strace"), "-f", "--seccomp-bpf", "-qq", *fault.options(n, self._log), *plain]
        try:
            await asyncio.to_thread(self.process.start)
            await self._pull(0, self._hot)
            await self._pull(*next(self._others))
        except DidNotStart:
            assert fault.error == "EIO", f"{fault}, n = {n}: it does not start\n{self.process.log()}"
        finally:
            self.process.command = plain
            if self.process.is_running:
                await asyncio.to_thread(self.process.kill)
        self.process.assert_log_is_clean()
        await asyncio.to_thread(self.process.start)
        await self._pull(0, self._hot)
        await self.is_well(f"a start in which {fault}, n = {n}")
        return b"(INJECTED)" in self._log.read_bytes()

    # -- what must hold -----------------------------------------------------------------------------------------------

    async def serves(self, when: str, *, spares_hits: bool = True, may_end_short: bool = False) -> None:
        """What is here and what is not, whole and right; `spares_hits`: the former without asking upstream."""
        before = self._asked_for_hot()
        for each in ((0, self._hot), next(self._others), (0, self._hot)):
            await self._pull(*each, may_end_short=may_end_short)
        assert not spares_hits or self._asked_for_hot() == before, f"{when}: a hit went upstream"

    async def is_well(self, when: str) -> None:
        """Without a restart: the next image is kept, nothing is promised to nobody, and the count is right."""
        number, other = next(self._others)
        await self._pull(number, other)
        n_before = len(self._registry.requests)
        await self._pull(number, other)
        assert len(self._registry.requests) == n_before, f"{when}: what is new is not kept again"
        eventually(lambda: self.status()["state"] == "ok", f"{when}: well again", 20)
        eventually(lambda: self.status()["reserved_bytes"] == 0, f"{when}: nothing reserved", 20)
        report = await asyncio.to_thread(self._verify)
        assert report["is_well"], f"{when}: {report}"
        lies = [path.name for path in self._blobs() if _lies(path)]
        assert not lies, f"{when}: {lies}"

    async def _pull(self, number: int, image: Image, *, may_end_short: bool = False) -> None:
        await self._get(f"manifests/{number}", image.body, may_end_short)
        await self._get(f"manifests/{image.digest}", image.body, may_end_short)
        for blob in image.blobs:
            await self._get(f"blobs/{blob.digest}", blob.content, may_end_short)

    async def _get(self, path: str, content: bytes, may_end_short: bool) -> None:
        answer = await ask(self.process.port, f"/v2/{REPOSITORY}/{path}")
        self.n_answers += 1
        said = f"{path}: {answer.status} {answer.end} {answer.body[:300]!r}"
        assert answer.status == 200, said
        if answer.end == "whole":
            assert answer.body == content, f"{path}: a wrong body"
        else:
            assert may_end_short and content.startswith(answer.body), said

    def _asked_for_hot(self) -> int:
        wanted = {self._hot.digest, *(blob.digest for blob in self._hot.blobs)}
        return sum(request.path.rpartition("/")[2] in wanted for request in self._registry.requests)

    def status(self) -> dict[str, Any]:
        """What the server says of its store."""
        found: dict[str, Any] = self.process.admin("/api/v1/status")["store"]
        return found

    def _verify(self) -> dict[str, Any]:
        return verified(self.process)

    def _blobs(self) -> Iterator[Path]:
        return (self.process.store / "breakwater" / "blobs").glob("*/*/*")


def verified(process: Breakwater) -> dict[str, Any]:
    """What `breakwater verify` would print, without the second or so that a command takes to start."""
    token = (process.store / "breakwater" / "admin-token").read_text().strip()
    connection = http.client.HTTPConnection("127.0.0.1", process.admin_port, timeout=60)
    try:
        asked = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        connection.request("POST", "/api/v1/verify", b"", asked)
        report: dict[str, Any] = json.loads(connection.getresponse().read().splitlines()[-1])
    finally:
        connection.close()
    assert report.get("event") == "report", report
    return report


def _lies(path: Path) -> bool:
    try:
        return hashlib.new(path.parts[-3], path.read_bytes()).hexdigest() != path.name
    except FileNotFoundError:
        return False  # evicted meanwhile


@asynccontextmanager
async def failing(scratch: Path, store: Path | None = None) -> AsyncIterator[Failing]:
    """A server that runs, before a registry."""
    async with ScriptedRegistry() as registry:
        made = Failing(scratch, registry, store)
        try:
            await made.start()
            yield made
        finally:
            made.process.close()


async def run_all(scratch: Path, only: list[str], *, in_a_start: bool) -> bool:
    """Every fault, a line for each. Whether all was well."""
    n_wrong = n_rounds = n_answers = 0
    every = faults_of_a_start() if in_a_start else faults()
    for n, fault in enumerate(each for each in every if all(word in str(each) for word in only)):
        (scratch / str(n)).mkdir()
        async with failing(scratch / str(n)) as made:
            try:
                n_calls = await (made.starts(fault) if in_a_start else made.rounds(fault))
                print(f"{n_calls:4}  {fault}", flush=True)
            except AssertionError as error:
                n_wrong += 1
                print(f"WRONG {error}", flush=True)
            n_rounds, n_answers = n_rounds + made.n_rounds, n_answers + made.n_answers
    print(f"{n_rounds} rounds, {n_answers} answers, {n_wrong} faults that were not borne")
    return not n_wrong


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[], help="only faults with all of these words, as they are printed"
    )
    parser.add_argument("--starts", action="store_true", help="faults in a start instead of faults while it runs")
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="failing-"))
    try:
        is_well = asyncio.run(run_all(scratch, asked.only, in_a_start=asked.starts))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
