"""A data port with one thing to serve, and clients that do not know HTTP better than they must."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from aiohttp import web

from proxy.errors import BreakwaterError
from proxy.oci.digest import Verifier
from proxy.oci.ranges import Range
from proxy.ports import BlobSource, FileIdentity, LocalFile
from proxy.web.lanes import Disk
from proxy.web.serve import Pace, Part, Sender, Sent
from proxy.web.server import DataServer, Limits
from tests.support.clock import ManualClock

#: Not a multiple of anything, and different at every offset.
PATTERN = b"".join(struct.pack(">I", n) for n in range(1 << 18))


class FileBlob:
    """An OpenBlob on a file, which counts how often it was closed."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size if size is None else size
        self.identity = FileIdentity(0, self.size, 0)

    async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
        raise AssertionError("sent from, never read")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class GrowingFile:
    """A Tail that the test fills: `grow` appends and moves the frontier, `fail` ends it."""

    def __init__(self, path: Path, size: int, *, in_file_up_to: int | None = None) -> None:
        self._out = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._limit = size if in_file_up_to is None else in_file_up_to
        self._ring = bytearray()
        self.fd = self._out
        self.size = size
        self.frontier = 0
        self.failure: BreakwaterError | None = None
        self.n_waiting = 0
        self.n_left = 0
        self._changed = asyncio.Condition()
        self.waiting = asyncio.Event()

    @property
    def in_file(self) -> int:
        return min(self.frontier, self._limit)

    async def grow(self, n_bytes: int) -> None:
        piece = PATTERN[self.frontier : self.frontier + n_bytes]
        os.pwrite(self._out, piece[: max(0, self._limit - self.frontier)], self.frontier)
        self._ring += piece
        async with self._changed:
            self.frontier += len(piece)
            self.waiting.clear()
            self._changed.notify_all()

    async def fail(self, failure: BreakwaterError) -> None:
        async with self._changed:
            self.failure = failure
            self._changed.notify_all()

    async def beyond(self, offset: int) -> int:
        async with self._changed:
            while self.frontier <= offset:
                if self.failure is not None:
                    raise self.failure
                self.n_waiting += 1
                self.waiting.set()
                try:
                    await self._changed.wait()
                finally:
                    self.n_waiting -= 1
        return self.frontier

    def piece(self, offset: int, limit: int) -> bytes:
        assert self.in_file <= offset < self.frontier
        return bytes(self._ring[offset : min(offset + limit, self.frontier)])

    def leave(self) -> None:
        self.n_left += 1

    def close(self) -> None:
        os.close(self._out)


class Port:
    """A data port that answers every request with `what(request)`: a source and parts of it."""

    def __init__(self, what: Callable[[web.BaseRequest], tuple[BlobSource, Sequence[Part]]], sender: Sender) -> None:
        self._what = what
        self.sender = sender
        self.sent: list[Sent] = []
        self.failures: list[BreakwaterError] = []
        self.n_cancelled = 0
        self.n_running = 0
        self.server: DataServer

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.addresses[0].rpartition(":")
        return host, int(port)

    async def quiet(self) -> None:
        """Wait until no body is on its way and every handler has said how its body ended."""
        while len(self.sender) or self.n_running:
            await asyncio.sleep(0)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        source, parts = self._what(request)
        length = sum(part.length if isinstance(part, Range) else len(part) for part in parts)
        response = web.StreamResponse(headers={"Content-Length": str(length)})
        self.n_running += 1
        try:
            self.sent.append(await self.sender.send(request, response, source, parts))
        except BreakwaterError as failure:
            self.failures.append(failure)
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        finally:
            self.n_running -= 1
        return response


@asynccontextmanager
async def port(
    what: Callable[[web.BaseRequest], tuple[BlobSource, Sequence[Part]]],
    *,
    limits: Limits | None = None,
    pace: Pace | None = None,
    disk: Disk | None = None,
    clock: ManualClock | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Port]:
    """A running data port on loopback; at the end it must close without having to cut anything."""
    sender = Sender(clock or ManualClock(), pace=pace or Pace(), disk=disk, n_threads=2)
    running = Port(what, sender)
    running.server = DataServer(running.answer, log=logging.getLogger("test.data"), limits=limits, tls=tls)
    await running.server.start(["127.0.0.1:0"])
    try:
        yield running
    finally:
        await running.server.aclose(5.0)
        sender.close()
        assert len(sender) == 0
        assert running.server.n_connections == 0


@asynccontextmanager
async def listening(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], limits: Limits | None = None
) -> AsyncIterator[tuple[str, int]]:
    """A data port with a handler of the test's own."""
    server = DataServer(handler, log=logging.getLogger("test.data"), limits=limits)
    await server.start(["127.0.0.1:0"])
    try:
        host, _, port = server.addresses[0].rpartition(":")
        yield host, int(port)
    finally:
        await server.aclose(0.0)


def none_left(n_free: int = 0) -> ExitStack:
    """Every descriptor that this process may have is taken, but for `n_free`; until it is closed."""
    held = ExitStack()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]

    def give_back() -> None:
        for fd in taken:
            os.close(fd)

    held.callback(give_back)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 4, before[1]))
    held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
    with suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(n_free):
        os.close(taken.pop())
    return held


def whole(path: Path) -> Callable[[web.BaseRequest], tuple[BlobSource, Sequence[Part]]]:
    """Serve the file at `path`, or the part `/start-end` of it that the request's path names."""

    def what(request: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        blob = FileBlob(path)
        start, _, end = request.path.strip("/").partition("-")
        asked = Range(int(start or 0), int(end or blob.size))
        return LocalFile(blob), (asked,) if asked.length else ()

    return what


@asynccontextmanager
async def connected(
    address: tuple[str, int], *, receive_buffer: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A plain connection, closed at the end however it fared."""
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(raw, address)
    except OSError:
        raw.close()
        raise
    reader, writer = await asyncio.open_connection(
        sock=raw, limit=1 << 16, ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass  # the other side was faster


def get(path: str = "/", *, more: str = "") -> bytes:
    """A request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()


async def head_of(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Read a response's head: its status and Content-Length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        (int(line.partition(":")[2]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
    )
    return int(head.split()[1]), length


async def body_of(reader: asyncio.StreamReader) -> bytes:
    """Read a response that must be a whole 200."""
    status, length = await head_of(reader)
    assert status == 200
    return await reader.readexactly(length)


def reset(writer: asyncio.StreamWriter) -> None:
    """Let the connection go with RST, as a killed client with unread bytes does."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
