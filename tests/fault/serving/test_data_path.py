"""The whole data path on both loops: nothing of it blocks, a slow disk holds up nobody else, and answers kept ready are
the answers of the long way.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from aiohttp import web
from blockbuster import BlockingError

from proxy.oci.digest import Digest
from proxy.oci.ranges import Range
from proxy.ports import BlobSource, LocalFile, OpenBlob
from proxy.web.lanes import Disk
from proxy.web.serve import Part, Sender
from tests.support import images
from tests.support.appliance import appliance, serving
from tests.support.clock import ManualClock
from tests.support.engine import FakeUpstream, engine
from tests.support.registry import ScriptedRegistry
from tests.support.serving import PATTERN, FileBlob, body_of, connected, get, head_of, listening, port

IMAGE = images.image(41, (3 * (1 << 20) + 1,))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
LAYER_DIGEST = images.digest_of(LAYER)
BASE = "/v2/library/alpine"


async def test_nothing_blocks_the_loop_on_the_way_of_an_image(tmp_path: Path) -> None:
    """house.md habit 2, by the detector that watches every test here: cold, from the tail, warm, in parts, by HEAD."""
    async with ScriptedRegistry() as registry:
        registry.put("library/alpine", IMAGE, "1")
        async with appliance(registry, tmp_path) as serves:
            for _ in range(4):  # a miss, a hit that is kept, and two of the kept ones
                assert (await serves.get(f"{BASE}/manifests/1")).body == IMAGE.body
            cold = await asyncio.gather(*(serves.get(f"{BASE}/blobs/{LAYER_DIGEST}") for _ in range(4)))
            assert all(answer.body == LAYER for answer in cold)
            await serves.quiet()
            assert (await serves.get(f"{BASE}/blobs/{LAYER_DIGEST}")).body == LAYER
            part = await serves.get(f"{BASE}/blobs/{LAYER_DIGEST}", more={"Range": "bytes=5-70000"})
            assert part.body == LAYER[5:70001]
            assert (await serves.get(f"{BASE}/blobs/{LAYER_DIGEST}", method="HEAD")).status == 200
            assert (await serves.get(f"{BASE}/tags/list")).status == 200
            assert (await serves.get(f"{BASE}/referrers/{IMAGE.digest}")).status == 200
            assert (await serves.get("/v2/")).status == 200


async def test_a_blocking_call_while_sending_is_found_out(tmp_path: Path) -> None:
    """The detector works for the serving half: a disk that is asked in a way that waits, on the loop."""

    class Waits(Disk):
        def is_resident(self, fd: int, start: int, end: int) -> bool:
            return True

        def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            raise OSError(errno.EINVAL, "so that it is copied")

        def read_resident(self, fd: int, offset: int, n_bytes: int) -> bytes | None:
            time.sleep(0.001)
            return b""

    path = tmp_path / "blob"
    path.write_bytes(PATTERN)
    sender = Sender(ManualClock(), disk=Waits(), n_threads=1)
    found: list[BlockingError] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(PATTERN))})
        try:
            await sender.send(request, response, LocalFile(FileBlob(path)), (Range(0, len(PATTERN)),))
        except BlockingError as error:
            found.append(error)
        return response

    async with listening(answer) as address, connected(address) as (reader, writer):
        writer.write(get())
        await head_of(reader)
        assert await reader.read(-1) == b""
    sender.close()
    assert len(found) == 1


async def test_a_blocking_call_in_the_engine_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for the engine: a store that opens on the loop instead of in a thread."""
    upstream = FakeUpstream()
    digest = upstream.put_blob(PATTERN)

    async with engine(upstream) as running:
        assert await running.read(digest) == PATTERN
        await running.idle()

        async def waits(_: Digest) -> OpenBlob | None:
            time.sleep(0.001)
            return None

        monkeypatch.setattr(running.store.blobs, "open", waits)
        with pytest.raises(BlockingError):
            await running.open(digest)


async def test_readers_of_a_disk_that_hangs_hold_up_no_hit(tmp_path: Path) -> None:
    """The loop never waits for the disk: more readers than threads wait for it, and 200 hits are answered meanwhile.

    Told by order and not by time: the disk is let go only after the last hit.
    """
    released = threading.Event()
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    cold.write_bytes(PATTERN)
    warm.write_bytes(PATTERN[:500_000])
    n_waiting = 0
    cold_inode = cold.stat().st_ino

    class Hangs(Disk):
        def read_resident(self, fd: int, offset: int, n_bytes: int) -> bytes | None:
            return None if os.fstat(fd).st_ino == cold_inode else super().read_resident(fd, offset, n_bytes)

        def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            nonlocal n_waiting
            n_waiting += 1
            assert released.wait(60)
            return super().sendfile_cold(out, fd, offset, n_bytes)

    def what(request: web.BaseRequest) -> tuple[BlobSource, Sequence[Part]]:
        blob = FileBlob(cold if request.path == "/cold" else warm)
        return LocalFile(blob), (Range(0, blob.size),)

    async def read_cold() -> None:
        async with connected(served.address) as (reader, writer):
            writer.write(get("/cold"))
            assert await body_of(reader) == PATTERN

    async with port(what, disk=Hangs()) as served:
        readers = [asyncio.create_task(read_cold()) for _ in range(5)]  # of which two find a thread
        async with connected(served.address) as (reader, writer):
            while n_waiting < 2:
                await asyncio.sleep(0)
            for _ in range(200):
                writer.write(get("/warm"))
                assert await body_of(reader) == PATTERN[:500_000]
        assert n_waiting == 2 and not any(reading.done() for reading in readers)
        released.set()
        await asyncio.gather(*readers)


#: What a client may ask of manifests and beside them; `{digest}` is IMAGE's.
REQUESTS = [
    f"{method} {target} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode()
    for method in ("GET", "HEAD")
    for target in (
        f"{BASE}/manifests/1",
        f"{BASE}/manifests/{IMAGE.digest}",
        f"{BASE}/manifests/1?ns=docker.io",
        f"{BASE}/manifests/absent",
        f"{BASE}/blobs/{LAYER_DIGEST}",
        f"{BASE}/tags/list",
        "/v2/",
    )
    for more in (
        "",
        "Accept: */*\r\n",
        f'If-None-Match: "{IMAGE.digest}"\r\n',
        "Range: bytes=0-9\r\n",
        "X-Request-Id: mine\r\n",
        "Authorization: Bearer nothing\r\n",
    )
]


async def test_every_answer_is_the_same_with_the_ready_table_and_without(tmp_path: Path) -> None:
    """performance.md 5: each request three times on kept-alive connections to two ports over one engine."""
    async with ScriptedRegistry() as registry:
        registry.put("library/alpine", IMAGE, "1")
        async with appliance(registry, tmp_path) as serves, serving(serves.engine, is_ready=False) as plain:
            await serves.get(f"{BASE}/manifests/1")
            await serves.get(f"{BASE}/blobs/{LAYER_DIGEST}")
            await serves.quiet()
            table = serves.server._ready
            assert table is not None and plain.server._ready is None
            async with (
                connected(("127.0.0.1", serves.port)) as with_table,
                connected(("127.0.0.1", plain.port)) as without,
            ):
                for request in REQUESTS:
                    answers = [await exchange(streams, request) for streams in (with_table, without) * 3]
                    assert all(answer == answers[1] for answer in answers), request
            # Without If-None-Match, X-Request-Id and Authorization: 3 targets, 2 methods, 3 heads.
            assert len(table) == 18


async def exchange(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> list[bytes]:
    """One answer on an open connection, as its lines without Date, Age and how it was had, and its body."""
    reader, writer = streams
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"Content-Length: (\d+)", head)
    has_body = not request.startswith(b"HEAD") and b" 304 " not in head[:16] and found is not None
    body = await reader.readexactly(int(found[1])) if has_body and found else b""
    lines = head.split(b"\r\n")[:-2]
    return [*sorted(line for line in lines if not line.startswith((b"Date:", b"Age:"))), body]
