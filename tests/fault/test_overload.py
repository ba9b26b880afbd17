"""More is asked than may be fetched at once: 503 with Retry-After, and everything works again once there is room."""

from __future__ import annotations

import asyncio
from pathlib import Path

from proxy.engine.blobs import Limits
from tests.support import images
from tests.support.appliance import appliance
from tests.support.registry import Gate, ScriptedRegistry, Twist

IMAGE = images.image(61, (200_000, 100_000))
FIRST, SECOND = (f"/v2/library/alpine/blobs/{blob.digest}" for blob in IMAGE.blobs[-2:])


async def test_beyond_the_limit_of_transfers_a_client_is_told_503_and_when_to_come_back(tmp_path: Path) -> None:
    """`transfers.max_concurrent` and `queue_deadline`: those who run go on, hits are served, nothing piles up."""
    gate = Gate()
    async with ScriptedRegistry(
        Twist(path=f"*{FIRST.rpartition('/')[2]}", method="GET", gate=gate, hold_at=(1000,))
    ) as registry:
        registry.put("library/alpine", IMAGE, "1")
        # The clock of this appliance passes short waits at once: the queue's deadline is over as soon as it begins.
        async with appliance(registry, tmp_path, limits=Limits(1, 1, 1.0)) as serves:
            await serves.get("/v2/library/alpine/manifests/1")
            running = asyncio.create_task(serves.get(FIRST))
            await gate.reached.wait()
            for _ in range(3):
                refused = await serves.get(SECOND)
                assert (refused.status, refused.code) == (503, "UNAVAILABLE")
                assert int(refused.headers["retry-after"]) > 0
            assert (await serves.get("/v2/library/alpine/manifests/1")).body == IMAGE.body
            assert len(registry.asked(f"*{SECOND.rpartition('/')[2]}", "GET")) == 0
            gate.open()
            assert (await running).body == IMAGE.blobs[-2].content
            await serves.quiet()
            assert (await serves.get(SECOND)).body == IMAGE.blobs[-1].content
            await serves.quiet()
