"""A body onto a connection: from a file without copying it, from a growing file as it grows, or from memory.

One `Sender` for the data port; `send` is all that others need. It knows nothing of digests, upstreams or why a body is
sent. INV-3 is kept from this side by never sending beyond a tail's frontier, and by ending short, never cleanly, when
the tail fails.

How, and what was rejected:

- Plain TCP and unix sockets: `os.sendfile` onto a duplicate of the connection's descriptor, on threads of their own
  (web/lanes.py), at most `TURN_BYTES` a turn. uvloop has no `loop.sendfile`; `web.FileResponse` then copies through
  threads (1.5-2.0 GB/s against 3.4-5.9). The duplicate is ours, so its number cannot become another connection's while
  we hold it, and we hold it until the lane has let go; the transport has written everything before and writes nothing
  meanwhile, so bytes never interleave.
- aiofastnet's `sendfile` was measured beside it and not taken (bench/README.md). Speed did not decide: it had 0.4 to
  1.2 of our GB/s at 64 clients, run by run. But an error of the disk ends its connection without saying how far it
  came, so that no body could be continued from upstream, and a file that ends early looks like a whole one.
- sendfile of a page that is not in memory waits for the disk. So each window is asked for first (`RWF_NOWAIT` on its
  ends), and a cold one is sent from a worker thread, which also has the kernel read ahead: a lane is for many, and may
  wait as little as the loop. A file system that cannot be asked (EOPNOTSUPP) counts as cold.
- TLS, or no descriptor to spare: pieces are read and written through the transport, with sensible watermarks (uvloop's
  own low-water mark is 16 bytes).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from proxy.errors import Unavailable
from proxy.oci.ranges import Range
from proxy.ports import BlobSource, Clock, LocalFile, Tail
from proxy.web.lanes import TURN_BYTES, Disk, Lanes, Splice

T = TypeVar("T")

#: The step of the copying path. Smaller costs hops, larger costs memory for every stalled TLS reader.
PIECE_BYTES = 256 << 10
#: Up to this size a body travels with its headers in one write; a duplicate and a sendfile would cost more.
SMALL_BYTES = 64 << 10
#: What may wait in the kernel for a client on this machine, in bytes, as SO_SNDBUF counts it: less than for those on a wire,
#: who have a round trip to bridge. Here it bridges nothing and costs both sides their caches; beside few others a little
#: more saves wake-ups (docs/performance.md has sizes and clients). Three: a kubelet's containerd asks for three layers.
NEAR_BUFFER_BYTES, NEAR_BUFFER_BYTES_OF_FEW, FEW = 64 << 10, 128 << 10, 3

#: What a socket says when the peer, or the way to it, is gone. Everything else sendfile says is about the file.
_PEER_ERRNOS = frozenset(
    {errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
)
#: File systems that cannot splice say one of these.
_NO_SENDFILE_ERRNOS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

Part = bytes | Range


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest reader that is kept: fewer than this many bytes/s over `window_s` seconds ends the connection.

    Time in which we had nothing to send does not count. The defaults cut a reader that takes hours for a layer while
    sparing a phone line.
    """

    min_bytes_per_s: int = 10_000
    window_s: float = 60.0


DEFAULT_PACE = Pace()


@dataclass(frozen=True, slots=True)
class Sent:
    """How far a body came. `gone`: the client went away; `slow`: it was cut for being too slow."""

    n_bytes: int
    ending: Literal["whole", "gone", "slow"]


class ReadFailed(Unavailable):
    """The file could not be read on. `rest` is what of the body has not left yet; `send` may be called again with it.

    `is_short`: the file ended before its size, so its bytes are not what its name says.
    """

    def __init__(self, sentence: str, *, rest: Sequence[Part], is_short: bool) -> None:
        super().__init__(sentence)
        self.rest = rest
        self.is_short = is_short


class Sender:
    """Sends bodies, and knows every body on its way so that too slow readers can be cut."""

    def __init__(
        self,
        clock: Clock,
        *,
        pace: Pace = DEFAULT_PACE,
        n_threads: int = 8,
        n_lanes: int | None = None,
        disk: Disk | None = None,
    ) -> None:
        """`n_threads` workers wait for the disk, so that nobody else does; at most `n_lanes` send what is in memory."""
        self._clock = clock
        self._pace = pace
        self._disk = disk or Disk()
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="read")
        self._lanes = Lanes(n_lanes)
        self._bodies: set[_Body] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Bodies on their way now."""
        return len(self._bodies)

    async def send(
        self, request: web.BaseRequest, response: web.StreamResponse, source: BlobSource, parts: Sequence[Part]
    ) -> Sent:
        """Prepare `response` and send `parts` in order: literal bytes, or a range of `source`.

        The headers, Content-Length among them, are set already and go out at once. Not for HEAD. Afterwards, on every
        path, the source's blob is closed or its tail left, so the caller need not. Return the response from the handler
        as usual: a body that ended short has its connection closed (with FIN), never another answer behind it.

        A client that goes away, or is too slow, is no error: see `Sent`. Raises whatever the tail raised when the
        transfer fails, ReadFailed when the disk fails, and CancelledError when the server ends the connection.
        """
        try:
            return await self._send(request, response, source, parts)
        finally:
            if isinstance(source, LocalFile):
                source.blob.close()
            else:
                source.leave()

    def sweep(self) -> None:
        """Cut every reader below the pace. Runs by itself while bodies are on their way; public for manual clocks."""
        now = self._clock.monotonic()
        for body in tuple(self._bodies):
            if body.is_slow(now, self._pace):
                body.cut()

    def close(self) -> None:
        """Let the threads go. After the last body."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._threads.shutdown(wait=False)
        self._lanes.close()

    # -- one body ------------------------------------------------------------------------------------------------------

    async def _send(
        self, request: web.BaseRequest, response: web.StreamResponse, source: BlobSource, parts: Sequence[Part]
    ) -> Sent:
        writer = await response.prepare(request)
        transport = request.transport
        if writer is None or transport is None or transport.is_closing():
            response.force_close()
            return Sent(0, "gone")
        body = _Body(response, writer, transport, self._clock.monotonic())
        self._bodies.add(body)
        self._arm_sweep()
        try:
            small = self._small(source, parts)
            if small is not None:
                await body.write(small)
            else:
                body.open(send_buffer_of(transport.get_extra_info("peername"), len(self._bodies)))
                await self._send_parts(body, source, parts)
            return Sent(body.n_sent, "whole")
        except ConnectionError:
            return Sent(body.n_sent, "slow" if body.is_cut else "gone")
        except _FileFault as fault:
            rest = _remaining(parts, body.n_sent)
            raise ReadFailed(str(fault), rest=rest, is_short=fault.is_short) from fault
        finally:
            self._bodies.discard(body)
            body.close()
            if body.n_sent < sum(map(size_of, parts)):
                response.force_close()  # whatever the reason: nothing may follow a body that is short

    def _small(self, source: BlobSource, parts: Sequence[Part]) -> bytes | None:
        """The whole body, where it is small and at hand."""
        if not isinstance(source, LocalFile) or sum(map(size_of, parts)) > SMALL_BYTES:
            return None
        pieces = [
            part if isinstance(part, bytes) else self._disk.read_resident(source.blob.fd, part.start, size_of(part))
            for part in parts
        ]
        return b"".join(pieces) if None not in pieces else None  # type: ignore[arg-type]  # None is not in it

    async def _send_parts(self, body: _Body, source: BlobSource, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, bytes):
                await body.write(part)
            elif isinstance(source, LocalFile):
                await self._from_file(body, source.blob.fd, part.start, part.end)
            else:
                await self._from_tail(body, source, part.start, part.end)

    async def _from_tail(self, body: _Body, tail: Tail, offset: int, end: int) -> None:
        """Follow the frontier (INV-3): from the file as far as it goes, from memory beyond."""
        while offset < end:
            body.is_waiting = True
            try:
                reach = min(await tail.beyond(offset), end)
            finally:
                body.is_waiting = False
            body.mark(self._clock.monotonic())
            in_file = min(reach, tail.in_file)
            if offset < in_file:
                await self._from_file(body, tail.fd, offset, in_file)
                offset = in_file
            else:
                piece = tail.piece(offset, min(reach - offset, PIECE_BYTES))
                await body.write(piece)
                offset += len(piece)

    async def _from_file(self, body: _Body, fd: int, offset: int, end: int) -> None:
        if body.is_zero_copy:
            await body.drain()
        while offset < end and body.is_zero_copy:
            splice = self._lanes.begin(self._disk, body.out, fd, offset, end, body.sent)
            if splice is None:
                body.is_zero_copy = False  # the copying path needs no descriptor and no thread
                break
            offset = await body.splice(splice)
            if offset < end and body.is_zero_copy:
                offset += await self._send_cold(body, fd, offset, min(offset + TURN_BYTES, end))
        await self._copy(body, fd, offset, end)

    async def _send_cold(self, body: _Body, fd: int, offset: int, end: int) -> int:
        """Bytes sent by a worker thread, which may wait for the disk but never for the client."""
        try:
            n = await self._hop(body, self._disk.sendfile_cold, body.out, fd, offset, end - offset)
        except BlockingIOError:
            await body.writable()
            return 0
        except OSError as error:
            body.judge(error)
            return 0
        if n == 0:
            raise _FileFault(_SHORT, is_short=True)
        body.sent(n)
        return n

    async def _copy(self, body: _Body, fd: int, offset: int, end: int) -> None:
        while offset < end:
            n_bytes = min(PIECE_BYTES, end - offset)
            piece = self._disk.read_resident(fd, offset, n_bytes)
            if piece is None:
                try:
                    piece = await self._hop(body, self._disk.read, fd, offset, n_bytes)
                except OSError as error:
                    raise _FileFault(f"cannot read the file: {error}", is_short=False) from error
            if not piece:
                raise _FileFault(_SHORT, is_short=True)
            await body.write(piece)
            offset += len(piece)

    async def _hop(self, body: _Body, call: Callable[..., T], *args: int) -> T:
        """Run `call` in a worker thread. Returns, even when cancelled, only once it has ended: it holds descriptors."""
        hop = asyncio.wrap_future(self._threads.submit(call, *args))
        body.is_waiting = True
        try:
            return await asyncio.shield(hop)
        except asyncio.CancelledError:
            await _over(hop)
            if not hop.cancelled():
                hop.exception()  # looked at, so that nobody reports it as lost
            raise
        finally:
            body.is_waiting = False
            body.mark(self._clock.monotonic())

    def _arm_sweep(self) -> None:
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(self._pace.window_s / 4, self._on_sweep_timer)

    def _on_sweep_timer(self) -> None:
        self._sweep_timer = None
        self.sweep()
        if self._bodies:
            self._arm_sweep()


def send_buffer_of(peer: object, n_bodies: int) -> int | None:
    """SO_SNDBUF, in bytes, for a client at this address (a socket's peer name) while `n_bodies` are on their way, or None
    to leave what its listener gave it: for clients elsewhere, and those of a Unix socket."""
    address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    if not address.startswith(("127.", "::ffff:127.")) and address != "::1":
        return None
    return NEAR_BUFFER_BYTES_OF_FEW if n_bodies <= FEW else NEAR_BUFFER_BYTES


def size_of(part: Part) -> int:
    """Bytes of a part."""
    return len(part) if isinstance(part, bytes) else part.length


def _remaining(parts: Sequence[Part], n_sent: int) -> Sequence[Part]:
    """What is left of `parts` after their first `n_sent` bytes."""
    rest: list[Part] = []
    for part in parts:
        taken = min(n_sent, size_of(part))
        n_sent -= taken
        if taken < size_of(part):
            rest.append(part[taken:] if isinstance(part, bytes) else Range(part.start + taken, part.end))
    return tuple(rest)


async def _over(ending: asyncio.Future[Any]) -> None:
    """Wait for what cannot be stopped, however often we are cancelled: the caller raises that."""
    while not ending.done():
        try:
            await asyncio.wait([ending])
        except asyncio.CancelledError:
            continue


_SHORT = "the file is shorter than its blob"


class _FileFault(Exception):
    def __init__(self, sentence: str, *, is_short: bool) -> None:
        super().__init__(sentence)
        self.is_short = is_short


class _Body:
    """One response on its way: its connection, its own descriptor for it, and how fast the client takes it."""

    __slots__ = (
        "_mark_at", "_mark_bytes", "_response", "_splice", "_transport", "_waiter", "_writer",
        "is_cut", "is_waiting", "is_zero_copy", "n_sent", "out",
    )  # fmt: skip

    def __init__(
        self, response: web.StreamResponse, writer: AbstractStreamWriter, transport: asyncio.Transport, now: float
    ) -> None:
        self._response = response
        self._writer = writer
        self._transport = transport
        self._waiter: asyncio.Future[None] | None = None
        self._splice: Splice | None = None
        self._mark_at = now
        self._mark_bytes = 0
        self.n_sent = 0
        self.out = -1
        #: Whether we wait for more to send, so that the client is not to blame.
        self.is_waiting = False
        self.is_zero_copy = False
        self.is_cut = False

    def open(self, send_buffer: int | None) -> None:
        """Take a descriptor where zero-copy is possible, and send the headers. `send_buffer`: SO_SNDBUF, None as it is."""
        self.out = _duplicate(self._transport)
        self.is_zero_copy = self.out >= 0
        if self.is_zero_copy and send_buffer is not None:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        # Zero: "drained" then means empty, and uvloop writes at once instead of at the end of its turn.
        high, low = (0, 0) if self.is_zero_copy else (PIECE_BYTES, PIECE_BYTES // 4)
        self._transport.set_write_buffer_limits(high, low)
        self._writer.send_headers()

    def close(self) -> None:
        if self.out >= 0:
            os.close(self.out)
            self.out = -1
        if not self._transport.is_closing():
            self._transport.set_write_buffer_limits(64 << 10, 16 << 10)

    async def write(self, piece: bytes) -> None:
        """Through the transport, waiting while it holds too much."""
        await self._response.write(piece)
        self.n_sent += len(piece)

    async def drain(self) -> None:
        """Wait until the transport holds nothing. Raises ConnectionError when the connection is lost."""
        while self._transport.get_write_buffer_size() > 0:
            await self._writer.drain()
            await asyncio.sleep(0)

    def judge(self, error: OSError) -> None:
        """Say whose fault an error of sendfile is: raises ConnectionError (the peer's) or _FileFault.

        Returns when it is nobody's: this file system cannot be sent from without copying, so the rest is copied.
        """
        if isinstance(error, ConnectionError):
            raise error
        if error.errno in _PEER_ERRNOS:
            raise ConnectionError(*error.args) from error
        if error.errno not in _NO_SENDFILE_ERRNOS:
            raise _FileFault(f"cannot read the file: {error}", is_short=False) from error
        self.is_zero_copy = False

    def sent(self, n_bytes: int) -> None:
        """Count what went past the transport, for the access log too. By a lane while it holds a splice of this body."""
        self.n_sent += n_bytes
        self._writer.output_size += n_bytes

    async def splice(self, splice: Splice) -> int:
        """See a splice through; returns the offset reached: the end, or where the file is cold or cannot be spliced.

        Returns or raises only once the lane has let go, cancelled or not: it holds descriptors. Raises ConnectionError
        or _FileFault.
        """
        self._splice = splice
        if self.is_cut:
            splice.drop()
        try:
            await asyncio.shield(splice.over)
        except asyncio.CancelledError:
            splice.drop()
            await _over(splice.over)
            raise
        finally:
            self._splice = None
        if splice.is_dropped:
            raise ConnectionAbortedError("cut")
        if splice.is_short:
            raise _FileFault(_SHORT, is_short=True)
        if isinstance(splice.error, OSError):
            self.judge(splice.error)
        elif splice.error is not None:
            raise splice.error
        return splice.offset

    @contextmanager
    def waiter(self) -> Iterator[asyncio.Future[None]]:
        """Something to wait for, which fails when the body is cut."""
        if self.is_cut:
            raise ConnectionAbortedError("cut")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            yield self._waiter
        finally:
            self._waiter = None

    async def writable(self) -> None:
        """Wait until the connection takes bytes again. Raises ConnectionError when the body is cut."""
        loop = asyncio.get_running_loop()
        with self.waiter() as waiter:

            def ready() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            loop.add_writer(self.out, ready)
            try:
                await waiter
            finally:
                loop.remove_writer(self.out)  # before it is closed: epoll would go on reporting its twin

    # -- pace ----------------------------------------------------------------------------------------------------------

    def mark(self, now: float) -> None:
        """Judge the client from here on."""
        self._mark_at = now
        self._mark_bytes = self.n_sent

    def is_slow(self, now: float, pace: Pace) -> bool:
        """Whether the client took too little since the mark; moves the mark when it took enough."""
        if self.is_waiting or self.n_sent - self._mark_bytes >= pace.min_bytes_per_s * pace.window_s:
            self.mark(now)
            return False
        return now - self._mark_at >= pace.window_s

    def cut(self) -> None:
        """End the connection, and what the kernel still holds for it, now."""
        self.is_cut = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionAbortedError("cut"))
        connection = self._transport.get_extra_info("socket")
        if connection is not None and not self._transport.is_closing():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self._splice is None:
            self._transport.abort()
        else:  # not before the lane has let go, and whoever waits for that is on its way: an abort cancels the handler
            self._splice.drop()
            self._splice.over.add_done_callback(lambda _: self._transport.abort())


def _duplicate(transport: asyncio.Transport) -> int:
    """A descriptor of our own for the connection, or -1 where its bytes must pass through the transport."""
    if transport.get_extra_info("sslcontext") is not None:
        return -1
    connection = transport.get_extra_info("socket")
    if connection is None:
        return -1
    try:
        return os.dup(connection.fileno())
    except OSError:
        return -1  # out of descriptors: the copying path needs none
