"""The data port itself: what it refuses, how it ends, where it listens."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import stat
from pathlib import Path

import pytest
from aiohttp import web

from proxy.web.server import DataServer, Limits
from tests.support.serving import connected, get, head_of, listening

LOG = logging.getLogger("test.data")


async def hello(_: web.BaseRequest) -> web.StreamResponse:
    """Answer at once."""
    return web.Response(body=b"hello")


class Gate:
    """A handler that waits to be let through."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.n_cancelled = 0

    async def __call__(self, _: web.BaseRequest) -> web.StreamResponse:
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        return web.Response(body=b"through")


REFUSED = {
    "not HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03SECRET\r\n\r\n", 400),
    "a header without a colon": (b"GET / HTTP/1.1\r\nHost: x\r\nSECRET\r\n\r\n", 400),
    "two lengths": (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nSECRET", 400),
    "length and chunked": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\nSECRET", 400,
    ),
    "a line that never ends": (b"GET /SECRET" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a header that never ends": (b"GET / HTTP/1.1\r\nHost: x\r\nSECRET: " + b"a" * 9000 + b"\r\n\r\n", 400),
    "headers without number": (
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"SECRET-%d: x\r\n" % n for n in range(200)) + b"\r\n", 400,
    ),
    "HTTP/2.0 in words": (b"GET /SECRET HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "HTTP/0.9 in words": (b"GET /SECRET HTTP/0.9\r\nHost: x\r\n\r\n", 505),
    "a GET with a body": (b"GET /SECRET HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nSECRET", 400),
    "a GET with a chunked body": (
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nSECRET\r\n0\r\n\r\n", 400,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "status"), REFUSED.values(), ids=REFUSED)
async def test_what_is_not_understood_is_refused_in_the_registry_format(
    sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The spec's envelope, nothing of what was sent, no traceback in the log, and the connection ends."""
    caplog.set_level(logging.DEBUG)
    async with listening(hello) as address, connected(address) as (reader, writer):
        writer.write(sent)
        got, length = await head_of(reader)
        body = await reader.readexactly(length)
        assert got == status
        assert json.loads(body)["errors"][0]["code"] == "REQUEST_INVALID"
        assert b"SECRET" not in body
        assert await reader.read(-1) == b""
    assert "Traceback" not in caplog.text and "SECRET" not in caplog.text


async def test_garbage_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A client that sends garbage for ever does not fill the log."""
    caplog.set_level(logging.INFO)
    async with listening(hello) as address:
        for _ in range(20):
            async with connected(address) as (reader, writer):
                writer.write(b"\x00\r\n\r\n")
                await reader.read(-1)
    assert len([record for record in caplog.records if record.name == "test.data"]) == 1


async def test_a_handler_that_breaks_answers_500_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """A bug of ours is ours to see, and not the client's."""

    async def broken(_: web.BaseRequest) -> web.StreamResponse:
        raise ValueError("SECRET")

    async with listening(broken) as address, connected(address) as (reader, writer):
        writer.write(get())
        status, length = await head_of(reader)
        body = await reader.readexactly(length)
        assert status == 500 and b"SECRET" not in body and json.loads(body)["errors"][0]["code"] == "UNKNOWN"
    assert "SECRET" in caplog.text


async def test_pipelined_requests_are_answered_in_order() -> None:
    """RFC 9112 §9.3.2, and more of them than are buffered."""
    n_asked = 0

    async def count(_: web.BaseRequest) -> web.StreamResponse:
        nonlocal n_asked
        n_asked += 1
        return web.Response(body=b"%4d" % n_asked)

    async with listening(count) as address, connected(address) as (reader, writer):
        writer.write(get() * 500)
        for n in range(500):
            assert await head_of(reader) == (200, 4)
            assert int(await reader.readexactly(4)) == n + 1


async def test_http_1_0_is_answered_and_closed() -> None:
    """RFC 9112 §9.3: persistence must be asked for in 1.0."""
    async with listening(hello) as address, connected(address) as (reader, writer):
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert await head_of(reader) == (200, 5)
        assert await reader.read(-1) == b"hello"


@pytest.mark.parametrize(
    "limits", [Limits(headers_s=0.05), Limits(keepalive_s=0.05)], ids=["the header deadline", "the idle deadline"]
)
async def test_a_client_that_never_ends_its_headers_is_closed(limits: Limits) -> None:
    """Bytes that trickle do not move the deadline."""
    async with listening(hello, limits) as address, connected(address) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHo")
        assert await reader.read(-1) == b""


async def test_headers_that_begin_before_the_connection_is_taken_have_a_deadline_too() -> None:
    """The first bytes may be there with the connection itself: every real client's are, and a slow one's."""
    async with listening(hello, Limits(headers_s=0.05)) as address:
        with socket.create_connection(address) as raw:  # while the loop stands still
            raw.sendall(b"GET / HTTP/1.1\r\nHo")
            raw.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(raw, 1) == b""


async def test_a_silent_client_is_closed() -> None:
    """Before its first request too."""
    async with listening(hello, Limits(keepalive_s=0.05)) as address, connected(address) as (reader, _):
        assert await reader.read(-1) == b""


async def test_over_the_cap_a_client_is_told_503_and_when_to_come_back() -> None:
    """Kubelets fail over on 503 (and hammer on 429); those who are in stay in."""
    async with listening(hello, Limits(n_connections=1)) as address:
        async with connected(address) as (reader, writer):
            writer.write(get())
            assert await head_of(reader) == (200, 5)
            await reader.readexactly(5)
            async with connected(address) as (other, asking):
                asking.write(get())
                head = (await other.readuntil(b"\r\n\r\n")).decode()
                assert head.startswith("HTTP/1.1 503 ") and "Retry-After: 5\r\n" in head
                assert b"UNAVAILABLE" in await other.read(-1)
            writer.write(get())
            assert await head_of(reader) == (200, 5)


async def test_far_over_the_cap_connections_are_closed_at_once() -> None:
    """Descriptors are the bound that nothing may pass."""
    async with listening(hello, Limits(n_connections=0)) as address:
        taken = [connected(address) for _ in range(9)]
        entered = [await one.__aenter__() for one in taken]
        reader, _ = entered[-1]
        with pytest.raises(ConnectionResetError):
            assert await reader.read(-1) == b""
            raise ConnectionResetError  # FIN or RST: both say it
        for one in taken:
            await one.__aexit__(None, None, None)


async def test_closing_lets_an_answer_finish() -> None:
    """Graceful: idle connections go at once, the running answer is given, nothing new is accepted."""
    gate = Gate()
    server = DataServer(gate, log=LOG)
    await server.start(["127.0.0.1:0"])
    host, _, port = server.addresses[0].rpartition(":")
    address = (host, int(port))
    async with connected(address) as (idle, _), connected(address) as (reader, writer):
        writer.write(get())
        await gate.entered.wait()
        async with asyncio.TaskGroup() as group:
            closing = group.create_task(server.aclose(30.0))
            assert await idle.read(-1) == b""
            with pytest.raises(ConnectionRefusedError):
                async with connected(address):
                    pass
            assert not closing.done()
            gate.opened.set()
            assert await head_of(reader) == (200, 7)
            assert await reader.read(-1) == b"through"
            writer.close()
        assert server.n_connections == 0


async def test_closing_cancels_what_takes_longer_than_the_grace() -> None:
    """After the grace the handler is cancelled and the connection cut; closing twice hurries."""
    gate = Gate()
    server = DataServer(gate, log=LOG)
    await server.start(["127.0.0.1:0"])
    host, _, port = server.addresses[0].rpartition(":")
    async with connected((host, int(port))) as (_, writer):
        writer.write(get())
        await gate.entered.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(server.aclose(3600.0))
            await asyncio.sleep(0)
            await server.aclose(0.0)
        assert (gate.n_cancelled, server.n_connections) == (1, 0)


async def test_a_handler_is_cancelled_when_its_client_resets() -> None:
    """What must outlive a client belongs to a task owner."""
    gate = Gate()
    async with listening(gate) as address, connected(address) as (_, writer):
        writer.write(get())
        await gate.entered.wait()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        while not gate.n_cancelled:
            await asyncio.sleep(0)


async def test_localhost_is_listened_on_in_every_family_it_has() -> None:
    """One port for all of them, also when the kernel chooses it."""
    server = DataServer(hello, log=LOG)
    await server.start(["localhost:0"])
    try:
        ports = {address.rpartition(":")[2] for address in server.addresses}
        assert len(ports) == 1 and any(address.startswith("127.0.0.1:") for address in server.addresses)
    finally:
        await server.aclose(0.0)


async def test_a_unix_socket_is_listened_on_and_removed(tmp_path: Path) -> None:
    """One that a killed process left behind is replaced."""
    path = tmp_path / "data"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    server = DataServer(hello, log=LOG)
    await server.start([f"unix:{path}"])
    assert stat.S_ISSOCK(path.stat().st_mode)
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(get())
    assert await head_of(reader) == (200, 5)
    writer.close()
    await writer.wait_closed()
    await server.aclose(0.0)
    assert not path.exists()


async def test_a_unix_socket_that_somebody_listens_on_is_left_to_them(tmp_path: Path) -> None:
    """Also when its queue is full, which a client is told with another word than that nobody is there."""
    path = tmp_path / "data"
    with socket.socket(socket.AF_UNIX) as theirs, socket.socket(socket.AF_UNIX) as waiting:
        theirs.bind(str(path))
        theirs.listen(0)
        waiting.connect(str(path))
        server = DataServer(hello, log=LOG)
        with pytest.raises(OSError, match=f"cannot listen on unix:{path}: Address already in use"):
            await server.start([f"unix:{path}"])
        assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.parametrize("address", ["127.0.0.1:absent", "a..b:0"], ids=["no such port", "no name at all"])
async def test_an_address_that_cannot_be_looked_up_is_named(address: str) -> None:
    """What the resolver says of it does not say which one was meant."""
    server = DataServer(hello, log=LOG)
    with pytest.raises(OSError, match=f"cannot listen on {address}"):
        await server.start([address])


async def test_connections_beyond_the_limit_are_counted() -> None:
    """What no handler hears of is in no count of requests."""
    server = DataServer(hello, log=LOG, limits=Limits(n_connections=1))
    await server.start(["127.0.0.1:0"])
    host, _, port = server.addresses[0].rpartition(":")
    async with connected((host, int(port))):
        for n in (1, 2):
            async with connected((host, int(port))) as (reader, writer):
                writer.write(get())
                assert (await head_of(reader))[0] == 503
                assert server.n_refused == n
    await server.aclose(5.0)


async def test_an_address_that_is_taken_is_named_and_nothing_listens() -> None:
    """All or nothing, and the sentence says which."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    server = DataServer(hello, log=LOG)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        await server.start(["127.0.0.1:0", f"127.0.0.1:{port}"])
    taken.close()
    assert server.n_connections == 0


async def test_a_socket_that_was_handed_over_is_served() -> None:
    """Connections that queued before we ran are answered: a restart loses none."""
    handed = socket.create_server(("127.0.0.1", 0))
    address = handed.getsockname()
    early = socket.create_connection(address)
    early.setblocking(False)
    server = DataServer(hello, log=LOG)
    await server.start([], [handed])
    reader, writer = await asyncio.open_connection(sock=early)
    writer.write(get())
    assert await head_of(reader) == (200, 5)
    writer.close()
    await writer.wait_closed()
    await server.aclose(0.0)


async def test_a_first_request_that_is_on_its_way_is_answered_when_the_port_closes() -> None:
    """Whoever was accepted before the stop gets an answer, and hears that it is the last."""
    server = DataServer(hello, log=LOG)
    await server.start(["127.0.0.1:0"])
    host, _, port = server.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while server.n_connections == 0:
        await asyncio.sleep(0)
    closing = asyncio.ensure_future(server.aclose(5.0))
    await asyncio.sleep(0)
    writer.write(get())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    await closing


async def test_a_connection_that_hears_of_the_stop_twice_is_waited_for_as_well() -> None:
    """One that is taken from the queue in the very turn in which the stop begins does, and its request is on its way."""
    server = DataServer(hello, log=LOG)
    await server.start(["127.0.0.1:0"])
    host, _, port = server.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while server.n_connections == 0:
        await asyncio.sleep(0)
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(server.aclose(5.0))
        for _ in range(5):
            await asyncio.sleep(0)
        writer.write(get())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
