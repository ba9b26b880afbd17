"""A tag under any weather: moves, outages, time, restarts; what is answered beside what was true (INV-6)."""

from __future__ import annotations

import asyncio
import math

from hypothesis import given
from hypothesis import strategies as st

from proxy.engine.tags import RECHECK_AFTER_S
from proxy.errors import BreakwaterError, Unreachable
from proxy.oci.digest import Digest
from proxy.rules.freshness import TagPolicy
from proxy.store.memory import MemoryStore
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.engine import HOST, FakeUpstream, engine, route, tag

IMAGES = [images.image(seed, (10,)) for seed in range(4)]

weather = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0.1, 400.0)),
        st.tuples(st.just("move"), st.integers(0, len(IMAGES) - 1)),
        st.tuples(st.sampled_from(["down", "up", "evict", "restart"]), st.just(0)),
        st.tuples(st.just("ask"), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@given(weather=weather, ttl=st.sampled_from([0.0, 60.0, 300.0]), stale=st.sampled_from([0.0, 120.0, math.inf]))
def test_nothing_older_than_the_policy_goes_out_unmarked(
    weather: list[tuple[str, float]], ttl: float, stale: float
) -> None:
    """INV-6: an unmarked answer was upstream's truth within the last tag_ttl; a stale one is marked, says why, and is
    within stale_if_error; and while upstream is up the answer is never an error."""
    asyncio.run(_live(weather, ttl, stale))


async def _live(weather: list[tuple[str, float]], ttl: float, stale: float) -> None:
    upstream, store, clock = FakeUpstream(), MemoryStore(), ManualClock()
    upstream.put(IMAGES[0], "1")
    truth = [(clock.wall(), IMAGES[0].digest)]
    days = [[]]  # type: list[list[tuple[str, float]]]
    for event in weather:
        if event[0] == "restart":
            days.append([])
        else:
            days[-1].append(event)
    for day in days:
        asked_again_at = clock.monotonic()
        async with engine(upstream, store=store, clock=clock, tag_policy=TagPolicy(ttl, stale)) as running:
            for what, value in day:
                if what == "wait":
                    await clock.advance(value)
                elif what == "move":
                    upstream.put(IMAGES[int(value)], "1")
                    truth.append((clock.wall(), IMAGES[int(value)].digest))
                elif what in ("down", "up"):
                    upstream.failure = Unreachable("down", upstream=HOST) if what == "down" else None
                    asked_again_at = clock.monotonic() + RECHECK_AFTER_S
                elif what == "evict":
                    for digest in [digest for digest, _ in running.ledger]:
                        await running.capacity.evict([digest])
                        running.manifests.forget(digest)
                else:
                    try:
                        found = await running.tags.resolve(route(), running.origin(), tag("1"))
                    except BreakwaterError:
                        assert upstream.failure is not None
                        continue
                    served = str(found.held.descriptor.digest)
                    assert Digest.of(found.held.body) == found.held.descriptor.digest
                    allowed = ttl
                    if found.outcome == "stale":
                        # Just after an outage it is not asked yet, and that is said, too.
                        assert found.trouble
                        assert upstream.failure is not None or clock.monotonic() < asked_again_at
                        allowed = ttl + stale
                    assert served in _true_within(truth, clock.wall(), allowed), (served, truth, clock.wall())
    await store.aclose()


def _true_within(truth: list[tuple[float, str]], now: float, seconds: float) -> set[str]:
    """What upstream would have said at some moment of the last `seconds`."""
    since = now - seconds
    found = {digest for at, digest in truth if at >= since}
    before = [digest for at, digest in truth if at <= since]
    return found | set(before[-1:] or [truth[0][1]])
