"""Bodies that break, lie or crawl (reliability.md §3, T02): a body ends clean only if it is whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.errors import Misbehaved, Timeout, Unreachable, UpstreamError
from proxy.oci.digest import Digest
from proxy.ports import BlobBody
from proxy.upstream.policy import Pace
from tests.support.registry import Gate, ScriptedRegistry, Twist, redirect
from tests.support.upstream import ALPINE, Asking, asking

CONTENT = bytes(range(256)) * 1024  # 256 KiB, different at every offset of a page
DIGEST = Digest.of(CONTENT)


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as scripted:
        scripted.put_blob(str(ALPINE), CONTENT)
        yield scripted


@pytest.fixture
async def asked(registry: ScriptedRegistry) -> AsyncIterator[Asking]:
    async with asking(registry) as made:
        yield made


async def read_to_the_end(body: BlobBody) -> bytes:
    """What can be read, and then closed, whatever happens; a failure is raised."""
    pieces = []
    try:
        while piece := await body.read():
            pieces.append(piece)
    finally:
        await body.close()
    return b"".join(pieces)


async def whole_blob(asked: Asking, offset: int = 0) -> bytes:
    """The blob from `offset` on."""
    return await read_to_the_end(await asked.client.blob(ALPINE, DIGEST, offset=offset))


def agrees(asked: Asking, registry: ScriptedRegistry) -> bool:
    """Whether what the client says it sent is what the registry's own log has."""
    ours = Counter((method, status) for _, method, status in asked.asked)
    return ours == Counter((line.method, line.status) for line in registry.log)


# -- that break --------------------------------------------------------------------------------------------------------

BREAKS: dict[str, dict[str, Any]] = {
    "short of its length": {"cut": "fin"},
    "reset": {"cut": "rst"},
    "chunks cut short": {"cut": "fin", "framing": "chunked"},
    "chunks reset": {"cut": "rst", "framing": "chunked"},
    "resumed, short of its range": {"cut": "fin", "offset": 1000},
    "resumed, chunks cut short": {"cut": "fin", "framing": "chunked", "offset": 1000},
}


@pytest.mark.parametrize("sixteenth", range(16))
@pytest.mark.parametrize("how", BREAKS.values(), ids=BREAKS.keys())
async def test_body_that_breaks_never_ends_clean(
    registry: ScriptedRegistry, asked: Asking, how: dict[str, Any], sixteenth: int
) -> None:
    """INV-3 begins here: b"" is returned only after every byte that was announced."""
    offset = how.get("offset", 0)
    twist = {key: value for key, value in how.items() if key != "offset"}
    registry.rewrite(Twist(**twist, cut_at=(len(CONTENT) - offset) * sixteenth // 16))
    with pytest.raises(Unreachable):
        await whole_blob(asked, offset)
    registry.rewrite()
    assert await whole_blob(asked) == CONTENT
    assert agrees(asked, registry)


async def test_body_without_a_length_has_no_size(registry: ScriptedRegistry, asked: Asking) -> None:
    """What ends with its connection looks whole whenever it ends: the digest alone can tell, and no `size` says so."""
    registry.rewrite(Twist(framing="eof", cut_at=1000))
    body = await asked.client.blob(ALPINE, DIGEST)
    assert body.size is None
    assert await read_to_the_end(body) == CONTENT[:1000]


async def test_resumed_body_without_a_length_is_measured_by_its_range(
    registry: ScriptedRegistry, asked: Asking
) -> None:
    """Content-Range tells the size where Content-Length does not."""
    registry.rewrite(Twist(framing="eof", cut_at=1000))
    body = await asked.client.blob(ALPINE, DIGEST, offset=500)
    assert body.size == len(CONTENT)
    with pytest.raises(Unreachable):
        await read_to_the_end(body)


async def test_body_longer_than_its_range_is_a_lie(registry: ScriptedRegistry, asked: Asking) -> None:
    """More bytes than the blob has are not content."""
    part = [("Content-Range", "bytes 500-1499/1500")]
    registry.rewrite(Twist(framing="chunked", body=b"x" * 2000, status=206, add=part))
    with pytest.raises(Misbehaved):
        await whole_blob(asked, 500)


async def test_bytes_after_the_body_reach_nobody(registry: ScriptedRegistry, asked: Asking) -> None:
    """What follows Content-Length is not of this body, nor the beginning of the next answer."""
    registry.rewrite(Twist(times=1, extra=b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
    assert await whole_blob(asked) == CONTENT
    assert await whole_blob(asked) == CONTENT


async def test_bytes_that_lie_are_passed_on_for_the_digest_to_judge(registry: ScriptedRegistry, asked: Asking) -> None:
    """Hashing is the ingest's; the client promises length, not truth."""
    registry.rewrite(Twist(flip_at=77))
    found = await whole_blob(asked)
    assert len(found) == len(CONTENT) and found != CONTENT


NOT_HTTP = {
    "nonsense": b"SSH-2.0-OpenSSH_9.2\r\n",
    "HTML at once": b"<html>hello</html>",
    "length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
    "status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "header of 20 kB": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "500 headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"Content-Length: 0\r\n\r\n",
    "header without a colon": b"HTTP/1.1 200 OK\r\nhello there\r\nContent-Length: 0\r\n\r\n",
    "NUL in a header": b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("raw", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_answer_that_is_not_http_is_misbehaviour(registry: ScriptedRegistry, asked: Asking, raw: bytes) -> None:
    """What cannot be read with certainty is not read at all."""
    registry.rewrite(Twist(raw=raw))
    with pytest.raises(Misbehaved):
        await asked.client.blob(ALPINE, DIGEST)


async def test_chunks_that_make_no_sense_break_the_body(registry: ScriptedRegistry, asked: Asking) -> None:
    """CVE-2026-69244 was here: what is malformed ends the body, and never cleanly."""
    registry.rewrite(Twist(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\nde\r\n"))
    with pytest.raises(UpstreamError):
        await whole_blob(asked)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_connection_that_drops_before_an_answer_is_reported_once(
    registry: ScriptedRegistry, asked: Asking, how: Any
) -> None:
    """One call, one GET (reliability.md §0.9): no unseen second one, on a fresh connection or a used one."""
    await whole_blob(asked)
    registry.rewrite(Twist(no_answer=how))
    for _ in range(3):
        with pytest.raises(Unreachable):
            await asked.client.blob(ALPINE, DIGEST)
    assert len(registry.requests) == 4
    assert agrees(asked, registry)


# -- that resume -------------------------------------------------------------------------------------------------------


async def test_resuming_asks_for_the_same_object(registry: ScriptedRegistry, asked: Asking) -> None:
    """Range, and If-Range with the ETag of the first answer (RFC 9110 §13.1.5)."""
    await whole_blob(asked)
    assert await whole_blob(asked, 1000) == CONTENT[1000:]
    resumed = registry.requests[-1]
    assert (resumed.header("Range"), resumed.header("If-Range")) == ("bytes=1000-", f'"{DIGEST}"')


async def test_etag_is_told_to_the_origin_that_gave_it_alone(registry: ScriptedRegistry) -> None:
    """Storage knows nothing of the registry's ETags, and a mismatch would only send the whole again."""
    async with ScriptedRegistry() as storage:
        storage.put_blob("s", CONTENT)
        registry.rewrite(redirect(f"{storage.url}/v2/s/blobs/{DIGEST}"))
        async with asking(registry, allow_private=True) as there:
            await read_to_the_end(await there.client.blob(ALPINE, DIGEST))
            await read_to_the_end(await there.client.blob(ALPINE, DIGEST, offset=5))
        assert registry.requests[-1].header("If-Range") == ""
        assert registry.requests[-1].header("Range") == "bytes=5-"
        assert storage.requests[-1].header("If-Range") == f'"{DIGEST}"'
        assert storage.requests[-1].header("Range") == "bytes=5-"


async def test_whole_answer_to_a_range_starts_at_zero(registry: ScriptedRegistry, asked: Asking) -> None:
    """Registries may ignore a range; `offset` says that they did."""
    registry.rewrite(Twist(ignores_range=True))
    body = await asked.client.blob(ALPINE, DIGEST, offset=1000)
    assert (body.offset, body.size) == (0, len(CONTENT))
    assert await read_to_the_end(body) == CONTENT


WRONG_PARTS = {
    "another start": [("Content-Range", f"bytes 999-{len(CONTENT) - 2}/{len(CONTENT)}")],
    "another total": [("Content-Range", f"bytes 1000-{len(CONTENT)}/{len(CONTENT) + 1}")],
    "another ETag": [("ETag", '"another"')],
    "no Content-Range": [("Content-Range", "")],
    "nonsense": [("Content-Range", "bytes all of them")],
    "encoded": [("Content-Encoding", "gzip")],
}


@pytest.mark.parametrize("headers", WRONG_PARTS.values(), ids=WRONG_PARTS.keys())
async def test_part_of_something_else_is_refused(
    registry: ScriptedRegistry, asked: Asking, headers: list[tuple[str, str]]
) -> None:
    """Bytes of two objects are never joined (reliability.md §3)."""
    await whole_blob(asked)
    registry.rewrite(Twist(add=headers))
    with pytest.raises(Misbehaved):
        await asked.client.blob(ALPINE, DIGEST, offset=1000)


async def test_blob_that_has_become_shorter_is_refused(registry: ScriptedRegistry, asked: Asking) -> None:
    """416 to a range that was fine before: not the same object."""
    with pytest.raises(Misbehaved):
        await asked.client.blob(ALPINE, DIGEST, offset=len(CONTENT) + 5)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip"])
async def test_encoded_blob_is_refused(registry: ScriptedRegistry, asked: Asking, encoding: str) -> None:
    """Other bytes than the digest's; we asked for none (Accept-Encoding: identity)."""
    registry.rewrite(Twist(add=[("Content-Encoding", encoding)]))
    with pytest.raises(Misbehaved):
        await asked.client.blob(ALPINE, DIGEST)
    assert registry.requests[-1].header("Accept-Encoding") == "identity"


async def test_partial_answer_to_a_whole_request_is_refused(registry: ScriptedRegistry, asked: Asking) -> None:
    """206 belongs to ranges."""
    registry.rewrite(Twist(status=206, add=[("Content-Range", f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")]))
    with pytest.raises(Misbehaved):
        await asked.client.blob(ALPINE, DIGEST)


# -- that crawl --------------------------------------------------------------------------------------------------------


async def test_silent_body_is_given_up(registry: ScriptedRegistry) -> None:
    """Nothing at all for a whole window."""
    gate = Gate()
    registry.rewrite(Twist(gate=gate, hold_at=[1000]))
    async with asking(registry, pace=Pace(min_bytes_per_s=1e6, window_s=0.05)) as asked:
        with pytest.raises(Timeout):
            await whole_blob(asked)


async def test_crawling_body_is_given_up_by_the_clock(registry: ScriptedRegistry, asked: Asking) -> None:
    """Bytes now and then reset no timer: what counts is how many came in the time that was waited."""
    gate, stops = Gate(), list(range(0, 10_000, 1000))
    registry.rewrite(Twist(gate=gate, hold_at=stops))
    body = await asked.client.blob(ALPINE, DIGEST)
    with pytest.raises(Timeout):
        for _ in stops:
            await gate.reached.wait()
            reading = asyncio.ensure_future(body.read())
            await asyncio.sleep(0)
            await asked.clock.advance(10)
            gate.step()
            await reading
    await body.close()


async def test_slow_body_that_keeps_the_pace_is_read_to_its_end(registry: ScriptedRegistry, asked: Asking) -> None:
    """No total deadline: a big layer over a thin line may take hours."""
    gate, stops = Gate(), list(range(0, len(CONTENT), len(CONTENT) // 16))
    registry.rewrite(Twist(gate=gate, hold_at=stops))
    body = await asked.client.blob(ALPINE, DIGEST)
    found = b""
    for _ in stops:
        await gate.reached.wait()
        reading = asyncio.ensure_future(body.read())
        await asyncio.sleep(0)
        await asked.clock.advance(1.5)
        gate.step()
        found += await reading
    while piece := await body.read():
        found += piece
    await body.close()
    assert found == CONTENT


async def test_time_in_which_we_do_not_read_does_not_count(registry: ScriptedRegistry, asked: Asking) -> None:
    """A slow disk of ours is not a slow upstream."""
    body = await asked.client.blob(ALPINE, DIGEST)
    found = b""
    while piece := await body.read():
        found += piece
        await asked.clock.advance(3600)
    await body.close()
    assert found == CONTENT


# -- that are left -----------------------------------------------------------------------------------------------------


async def test_connection_is_used_again_only_after_a_whole_body(registry: ScriptedRegistry, asked: Asking) -> None:
    """A half-read connection in the pool gives the next asker somebody else's bytes (aiohttp #12795)."""
    gate = Gate()
    for _ in range(3):
        await whole_blob(asked)
    assert registry.n_connections == 1
    registry.rewrite(Twist(times=1, gate=gate, hold_at=[1000]))
    body = await asked.client.blob(ALPINE, DIGEST)
    await body.read()
    await body.close()
    assert await whole_blob(asked) == CONTENT
    assert registry.n_connections == 2


async def test_cancelled_reader_leaves_nothing_half_read(registry: ScriptedRegistry, asked: Asking) -> None:
    """Cancelled in the middle of a wait, then closed: the connection is gone, the next answer is right."""
    gate = Gate()
    registry.rewrite(Twist(times=20, gate=gate, hold_at=[0]))
    for _ in range(20):
        body = await asked.client.blob(ALPINE, DIGEST)
        reading = asyncio.ensure_future(body.read())
        await gate.reached.wait()
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await body.close()
    assert await whole_blob(asked) == CONTENT


async def test_asker_cancelled_before_the_headers_is_counted_and_leaves_nothing(
    registry: ScriptedRegistry, asked: Asking
) -> None:
    """The request was sent, so it counts; nobody is there for its answer."""
    gate = Gate()
    registry.rewrite(Twist(times=5, gate=gate, holds_headers=True))
    for _ in range(5):
        asking_it = asyncio.ensure_future(asked.client.blob(ALPINE, DIGEST))
        await gate.reached.wait()
        gate.reached.clear()
        asking_it.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking_it
    assert await whole_blob(asked) == CONTENT
    assert agrees(asked, registry)


@pytest.mark.parametrize("where", [{"hold_at": [0]}, {"holds_headers": True}], ids=["body", "headers"])
async def test_asker_is_woken_when_the_client_is_closed(
    registry: ScriptedRegistry, asked: Asking, where: dict[str, Any]
) -> None:
    """At a stop nothing hangs, and later calls say why they fail."""
    gate = Gate()
    registry.rewrite(Twist(gate=gate, **where))
    reading = asyncio.ensure_future(whole_blob(asked))
    await gate.reached.wait()
    await asyncio.sleep(0)
    await asked.client.aclose()
    with pytest.raises(Unreachable):
        await reading
    with pytest.raises(Unreachable, match="stopping"):
        await asked.client.blob(ALPINE, DIGEST)


async def test_reader_is_woken_when_the_client_is_closed(registry: ScriptedRegistry, asked: Asking) -> None:
    """In the middle of a body, where closing a session wakes nobody."""
    gate = Gate()
    registry.rewrite(Twist(gate=gate, hold_at=[0]))
    body = await asked.client.blob(ALPINE, DIGEST)
    reading = asyncio.ensure_future(body.read())
    await gate.reached.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    await asked.client.aclose()
    with pytest.raises(Unreachable):
        await reading
    await body.close()


async def test_bytes_are_counted_as_upstream_counts_them(registry: ScriptedRegistry, asked: Asking) -> None:
    """Errors and redirects have bodies too."""
    registry.put_blob(str(ALPINE), b"more")
    await whole_blob(asked)
    await whole_blob(asked, 100)
    await asked.client.blob_size(ALPINE, Digest.of(b"more"))
    registry.rewrite(Twist(times=1, status=500, body=b"oops"), redirect("/v2/library/alpine/blobs/x", times=1))
    with pytest.raises(Unreachable):
        await asked.client.blob(ALPINE, DIGEST)
    assert asked.n_bytes == sum(line.n_bytes for line in registry.log)
    assert agrees(asked, registry)
