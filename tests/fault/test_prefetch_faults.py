"""A prefetch that is killed, or told to slow down: the real command against a scripted registry that counts."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.support.clients import TEST_HOST
from tests.support.commands import Done, breakwater_command
from tests.support.images import KIB, MIB, Blob, image, manifest
from tests.support.process import Breakwater, eventually
from tests.support.registry import Gate, ScriptedRegistry, Twist

NAME = f"{TEST_HOST}/team/app:1"
CONFIG = "application/vnd.oci.image.config.v1+json"


def blobs_of(mirror: Breakwater) -> int:
    """Files under blobs/: complete, by their names."""
    return sum(path.is_file() for path in (mirror.store / "breakwater" / "blobs").rglob("*"))


async def fetched(mirror: Breakwater, *more: str) -> Done:
    return await asyncio.to_thread(breakwater_command, mirror, "prefetch", "--json", NAME, *more)


async def test_a_prefetch_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Issue 8, resumes: kill -9 half way; what was complete is not asked for again, and of what was on its way only the
    rest."""
    gate = Gate()
    small = image(1, (20 * KIB, 30 * KIB, 40 * KIB))
    big = Blob(bytes(range(256)) * (24 * MIB // 256), "application/vnd.oci.image.layer.v1.tar")
    wanted = manifest(small.blobs[0], [*small.blobs[1:], big])
    path = f"/v2/team/app/blobs/{big.digest}"
    async with ScriptedRegistry(Twist(path=path, method="GET", gate=gate, hold_at=(20 * MIB,), times=1)) as registry:
        registry.put("team/app", wanted, "1")
        mirror = Breakwater(tmp_path, {"upstreams": {TEST_HOST: {"url": registry.url}}})
        command = [sys.executable, "-m", "proxy", "prefetch", "--config", str(mirror.settings_path), NAME]
        child = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await gate.reached.wait()
        # The manifest, its config and the three small layers; and on disk as well what has come of the big one.
        await asyncio.to_thread(eventually, lambda: blobs_of(mirror) == 5, "what is not held back is there")
        ingest = mirror.store / "breakwater" / "ingest"
        await asyncio.to_thread(
            eventually, lambda: any(one.stat().st_size >= 17 * MIB for one in ingest.iterdir()), "most of it is there"
        )
        child.kill()
        await child.wait()
        gate.open()
        done = await fetched(mirror)
        assert done.code == 0, done.err
        assert done.report["images"][0]["digest"] == wanted.digest
        assert done.report["images"][0]["missing"] == {}
        assert blobs_of(mirror) == 6

        gets = {(target, ranged): n for (method, target, ranged), n in registry.counts.items() if method == "GET"}
        small_ones = [f"/v2/team/app/blobs/{blob.digest}" for blob in small.blobs]
        assert {target: gets[target, ""] for target in small_ones} == dict.fromkeys(small_ones, 1)
        [rest] = [ranged for target, ranged in gets if target == path and ranged]
        assert int(rest.removeprefix("bytes=").rstrip("-")) >= 16 * MIB
        assert gets[path, ""] == gets[path, rest] == 1
        assert sum(n for (target, _), n in gets.items() if "/manifests/sha256:" in target) == 0
        assert gets["/v2/team/app/manifests/1", ""] == 1, "the tag was resolved once, and that was recorded"


async def test_a_throttled_prefetch_waits_and_goes_on(tmp_path: Path) -> None:
    """Issue 8, polite: after a 429 nobody of it asks again before Retry-After is over, and then all of it comes."""
    wanted = image(2, tuple(10 * KIB for _ in range(12)))
    told = Twist(path="/v2/team/app/blobs/*", method="GET", after=3, times=1, status=429, add=[("Retry-After", "2")])
    async with ScriptedRegistry(told) as registry:
        registry.put("team/app", wanted, "1")
        mirror = Breakwater(tmp_path, {"upstreams": {TEST_HOST: {"url": registry.url}}})
        done = await fetched(mirror)
        assert done.code == 0, done.err
        assert done.report["images"][0]["missing"] == {}
        statuses = [one.status for one in registry.log if "/blobs/" in one.path]
        assert statuses.count(429) == 1
        assert statuses.count(200) == len(wanted.blobs)
        assert len(statuses) == len(wanted.blobs) + 1, "one question too many, and that is all it cost upstream"
