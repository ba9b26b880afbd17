"""engine/listings.py by behaviour: lists are upstream's, and what is known here when it cannot answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from proxy.engine.origins import Origin, SealedUpstream
from proxy.errors import UnknownBlob, UnknownManifest, UnknownName, Unreachable
from proxy.oci import referrers
from proxy.oci.digest import Digest
from proxy.oci.names import Repository
from proxy.rules.freshness import TagPolicy
from tests.support import images
from tests.support.engine import HOST, Engine, FakeUpstream, engine, route, tag

IMAGE = images.image(6, (10,))
SIGNATURE = images.artifact(IMAGE, "application/vnd.test.signature", b"signed")
IMAGE_DIGEST = Digest.parse(IMAGE.digest)
DOWN = Unreachable("down", upstream=HOST)


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream()
    for name in ("b", "a", "c", "B"):
        found.put(IMAGE, name)
    return found


@pytest.fixture
async def running(upstream: FakeUpstream) -> AsyncIterator[Engine]:
    async with engine(upstream) as made:
        yield made


async def tags(
    running: Engine, n: int | None = None, last: str | None = None
) -> tuple[tuple[str, ...], str | None, str]:
    page, outcome = await running.listings.tags(
        route(), running.origin(), n=n, last=last, visible=lambda name: name != "c"
    )
    return page.tags, page.last, outcome


async def test_tags_come_in_the_specs_order_without_what_is_hidden(running: Engine) -> None:
    """distribution-spec § Listing Tags: lexical order, whatever upstream's is."""
    found, following, outcome = await tags(running)
    assert (sorted(found), following, outcome) == (["B", "a", "b"], None, "miss")
    assert [name.lower() for name in found] == ["a", "b", "b"]


async def test_pages_after_the_first_do_not_ask_again(running: Engine, upstream: FakeUpstream) -> None:
    """A client that pages sees one list, and upstream is asked for it once."""
    found: list[str] = []
    last = None
    for _ in range(10):
        page, last, _ = await tags(running, 1, last)
        found += page
        if last is None:
            break
    assert sorted(found) == ["B", "a", "b"]
    assert upstream.count("tags") == 1
    await tags(running)
    assert upstream.count("tags") == 2


async def test_askers_of_one_list_ask_once(running: Engine, upstream: FakeUpstream) -> None:
    """Coalesced like everything else."""
    found = await asyncio.gather(*(tags(running) for _ in range(20)))
    assert sorted(outcome for _, _, outcome in found) == ["coalesced"] * 19 + ["miss"]
    assert upstream.count("tags") == 1


async def test_while_upstream_is_down_the_last_list_is_served_stale(running: Engine, upstream: FakeUpstream) -> None:
    """And without one, its failure is the answer."""
    await tags(running)
    upstream.failure = DOWN
    assert (await tags(running))[2] == "stale"
    await running.clock.advance(301)
    with pytest.raises(Unreachable):
        await tags(running)


async def test_an_unknown_repository_is_unknown(running: Engine) -> None:
    """Upstream's own word."""
    with pytest.raises(UnknownName):
        await running.listings.tags(
            route(Repository.parse("no/where")), running.origin(), n=None, last=None, visible=lambda _: True
        )


# -- referrers ---------------------------------------------------------------------------------------------------------


async def asked(running: Engine) -> tuple[list[str], str, str]:
    found = await running.listings.referrers(route(), running.origin(), IMAGE_DIGEST)
    return [each.artifact_type for each in found.descriptors], found.outcome, found.trouble


async def test_nothing_refers_to_it_is_an_answer(running: Engine) -> None:
    """An empty list, not a 404."""
    assert await asked(running) == ([], "miss", "")


async def test_upstreams_list_is_remembered_as_long_as_a_tag(running: Engine, upstream: FakeUpstream) -> None:
    """Then it is asked again, and finds what was attached since."""
    upstream.put(SIGNATURE)
    assert await asked(running) == (["application/vnd.test.signature"], "miss", "")
    upstream.put(images.artifact(IMAGE, "application/vnd.test.sbom", b"bill"))
    assert await asked(running) == (["application/vnd.test.signature"], "hit", "")
    await running.clock.advance(running.origin().tag_policy.tag_ttl_s)
    assert len((await asked(running))[0]) == 2
    assert upstream.count("referrers") == 2


async def test_without_the_api_the_tag_schema_is_asked(running: Engine, upstream: FakeUpstream) -> None:
    """distribution-spec § Referrers Tag Schema."""
    upstream.has_referrers = False
    index = images.index([SIGNATURE])
    fallback = referrers.fallback_tag(IMAGE_DIGEST)
    upstream.put(index, fallback.value)
    found = await running.listings.referrers(route(), running.origin(), IMAGE_DIGEST)
    assert [str(each.digest) for each in found.descriptors] == [SIGNATURE.digest]


async def test_without_the_api_and_without_the_tag_nothing_refers(running: Engine, upstream: FakeUpstream) -> None:
    """As the spec says."""
    upstream.has_referrers = False
    assert await asked(running) == ([], "miss", "")


async def test_while_upstream_is_down_what_is_known_here_is_told_and_marked(
    running: Engine, upstream: FakeUpstream
) -> None:
    """Signatures that were pulled here are found, with why the list may lack others."""
    upstream.put(SIGNATURE)
    await running.manifests.fetch(route(), running.origin(), Digest.parse(SIGNATURE.digest))
    upstream.failure = DOWN
    assert await asked(running) == (["application/vnd.test.signature"], "stale", "down")


async def test_of_a_digest_that_is_unknown_here_upstreams_failure_is_the_answer(
    running: Engine, upstream: FakeUpstream
) -> None:
    """No false emptiness."""
    upstream.failure = DOWN
    with pytest.raises(Unreachable):
        await asked(running)


# -- sealed ------------------------------------------------------------------------------------------------------------


async def test_a_sealed_upstream_has_what_is_here_and_says_that_it_is_sealed(upstream: FakeUpstream) -> None:
    """Promise 3: a 404 that says sealed. Nobody is asked."""
    async with engine(upstream) as running:
        await running.tags.resolve(route(), running.origin(), tag("a"))
        upstream.asked.clear()
        sealed = running.origins[HOST] = Origin(HOST, SealedUpstream(HOST), TagPolicy(sealed=True))
        assert (await running.tags.resolve(route(), sealed, tag("a"))).outcome == "hit"
        assert (await tags(running))[0] == ("a",)
        assert await asked(running) == ([], "miss", "")
        for failing, error in [
            (running.tags.resolve(route(), sealed, tag("b")), UnknownManifest),
            (running.manifests.fetch(route(), sealed, Digest.of(b"x")), UnknownManifest),
            (running.blobs.open(route(), sealed, Digest.of(b"x")), UnknownBlob),
            (running.blobs.size(route(), sealed, Digest.of(b"x")), UnknownBlob),
            (
                running.listings.tags(
                    route(Repository.parse("no/where")), sealed, n=None, last=None, visible=lambda _: True
                ),
                UnknownName,
            ),
        ]:
            with pytest.raises(error, match="sealed"):
                await failing
        assert upstream.asked == []


async def test_no_record_of_a_sealed_upstream_expires(upstream: FakeUpstream) -> None:
    """Sealed: ten years on the tag, the list of tags and the manifest are what they were, unmarked; nobody is asked."""
    strict = TagPolicy(tag_ttl_s=600.0, stale_if_error_s=0.0, sealed=True)
    async with engine(upstream) as running:
        before = await running.tags.resolve(route(), running.origin(), tag("a"))
        upstream.asked.clear()
        running.origins[HOST] = Origin(HOST, SealedUpstream(HOST), strict)
        await running.clock.advance(2_000)
        running.clock.jump(10 * 365 * 86_400)
        after = await running.tags.resolve(route(), running.origin(), tag("a"))
        assert (after.held.body, after.outcome, after.trouble) == (before.held.body, "hit", "")
        assert (await tags(running))[0] == ("a",)
        digest = before.held.descriptor.digest
        assert (await running.manifests.get(route(), running.origin(), digest))[1] == "hit"
        assert upstream.asked == []
