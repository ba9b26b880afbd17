"""One HTTP request to one URL, and its answer. Knows nothing of registries, redirects or tokens.

Keeps INV-7's last line: every address is judged after its name was resolved, at the moment of connecting, literals
included. aiohttp is told to do nothing by itself: no retry of a GET (a dropped connection is reported, and counts
once), no redirect, no cookies, no netrc, no environment, no decoding. Exceptions leave as ours, without the URLs and
headers that theirs quote.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from multidict import CIMultiDictProxy
from yarl import URL

from proxy import __version__
from proxy.errors import Unreachable, UpstreamError
from proxy.events import UpstreamAsked, UpstreamBytes, UpstreamUnreached
from proxy.upstream import failures
from proxy.upstream.detour import goes_direct
from proxy.upstream.failures import AddressDenied
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.targets import Targets

#: Name and port to addresses. Raises OSError (gaierror) when there are none.
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
#: Takes what happened on the wire: one `UpstreamAsked` for each HTTP request sent, `UpstreamUnreached` for each that
#: could not be, `UpstreamBytes` as bodies are read.
Observer = Callable[[UpstreamAsked | UpstreamUnreached | UpstreamBytes], None]

#: One read of a body returns at most this (ports.BlobBody).
PIECE_BYTES = 1 << 20
#: From this size on, pieces are not joined to larger ones.
LARGE_BYTES = 32 << 10
#: aiohttp stops reading at twice this, and by then holds one receive (256 KiB at most) more: never over a piece, so
#: that nothing is ever cut. With a buffer of a MiB and more, and pieces cut from it, one GB cost 0.8 CPU seconds where
#: this way it cost 0.4.
BUFFER_BYTES = 384 * 1024
#: A body that nobody wants is read to its end up to here, because that keeps the connection; beyond, closing is
#: cheaper.
DRAIN_BYTES = 64 * 1024
#: Locations of signed storage reach 4 KiB; more than this is not read.
MAX_HEADER_BYTES = 16 * 1024
#: Idle connections are given up before common servers do (60 s and more), so that a request seldom meets a closing one.
KEEPALIVE_S = 15.0

USER_AGENT = f"breakwater/{__version__}"


async def system_lookup(name: str, port: int) -> Sequence[str]:
    """Addresses of `name` by the system's resolver, in libuv's threads on uvloop: a slow one delays no disk work."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(sockaddr[0]) for _, _, _, _, sockaddr in found]


class _GuardedResolver(AbstractResolver):
    """Leaves out the addresses that may not be connected to; none left is an error that says so."""

    def __init__(self, targets: Targets, lookup: Lookup) -> None:
        self._targets = targets
        self._lookup = lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        permitted: list[ResolveResult] = []
        refusals: list[str] = []
        for text in await self._lookup(host, port):
            address = ip_address(text)
            if why := self._targets.why_denied(address, port):
                refusals.append(f"{address} ({why})")
                continue
            permitted.append(
                ResolveResult(
                    hostname=host,
                    host=text,
                    port=port,
                    family=socket.AF_INET6 if address.version == 6 else socket.AF_INET,
                    proto=0,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not permitted:
            if not refusals:
                raise OSError("a name without addresses")  # which aiohttp reports as every other failure of DNS
            told = ", ".join(refusals[:4])
            raise AddressDenied(f"the name resolves to {told}; set allow_private if that is meant")
        return permitted

    async def close(self) -> None:
        """Nothing is held."""


class _Connector(aiohttp.TCPConnector):
    """Passes over pooled connections on which something arrived while nobody had asked.

    A server that sends more than it announced has thereby answered the next request too, with bytes that nobody asked
    for. aiohttp pools such a connection when the surplus arrives after the end of the body.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._handed_out: WeakSet[asyncio.BaseProtocol] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 – the signature is aiohttp's
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            # A fresh connection is taken as it is: one that speaks first always will, and fails by its own words.
            if protocol is None or protocol not in self._handed_out or not protocol.should_close:
                break
            connection.close()
        if protocol is not None:
            self._handed_out.add(protocol)
        return connection


class Wire:
    """The connections of one upstream. Open from the first request to `aclose`."""

    def __init__(
        self, policy: UpstreamPolicy, targets: Targets, *, observer: Observer, lookup: Lookup = system_lookup
    ) -> None:
        self._policy = policy
        self._targets = targets
        self._observer = observer
        self._lookup = lookup
        self._maybe_session: aiohttp.ClientSession | None = None
        self._maybe_detour: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._replies: set[Reply] = set()
        self._n_sending = 0

    @property
    def is_used(self) -> bool:
        """Whether a request is on its way or its answer being read."""
        return self._n_sending > 0 or bool(self._replies)

    async def send(self, method: str, url: URL, headers: Mapping[str, str], *, kind: str) -> Reply:
        """Send one request and return when the headers of its answer are here. `kind` is for the observer.

        Raises Unreachable, Timeout (connecting) or Misbehaved. The headers have no deadline but the caller's.
        """
        if self._is_closed:
            raise self._stopping()
        context = SimpleNamespace(is_sent=False)
        status = 0
        self._n_sending += 1
        try:
            session, through = self._way(url)
            response = await session.request(
                method,
                url,
                proxy=through,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
                allow_redirects=False,
                trace_request_ctx=context,
            )
            status = response.status
        except failures.FOREIGN as error:
            failure = failures.of_exception(error, upstream=self._policy.host, place=url.raw_host or "")
            if not context.is_sent:
                self._observer(UpstreamUnreached(self._policy.host, str(failure)))
            raise failure from None
        finally:
            self._n_sending -= 1
            # Also when cancelled: what upstream logged is counted, and a connection that was never made is not.
            if status or context.is_sent:
                self._observer(UpstreamAsked(self._policy.host, kind, method, status))
        if self._is_closed:
            response.close()
            raise self._stopping()
        return Reply(response, upstream=self._policy.host, url=url, observer=self._observer, open_ones=self._replies)

    async def aclose(self) -> None:
        """Close every connection. Bodies that are being read break."""
        self._is_closed = True
        # One by one, because a session that is closed does not wake those who wait for a body.
        for reply in tuple(self._replies):
            reply.close()
        for session in (self._maybe_session, self._maybe_detour):
            if session is not None:
                await session.close()

    def __len__(self) -> int:
        """How many answers somebody still has open."""
        return len(self._replies)

    def _stopping(self) -> Unreachable:
        host = self._policy.host
        return Unreachable(f"upstream {host} is not asked any more: Breakwater is stopping", upstream=host)

    def _way(self, url: URL) -> tuple[aiohttp.ClientSession, str | None]:
        """The session for a request to `url`, and the HTTP proxy that it goes through, if any."""
        # Made at the first request: aiohttp wants a running loop, and most upstreams of a process are never asked.
        if not self._policy.http_proxy or goes_direct(url, self._policy.no_proxy):
            if self._maybe_session is None:
                self._maybe_session = self._open_session(is_detour=False)
            return self._maybe_session, None
        if self._maybe_detour is None:
            self._maybe_detour = self._open_session(is_detour=True)
        return self._maybe_detour, self._policy.http_proxy

    def _open_session(self, *, is_detour: bool) -> aiohttp.ClientSession:
        """The connections of one way. On the detour all of them are to the HTTP proxy, which the settings name and
        which resolves names itself: of targets only literals can be judged then, and `Targets.check` has done so."""
        deadlines = self._policy.deadlines
        guards: dict[str, Any] = {}
        if not is_detour:
            guards = {
                "resolver": _GuardedResolver(self._targets, self._lookup),
                "socket_factory": self._guarded_socket,
            }
        connector = _Connector(
            **guards,
            ssl=self._policy.tls or True,
            limit=0,  # how much runs at once is the engine's to decide, and a queue in here would have no deadline
            keepalive_timeout=KEEPALIVE_S,
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_request_headers_sent.append(_mark_sent)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            requote_redirect_url=False,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=deadlines.connect_s, sock_connect=deadlines.sock_connect_s, sock_read=None
            ),
            read_bufsize=BUFFER_BYTES,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            trace_configs=[tracing],
        )
        # Private, and without another way: otherwise a GET whose connection drops is sent again unseen, twice in
        # upstream's log and once in ours. A test counts the requests, and so notices when the name changes.
        session._retry_connection = False
        return session

    def _guarded_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """A socket for an address that was judged; the resolver saw names alone, this sees literals too."""
        family, kind, protocol, _, sockaddr = info
        if why := self._targets.why_denied(ip_address(str(sockaddr[0])), int(sockaddr[1])):
            raise AddressDenied(f"{sockaddr[0]} is a {why} address; set allow_private if that is meant")
        return socket.socket(family=family, type=kind, proto=protocol)


async def _mark_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    context.trace_request_ctx.is_sent = True


class Reply:
    """The answer to one request. Whoever has one closes it; a connection is used again only after a whole body."""

    __slots__ = (
        "_content",
        "_counted",
        "_observer",
        "_open_ones",
        "_response",
        "_upstream",
        "headers",
        "status",
        "url",
    )

    def __init__(
        self, response: aiohttp.ClientResponse, *, upstream: str, url: URL, observer: Observer, open_ones: set[Reply]
    ) -> None:
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self.url = url
        self._response = response
        self._content = response.content
        self._upstream = upstream
        self._observer = observer
        self._counted = 0
        self._open_ones = open_ones
        open_ones.add(self)

    def buffered(self) -> bytes:
        """Of what has arrived already, at most a MiB; b"" when nothing has. Raises as `piece`.

        What came in large pieces is handed on as it came: to join them copies every byte, which was a tenth of the CPU
        that fetching takes. Small ones are joined, because each piece costs some calls.
        """
        content = self._content
        try:
            if content.exception() is None and content._buffer and len(content._buffer[0]) >= LARGE_BYTES:
                piece = content._read_nowait_chunk(-1)
            else:
                piece = content.read_nowait(PIECE_BYTES)
        except failures.FOREIGN as error:
            raise self._failure(error) from None
        self._count()
        return piece

    async def piece(self) -> bytes:
        """The next bytes, as many as there are, at most a MiB; b"" at the end. Raises Unreachable if it breaks."""
        try:
            piece = await self._content.readany()
        except failures.FOREIGN as error:
            raise self._failure(error) from None
        self._count()
        return piece

    async def at_most(self, limit: int) -> bytes:
        """The body, or its beginning of more than `limit` bytes if it is longer; closes either way."""
        pieces: list[bytes] = []
        n_bytes = 0
        try:
            while n_bytes <= limit and (piece := await self.piece()):
                pieces.append(piece)
                n_bytes += len(piece)
        finally:
            self.close()
        return b"".join(pieces)

    async def drain(self) -> None:
        """Be done with a body that nobody wants. Never raises for what upstream does: the answer's headers stand."""
        try:
            await self.at_most(DRAIN_BYTES)
        except UpstreamError:
            pass  # it broke off; nobody wanted it

    def close(self) -> None:
        """Let go. Closes the connection unless the whole body was read; `release` would pool half-read ones."""
        self._count()
        self._open_ones.discard(self)
        self._response.close()

    def _count(self) -> None:
        if arrived := self._content.total_bytes - self._counted:
            self._counted += arrived
            self._observer(UpstreamBytes(self._upstream, arrived))

    def _failure(self, error: BaseException) -> Exception:
        return failures.of_exception(error, upstream=self._upstream, place=self.url.raw_host or "")
