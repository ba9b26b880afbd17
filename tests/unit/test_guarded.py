"""engine/guarded.py, failover.py, bandwidth.py, foreign.py: wrappers around an upstream, each a `ports.Upstream`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from proxy.engine.bandwidth import LimitedUpstream, Share
from proxy.engine.failover import SET_BACK_S, Failover
from proxy.engine.foreign import WithoutForeignLayers
from proxy.engine.guarded import GuardedUpstream
from proxy.errors import (
    BreakwaterError,
    Denied,
    Misbehaved,
    NotFound,
    Throttled,
    Timeout,
    Unauthorised,
    UnknownManifest,
    Unreachable,
)
from proxy.events import Event, Noticed
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.ports import Upstream
from proxy.rules.bandwidth import UNLIMITED, Bandwidth
from proxy.rules.breaker import FIRST_S, TRIPS_AFTER
from proxy.rules.budget import LOOK_EVERY_S
from proxy.rules.freshness import TagPolicy
from proxy.upstream.answers import Budget as Quote
from tests.contract.suites.upstream import IMAGE, REPOSITORY, SIGNATURE, TAGS, UpstreamSuite, World
from tests.support import images
from tests.support.appliance import HastyClock
from tests.support.clock import ManualClock
from tests.support.engine import ALPINE, HOST, FakeUpstream, Script, engine, route, tag

ONE, TWO = images.image(1, (10,)), images.image(2, (10,))
LAYER = images.image(3, (3 * images.MIB,))
TTL_S = TagPolicy().tag_ttl_s

DOWN = Unreachable("no connection", upstream=HOST)
SLOW = Timeout("too slow", upstream=HOST)
LATER = Throttled("later", upstream=HOST, retry_after_s=120.0)
REFUSED = Unauthorised("refused", upstream=HOST)
NONSENSE = Misbehaved("nonsense", upstream=HOST)
ABSENT = UnknownManifest("not there")


def guarded(upstream: Upstream, clock: ManualClock | None = None, **more: Any) -> GuardedUpstream:
    """A guard with nothing to hear but what `more` says."""
    words: dict[str, Any] = {"observe": lambda _: None, "chance": lambda: 0.999999, **more}
    return GuardedUpstream(upstream, host=HOST, address="https://here", clock=clock or ManualClock(), **words)


async def ask(upstream: Upstream, name: str = "1") -> BreakwaterError | None:
    """Ask for a manifest; returns what it raised."""
    try:
        await upstream.manifest(ALPINE, Tag(name))
    except BreakwaterError as error:
        return error
    return None


async def turns() -> None:
    """Let everybody run who can."""
    for _ in range(10):
        await asyncio.sleep(0)


# -- all of them are upstreams -----------------------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[FakeUpstream], Upstream]] = {
    "guarded": guarded,
    "failover": lambda one: Failover([one], ManualClock()),
    "failover past one that is down": lambda one: Failover([down(), one], ManualClock()),
    "limited": lambda one: LimitedUpstream(one, Share(ManualClock())),
    "without foreign layers": lambda one: WithoutForeignLayers(one, HOST),
}


def down() -> FakeUpstream:
    """An upstream that cannot be reached."""
    found = FakeUpstream()
    found.failure = DOWN
    return found


@pytest.fixture(params=[name for name in WRAPPERS if "down" not in name])
def world(request: pytest.FixtureRequest) -> World:
    """Each wrapper around a fake that has what the suite asks for."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, *TAGS, repository=REPOSITORY)
    upstream.put(SIGNATURE, repository=REPOSITORY)
    wrapped = WRAPPERS[request.param](upstream)
    return World(wrapped, lambda content, algorithm: upstream.put_blob(content, algorithm, repository=REPOSITORY))


class TestWrapped(UpstreamSuite):
    """What an upstream promises, it promises through each of them."""


# -- the circuit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "opens"),
    [(DOWN, True), (SLOW, True), (REFUSED, False), (NONSENSE, False), (ABSENT, False)],
    ids=["unreachable", "timeout", "unauthorised", "misbehaved", "not found"],
)
async def test_only_an_upstream_that_does_not_answer_is_left_alone(failure: BreakwaterError, opens: bool) -> None:
    """The table of engine/guarded.py. What is refused is refused in its class and without a request."""
    inner = FakeUpstream()
    inner.failure = failure
    guard = guarded(inner)
    for _ in range(TRIPS_AFTER):
        assert type(await ask(guard)) is type(failure)
    assert (guard.condition().circuit == "open") is opens
    after = await ask(guard)
    assert inner.count("manifest") == TRIPS_AFTER + (not opens)
    assert isinstance(after, Unreachable) is opens or failure is DOWN


async def test_an_outage_ends_with_one_probe_and_two_notices() -> None:
    """An operator reads that it began and that it is over, once each."""
    inner, clock, events = FakeUpstream(), ManualClock(), list[Event]()
    inner.put(ONE, "1")
    guard = guarded(inner, clock, observe=events.append)
    inner.failure = DOWN
    await asyncio.gather(*(ask(guard) for _ in range(50)))
    asked = len(inner.asked)
    await asyncio.gather(*(ask(guard) for _ in range(50)))
    assert len(inner.asked) == asked
    inner.failure = None
    await clock.advance(FIRST_S)
    inner.gate = asyncio.Event()
    probe = asyncio.gather(*(ask(guard) for _ in range(50)))
    await asyncio.sleep(0)
    inner.gate.set()
    results = await probe
    assert len(inner.asked) == asked + 1
    assert sum(result is None for result in results) == 1
    assert await ask(guard) is None
    assert [event.level for event in events if isinstance(event, Noticed)] == ["warning", "info"]


async def test_a_probe_that_is_cancelled_gives_its_turn_back() -> None:
    """A client that leaves must not keep an upstream closed."""
    inner, clock = FakeUpstream(), ManualClock()
    inner.put(ONE, "1")
    guard = guarded(inner, clock)
    inner.failure = DOWN
    for _ in range(TRIPS_AFTER):
        await ask(guard)
    inner.failure, inner.gate = None, asyncio.Event()
    await clock.advance(FIRST_S)
    probe = asyncio.create_task(ask(guard))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    inner.gate.set()
    assert await ask(guard) is None


# -- the budget --------------------------------------------------------------------------------------------------------


async def test_throttled_once_nobody_asks_until_then() -> None:
    """One Retry-After is shared by all requests; each is told how long it still is."""
    inner, clock = FakeUpstream(), ManualClock()
    digest = inner.put(ONE, "1")
    guard = guarded(inner, clock)
    inner.failure = LATER
    assert await ask(guard) is LATER
    await clock.advance(20.0)
    inner.failure = None
    with pytest.raises(Throttled) as told:
        await guard.blob(ALPINE, digest)
    assert told.value.retry_after_s == 100.0
    assert len(inner.asked) == 1
    assert guard.condition().throttled_for_s == 100.0
    await clock.advance(100.0)
    assert await ask(guard) is None


async def test_below_the_floor_tags_go_stale_and_misses_are_fetched() -> None:
    """What is left is for what is not here; a look once a minute hears when there is more."""
    inner, clock = FakeUpstream(), ManualClock()
    inner.put(ONE, "1")
    inner.put(TWO, "2")
    quote = [Quote(100, 90, 21600)]
    guard = guarded(inner, clock, quote=lambda: quote[0])
    async with engine(ports={HOST: guard}, clock=clock) as running:
        await running.tags.resolve(route(), running.origin(), tag("1"))
        quote[0] = Quote(100, 5, 21600)
        await running.tags.resolve(route(), running.origin(), tag("2"))
        assert guard.condition().is_low
        await clock.advance(TTL_S)
        looked = await running.tags.resolve(route(), running.origin(), tag("1"))
        stale = await running.tags.resolve(route(), running.origin(), tag("2"))
        assert (looked.outcome, stale.outcome) == ("hit", "stale")
        assert "kept for what is not here" in stale.trouble
        assert inner.count("manifest head") == 1
        inner.put(ONE, "3")
        assert (await running.tags.resolve(route(), running.origin(), tag("3"))).outcome == "miss"
        quote[0] = Quote(100, 95, 21600)
        await clock.advance(LOOK_EVERY_S)
        assert (await running.tags.resolve(route(), running.origin(), tag("2"))).outcome == "hit"
        assert not guard.condition().is_low


async def test_a_tag_too_old_to_be_served_is_a_miss_and_may_spend() -> None:
    """Keeping back what is left must not fail a pull that it would have paid for."""
    inner, clock = FakeUpstream(), ManualClock()
    inner.put(ONE, "1")
    guard = guarded(inner, clock, quote=lambda: Quote(100, 5, 21600))
    async with engine(ports={HOST: guard}, clock=clock, tag_policy=TagPolicy(600.0, 0.0)) as running:
        for outcome in ("miss", "hit", "miss"):
            assert (await running.tags.resolve(route(), running.origin(), tag("1"))).outcome == outcome
            await clock.advance(0.5 * LOOK_EVERY_S if outcome == "hit" else TTL_S)
            if outcome == "hit":
                await clock.advance(TTL_S)
                assert not await _is_refused(guard)


async def _is_refused(guard: GuardedUpstream) -> bool:
    """Uses up the minute's look."""
    try:
        await guard.manifest_head(ALPINE, Tag("1"))
    except Throttled:
        return True
    return False


# -- several addresses -------------------------------------------------------------------------------------------------


def pair(clock: ManualClock | None = None) -> tuple[FakeUpstream, FakeUpstream, ManualClock, Failover]:
    """Two addresses with ONE under "1"."""
    first, second, clock = FakeUpstream(), FakeUpstream(), clock or ManualClock()
    first.put(ONE, "1")
    second.put(ONE, "1")
    return first, second, clock, Failover([guarded(first, clock), guarded(second, clock)], clock)


@pytest.mark.parametrize("failure", [DOWN, SLOW, LATER, REFUSED, NONSENSE], ids=lambda one: one.failure)
async def test_the_next_address_answers_for_one_that_fails(failure: BreakwaterError) -> None:
    """In every class: whoever asks does not notice."""
    first, second, _, both = pair()
    first.failure = failure
    assert (await both.manifest(ALPINE, Tag("1"))).body == ONE.body
    assert (first.count("manifest"), second.count("manifest")) == (1, 1)


async def test_an_address_that_is_down_is_not_asked_each_time() -> None:
    """Its breaker is its health."""
    first, second, _, both = pair()
    first.failure = DOWN
    for _ in range(20):
        await both.manifest(ALPINE, Tag("1"))
    assert (first.count("manifest"), second.count("manifest")) == (TRIPS_AFTER, 20)


@pytest.mark.parametrize(
    ("one", "two", "outcome"),
    [
        (None, None, None),
        (ABSENT, None, None),
        (DOWN, None, None),
        (ABSENT, ABSENT, NotFound),
        (DOWN, ABSENT, Unreachable),
        (ABSENT, DOWN, Unreachable),
        (LATER, ABSENT, Throttled),
        (DOWN, LATER, Unreachable),
    ],
)
async def test_not_found_counts_only_when_every_address_says_so(
    one: BreakwaterError | None, two: BreakwaterError | None, outcome: type[BreakwaterError] | None
) -> None:
    """ "Could not find out" is never "absent": a tag that is known here would be forgotten for it."""
    first, second, _, both = pair()
    first.failure, second.failure = one, two
    raised = await ask(both)
    assert raised is None if outcome is None else isinstance(raised, outcome)


async def test_falling_back_never_moves_a_tag_back() -> None:
    """A mirror that lags confirms what is known, and otherwise says nothing while the first address fails."""
    first, second, clock, both = pair()
    first.put(TWO, "1")
    async with engine(ports={HOST: both}, clock=clock) as running:
        assert (await running.tags.resolve(route(), running.origin(), tag("1"))).held.body == TWO.body
        first.failure = DOWN
        await clock.advance(TTL_S)
        stale = await running.tags.resolve(route(), running.origin(), tag("1"))
        assert (stale.held.body, stale.outcome) == (TWO.body, "stale")
        assert "moved" in stale.trouble
        second.put(TWO, "1")
        await clock.advance(11.0)
        assert (await running.tags.resolve(route(), running.origin(), tag("1"))).outcome == "hit"


async def test_falling_back_to_one_without_the_tag_does_not_forget_it() -> None:
    """A mirror that never had it, while the first address is down, is not upstream deleting it."""
    first, second, clock, both = pair()
    second.remove("1")
    async with engine(ports={HOST: both}, clock=clock) as running:
        await running.tags.resolve(route(), running.origin(), tag("1"))
        first.failure = DOWN
        await clock.advance(TTL_S)
        assert (await running.tags.resolve(route(), running.origin(), tag("1"))).outcome == "stale"


async def test_a_second_hand_answer_without_a_digest_confirms_nothing() -> None:
    """There is nothing to compare, and fetching the tag could move it back."""
    first, second, _, both = pair()
    first.failure, second.says_digest = DOWN, False
    with pytest.raises(Unreachable):
        await both.manifest_head(ALPINE, Tag("1"))


async def test_a_broken_transfer_goes_on_at_the_next_address() -> None:
    """From the byte that it has, and the reader does not notice."""
    first, second, clock, both = pair(HastyClock())
    content = max((blob.content for blob in LAYER.blobs), key=len)
    for one in (first, second):
        one.put(LAYER, "layer")
    digest = Digest.of(content)
    first.scripts[digest] = [Script(len(content), [content[: images.MIB], DOWN])]
    async with engine(ports={HOST: both}, clock=clock) as running:
        assert await running.read(digest) == content
    blobs = [(one.kind, one.offset) for one in (*first.asked, *second.asked) if one.kind == "blob"]
    assert blobs == [("blob", 0), ("blob", images.MIB)]
    assert second.count("blob") == 1


async def test_an_address_that_broke_off_is_asked_last_for_a_while() -> None:
    """And first again after it."""
    first, second, clock, both = pair()
    digest = first.put_blob(b"content")
    second.put_blob(b"content")
    first.scripts[digest] = [Script(7, [DOWN])]
    body = await both.blob(ALPINE, digest)
    with pytest.raises(Unreachable):
        await body.read()
    await body.close()
    for n_first, n_second in ((1, 1), (2, 1)):
        await (await both.blob(ALPINE, digest)).close()
        assert (first.count("blob"), second.count("blob")) == (n_first, n_second)
        await clock.advance(SET_BACK_S)


# -- bandwidth ---------------------------------------------------------------------------------------------------------


async def test_bodies_share_the_rate_and_a_new_rate_holds_at_once() -> None:
    """Two that read all the time have half of it each; what runs follows the setting."""
    inner, clock = FakeUpstream(piece_bytes=1000), ManualClock()
    digests = [inner.put_blob(bytes([n]) * 20_000) for n in (1, 2)]
    share = Share(clock, Bandwidth.always(1000.0))
    limited = LimitedUpstream(inner, share)
    taken = [0, 0]

    async def read(number: int) -> None:
        body = await limited.blob(ALPINE, digests[number])
        while piece := await body.read():
            taken[number] += len(piece)
        await body.close()

    readers = [asyncio.create_task(read(number)) for number in (0, 1)]
    for _ in range(20):
        await turns()
        await clock.advance(0.5)
    assert 9_000 <= sum(taken) <= 13_000
    assert abs(taken[0] - taken[1]) <= 1000
    share.follow(Bandwidth.always(4000.0))
    before = sum(taken)
    for _ in range(40):
        await turns()
        await clock.advance(0.1)
    assert sum(taken) - before >= 10_000
    share.follow(UNLIMITED)
    while not all(reader.done() for reader in readers):
        await turns()
        await clock.advance(1.0)
    assert taken == [20_000, 20_000]


# -- foreign layers ----------------------------------------------------------------------------------------------------


async def test_a_manifest_with_foreign_layers_is_refused_and_not_kept() -> None:
    """CVE-2020-15157: nobody here follows `urls`; where clients may not either, they never see them."""
    document = json.loads(ONE.body)
    document["layers"][0]["urls"] = ["https://elsewhere.test/layer"]
    body = json.dumps(document).encode()
    inner = FakeUpstream()
    digest = inner.put(ONE, "1")
    inner.put(replace(ONE, body=body), "foreign")
    async with engine(ports={HOST: WithoutForeignLayers(inner, HOST)}) as running:
        with pytest.raises(Denied) as told:
            await running.tags.resolve(route(), running.origin(), tag("foreign"))
        assert told.value.rule == "foreign_layers"
        assert await running.stored(Digest.of(body)) is None
        assert (await running.tags.resolve(route(), running.origin(), tag("1"))).held.descriptor.digest == digest
