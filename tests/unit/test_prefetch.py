"""Prefetch as the engine does it: pins that are judged before anything is fetched for them, and patience."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

import pytest

from proxy.engine.pins import Pins
from proxy.engine.prefetch import MAX_WAIT_S, N_ATTEMPTS, N_BLOBS, N_IMAGES, Filled, Prefetch
from proxy.engine.walk import Scope
from proxy.errors import Throttled
from proxy.oci.digest import Digest
from proxy.oci.names import Reference, Repository
from proxy.rules.globs import Glob
from proxy.rules.quota import Allowance
from proxy.rules.routes import ProjectRoute
from tests.support.engine import HOST, Engine, FakeUpstream, engine
from tests.support.images import Image, image, multi_arch

KIB = 1024
APP, MORE = (Reference.parse(f"{HOST}/library/alpine:{tag}") for tag in ("1", "2"))
TEAM = Reference.parse(f"{HOST}/team/app:1")

_SEED = count(65_000)


@dataclass(slots=True)
class Filling:
    """An engine, what fills it and what is pinned in it."""

    there: Engine
    upstream: FakeUpstream
    pins: Pins
    prefetch: Prefetch

    async def run(self, *references: Reference, pin: bool = True, is_list: bool = False) -> list[Filled]:
        """Fetch these."""
        return await self.prefetch.run(references, Scope(), pin=pin, is_list=is_list)

    def put(self, reference: Reference, wanted: Image) -> Image:
        """Have it upstream."""
        repository = Repository.parse(reference.repository.value)
        self.upstream.put(wanted, str(reference.target), repository=repository)
        return wanted

    def pinned(self) -> list[str]:
        """The references that are."""
        return [pin.reference for pin in self.pins.all()]


@asynccontextmanager
async def filling(
    *, capacity: int = 1 << 40, allowances: Mapping[str, Allowance] | None = None
) -> AsyncIterator[Filling]:
    upstream = FakeUpstream()
    team = ProjectRoute("team", match=(Glob.parse(f"{HOST}/team/**"),))
    async with engine(upstream, capacity=capacity, allowances=allowances, projects=(team,)) as there:
        pins = Pins(there.store.notes, there.capacity.ledger, there.owner)
        there.capacity.pinned = pins
        prefetch = Prefetch(there.pull, there.capacity, there.charges, pins, clock=there.clock)
        yield Filling(there, upstream, pins, prefetch)


# -- pins --------------------------------------------------------------------------------------------------------------


async def test_a_pinned_image_is_kept_from_its_first_blob_on() -> None:
    """A list that is larger than the room left does not push out what it has just brought."""
    async with filling() as fill:
        wanted = fill.put(APP, multi_arch(next(_SEED), (20 * KIB,)))
        [filled] = await fill.run(APP)
        assert (filled.missing, filled.is_pinned) == ({}, True)
        assert fill.pinned() == [str(APP)]
        assert all(Digest.parse(blob.digest) in fill.pins for blob in wanted.all_blobs())


async def test_a_pin_beyond_the_capacity_is_refused_and_nothing_is_fetched_for_it() -> None:
    """Known as soon as the manifests have come: not a blob is asked for, and what is pinned stays."""
    async with filling(capacity=300 * KIB) as fill:
        fill.put(APP, image(next(_SEED), (100 * KIB,)))
        fill.put(MORE, image(next(_SEED), (250 * KIB,)))
        first, second = await fill.run(APP, MORE)
        assert first.is_pinned
        assert "raise store.capacity, or unpin something" in second.missing["pin"]
        assert (second.is_pinned, second.fetched_bytes) == (False, 0)
        assert fill.pinned() == [str(APP)]
        asked = fill.upstream.count("blob")
        await fill.run(MORE)
        assert fill.upstream.count("blob") == asked == 2


@pytest.mark.parametrize("on_full", ["evict", "bypass", "deny"])
async def test_a_pin_beyond_a_quota_is_refused_and_nothing_is_fetched_for_it(on_full: str) -> None:
    """Whatever the project does when it is full: a pin that it could not pay is not begun."""
    async with filling(allowances={"team": Allowance(50 * KIB, on_full)}) as fill:  # type: ignore[arg-type]
        fill.put(TEAM, multi_arch(next(_SEED), (40 * KIB,)))
        [filled] = await fill.run(TEAM)
        assert not filled.is_pinned
        assert any("'team'" in why for why in filled.missing.values())
        assert fill.upstream.count("blob") == 0
        assert fill.pinned() == []


async def test_what_others_have_paid_is_no_way_to_pin_beyond_a_quota() -> None:
    """Cached for one project and asked for by another, without room: every byte is here, and it is not pinned."""
    async with filling(allowances={"team": Allowance(50 * KIB, "bypass")}) as fill:
        wanted = image(next(_SEED), (60 * KIB,))
        fill.put(APP, wanted)
        fill.put(TEAM, wanted)
        [here] = await fill.run(APP, pin=False)
        assert here.missing == {}
        [filled] = await fill.run(TEAM)
        assert "quota of project 'team'" in filled.missing["pin"]
        assert fill.pinned() == []
        assert fill.there.charges.book.of("team").used <= 50 * KIB


async def test_a_pinned_image_is_paid_for_by_its_project() -> None:
    """Also where every byte of it was here before, at another's expense."""
    async with filling(allowances={"team": Allowance(100 * KIB, "bypass")}) as fill:
        wanted = image(next(_SEED), (60 * KIB,))
        fill.put(APP, wanted)
        fill.put(TEAM, wanted)
        await fill.run(APP, pin=False)
        [filled] = await fill.run(TEAM)
        assert filled.is_pinned
        sizes = len(wanted.body) + sum(len(blob.content) for blob in wanted.blobs)
        assert fill.there.charges.book.of("team").used == sizes


async def test_a_list_lets_go_of_what_it_no_longer_names() -> None:
    """[prefetch]: the new list is here and pinned, then what only the old one named may go."""
    async with filling() as fill:
        for reference in (APP, MORE, TEAM):
            fill.put(reference, image(next(_SEED), (10 * KIB,)))
        await fill.run(TEAM)
        await fill.run(APP, is_list=True)
        assert fill.pinned() == [str(APP), str(TEAM)]
        await fill.run(MORE, is_list=True)
        assert fill.pinned() == [str(MORE), str(TEAM)]


async def test_what_could_not_be_fetched_leaves_no_promise_behind() -> None:
    """A pin is of a whole image or none: what was promised meanwhile may go again."""
    async with filling() as fill:
        wanted = fill.put(APP, image(next(_SEED), (10 * KIB, 20 * KIB)))
        fill.upstream.remove(wanted.blobs[2].digest)
        [filled] = await fill.run(APP)
        assert list(filled.missing) == [wanted.blobs[2].digest]
        assert Digest.parse(wanted.blobs[1].digest) not in fill.pins
        assert fill.pins.n_bytes == 0


async def test_what_is_pinned_is_never_evicted_however_much_is_pulled() -> None:
    """Issue 8: what is listed is here at all times; others come and go beside it, and unpinned it goes like them."""
    async with filling(capacity=400 * KIB) as fill:
        pinned = fill.put(APP, image(next(_SEED), (60 * KIB, 70 * KIB)))
        assert (await fill.run(APP))[0].is_pinned
        others = [Reference.parse(f"{HOST}/library/alpine:other-{n}") for n in range(8)]
        for other in others:
            fill.put(other, image(next(_SEED), (100 * KIB,)))
            assert (await fill.run(other, pin=False))[0].missing == {}
        assert fill.there.capacity.evicted_bytes > 0
        digests = [Digest.parse(text) for text in (pinned.digest, *(blob.digest for blob in pinned.blobs))]
        assert all([await fill.there.stored(digest) is not None for digest in digests])
        await fill.pins.remove(str(APP))
        for other in others:
            assert (await fill.run(other, pin=False))[0].missing == {}
        assert not any([await fill.there.stored(digest) for digest in digests])


# -- pace --------------------------------------------------------------------------------------------------------------


async def test_a_few_images_and_a_few_blobs_are_fetched_at_a_time() -> None:
    """Parallel but polite: nodes find free places, whatever the length of the list."""
    async with filling() as fill:
        references = [Reference.parse(f"{HOST}/library/alpine:{n}") for n in range(3 * N_IMAGES)]
        for reference in references:
            fill.put(reference, image(next(_SEED), tuple(KIB for _ in range(2 * N_BLOBS))))
        fill.upstream.gate = asyncio.Event()
        running = asyncio.ensure_future(fill.run(*references, pin=False))

        async def turns() -> None:
            for _ in range(200):
                await asyncio.sleep(0)

        await turns()
        assert fill.upstream.count("manifest") + fill.upstream.count("manifest head") == N_IMAGES
        most = 0
        while not running.done():
            before, fill.upstream.gate = fill.upstream.gate, asyncio.Event()
            before.set()
            await turns()
            most = max(most, sum(fill.upstream.open_bodies.values()))
        assert most == N_BLOBS
        assert all(filled.missing == {} for filled in await running)


# -- patience ----------------------------------------------------------------------------------------------------------


async def test_retry_after_is_waited_for() -> None:
    """429 with Retry-After: upstream is left alone for as long as it said, and then asked again."""
    async with filling() as fill:
        fill.put(APP, image(next(_SEED), (10 * KIB,)))
        fill.upstream.failure = Throttled("too many requests", upstream=HOST, retry_after_s=30)
        running = asyncio.ensure_future(fill.run(APP, pin=False))  # the test is its owner
        while not fill.upstream.asked:
            await asyncio.sleep(0)
        for _ in range(20):  # until it waits, and everything else of the engine does, too
            await asyncio.sleep(0)
        n_asked = len(fill.upstream.asked)
        await fill.there.clock.advance(29)
        assert len(fill.upstream.asked) == n_asked
        fill.upstream.failure = None
        await fill.there.clock.advance(1)
        [filled] = await running
        assert filled.missing == {}


async def test_patience_ends_and_says_why() -> None:
    """An upstream that goes on refusing is missing with its reason; no wait is longer than a minute."""
    async with filling() as fill:
        fill.put(APP, image(next(_SEED), (10 * KIB,)))
        fill.upstream.failure = Throttled("too many requests today", upstream=HOST, retry_after_s=86_400)
        running = asyncio.ensure_future(fill.run(APP, pin=False))  # the test is its owner
        while not running.done():
            await fill.there.clock.advance(MAX_WAIT_S)
            await asyncio.sleep(0)
        [filled] = await running
        assert filled.missing == {str(APP): "too many requests today"}
        assert fill.upstream.count("manifest") + fill.upstream.count("manifest head") <= 2 * N_ATTEMPTS
