"""What lets an answer be kept ready (Pull.vouch), and what takes that back: no shortcut may change an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.engine.manifests import holding_of
from proxy.engine.purge import Purge
from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.ports import TagRecord
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT
from tests.support import images
from tests.support.engine import ALPINE, Engine, FakeUpstream, engine, route, tag

IMAGE, OTHER = images.image(71, (100,)), images.image(72, (100,))
BY_TAG = ManifestGet(RepositoryPath(None, ALPINE.value), tag("1"), None)
BY_DIGEST = ManifestGet(RepositoryPath(None, ALPINE.value), Digest.parse(IMAGE.digest), None)
BOTH = pytest.mark.parametrize("asked", [BY_TAG, BY_DIGEST], ids=["by tag", "by digest"])


def upstream() -> FakeUpstream:
    one = FakeUpstream()
    one.put(IMAGE, "1")
    one.put(OTHER, "2")
    return one


async def vouched(running: Engine, asked: ManifestGet):  # type: ignore[no-untyped-def]
    """Ask until it is a hit, and what vouches for that one."""
    await running.pull.manifest(BY_TAG)
    await running.idle()
    pulled = await running.pull.manifest(asked)
    assert pulled.outcome == "hit"
    again = running.pull.vouch(asked, pulled)
    assert again is not None and again() is not None
    return again


@BOTH
async def test_a_purge_takes_it_back(asked: ManifestGet) -> None:
    """What was taken out is not served from a table either."""
    async with engine(upstream()) as running:
        again = await vouched(running, asked)
        purge = Purge(running.store.records, running.links, running.tags, running.manifests, running.capacity)
        await purge.run(f"docker.io/{ALPINE.value}:1")
        assert again() is None


@BOTH
async def test_another_plan_takes_it_back(asked: ManifestGet) -> None:
    """A reload swaps the plan; every verdict is made anew."""
    async with engine(upstream()) as running:
        again = await vouched(running, asked)
        running.pull.plan = replace(running.pull.plan)
        assert again() is None


async def test_a_tag_is_vouched_for_until_its_time_is_up() -> None:
    """INV-6: then upstream is asked, and the long way does that. A digest has no time."""
    async with engine(upstream()) as running:
        by_tag, by_digest = await vouched(running, BY_TAG), await vouched(running, BY_DIGEST)
        await running.clock.advance(599)
        assert by_tag() == 599
        await running.clock.advance(2)
        assert by_tag() is None
        assert by_digest() is not None


async def test_a_tag_that_a_bundle_moves_is_not_vouched_for_as_it_was() -> None:
    """An import says what a tag means from now on, well within the old answer's time."""
    async with engine(upstream()) as running:
        again = await vouched(running, BY_TAG)
        moved = (await running.pull.manifest(replace(BY_TAG, target=tag("2")))).held.descriptor
        await running.tags.learn(holding_of(route()), TagRecord("1", moved, running.clock.wall()))
        assert again() is None


async def test_a_project_that_cannot_pay_takes_the_long_way() -> None:
    """The refusal is said by the long way; the short one never raises into the connection."""
    async with engine(upstream(), allowances={DEFAULT_PROJECT: Allowance(quota=1 << 20, on_full="deny")}) as running:
        again = await vouched(running, BY_DIGEST)

        def refuses(project: str, digest: Digest) -> None:
            raise Denied("full", rule="quota", project=project)

        running.charges.use = refuses  # type: ignore[method-assign]
        assert again() is None
