"""64 parallel pulls at 99 % of a quota, over real sockets to a real port, before a registry on another: not one byte more.

The same for blobs alone, with pieces that come one by one, is in test_engine_charges.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proxy.rules.quota import Allowance, OnFull
from proxy.rules.routes import ProjectRoute
from tests.support.appliance import Answer, Appliance, appliance
from tests.support.images import Image, image
from tests.support.registry import ScriptedRegistry

N_BEFORE, N_CROWD = 33, 64


def size_of(one: Image) -> int:
    """What a project pays for it: manifest, config and layers."""
    return len(one.body) + sum(len(blob.content) for blob in one.all_blobs())


async def pull(running: Appliance, tag: int, wanted: Image) -> Answer:
    """As a client does it: the manifest, then all that it names; the first refusal, or the last answer."""
    at = "/v2/~team/library/alpine"
    answer = await running.get(f"{at}/manifests/{tag}")
    for blob in wanted.all_blobs() if answer.status == 200 else ():
        answer = await running.get(f"{at}/blobs/{blob.digest}")
        assert (answer.status, answer.body) == (200, blob.content), "whoever was given the manifest gets its blobs"
    return answer


@pytest.mark.parametrize("on_full", ["evict", "bypass", "deny"])
async def test_64_parallel_pulls_at_99_percent_of_a_quota_do_not_overshoot(tmp_path: Path, on_full: OnFull) -> None:
    """Promise 5, watched at every turn of the loop: what is charged and reserved stays within the quota, overshoot 0
    bytes; and in the end the disk has what is charged."""
    images = [image(seed, (6000,)) for seed in range(N_BEFORE + N_CROWD)]
    quota = sum(map(size_of, images[:N_BEFORE])) * 100 // 99
    async with ScriptedRegistry() as upstream:
        for tag, each in enumerate(images):
            upstream.put("library/alpine", each, str(tag))
        allowances = {"team": Allowance(quota, on_full)}
        async with appliance(upstream, tmp_path, projects=(ProjectRoute("team"),), allowances=allowances) as running:
            charges = running.engine.charges
            account = charges.book.of("team")
            for tag, each in enumerate(images[:N_BEFORE]):
                assert (await pull(running, tag, each)).status == 200
            await running.quiet()
            assert account.charged / quota == pytest.approx(0.99, abs=0.001)
            peak = 0

            async def watch() -> None:
                nonlocal peak
                while True:
                    peak = max(peak, account.used)
                    await asyncio.sleep(0)

            watching = asyncio.get_running_loop().create_task(watch())
            crowd = [pull(running, tag, images[tag]) for tag in range(N_BEFORE, N_BEFORE + N_CROWD)]
            answers = await asyncio.gather(*crowd)
            await running.quiet()
            await charges.sweep()
            watching.cancel()

            overshoot = max(0, peak - quota)
            assert overshoot == 0
            assert peak > 0.99 * quota, "it was tight"
            denied = [answer for answer in answers if answer.status != 200]
            assert all((answer.status, answer.code) == (403, "DENIED") for answer in denied)
            assert all("rule 'quota' of project 'team'" in answer.message for answer in denied)
            assert bool(denied) is (on_full == "deny")
            assert account.reserved == 0
            stored = {blob.digest: blob.size async for batch in running.engine.store.blobs.scan() for blob in batch}
            assert sum(stored.values()) == account.charged <= quota
            assert dict(account) == stored
