"""The data port: connections, their limits and their end. What is answered is somebody else's.

A thin layer over aiohttp's low-level server, which parses and keeps connections alive; sockets are bound in
web/listening.py. Added here: caps and deadlines; refusals in the registry's own error format, reflecting nothing of what
was sent; a response that ends with FIN and not with RST; a client that closes its sending half early and still gets its
answer; a close that lets answers finish.

A handler is cancelled when its client is gone (`handler_cancellation`): transfers belong to the engine, so nothing is
lost but the reader. Whatever a handler must finish, it hands to a task owner.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import socket
import ssl
import termios
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web

from proxy.oci.codes import ErrorCode, envelope
from proxy.web.errors import COMMON
from proxy.web.listening import bind, forget_unix, name_of, tune
from proxy.web.ready import READY, Ready, ReadyTable

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may take. Seconds and bytes."""

    #: Beyond this a connection gets a 503 and is closed; beyond an eighth more it is closed at once.
    n_connections: int = 10_500
    #: How long a connection may be silent between requests, or before the first.
    keepalive_s: float = 75.0
    #: From the first byte of a request to the end of its headers.
    headers_s: float = 20.0
    #: How long we wait for a client to close after our last byte, before we do.
    lingering_s: float = 2.0
    #: How long a client that has closed its sending half is waited for while we have nothing to send: it may be gone.
    half_closed_s: float = 5.0
    max_line_bytes: int = 8190
    max_field_bytes: int = 8190
    max_headers: int = 128
    #: Per connection, in the kernel: a stalled reader pins no more than about twice this. 0 leaves it to the kernel.
    send_buffer_bytes: int = 256 << 10
    #: When the kernel gives up a connection whose peer acknowledges nothing or has its window closed.
    unacknowledged_s: int = 120
    #: When we stop, how long a connection that has not sent anything yet may still send its first request: it was made
    #: while we accepted, and whoever made it knows nothing of our stopping.
    first_request_s: float = 0.5
    backlog: int = 4096


class DataServer:
    """Listens, and answers every request with `handler`.

    The handler gets requests of HTTP/1.0 and 1.1; a GET or HEAD among them has no body, and another's need not be read.
    It is cancelled when its client goes away.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        log: logging.Logger,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        ready: ReadyTable | None = None,
    ) -> None:
        """`ready`: answers that a handler offered to be kept (web/ready.py); None: every request takes the long way."""
        self._handler = handler
        self._ready = ready
        self._log = log
        self._limits = limits or Limits()
        self._tls = tls
        self._server: _Server | None = None
        self._listeners: list[asyncio.AbstractServer] = []
        self._addresses: list[str] = []
        self._unix_paths: list[str] = []
        self._is_draining = False

    @property
    def addresses(self) -> Sequence[str]:
        """What is listened on, with real port numbers: "127.0.0.1:5000", "[::1]:5000", "unix:/run/x"."""
        return tuple(self._addresses)

    @property
    def n_connections(self) -> int:
        """Open connections, idle ones among them."""
        return self._server.n_connections if self._server else 0

    @property
    def n_refused(self) -> int:
        """Connections beyond the limit since the start: told so, or closed at once. No handler hears of them."""
        return self._server.n_refused if self._server else 0

    async def start(self, listen: Sequence[str], inherited: Sequence[socket.socket] = ()) -> None:
        """Listen on sockets that were handed over, then on each of `listen`.

        How they are written is `listening.bind`'s. Raises OSError when an address cannot be had; nothing listens then.
        """
        loop = asyncio.get_running_loop()
        server = self._server = _Server(self._answer, loop, self._limits, self._log, self._ready)
        sockets = list(inherited)
        try:
            for address in listen:
                sockets += await bind(address)
                if address.startswith("unix:"):
                    self._unix_paths.append(address.removeprefix("unix:"))
            for listening in sockets:
                tune(
                    listening,
                    send_buffer_bytes=self._limits.send_buffer_bytes,
                    unacknowledged_s=self._limits.unacknowledged_s,
                )
                create = loop.create_unix_server if listening.family == socket.AF_UNIX else loop.create_server
                self._addresses.append(name_of(listening))
                self._listeners.append(
                    await create(server, sock=listening, ssl=self._tls, backlog=self._limits.backlog)
                )
        except BaseException:
            for listening in sockets:
                listening.close()
            await self.aclose(0)
            raise

    async def aclose(self, grace_s: float) -> None:
        """Stop accepting, give running answers `grace_s` seconds, then cancel them. May be called again, to hurry."""
        self._is_draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        while self._unix_paths:
            await asyncio.to_thread(forget_unix, self._unix_paths.pop())
        if self._server is not None:
            await self._server.drain(grace_s)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.version not in (HttpVersion10, HttpVersion11):
            return refusal(505, ErrorCode.REQUEST_INVALID, "this port speaks HTTP/1.1")
        connection = request.protocol
        if isinstance(connection, Connection) and connection.is_surplus:
            return refusal(503, ErrorCode.UNAVAILABLE, "too many connections; ask again, or ask another mirror")
        if request.body_exists and request.method in ("GET", "HEAD"):
            return refusal(400, ErrorCode.REQUEST_INVALID, "a GET has no body")
        response = await self._handler(request)
        if self._is_draining:
            response.force_close()
        return response


def refusal(status: int, code: ErrorCode, sentence: str) -> web.Response:
    """An answer in the registry's error format (distribution-spec § Error Codes) that closes the connection."""
    body = envelope(code, sentence)
    response = web.Response(status=status, headers=COMMON, body=body, content_type="application/json")
    if status == 503:
        response.headers["Retry-After"] = "5"
    response.force_close()
    return response


# -- connections -------------------------------------------------------------------------------------------------------


class _Server(web.Server):
    """aiohttp's server, making our kind of connection and able to say when the last one is gone."""

    def __init__(
        self,
        handler: Handler,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        log: logging.Logger,
        ready: ReadyTable | None,
    ) -> None:
        super().__init__(handler, handler_cancellation=True, loop=loop)
        self.limits = limits
        self.ready = ready
        self.log = log
        self.grumble = _Grumble(log, loop)
        self.is_draining = False
        self.n_refused = 0
        self._emptied = asyncio.Event()

    @property
    def n_connections(self) -> int:
        return len(self._connections)

    def __call__(self) -> Connection:
        return Connection(self, self._loop)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        task = handler._task_handler
        if task is None:
            self._notice_empty()
        else:
            task.add_done_callback(lambda _: self._notice_empty())

    def _notice_empty(self) -> None:
        if not self._connections:
            self._emptied.set()

    async def drain(self, grace_s: float) -> None:
        """Close what is idle, let what is busy finish for `grace_s`, then cut it, and return once all is over."""
        self.is_draining = True
        await asyncio.sleep(0)  # what was accepted in this turn of the loop is made known in the next
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.finish()
        if await self._is_empty_within(grace_s):
            return
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.cut()
        await self._is_empty_within(5.0)

    async def _is_empty_within(self, seconds: float) -> bool:
        if not self._connections:
            return True
        self._emptied.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._emptied.wait()
        except TimeoutError:
            return False
        return True


class Connection(web.RequestHandler):
    """One client's connection. See the module for what it adds to aiohttp's."""

    __slots__ = (
        "_at_boundary",
        "_first_request_timer",
        "_half_closed_timer",
        "_header_timer",
        "_input_ended",
        "_is_discarding",
        "_is_half_closed",
        "_progress",
        "_remote",
        "_request_bytes",
        "_server",
        "is_surplus",
    )

    def __init__(self, server: _Server, loop: asyncio.AbstractEventLoop) -> None:
        limits = server.limits
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=limits.keepalive_s,
            max_line_size=limits.max_line_bytes,
            max_field_size=limits.max_field_bytes,
            max_headers=limits.max_headers,
            lingering_time=limits.lingering_s,
            auto_decompress=False,
            logger=server.log,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's annotation leaves out None, which its body allows
        )
        self._server = server
        #: Over the cap: to be told so and closed.
        self.is_surplus = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._half_closed_timer: asyncio.TimerHandle | None = None
        self._first_request_timer: asyncio.TimerHandle | None = None
        self._is_half_closed = False
        self._is_discarding = False
        self._input_ended: asyncio.Future[None] | None = None
        self._progress: object = None
        self._remote = ""
        #: The parser holds no part of a request: what comes next begins one.
        self._at_boundary = True
        #: The bytes of the one request that is being answered, when they came alone; else b"".
        self._request_bytes = b""

    @property
    def is_idle(self) -> bool:
        """No request is being answered or waiting to be."""
        return self._waiter is not None and not self._messages

    def finish(self) -> None:
        """Close now when idle, else after the answer that is running. A first request on its way is waited for."""
        if self._first_request_timer is not None:
            return  # told before: a connection that is made while the port closes hears of it twice
        if self._request_count == 0 and not self._messages:
            self._await_first_request()
        elif self.is_idle:
            self.force_close()
        else:
            self.close()

    def _await_first_request(self) -> None:
        self._first_request_timer = self._loop.call_later(
            self._server.limits.first_request_s, self._on_first_request_deadline
        )

    def _on_first_request_deadline(self) -> None:
        self._first_request_timer = None
        transport = self.transport
        if transport is None:
            return
        if self.is_idle and _unread(transport):
            self._await_first_request()  # it is here, and we are late: timers run before sockets are read
        elif self.is_idle:
            self.force_close()
        else:
            self.close()

    def cut(self) -> None:
        """End it now, cancelling what runs."""
        transport, task = self.transport, self._task_handler
        if transport is not None:
            transport.abort()
        if task is not None:
            task.cancel()

    # -- what the transport says ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._remote = str(peer[0]) if isinstance(peer, tuple) else "unix"
        if self._server.is_draining:
            self.finish()
        surplus = self._server.n_connections - self._server.limits.n_connections
        if surplus > 0:
            self.is_surplus = True
            self._server.n_refused += 1
            self._server.grumble(
                logging.WARNING, "more than %d connections: refusing", self._server.limits.n_connections
            )
            if surplus > self._server.limits.n_connections // 8 + 8:
                self.cut()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel_timers()
        self._end_input()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_discarding or (self._at_boundary and self._answer_ready(data)):
            return
        n_requests = self._request_count
        was_alone = self._at_boundary and self.is_idle
        super().data_received(data)
        if data:
            # A head ends so, and no body follows one here: a request with one is refused and its connection closed.
            self._at_boundary = data.endswith(b"\r\n\r\n")
            is_whole = was_alone and self._at_boundary and self._request_count == n_requests + 1
            self._request_bytes = data if is_whole else b""
        if self._request_count != n_requests:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
        elif self._header_timer is None and data and self._current_request is None and not self._messages:
            # Not `is_idle`: the first bytes may come with the connection, before its task has begun to wait for them.
            self._header_timer = self._loop.call_later(self._server.limits.headers_s, self._on_header_deadline)

    def _answer_ready(self, data: bytes) -> bool:
        """Write the kept answer to exactly these bytes, if there is one, and this connection has nothing else to do."""
        server, transport = self._server, self.transport
        if self._waiter is None or self._messages or self._force_close or self._close or self.is_surplus:
            return False
        if server.ready is None or server.is_draining or transport is None or transport.get_write_buffer_size():
            return False
        answer = server.ready.find(data, self._remote)
        if answer is None:
            return False
        transport.write(answer)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        return True

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio.Protocol allows it, aiohttp narrows to None
        """A client may close its sending half after its last request (RFC 9112 § 9.6) and still gets its answers."""
        self._end_input()
        if self._is_discarding or self.is_idle or self._is_tls:
            return False  # the transport closes; over TLS there is no half
        self._is_half_closed = True
        self._watch_half_closed()
        return True

    # -- how a response ends -------------------------------------------------------------------------------------------

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """aiohttp's end of a response, and ours: no RST may overtake what was written."""
        resp, is_reset = await super().finish_response(request, resp, start_time)
        if is_reset:
            return resp, is_reset
        self._maybe_keep(request, resp)
        if self._is_half_closed and not self._messages:
            self.close()  # nothing more can come
        elif not resp.keep_alive and not self._is_half_closed:
            await self._linger()
        return resp, is_reset

    def _maybe_keep(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Keep the answer, if its handler offers that and the request came whole, alone and will not be its last."""
        ready = request.get(READY)
        table, whole = self._server.ready, self._request_bytes
        if not isinstance(ready, Ready) or table is None or not whole:
            return
        if response.keep_alive and request.version == HttpVersion11:
            table.keep(whole, response, ready)

    async def _linger(self) -> None:
        """Send FIN, then read and forget until the client has closed too.

        Closing a socket that has unread input, or gets more of it, makes the kernel send RST, and that takes bytes away
        that the client has not read yet. containerd resumes after a short end with FIN, and fails the pull after RST.
        """
        transport = self.transport
        if transport is None or transport.is_closing() or not transport.can_write_eof():
            return
        self._is_discarding = True
        self._input_ended = self._loop.create_future()
        transport.write_eof()
        self._resume_transport_reading()
        try:
            async with asyncio.timeout(self._server.limits.lingering_s):
                await self._input_ended
        except TimeoutError:
            pass  # it had its chance
        finally:
            self._input_ended = None

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What the parser refused, or a handler let slip: our format, and nothing of what the client sent."""
        if status == 400:
            self._server.grumble(logging.INFO, "%s sent what is not HTTP: %s", request.remote, type(exc).__name__)
        else:
            self._server.log.error("answering %s failed", request.remote, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a response has begun; it can only be cut short")
        if status == 400:
            return refusal(400, ErrorCode.REQUEST_INVALID, "the request is not HTTP/1.1 as this port understands it")
        return refusal(500, ErrorCode.UNKNOWN, "something went wrong here; the log says what")

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _on_header_deadline(self) -> None:
        self._header_timer = None
        if self.is_idle:
            self.force_close()

    def _watch_half_closed(self) -> None:
        self._half_closed_timer = self._loop.call_later(
            self._server.limits.half_closed_s, self._on_half_closed_deadline
        )

    def _on_half_closed_deadline(self) -> None:
        """FIN says "no more requests" or "I am gone". Nothing sent and nothing left to send: take it for the second."""
        self._half_closed_timer = None
        transport = self.transport
        if transport is None:
            return
        if self.is_idle:
            self.force_close()
            return
        request = self._current_request
        progress = (request, request.writer.output_size if request is not None else 0)
        if progress == self._progress and not _unacknowledged(transport):
            self.cut()
            return
        self._progress = progress
        self._watch_half_closed()

    def _end_input(self) -> None:
        if self._input_ended is not None and not self._input_ended.done():
            self._input_ended.set_result(None)

    def _cancel_timers(self) -> None:
        for timer in (self._header_timer, self._half_closed_timer, self._first_request_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._half_closed_timer = self._progress = None

    @property
    def _is_tls(self) -> bool:
        return self.transport is not None and self.transport.get_extra_info("sslcontext") is not None


def _unacknowledged(transport: asyncio.BaseTransport) -> int:
    """Bytes the kernel has not got rid of yet (SIOCOUTQ)."""
    return _queued(transport, termios.TIOCOUTQ)


def _unread(transport: asyncio.BaseTransport) -> int:
    """Bytes that have come and that nobody has read yet (SIOCINQ)."""
    return _queued(transport, termios.FIONREAD)


def _queued(transport: asyncio.BaseTransport, which: int) -> int:
    connection = transport.get_extra_info("socket")
    queued = array.array("i", [0])
    try:
        fcntl.ioctl(connection.fileno(), which, queued)
    except OSError:
        return 0
    return queued[0]


class _Grumble:
    """One line in ten seconds about what clients do wrong, saying how many there were."""

    def __init__(self, log: logging.Logger, loop: asyncio.AbstractEventLoop) -> None:
        self._log = log
        self._loop = loop
        self._quiet_until = 0.0
        self._n_unsaid = 0

    def __call__(self, level: int, sentence: str, *args: Any) -> None:
        now = self._loop.time()
        if now < self._quiet_until:
            self._n_unsaid += 1
            return
        self._log.log(level, sentence + " (and %d more like this before)", *args, self._n_unsaid)
        self._quiet_until = now + 10.0
        self._n_unsaid = 0
