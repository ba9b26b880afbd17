"""engine/tags.py by behaviour: what a tag means, for how long, and how often upstream is asked (INV-6)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from proxy.engine.manifests import MAX_NEGATIVES
from proxy.engine.tags import RECHECK_AFTER_S, STALE_AFTER_S, Resolved
from proxy.errors import (
    BreakwaterError,
    Misbehaved,
    Throttled,
    Timeout,
    Unauthorised,
    UnknownManifest,
    Unreachable,
)
from proxy.events import TagMoved
from proxy.oci.digest import Digest
from proxy.rules.freshness import TagPolicy
from proxy.store.memory import MemoryStore
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.engine import HOST, Engine, FakeUpstream, engine, route, tag

ONE, TWO = images.image(1, (10,)), images.image(2, (10,))
TTL_S = TagPolicy().tag_ttl_s

FAILURES: dict[str, BreakwaterError] = {
    "unreachable": Unreachable("no connection", upstream=HOST),
    "timeout": Timeout("too slow", upstream=HOST),
    "throttled": Throttled("later", upstream=HOST, retry_after_s=7.0),
    "unauthorised": Unauthorised("refused", upstream=HOST),
    "misbehaved": Misbehaved("nonsense", upstream=HOST),
}


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream()
    found.put(ONE, "1")
    return found


@pytest.fixture
async def running(upstream: FakeUpstream) -> AsyncIterator[Engine]:
    async with engine(upstream) as made:
        yield made


async def resolve(running: Engine, name: str = "1") -> Resolved:
    return await running.tags.resolve(route(), running.origin(), tag(name))


def body(resolved: Resolved) -> bytes:
    return resolved.held.body


async def turns(n: int = 30) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


# -- how often upstream is asked ---------------------------------------------------------------------------------------


async def test_a_fresh_tag_is_served_without_asking(running: Engine, upstream: FakeUpstream) -> None:
    """INV-6: within tag_ttl the record is the answer, and Age says how old it is."""
    first = await resolve(running)
    await running.clock.advance(TTL_S - 1)
    second = await resolve(running)
    assert (first.outcome, second.outcome) == ("miss", "hit")
    assert (first.age_s, second.age_s) == (0.0, TTL_S - 1)
    assert upstream.kinds() == ["manifest"]


async def test_a_hundred_cold_askers_ask_once(running: Engine, upstream: FakeUpstream) -> None:
    """Requests for one tag coalesce: one miss, and the others waited for it."""
    found = await asyncio.gather(*(resolve(running) for _ in range(100)))
    assert {body(each) for each in found} == {ONE.body}
    assert Counter(each.outcome for each in found) == {"miss": 1, "coalesced": 99}
    assert upstream.kinds() == ["manifest"]


async def test_two_hundred_askers_of_an_expired_tag_revalidate_once(running: Engine, upstream: FakeUpstream) -> None:
    """One HEAD, which is free where GET is counted, for any number of clients."""
    await resolve(running)
    await running.clock.advance(TTL_S)
    found = await asyncio.gather(*(resolve(running) for _ in range(200)))
    assert {(body(each), each.age_s, each.trouble) for each in found} == {(ONE.body, 0.0, "")}
    assert upstream.kinds() == ["manifest", "manifest head"]


async def test_askers_of_a_tag_that_has_moved_share_one_fetch(running: Engine, upstream: FakeUpstream) -> None:
    """The move is told once, and the old digest stays readable: only the name has moved."""
    await resolve(running)
    upstream.put(TWO, "1")
    await running.clock.advance(TTL_S)
    found = await asyncio.gather(*(resolve(running) for _ in range(50)))
    assert {body(each) for each in found} == {TWO.body}
    assert Counter(each.outcome for each in found) == {"miss": 1, "coalesced": 49}
    assert upstream.kinds() == ["manifest", "manifest head", "manifest"]
    moves = [event for event in running.events if isinstance(event, TagMoved)]
    assert [(move.was, move.now) for move in moves] == [(ONE.digest, TWO.digest)]
    held, outcome = await running.manifests.get(route(), running.origin(), Digest.parse(ONE.digest))
    assert (held.body, outcome) == (ONE.body, "hit")


async def test_an_upstream_whose_head_tells_no_digest_is_asked_for_the_manifest(upstream: FakeUpstream) -> None:
    """Each part of a HEAD's answer may be missing (peers.md §5.5); then only the bytes can tell."""
    upstream.says_digest = False
    async with engine(upstream) as running:
        await resolve(running)
        await running.clock.advance(TTL_S)
        assert body(await resolve(running)) == ONE.body
        assert upstream.kinds() == ["manifest", "manifest head", "manifest"]


async def test_an_asker_who_leaves_does_not_end_the_asking(running: Engine, upstream: FakeUpstream) -> None:
    """The flight belongs to the engine: whoever comes next finds it further, or done."""
    upstream.gate = asyncio.Event()
    first = asyncio.create_task(resolve(running))
    await turns()
    first.cancel()
    second = asyncio.create_task(resolve(running))
    await turns()
    upstream.gate.set()
    assert body(await second) == ONE.body
    assert upstream.kinds() == ["manifest"]


# -- when upstream cannot answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_a_failing_upstream_yields_the_stale_answer_and_says_why(
    running: Engine, upstream: FakeUpstream, failure: BreakwaterError
) -> None:
    """INV-6: past tag_ttl nothing goes out unmarked; and an outage upstream does not break what is cached."""
    await resolve(running)
    await running.clock.advance(TTL_S + 5)
    upstream.failure = failure
    found = await resolve(running)
    assert (body(found), found.outcome, found.age_s, found.trouble) == (ONE.body, "stale", TTL_S + 5, str(failure))


async def test_a_tag_that_moved_to_nonsense_is_served_stale(running: Engine, upstream: FakeUpstream) -> None:
    """A manifest that is none is upstream's failure, not the tag's end."""
    await resolve(running)
    await running.clock.advance(TTL_S)
    upstream.put(images.Image(b"<html>", images.OCI_MANIFEST), "1")
    found = await resolve(running)
    assert (body(found), found.outcome) == (ONE.body, "stale")


async def test_a_head_that_names_what_upstream_does_not_have_forgets_no_tag(
    running: Engine, upstream: FakeUpstream
) -> None:
    """A replica that lags, or a lie: the tag itself is asked for, and only its own "not found" is one."""
    await resolve(running)
    upstream.put(TWO, "1")
    upstream.remove(TWO.digest)
    await running.clock.advance(TTL_S)
    found = await resolve(running)
    assert (body(found), found.trouble) == (TWO.body, "")
    assert [one.what for one in upstream.asked] == ["1", "1", TWO.digest, "1"]


async def test_after_a_failure_upstream_is_left_in_peace_for_a_while(running: Engine, upstream: FakeUpstream) -> None:
    """Stale is served at once; then one asks again."""
    await resolve(running)
    await running.clock.advance(TTL_S)
    upstream.failure = FAILURES["unreachable"]
    for _ in range(20):
        assert (await resolve(running)).outcome == "stale"
    assert upstream.count("manifest head") == 1
    await running.clock.advance(RECHECK_AFTER_S)
    upstream.failure = None
    found = await resolve(running)
    assert (found.outcome, found.age_s, found.trouble) == ("hit", 0.0, "")
    assert upstream.count("manifest head") == 2


async def test_a_slow_revalidation_yields_stale_after_two_seconds_and_goes_on(
    running: Engine, upstream: FakeUpstream
) -> None:
    """product.md, promise 3: what is cached is answered within 2 seconds whatever the upstream does."""
    await resolve(running)
    await running.clock.advance(TTL_S)
    upstream.gate = asyncio.Event()
    asking = [asyncio.create_task(resolve(running)) for _ in range(10)]
    await turns()
    await running.clock.advance(STALE_AFTER_S - 0.01)
    assert not any(task.done() for task in asking)
    await running.clock.advance(0.01)
    for found in await asyncio.gather(*asking):
        assert (body(found), found.outcome) == (ONE.body, "stale")
        assert "more than 2 s" in found.trouble
    upstream.gate.set()
    await running.idle()
    found = await resolve(running)
    assert (found.outcome, found.trouble) == ("hit", "")
    assert upstream.count("manifest head") == 1


async def test_later_askers_of_a_slow_revalidation_do_not_wait_anew(running: Engine, upstream: FakeUpstream) -> None:
    """The two seconds are the revalidation's, not each asker's: an upstream that hangs must not slow every pull."""
    await resolve(running)
    await running.clock.advance(TTL_S)
    upstream.gate = asyncio.Event()
    first = asyncio.create_task(resolve(running))
    await turns()
    await running.clock.advance(STALE_AFTER_S / 2)
    second = asyncio.create_task(resolve(running))
    await turns()
    await running.clock.advance(STALE_AFTER_S / 2)
    assert [(await one).outcome for one in (first, second)] == ["stale", "stale"]
    before = running.clock.monotonic()
    for _ in range(20):
        found = await resolve(running)
        assert (body(found), found.outcome) == (ONE.body, "stale")
        assert "more than 2 s" in found.trouble
    assert running.clock.monotonic() == before
    assert upstream.count("manifest head") == 1
    upstream.gate.set()
    await running.idle()
    assert (await resolve(running)).outcome == "hit"


async def test_what_is_too_old_is_refused_while_upstream_fails(upstream: FakeUpstream) -> None:
    """stale_if_error counts from the end of tag_ttl; past it the failure itself is the answer."""
    async with engine(upstream, tag_policy=TagPolicy(60.0, 100.0)) as running:
        await resolve(running)
        upstream.failure = FAILURES["unreachable"]
        await running.clock.advance(159)
        assert (await resolve(running)).outcome == "stale"
        await running.clock.advance(1)
        with pytest.raises(Unreachable):
            await resolve(running)
        upstream.failure = None
        assert (await resolve(running)).outcome == "hit"


async def test_a_tag_never_seen_is_what_upstream_says(running: Engine, upstream: FakeUpstream) -> None:
    """No false 404: "could not find out" is the failure itself."""
    upstream.failure = FAILURES["timeout"]
    with pytest.raises(Timeout):
        await resolve(running)


# -- clocks ------------------------------------------------------------------------------------------------------------


async def test_a_machine_that_starts_in_1970_serves_what_it_has() -> None:
    """An impossible age is stale, never refused, whatever stale_if_error says; asked, upstream makes it fresh."""
    upstream, store = FakeUpstream(), MemoryStore()
    upstream.put(ONE, "1")
    async with engine(upstream, store=store) as running:
        await resolve(running)
    upstream.failure = FAILURES["unreachable"]
    never_stale = TagPolicy(TTL_S, 0.0)
    async with engine(upstream, store=store, clock=ManualClock(wall=12.0), tag_policy=never_stale) as running:
        found = await resolve(running)
        assert (body(found), found.outcome, found.age_s) == (ONE.body, "stale", None)
        upstream.failure = None
        await running.clock.advance(RECHECK_AFTER_S)
        assert ((await resolve(running)).outcome, (await resolve(running)).age_s) == ("hit", 0.0)
    await store.aclose()


async def test_a_clock_that_is_set_while_running_ages_nothing(running: Engine, upstream: FakeUpstream) -> None:
    """What this process validated is aged by the monotonic clock."""
    await resolve(running)
    running.clock.jump(10 * 365 * 86400)
    assert (await resolve(running)).outcome == "hit"
    running.clock.jump(-20 * 365 * 86400)
    assert (await resolve(running)).outcome == "hit"
    assert upstream.kinds() == ["manifest"]


async def test_a_record_outlives_the_process() -> None:
    """Fresh by the wall clock after a start, without asking."""
    upstream, store = FakeUpstream(), MemoryStore()
    upstream.put(ONE, "1")
    async with engine(upstream, store=store) as running:
        await resolve(running)
        wall = running.clock.wall()
    async with engine(upstream, store=store, clock=ManualClock(wall=wall + 30)) as running:
        found = await resolve(running)
        assert (body(found), found.outcome, found.age_s) == (ONE.body, "hit", 30.0)
    assert upstream.kinds() == ["manifest"]
    await store.aclose()


# -- what is gone ------------------------------------------------------------------------------------------------------


async def test_a_tag_that_is_deleted_upstream_is_gone_and_its_digest_is_not(
    running: Engine, upstream: FakeUpstream
) -> None:
    """Upstream's own 404 is a true answer; only the name is forgotten."""
    await resolve(running)
    upstream.remove("1")
    await running.clock.advance(TTL_S)
    with pytest.raises(UnknownManifest):
        await resolve(running)
    upstream.failure = FAILURES["unreachable"]
    with pytest.raises(Unreachable):
        await resolve(running)  # what upstream has deleted does not come back when it is down
    held, outcome = await running.manifests.get(route(), running.origin(), Digest.parse(ONE.digest))
    assert (held.body, outcome) == (ONE.body, "hit")


async def test_not_found_is_remembered_for_a_short_while(running: Engine, upstream: FakeUpstream) -> None:
    """It absorbs a rollout of a wrong tag, and an image just pushed is there at the next retry; memory is bounded."""
    for _ in range(20):
        with pytest.raises(UnknownManifest):
            await resolve(running, "soon")
    assert upstream.count("manifest") == 1
    upstream.put(TWO, "soon")
    await running.clock.advance(running.origin().negative_ttl_s)
    assert body(await resolve(running, "soon")) == TWO.body
    assert running.manifests._absent.maxsize == MAX_NEGATIVES


async def _evict(running: Engine, image: images.Image) -> None:
    digest = Digest.parse(image.digest)
    await running.capacity.evict([digest])
    running.manifests.forget(digest)


async def test_evicted_content_behind_a_fresh_tag_is_fetched_by_digest(running: Engine, upstream: FakeUpstream) -> None:
    """The record still says what the tag means: what was evicted is those bytes, and no others are asked for."""
    await resolve(running)
    await _evict(running, ONE)
    upstream.put(TWO, "1")
    found = await resolve(running)
    assert (body(found), found.outcome) == (ONE.body, "miss")
    assert [one.what for one in upstream.asked] == ["1", ONE.digest]


async def test_evicted_here_and_deleted_there_a_fresh_tag_is_asked_for_again(
    running: Engine, upstream: FakeUpstream
) -> None:
    """No false 404: the tag is alive upstream, and only what it meant is gone."""
    await resolve(running)
    await _evict(running, ONE)
    upstream.put(TWO, "1")
    upstream.remove(ONE.digest)
    found = await resolve(running)
    assert (body(found), found.age_s) == (TWO.body, 0.0)


async def test_evicted_and_upstream_down_is_upstreams_failure(running: Engine, upstream: FakeUpstream) -> None:
    """What is not here and cannot be had gets a true answer."""
    await resolve(running)
    await _evict(running, ONE)
    upstream.failure = FAILURES["unreachable"]
    with pytest.raises(Unreachable):
        await resolve(running)
