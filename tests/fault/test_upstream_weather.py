"""Every class of failure × what is asked for × what is here already: one table, over real sockets on both sides.

The manual clock does not move while a cached answer is had: whatever upstream does, it costs no time at all, or the two
seconds after which a slow revalidation yields stale. Digests and blobs that are here cost no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from proxy.engine.tags import STALE_AFTER_S
from proxy.rules.breaker import TRIPS_AFTER
from proxy.rules.freshness import TagPolicy
from proxy.upstream.policy import Deadlines, Pace
from tests.support import images
from tests.support.appliance import Appliance, appliance
from tests.support.clock import ManualClock
from tests.support.registry import Gate, ScriptedRegistry, Twist

Kind = Literal["tag", "digest", "blob"]
KINDS: tuple[Kind, ...] = ("tag", "digest", "blob")

IMAGE = images.image(5, (100 * images.KIB,))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
TARGETS: dict[Kind, str] = {
    "tag": "/v2/library/alpine/manifests/1",
    "digest": f"/v2/library/alpine/manifests/{IMAGE.digest}",
    "blob": f"/v2/library/alpine/blobs/{images.digest_of(LAYER)}",
}
CONTENT: dict[Kind, bytes] = {"tag": IMAGE.body, "digest": IMAGE.body, "blob": LAYER}
TTL_S = TagPolicy().tag_ttl_s
#: Askers of something that is on its way.
N = 5


@dataclass(frozen=True, slots=True)
class Weather:
    """A class of failure: how upstream behaves, what an uncached request is told, what the circuit breaker makes of it.

    `tag_status`: what a cached tag is answered with once it has to be asked about.
    """

    name: str
    twist: Callable[[Gate], Twist]
    status: int
    code: str
    opens: bool
    retry_after: str | None = None
    tag_status: int = 200


JSON = ("Content-Type", "application/json")
WEATHERS = [
    Weather("unreachable", lambda _: Twist(no_answer="rst"), 502, "UNAVAILABLE", opens=True),
    Weather("failing", lambda _: Twist(status=500, body=b"{}", add=[JSON]), 502, "UNAVAILABLE", opens=True),
    Weather("timeout", lambda gate: Twist(gate=gate, holds_headers=True), 504, "UNAVAILABLE", opens=True),
    Weather(
        "throttled",
        lambda _: Twist(status=429, body=b"{}", add=[JSON, ("Retry-After", "90")]),
        503,
        "TOOMANYREQUESTS",
        opens=False,
        retry_after="90",
    ),
    Weather("unauthorised", lambda _: Twist(status=403, body=b"{}", add=[JSON]), 403, "DENIED", opens=False),
    Weather("misbehaved", lambda _: Twist(raw=b"220 smtp ready\r\n\r\n"), 502, "UNAVAILABLE", opens=False),
    Weather("not found", lambda _: Twist(status=404, body=b"{}", add=[JSON]), 404, "", opens=False, tag_status=404),
]
every_weather = pytest.mark.parametrize("weather", WEATHERS, ids=lambda one: one.name)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Sky:
    """An appliance before a registry whose weather changes."""

    def __init__(self, registry: ScriptedRegistry, serves: Appliance) -> None:
        self.registry = registry
        self.serves = serves
        self.clock = serves.engine.clock
        self.gate = Gate()

    def becomes(self, weather: Weather) -> None:
        """From now on."""
        self.registry.rewrite(weather.twist(self.gate))
        self.registry.requests.clear()

    async def known(self) -> None:
        """The image is here, with all that it names."""
        for kind in KINDS:
            assert (await self.serves.get(TARGETS[kind])).status == 200
        await self.serves.quiet()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """The appliance, its clock still and its registry well."""

    async def made(check: Callable[[Sky], Any]) -> None:
        policy = {"deadlines": Deadlines(answer_s=0.3), "pace": Pace(1, 0.3)}
        async with ScriptedRegistry() as registry:
            registry.put("library/alpine", IMAGE, "1")
            serving = appliance(registry, tmp_path, policy=policy, is_guarded=True, clock=ManualClock())
            async with serving as serves:
                sky = Sky(registry, serves)
                await check(sky)
                sky.gate.open()
                await serves.quiet()

    return made


@every_weather
@every_kind
async def test_what_is_here_is_served_in_any_weather(weather: Weather, kind: Kind, make: Any) -> None:
    """Fresh tags, digests and blobs cost no request and no time, however upstream is."""

    async def check(sky: Sky) -> None:
        await sky.known()
        sky.becomes(weather)
        before = sky.clock.monotonic()
        for _ in range(2 * TRIPS_AFTER):
            answer = await sky.serves.get(TARGETS[kind])
            assert (answer.status, answer.body) == (200, CONTENT[kind])
        assert sky.clock.monotonic() == before
        assert sky.registry.requests == []

    await make(check)


@every_weather
@every_kind
async def test_past_its_time_a_tag_goes_out_marked_and_the_rest_as_ever(
    weather: Weather, kind: Kind, make: Any
) -> None:
    """INV-6; only "not found" is upstream's own word about the tag. Digests and blobs know no age."""

    async def check(sky: Sky) -> None:
        await sky.known()
        sky.becomes(weather)
        await sky.clock.advance(TTL_S)
        before = sky.clock.monotonic()
        answer = await sky.serves.get(TARGETS[kind])
        assert sky.clock.monotonic() == before
        status = weather.tag_status if kind == "tag" else 200
        assert answer.status == status
        is_stale = "stale" in answer.headers.get("cache-status", "")
        assert is_stale is (kind == "tag" and status == 200)
        assert (answer.body == CONTENT[kind]) is (status == 200)
        assert len(sky.registry.requests) <= (1 if kind == "tag" else 0)
        again = await sky.serves.get(TARGETS[kind])
        assert again.status == status
        assert len(sky.registry.requests) <= (2 if status == 404 else 1)

    await make(check)


@every_weather
@every_kind
async def test_what_is_not_here_gets_the_true_answer(weather: Weather, kind: Kind, make: Any) -> None:
    """The status of its class, its code, a sentence, and upstream's own Retry-After."""

    async def check(sky: Sky) -> None:
        sky.becomes(weather)
        answer = await sky.serves.get(TARGETS[kind])
        code = weather.code or ("BLOB_UNKNOWN" if kind == "blob" else "MANIFEST_UNKNOWN")
        assert (answer.status, answer.code) == (weather.status, code)
        assert answer.headers.get("retry-after") == weather.retry_after
        assert answer.message

    await make(check)


@every_weather
@every_kind
async def test_what_is_on_its_way_fails_once_for_all_who_wait(weather: Weather, kind: Kind, make: Any) -> None:
    """Whoever joined is told the same, and upstream was asked no more often than by one."""

    async def check(sky: Sky) -> None:
        sky.becomes(weather)
        answers = await asyncio.gather(*(sky.serves.get(TARGETS[kind]) for _ in range(N)))
        assert {answer.status for answer in answers} == {weather.status}
        assert len({answer.message for answer in answers}) <= 2
        assert len(sky.registry.requests) <= 2

    await make(check)


@every_weather
async def test_the_circuit_opens_for_silence_and_for_nothing_else(weather: Weather, make: Any) -> None:
    """Then what is not here fails at once, in the class of the cause; after the pause one request asks again."""

    async def check(sky: Sky) -> None:
        sky.becomes(weather)
        for number in range(TRIPS_AFTER):
            await sky.serves.get(f"/v2/library/alpine/manifests/absent{number}")
        n_asked = len(sky.registry.requests)
        answer = await sky.serves.get("/v2/library/alpine/manifests/another")
        is_left_alone = len(sky.registry.requests) == n_asked
        assert is_left_alone is (weather.opens or weather.name == "throttled")
        assert answer.status == (502 if weather.opens else weather.status)
        sky.gate.open()
        sky.registry.rewrite()
        await sky.clock.advance(91.0)
        assert (await sky.serves.get(TARGETS["tag"])).status == 200

    await make(check)


async def test_a_revalidation_that_hangs_yields_stale_after_two_seconds(make: Any) -> None:
    """product.md, promise 3: by the clock, and not by upstream's patience."""

    async def check(sky: Sky) -> None:
        await sky.known()
        sky.registry.rewrite(Twist(gate=sky.gate, holds_headers=True))
        await sky.clock.advance(TTL_S)
        asking = asyncio.ensure_future(sky.serves.get(TARGETS["tag"]))
        await sky.gate.reached.wait()
        await sky.clock.advance(STALE_AFTER_S)
        answer = await asking
        assert answer.status == 200
        assert "stale" in answer.headers["cache-status"]

    await make(check)
