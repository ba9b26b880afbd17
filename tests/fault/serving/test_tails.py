"""Bodies that are still becoming: readers follow the frontier, and end short when it will not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from proxy.errors import Unreachable
from proxy.oci.ranges import Range
from proxy.ports import BlobSource
from proxy.web.serve import Part
from proxy.web.server import Limits
from tests.support.serving import PATTERN, GrowingFile, connected, get, head_of, port, reset

STEP = 100_003
FAILURE = Unreachable("upstream went away", upstream="registry.example")


@pytest.fixture(params=[None, 300_000, 0], ids=["in a file", "file, then memory", "in memory"])
async def growing(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GrowingFile]:
    tail = GrowingFile(tmp_path / "ingest", len(PATTERN), in_file_up_to=request.param)
    yield tail
    tail.close()


def following(tail: GrowingFile) -> Callable[[web.BaseRequest], tuple[BlobSource, Sequence[Part]]]:
    """Serve the part `/start-end` of the tail that the request names."""

    def what(request: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        start, _, end = request.path.strip("/").partition("-")
        return tail, (Range(int(start or 0), int(end or tail.size)),)

    return what


async def test_readers_that_start_anywhere_get_their_bytes_as_they_come(growing: GrowingFile) -> None:
    """Before, at and behind the frontier; each gets what is there before the rest has come."""
    starts = [0, 1, STEP - 1, STEP, STEP + 1, 3 * STEP, len(PATTERN) - 1]

    async def read(start: int) -> None:
        async with connected(served.address) as (reader, writer):
            writer.write(get(f"/{start}-"))
            assert await head_of(reader) == (200, len(PATTERN) - start)
            if start < STEP:  # all of the first step has come, and no more of it
                assert await reader.readexactly(STEP - start) == PATTERN[start:STEP]
                start = STEP
            has_first_bytes.release()
            assert await reader.readexactly(len(PATTERN) - start) == PATTERN[start:]

    has_first_bytes = asyncio.Semaphore(0)
    await growing.grow(STEP)
    async with port(following(growing)) as served, asyncio.TaskGroup() as readers:
        for start in starts:
            readers.create_task(read(start))
        for _ in starts:
            await has_first_bytes.acquire()
        while growing.frontier < growing.size:
            await growing.grow(STEP)
            await asyncio.sleep(0)
    await served.quiet()
    assert growing.n_left == len(starts)


@pytest.mark.parametrize("pipelined", [0, 3, 50_000], ids=["alone", "with requests behind", "with more than are read"])
async def test_a_failed_transfer_ends_short_with_fin_and_never_rst(growing: GrowingFile, pipelined: int) -> None:
    """INV-3: no clean end; and no RST, after which containerd would give up the pull instead of resuming it.

    Requests that wait behind the body are unread input, which would turn a plain close into RST.
    """
    async with port(following(growing)) as served, connected(served.address) as (reader, writer):
        writer.write(get("/") + get("/") * pipelined)
        assert await head_of(reader) == (200, len(PATTERN))
        await growing.grow(STEP)
        await growing.waiting.wait()
        await growing.fail(FAILURE)
        assert await reader.read(-1) == PATTERN[:STEP]
        writer.write(get("/"))  # into a connection that has ended: forgotten, not answered
        await served.quiet()
        assert served.failures == [FAILURE]
        assert growing.n_left == 1


async def test_a_reader_that_waits_is_released_when_its_client_resets(growing: GrowingFile) -> None:
    """Nothing is sent, so only the server can notice; the transfer loses one reader and goes on."""
    async with port(following(growing)) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        await head_of(reader)
        await growing.waiting.wait()
        reset(writer)
        await served.quiet()
        assert (served.n_cancelled, growing.n_left, growing.n_waiting) == (1, 1, 0)


async def test_a_reader_that_waits_is_released_soon_after_its_client_closes(growing: GrowingFile) -> None:
    """FIN alone does not tell a client that left from one that listens on: while nothing moves, it is given a while."""
    async with port(following(growing), limits=Limits(half_closed_s=0.05)) as served:
        async with connected(served.address) as (reader, writer):
            writer.write(get())
            await head_of(reader)
            await growing.waiting.wait()
        await served.quiet()
        assert (served.n_cancelled, growing.n_left) == (1, 1)


async def test_a_half_closed_reader_that_waits_gets_what_comes(growing: GrowingFile) -> None:
    """FIN after the request, bytes from upstream after the FIN: the answer arrives whole."""
    async with port(following(growing)) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        writer.write_eof()
        await head_of(reader)
        await growing.waiting.wait()
        while growing.frontier < growing.size:
            await growing.grow(STEP)
            await asyncio.sleep(0)
        assert await reader.read(-1) == PATTERN


async def test_headers_leave_before_the_first_byte_has_come(growing: GrowingFile) -> None:
    """Clients wait 30 s for headers, and longer for a body that has begun."""
    async with port(following(growing)) as served, connected(served.address) as (reader, writer):
        writer.write(get("/5-10"))
        assert await head_of(reader) == (200, 5)
        await growing.grow(10)
        assert await reader.readexactly(5) == PATTERN[5:10]
