"""Files onto sockets: every byte, in order, whatever the client does."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from proxy.oci.ranges import Range
from proxy.ports import BlobSource, LocalFile
from proxy.web.lanes import TURN_BYTES, Disk
from proxy.web.serve import (
    FEW,
    NEAR_BUFFER_BYTES,
    NEAR_BUFFER_BYTES_OF_FEW,
    PIECE_BYTES,
    SMALL_BYTES,
    Pace,
    Part,
    ReadFailed,
    Sender,
    send_buffer_of,
)
from proxy.web.server import Limits
from tests.support.clock import ManualClock
from tests.support.serving import (
    PATTERN,
    FileBlob,
    body_of,
    connected,
    get,
    head_of,
    listening,
    none_left,
    port,
    reset,
    whole,
)

EDGES = sorted(
    {0, 1} | {edge + by for edge in (SMALL_BYTES, PIECE_BYTES, TURN_BYTES, 4 * TURN_BYTES) for by in (-1, 0, 1)}
)
SEED = 20261122


class Cold(Disk):
    """A disk that has nothing in memory, and says when it was read from a thread."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def read_resident(self, fd: int, offset: int, n_bytes: int) -> bytes | None:
        return None

    def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        self.threads.add(threading.current_thread().name)
        return super().read(fd, offset, n_bytes)

    def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        self.threads.add(threading.current_thread().name)
        return super().sendfile_cold(out, fd, offset, n_bytes)


class Unsendable(Disk):
    """A file system that has no sendfile."""

    def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture(params=[Disk, Cold, Unsendable], ids=["resident", "cold", "no sendfile"])
def disk(request: pytest.FixtureRequest) -> Disk:
    made: Disk = request.param()
    return made


@pytest.mark.parametrize("size", EDGES)
async def test_a_body_of_any_size_arrives_whole(tmp_path: Path, disk: Disk, size: int) -> None:
    """Sizes at the edges of every step: nothing, one byte, and each threshold ± 1; twice on one connection."""
    path = tmp_path / "blob"
    wanted = (PATTERN * 5)[:size]
    path.write_bytes(wanted)
    async with port(whole(path), disk=disk) as served, connected(served.address) as (reader, writer):
        for _ in range(2):
            writer.write(get())
            assert await body_of(reader) == wanted
        await served.quiet()
        assert [sent.ending for sent in served.sent] == ["whole", "whole"]


async def test_random_ranges_are_the_bytes_of_the_file(blob: Path) -> None:
    """1,000 ranges, many connections, requests pipelined eight at a time."""
    chance = random.Random(SEED)
    ranges = [sorted(chance.sample(range(len(PATTERN) + 1), 2)) for _ in range(1000)]

    async def ask(some: Sequence[Sequence[int]]) -> None:
        async with connected(served.address) as (reader, writer):
            for start in range(0, len(some), 8):
                batch = some[start : start + 8]
                writer.write(b"".join(get(f"/{first}-{last}") for first, last in batch))
                for first, last in batch:
                    assert await body_of(reader) == PATTERN[first:last]

    async with port(whole(blob)) as served:
        await asyncio.gather(*(ask(ranges[n::6]) for n in range(6)))


async def test_parts_of_memory_and_of_the_file_arrive_in_order(blob: Path, disk: Disk) -> None:
    """A multipart body: literal bytes and ranges by turns, backwards too."""
    parts: list[Part] = [
        b"first", Range(500_000, 900_000), b"second" * 1000, Range(0, 1), b"", Range(1, 200_000), b"last",
    ]  # fmt: skip
    wanted = b"".join(part if isinstance(part, bytes) else PATTERN[part.start : part.end] for part in parts)

    def what(_: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        return LocalFile(FileBlob(blob)), parts

    async with port(what, disk=disk) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        assert await body_of(reader) == wanted


async def test_what_the_transport_still_holds_goes_before_the_file(blob: Path) -> None:
    """A client that reads slowly leaves literal bytes in the transport; a range that follows must not overtake them."""
    parts: list[Part] = []
    for n in range(12):
        parts += [Range(n * 50_000, n * 50_000 + 50_000), b"%05d" % n * 10_000]
    wanted = b"".join(part if isinstance(part, bytes) else PATTERN[part.start : part.end] for part in parts)

    def what(_: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        return LocalFile(FileBlob(blob)), parts

    async with (
        port(what, limits=Limits(send_buffer_bytes=8 << 10)) as served,
        connected(served.address, receive_buffer=4 << 10) as (reader, writer),
    ):
        writer.write(get())
        assert await body_of(reader) == wanted


@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=(pytest.mark.soak, pytest.mark.timeout(900)))])
async def test_aborts_at_random_offsets_leave_nothing_and_harm_nobody(blob: Path, n: int) -> None:
    """Clients leave in the middle, by FIN or RST, beside others that must get exactly their own bytes all the while.

    That no descriptor and no task is left is checked for every test.
    """
    chance = random.Random(SEED)
    n_left = 0

    async def abort(after: int, by_reset: bool) -> None:
        nonlocal n_left
        async with connected(served.address, receive_buffer=16 << 10) as (reader, writer):
            writer.write(get())
            await head_of(reader)
            await reader.readexactly(after)
            if by_reset:
                reset(writer)
        n_left += 1

    async def leave(times: int) -> None:
        for _ in range(times):
            await abort(chance.randrange(len(PATTERN) // 8), chance.random() < 0.5)

    async def stay(start: int) -> None:
        async with connected(served.address) as (reader, writer):
            while n_left < n:
                writer.write(get(f"/{start}-"))
                assert await body_of(reader) == PATTERN[start:]

    async with port(whole(blob)) as served:
        await asyncio.gather(stay(1), stay(77_777), *(leave(n // 8) for _ in range(8)))
        await served.quiet()
        assert n_left == n
        assert all(sent.n_bytes <= len(PATTERN) for sent in served.sent)


async def test_a_client_that_closes_its_sending_half_gets_its_whole_answer(blob: Path) -> None:
    """RFC 9112 §9.6: FIN after the request is no abort. Then the connection ends."""
    async with port(whole(blob)) as served, connected(served.address, receive_buffer=16 << 10) as (reader, writer):
        writer.write(get() + get("/5-500000"))
        writer.write_eof()
        assert await body_of(reader) == PATTERN
        assert await body_of(reader) == PATTERN[5:500_000]
        assert await reader.read() == b""


async def test_a_half_closed_client_that_reads_slowly_is_not_taken_for_gone(blob: Path) -> None:
    """While the kernel still holds bytes for it, it is being served, whatever the half-close deadline says."""
    limits = Limits(
        half_closed_s=0.05
    )  # passes several times while this is read, and is longer than a lane ever sleeps
    async with (
        port(whole(blob), limits=limits) as served,
        connected(served.address, receive_buffer=4 << 10) as (reader, writer),
    ):
        writer.write(get())
        writer.write_eof()
        _, length = await head_of(reader)
        got = bytearray()
        while len(got) < length:
            got += await reader.readexactly(min(4096, length - len(got)))
            await asyncio.sleep(0.002)  # how slowly it reads
        assert got == PATTERN


async def test_bodies_take_turns_and_none_of_them_on_the_loop(tmp_path: Path) -> None:
    """However many can be written to: what is sent at once is bounded, and never sent by the loop's own thread."""
    path = tmp_path / "blob"
    path.write_bytes(PATTERN * 4)
    sent: list[tuple[str, int]] = []

    class Watched(Disk):
        def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            sent.append((threading.current_thread().name, n := super().sendfile(out, fd, offset, n_bytes)))
            return n

    async def read() -> None:
        async with connected(served.address, receive_buffer=4 << 20) as (reader, writer):
            writer.write(get())
            assert len(await body_of(reader)) == 4 * len(PATTERN)

    async with port(whole(path), disk=Watched(), limits=Limits(send_buffer_bytes=4 << 20)) as served:
        await asyncio.gather(*(read() for _ in range(12)))
        await served.quiet()
    assert {name for name, _ in sent} == {"lane"}
    assert max(n for _, n in sent) <= TURN_BYTES
    assert sum(n for _, n in sent) == 12 * 4 * len(PATTERN)


async def test_a_stalled_reader_is_cut_once_it_is_below_the_pace(blob: Path) -> None:
    """No bytes for a whole window: the connection is reset and everything it held is given back."""
    clock = ManualClock()
    async with (
        port(whole(blob), clock=clock, pace=Pace(10_000, 60.0), limits=Limits(send_buffer_bytes=16 << 10)) as served,
        connected(served.address, receive_buffer=4 << 10) as (reader, writer),
    ):
        writer.write(get())
        await head_of(reader)
        n_before = -1
        while n_before != (n_before := reader._buffer.__len__()):  # type: ignore[attr-defined]  # until it takes no more
            for _ in range(50):
                await asyncio.sleep(0)
        served.sender.sweep()
        await clock.advance(59)
        served.sender.sweep()
        assert len(served.sender) == 1
        for _ in range(3):  # a sweep that sees progress starts a new window
            await clock.advance(61)
            served.sender.sweep()
            for _ in range(20):
                await asyncio.sleep(0)
        await served.quiet()
        assert [sent.ending for sent in served.sent] == ["slow"]
        with pytest.raises(ConnectionResetError):
            while await reader.read(1 << 16):
                pass


async def test_cold_windows_are_sent_by_worker_threads_while_the_loop_turns(blob: Path) -> None:
    """A disk that takes its time holds up its own reader and nobody else."""
    released = threading.Event()

    class Stuck(Cold):
        def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            assert released.wait(30)
            return super().sendfile_cold(out, fd, offset, n_bytes)

    stuck = Stuck()
    async with port(whole(blob), disk=stuck) as slow, port(whole(blob)) as fast:
        async with connected(slow.address) as (reader, writer):
            writer.write(get())
            assert await head_of(reader) == (200, len(PATTERN))
            async with connected(fast.address) as (other, asking):
                asking.write(get())
                assert await body_of(other) == PATTERN
            assert not slow.sent
            released.set()
            assert await reader.readexactly(len(PATTERN)) == PATTERN
    assert stuck.threads and all(name.startswith("read") for name in stuck.threads)


async def test_a_file_dropped_from_memory_is_cold_and_arrives_whole(blob: Path) -> None:
    """The real question to the real kernel: nothing of it is in memory, so a worker thread goes first."""
    threads: set[str] = set()

    class Watched(Disk):
        def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            threads.add(threading.current_thread().name)
            return super().sendfile_cold(out, fd, offset, n_bytes)

    fd = os.open(blob, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    async with port(whole(blob), disk=Watched()) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        assert await body_of(reader) == PATTERN
    assert threads


async def test_ranges_beyond_four_gigabytes_are_the_right_ones(tmp_path: Path, disk: Disk) -> None:
    """Offsets do not wrap, in a sparse file with marks at the edges of 31 and 32 bits."""
    path = tmp_path / "blob"
    edges = (1 << 31, 1 << 32)
    with path.open("wb") as file:
        file.truncate((1 << 32) + 1000)
        for edge in edges:
            file.seek(edge - 100)
            file.write(PATTERN[edge % 977 : edge % 977 + 200])
    async with port(whole(path), disk=disk) as served, connected(served.address) as (reader, writer):
        for edge in edges:
            writer.write(get(f"/{edge - 100_100}-{edge + 100}"))
            assert await body_of(reader) == bytes(100_000) + PATTERN[edge % 977 : edge % 977 + 200]


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_whole_body_of_more_than_four_gigabytes_arrives(tmp_path: Path) -> None:
    """Sparse, with marks at the edges; every byte that is not a mark is zero, and none is missing."""
    path = tmp_path / "blob"
    size = (1 << 32) + (1 << 20) + 1
    wanted = hashlib.sha256()
    with path.open("wb") as file:
        file.truncate(size)
        for edge in (1 << 31, 1 << 32):
            file.seek(edge - 100)
            file.write(PATTERN[:200])
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            wanted.update(piece)
    found = hashlib.sha256()
    async with port(whole(path)) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        assert await head_of(reader) == (200, size)
        n_missing = size
        while n_missing:
            piece = await reader.read(1 << 20)
            assert piece
            found.update(piece)
            n_missing -= len(piece)
    assert found.digest() == wanted.digest()


async def test_a_client_that_leaves_during_a_cold_read_frees_its_descriptors_after_it(blob: Path) -> None:
    """A worker thread holds descriptors: they are closed when it is done, never beneath it."""
    started, released = threading.Event(), threading.Event()
    blobs: list[FileBlob] = []

    class Stuck(Cold):
        def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            started.set()
            assert released.wait(30)
            os.fstat(out)
            os.fstat(fd)
            return super().sendfile_cold(out, fd, offset, n_bytes)

    def what(_: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        blobs.append(FileBlob(blob))
        return LocalFile(blobs[-1]), (Range(0, len(PATTERN)),)

    async with port(what, disk=Stuck()) as served:
        async with connected(served.address) as (reader, writer):
            writer.write(get())
            await head_of(reader)
            while not started.is_set():
                await asyncio.sleep(0)
            reset(writer)
        for _ in range(20):
            await asyncio.sleep(0)
        assert blobs[0].fd >= 0
        released.set()
        await served.quiet()
        assert blobs[0].fd == -1


class Failing(Disk):
    """A disk that fails beyond an offset."""

    def __init__(self, beyond: int, *, is_resident: bool) -> None:
        self._beyond = beyond
        self._is_resident = is_resident

    def read_resident(self, fd: int, offset: int, n_bytes: int) -> bytes | None:
        return super().read_resident(fd, offset, n_bytes) if self._is_resident else None

    def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        if offset >= self._beyond:
            raise OSError(errno.EIO, "Input/output error")
        return super().sendfile(out, fd, offset, min(n_bytes, self._beyond - offset))


@pytest.mark.parametrize("is_resident", [True, False], ids=["on a lane", "in a thread"])
async def test_a_disk_that_fails_halfway_says_what_is_left_to_send(blob: Path, is_resident: bool) -> None:
    """EIO in the middle: the rest can be sent from elsewhere, and the client sees one body."""
    failing = Sender(ManualClock(), disk=Failing(300_000, is_resident=is_resident))
    good = Sender(ManualClock())
    failures: list[ReadFailed] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(PATTERN) + 4)})
        try:
            await failing.send(request, response, LocalFile(FileBlob(blob)), (b"head", Range(0, len(PATTERN))))
        except ReadFailed as failed:
            failures.append(failed)
            await good.send(request, response, LocalFile(FileBlob(blob)), failed.rest)
        return response

    async with listening(answer) as address, connected(address) as (reader, writer):
        writer.write(get())
        assert await body_of(reader) == b"head" + PATTERN
    failing.close()
    good.close()
    assert [(failed.rest, failed.is_short) for failed in failures] == [((Range(300_000, len(PATTERN)),), False)]


async def test_without_descriptors_for_a_lane_the_body_is_copied(blob: Path) -> None:
    """The last descriptor is the body's own; a body that has begun is not broken for want of more."""
    sender = Sender(ManualClock())

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(PATTERN))})
        source = LocalFile(FileBlob(blob))
        with none_left(1):
            await sender.send(request, response, source, (Range(0, len(PATTERN)),))
        return response

    async with listening(answer) as address, connected(address) as (reader, writer):
        writer.write(get())
        assert await body_of(reader) == PATTERN
    sender.close()


async def test_a_file_shorter_than_its_blob_ends_the_body_short(blob: Path, disk: Disk) -> None:
    """Promise 2: never padded, never a clean end; with FIN, so that a client resumes."""

    def what(_: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        return LocalFile(FileBlob(blob, len(PATTERN) + 1)), (Range(0, len(PATTERN) + 1),)

    async with port(what, disk=disk) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        assert await head_of(reader) == (200, len(PATTERN) + 1)
        assert await reader.read(-1) == PATTERN
        await served.quiet()
        (failure,) = served.failures
        assert isinstance(failure, ReadFailed) and failure.is_short


@pytest.fixture
def certificates() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


async def test_over_tls_the_same_bytes_arrive(
    blob: Path, disk: Disk, certificates: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """No sendfile beneath TLS: the copying path, with the same promises."""
    ours, theirs = certificates
    async with (
        port(whole(blob), tls=ours, disk=disk) as served,
        connected(served.address, tls=theirs) as (reader, writer),
    ):
        for path, wanted in (("/", PATTERN), ("/7-70", PATTERN[7:70]), ("/1-1000000", PATTERN[1:1_000_000])):
            writer.write(get(path))
            assert await body_of(reader) == wanted


async def test_a_tls_client_that_leaves_frees_everything(
    blob: Path, certificates: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """As over TCP: by RST in the middle of a body."""
    ours, theirs = certificates
    async with port(whole(blob), tls=ours) as served:
        for _ in range(10):
            async with connected(served.address, tls=theirs, receive_buffer=8 << 10) as (reader, writer):
                writer.write(get())
                await head_of(reader)
                await reader.readexactly(1000)
                reset(writer)
        await served.quiet()


@pytest.mark.parametrize(
    ("peer", "n_bodies", "bound"),
    [
        (("127.0.0.1", 5), 1, NEAR_BUFFER_BYTES_OF_FEW),
        (("127.9.9.9", 5), FEW, NEAR_BUFFER_BYTES_OF_FEW),
        (("127.0.0.1", 5), FEW + 1, NEAR_BUFFER_BYTES),
        (("::1", 5, 0, 0), 64, NEAR_BUFFER_BYTES),
        (("::ffff:127.0.0.1", 5, 0, 0), 64, NEAR_BUFFER_BYTES),
        (("10.0.0.7", 5), 1, None),
        (("fe80::1", 5, 0, 3), 64, None),
        ("", 1, None),
        (None, 1, None),
    ],
    ids=lambda value: repr(value),
)
def test_little_waits_in_the_kernel_for_clients_on_this_machine(peer: object, n_bodies: int, bound: int | None) -> None:
    """Elsewhere a round trip must be bridged: those keep what their listener gave them, and so does a Unix socket."""
    assert send_buffer_of(peer, n_bodies) == bound


async def test_a_body_for_a_client_on_this_machine_sets_its_send_buffer(blob: Path) -> None:
    """The bound is the connection's own, while its body is sent."""
    seen: list[int] = []

    class Watched(Disk):
        def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            with socket.socket(fileno=os.dup(out)) as connection:
                seen.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
            return super().sendfile(out, fd, offset, n_bytes)

    async with port(whole(blob), disk=Watched()) as served, connected(served.address) as (reader, writer):
        writer.write(get())
        _, length = await head_of(reader)
        assert await reader.readexactly(length) == PATTERN
    assert set(seen) == {2 * NEAR_BUFFER_BYTES_OF_FEW}, "Linux counts twice what was asked for"
