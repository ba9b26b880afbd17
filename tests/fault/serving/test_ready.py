"""Answers kept ready (web/ready.py) over real sockets: the same as the long way, and never to other bytes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf

import pytest
from aiohttp import web

from proxy.engine.pull import Vouched
from proxy.events import Answered, Event
from proxy.web.ready import MAX_BYTES, READY, Ready, ReadyTable
from proxy.web.server import DataServer
from tests.support.appliance import repeats_into
from tests.support.clock import ManualClock

LOG = logging.getLogger("test.ready")
REQUEST = b"GET /v2/x/manifests/1 HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclass
class Kept:
    """A data port whose handler offers every answer to be kept, and counts how often it was asked itself."""

    port: int
    clock: ManualClock
    table: ReadyTable
    #: None: the answer no longer stands, which is found out when it is asked about in full.
    age_s: float | None = 7.0
    fresh_for_s: float = inf
    #: Moves when something has changed that an answer may depend on.
    n_changes: int = 0
    n_handled: int = 0
    #: How often an answer was judged in full.
    n_judged: int = 0
    good_until: float = inf
    body: bytes = b'{"answer": 1}'
    events: list[Event] = field(default_factory=list)

    def again(self) -> Vouched | None:
        """What the handler offers to be asked."""
        self.n_judged += 1
        if self.age_s is None:
            return None
        n_changes = self.n_changes
        return Vouched(self.age_s, self.fresh_for_s, lambda: self.n_changes == n_changes)


@asynccontextmanager
async def keeping(*, ready: bool = True) -> AsyncIterator[Kept]:
    """The port, with the table on or off."""
    clock = ManualClock()
    events: list[Event] = []
    ids = iter(range(10_000))
    table = ReadyTable(clock=clock, repeats=repeats_into(events), request_id=lambda: f"id-{next(ids)}")
    kept = Kept(0, clock, table, events=events)

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        kept.n_handled += 1
        body = kept.body if request.method == "GET" else b""
        said = Answered("first", "127.0.0.1", request.method, request.raw_path, "", status=200, n_bytes=len(body))
        headers = {"Content-Type": "application/x", "Content-Length": str(len(kept.body)), "Age": "7", "Server": "B"}
        request[READY] = Ready(said, body, kept.again, has_age=True, good_until=kept.good_until)
        return web.Response(headers=headers, body=kept.body if request.method == "GET" else None)

    server = DataServer(handler, log=LOG, ready=table if ready else None)
    await server.start(["127.0.0.1:0"])
    kept.port = int(server.addresses[0].rpartition(":")[2])
    try:
        yield kept
    finally:
        await server.aclose(0)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed for certain."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield streams
    finally:
        streams[1].close()
        await streams[1].wait_closed()


async def ask(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> bytes:
    """One whole answer on an open connection."""
    reader, writer = streams
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"Content-Length: (\d+)", head)
    n_bytes = 0 if request.startswith(b"HEAD") or found is None else int(found[1])
    return head + await reader.readexactly(n_bytes)


def timeless(answer: bytes) -> list[bytes]:
    """The lines of an answer without its date, in no order: headers have none."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return [*sorted(line for line in head.split(b"\r\n") if not line.startswith(b"Date:")), body]


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_a_kept_answer_is_the_long_ways_answer(method: bytes) -> None:
    """performance.md 5: no shortcut may change an answer. Status line, headers and body are those of the first."""
    request = REQUEST.replace(b"GET", method)
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            answers = [await ask(streams, request) for _ in range(3)]
            assert kept.n_handled == 1
    assert timeless(answers[0]) == timeless(answers[1]) == timeless(answers[2])
    assert b"Age: 7" in answers[2]


async def test_every_kept_answer_is_reported_under_an_id_of_its_own() -> None:
    """The log and the metrics know no shortcut: one event for each answer, of the same kind as the first."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            for _ in range(3):
                await ask(streams, REQUEST)
    said = [event for event in kept.events if isinstance(event, Answered)]
    assert [(event.request_id, event.status, event.n_bytes, event.remote) for event in said] == [
        ("id-0", 200, 13, "127.0.0.1"),
        ("id-1", 200, 13, "127.0.0.1"),
    ]


async def test_an_answer_that_no_longer_stands_is_asked_for_again() -> None:
    """Whether anything has changed is asked every time; what then does not stand is dropped and takes the long way."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            for _ in range(3):
                await ask(streams, REQUEST)
            kept.age_s, kept.body = None, b'{"answer": 2, "longer": true}'
            kept.n_changes += 1
            assert (await ask(streams, REQUEST)).endswith(b'{"answer": 2, "longer": true}')
            assert kept.n_handled == 2


async def test_an_answer_is_judged_in_full_once_a_second_and_whenever_something_has_changed() -> None:
    """That is what makes the others cheap; and what no count of changes tells is found out within the second."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            judged = []
            for _ in range(3):
                for _ in range(5):
                    await ask(streams, REQUEST)
                judged.append(kept.n_judged)
                kept.n_changes += 1
            for _ in range(5):
                await ask(streams, REQUEST)
            await kept.clock.advance(1.0)
            for _ in range(5):
                await ask(streams, REQUEST)
            assert [*judged, kept.n_judged] == [1, 2, 3, 5]
            assert kept.n_handled == 1


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param({"fresh_for_s": 0.25}, id="the tag's time"),
        pytest.param({"good_until": 0.25}, id="the token's time"),
    ],
)
async def test_an_answer_stands_not_a_moment_longer_than_its_time(ends: dict[str, float]) -> None:
    """INV-6, and tokens that end: to the moment, although it is judged in full only once a second."""
    async with keeping() as kept:
        began = kept.clock.monotonic()
        kept.fresh_for_s = ends.get("fresh_for_s", inf)
        kept.good_until = began + ends.get("good_until", inf)
        async with connected(kept.port) as streams:
            for _ in range(3):
                await ask(streams, REQUEST)
            assert (kept.n_handled, kept.n_judged) == (1, 1)
            kept.age_s = None
            await kept.clock.advance(0.2)
            await ask(streams, REQUEST)
            assert (kept.n_handled, kept.n_judged) == (1, 1)
            await kept.clock.advance(0.05)
            await ask(streams, REQUEST)
            assert kept.n_handled == 2


async def test_age_and_date_move_with_time() -> None:
    """RFC 9111 §5.1: Age is the answer's age now, not when it was kept."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            await ask(streams, REQUEST)
            first = await ask(streams, REQUEST)
            kept.age_s = 9.5
            await kept.clock.advance(2.0)
            second = await ask(streams, REQUEST)
    dates = [re.search(rb"Date: [^\r]+", answer) for answer in (first, second)]
    assert b"Age: 7" in first and b"Age: 9\r" in second
    assert dates[0] is not None and dates[1] is not None and dates[0][0] != dates[1][0]


async def test_a_request_in_pieces_takes_the_long_way_wherever_it_is_cut() -> None:
    """Only bytes that begin where a request begins are looked up; a cut request is the parser's."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            whole = await ask(streams, REQUEST)
            for cut in range(1, len(REQUEST), 5):
                streams[1].write(REQUEST[:cut])
                await streams[1].drain()
                await asyncio.sleep(0)
                assert timeless(await ask(streams, REQUEST[cut:])) == timeless(whole)


async def test_kept_bytes_inside_another_request_are_not_a_request() -> None:
    """Request smuggling: behind a front that shares connections, a header's value must never be answered."""
    async with keeping() as kept:
        async with connected(kept.port) as streams:
            await ask(streams, REQUEST)
            n_before = kept.n_handled
            streams[1].write(b"GET /v2/other HTTP/1.1\r\nX-Part: ")
            await streams[1].drain()
            await asyncio.sleep(0.01)
            answer = await ask(streams, REQUEST)
            assert answer.startswith(b"HTTP/1.1 200")
            assert kept.n_handled == n_before + 1, "the part was answered as a request of its own"
            # Two requests in one write: the second half of the data is the parser's, and both are answered in order.
            streams[1].write(REQUEST + REQUEST[:20])
            await streams[0].readuntil(b'{"answer": 1}')
            assert (await ask(streams, REQUEST[20:])).startswith(b"HTTP/1.1 200")


async def test_a_last_request_is_not_kept_as_one_of_many() -> None:
    """An answer that closes the connection is that connection's alone."""
    closing = REQUEST.replace(b"Host: a", b"Host: a\r\nConnection: close")
    async with keeping() as kept:
        for _ in range(2):
            async with connected(kept.port) as streams:
                streams[1].write(closing)
                assert (await streams[0].read()).endswith(kept.body)
        assert kept.n_handled == 2 and len(kept.table) == 0


async def test_the_table_is_bounded_by_bytes() -> None:
    """A client that varies a header grows nothing without bound."""
    async with keeping() as kept:
        kept.body = bytes(100_000)
        async with connected(kept.port) as streams:
            for n in range(200):
                await ask(streams, REQUEST.replace(b"Host: a", b"Host: a%d" % n))
            assert 0 < len(kept.table) <= MAX_BYTES // 100_000


async def test_without_a_table_every_request_takes_the_long_way() -> None:
    """The switch that the conformance comparison is made with."""
    async with keeping(ready=False) as kept:
        async with connected(kept.port) as streams:
            for _ in range(3):
                await ask(streams, REQUEST)
            assert kept.n_handled == 3
