"""Every class of failure and every odd answer × what is here already × what is asked for: one table, over real sockets
on both sides.

The manual clock does not move while a cached answer is had: whatever upstream does, it costs no time at all, or the two
seconds after which a slow revalidation yields stale. Digests and blobs that are here cost no request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, Literal

import pytest

from proxy.engine.tags import STALE_AFTER_S
from proxy.oci.digest import Digest
from proxy.rules.breaker import TRIPS_AFTER
from proxy.rules.freshness import TagPolicy
from proxy.rules.transfer import HELD_BACK_BYTES
from proxy.upstream.policy import Deadlines, Pace
from tests.support import images
from tests.support.appliance import Answer, Appliance, HastyClock, appliance
from tests.support.registry import Gate, Guard, ScriptedRegistry, Twist, redirect

Kind = Literal["tag", "digest", "blob"]
KINDS: tuple[Kind, ...] = ("tag", "digest", "blob")

IMAGE = images.image(5, (200 * images.KIB,))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
LAYER_DIGEST = Digest.parse(images.digest_of(LAYER))
TARGETS: dict[Kind, str] = {
    "tag": "/v2/library/alpine/manifests/1",
    "digest": f"/v2/library/alpine/manifests/{IMAGE.digest}",
    "blob": f"/v2/library/alpine/blobs/{LAYER_DIGEST}",
}
CONTENT: dict[Kind, bytes] = {"tag": IMAGE.body, "digest": IMAGE.body, "blob": LAYER}
#: A byte in the middle, where bodies break; of the layer one that is no reader's yet when it breaks.
MIDDLE: dict[Kind, int] = {"tag": 200, "digest": 200, "blob": 100 * images.KIB}
TTL_S = TagPolicy().tag_ttl_s
#: Askers of something that is on its way.
N = 5
#: What the pauses between the attempts of one transfer come to at most, in seconds.
PAUSES_S = 10.0


@dataclass(frozen=True, slots=True)
class Told:
    """What an uncached request is told. `is_short`: the headers had left, and the body ends short of its length."""

    status: int = 200
    code: str = ""
    retry_after: str | None = None
    is_short: bool = False


RIGHT = Told()
SHORT = Told(is_short=True)
LIE = Told(502, "UNAVAILABLE")
DOWN = Told(502, "UNAVAILABLE")
SLOW = Told(504, "UNAVAILABLE")
REFUSED = Told(403, "DENIED")
GARBLED = Told(502, "MANIFEST_INVALID")
UNKNOWN = Told(404, "MANIFEST_UNKNOWN")


@dataclass(frozen=True, slots=True)
class Weather:
    """A class of failure or an odd answer, and what comes of it."""

    name: str
    tag: Told
    digest: Told
    blob: Told
    #: What becomes of a cached tag once it has to be asked about.
    past_its_time: Literal["confirmed", "stale", "gone"]
    twist: Callable[[Kind, Gate], Twist] | None = None
    guard: Callable[[], Guard] | None = None
    #: Whether the circuit opens for it; None where that is told elsewhere.
    opens: bool | None = None
    #: Requests that one uncached question may cost, tokens and redirects among them.
    n_asked: int = 2

    def told(self, kind: Kind) -> Told:
        """What an uncached request of this kind is told."""
        return {"tag": self.tag, "digest": self.digest, "blob": self.blob}[kind]


def by(**words: Any) -> Callable[[Kind, Gate], Twist]:
    """The same for every kind."""
    return lambda _, __: Twist(**words)


def refusing(status: int, *headers: tuple[str, str]) -> Callable[[Kind, Gate], Twist]:
    """Any method, with an error's body."""
    return by(status=status, body=b"{}", add=[("Content-Type", "application/json"), *headers])


def breaking(**words: Any) -> Callable[[Kind, Gate], Twist]:
    """Each GET breaks off in the middle."""
    return lambda kind, _: Twist(method="GET", cut_at=MIDDLE[kind], ignores_range=True, **words)


def later(seconds: str) -> Told:
    """503 with Retry-After."""
    return Told(503, "TOOMANYREQUESTS", seconds)


def bearer(**words: Any) -> Callable[[], Guard]:
    """A token realm at the registry itself."""
    return lambda: Guard(scheme="bearer", **words)


PAGES = b"<html><body>Please log in to the hotel's network</body></html>" * 200
SCHEMA1 = json.dumps({"schemaVersion": 1, "name": "library/alpine", "fsLayers": [], "history": []}).encode()
SCHEMA1_TYPE = ("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
IN_90_S = formatdate(HastyClock().wall() + 90, usegmt=True)
TWO_SCHEMES = 'Basic realm="x", Bearer realm="{realm}",service="{service}",scope="repository:{name}:pull"'

#: The classes of failure (engine/guarded.py), first; then odd registries (peers.md §5.5), failing and not.
WEATHERS = [
    Weather("unreachable", DOWN, DOWN, DOWN, "stale", by(no_answer="rst"), opens=True),
    Weather("failing", DOWN, DOWN, DOWN, "stale", refusing(500), opens=True),
    Weather("timeout", SLOW, SLOW, SLOW, "stale", lambda _, gate: Twist(gate=gate, holds_headers=True), opens=True),
    Weather(
        "throttled", later("90"), later("90"), later("90"), "stale", refusing(429, ("Retry-After", "90")), opens=False
    ),
    Weather("unauthorised", REFUSED, REFUSED, REFUSED, "stale", refusing(403), opens=False),
    Weather("misbehaved", LIE, LIE, LIE, "stale", by(raw=b"220 smtp ready\r\n\r\n"), opens=False),
    Weather("not found", UNKNOWN, UNKNOWN, Told(404, "BLOB_UNKNOWN"), "gone", refusing(404), opens=False),
    # -- throttling in other words
    Weather(
        "throttled until a date", later("90"), later("90"), later("90"), "stale",
        refusing(429, ("Retry-After", IN_90_S)),
    ),
    Weather(
        "throttled for garbage", later("30"), later("30"), later("30"), "stale",
        refusing(429, ("Retry-After", "a while; 2x"), ("ratelimit-remaining", "many"), ("ratelimit-limit", ";w=")),
    ),
    Weather("overloaded", later("9"), later("9"), later("9"), "stale", refusing(503, ("Retry-After", "9"))),
    # -- bodies that break
    Weather("ends in the middle", DOWN, DOWN, SHORT, "confirmed", breaking(), n_asked=6),
    Weather("resets in the middle", DOWN, DOWN, SHORT, "confirmed", breaking(cut="rst"), n_asked=7),
    Weather(
        "stalls in the middle", SLOW, SLOW, SHORT, "confirmed",
        lambda kind, gate: Twist(method="GET", gate=gate, hold_at=(MIDDLE[kind],), ignores_range=True), n_asked=6,
    ),
    Weather("another byte", LIE, LIE, SHORT, "confirmed", by(method="GET", flip_at=150)),
    # -- HEAD
    Weather("HEAD without a digest", RIGHT, RIGHT, RIGHT, "confirmed", by(method="HEAD", drop=["Docker-Content-Digest"])),
    Weather("HEAD without a length", RIGHT, RIGHT, RIGHT, "confirmed", by(method="HEAD", drop=["Content-Length"])),
    Weather("HEAD refused", RIGHT, RIGHT, RIGHT, "confirmed", by(method="HEAD", status=405, body=b""), n_asked=3),
    Weather(
        "another digest in the header", LIE, RIGHT, RIGHT, "stale",
        by(add=[("Docker-Content-Digest", images.digest_of(b"another"))]),
    ),
    # -- documents
    Weather("packed", RIGHT, RIGHT, LIE, "confirmed", by(packed=True)),
    Weather("without a Content-Type", RIGHT, RIGHT, RIGHT, "confirmed", by(drop=["Content-Type"])),
    Weather("more than 4 MiB", LIE, LIE, SHORT, "stale", by(body=b" " * (5 << 20))),
    Weather("pages of HTML", LIE, LIE, SHORT, "stale", by(body=PAGES, add=[("Content-Type", "text/html")])),
    Weather("schema 1", GARBLED, LIE, SHORT, "stale", by(body=SCHEMA1, add=[SCHEMA1_TYPE])),
    Weather("in chunks", RIGHT, RIGHT, RIGHT, "confirmed", by(framing="chunked")),
    Weather("until it closes", RIGHT, RIGHT, RIGHT, "confirmed", by(framing="eof")),
    # -- redirects
    Weather(
        "behind a relative redirect", RIGHT, RIGHT, RIGHT, "confirmed",
        lambda kind, _: redirect(TARGETS[kind].replace("library/alpine", "moved"), path="/v2/library/*"), n_asked=4,
    ),
    Weather("redirects in circles", LIE, LIE, LIE, "stale", lambda _, __: redirect("?again"), n_asked=6),
    Weather("redirects to the metadata", LIE, LIE, LIE, "stale", lambda _, __: redirect("http://169.254.169.254/latest")),
    # -- logins
    Weather("access_token", RIGHT, RIGHT, RIGHT, "confirmed", guard=bearer(token_key="access_token"), n_asked=4),
    Weather("a token without expiry", RIGHT, RIGHT, RIGHT, "confirmed", guard=bearer(token_says={}), n_asked=4),
    Weather(
        "a challenge without a scope", RIGHT, RIGHT, RIGHT, "confirmed",
        guard=bearer(challenges=['Bearer realm="{realm}",service="{service}"']), n_asked=4,
    ),
    Weather(
        "two challenges in one header", RIGHT, RIGHT, RIGHT, "confirmed",
        guard=bearer(challenges=[TWO_SCHEMES]), n_asked=4,
    ),
    Weather("refuses every token", REFUSED, REFUSED, REFUSED, "stale", guard=bearer(refuses_all=True), n_asked=3),
]  # fmt: skip
every_weather = pytest.mark.parametrize("weather", WEATHERS, ids=lambda one: one.name)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Sky:
    """An appliance before a registry whose weather changes."""

    def __init__(self, registry: ScriptedRegistry, serves: Appliance) -> None:
        self.registry = registry
        self.serves = serves
        self.clock = serves.engine.clock
        self.gate = Gate()

    def becomes(self, weather: Weather, kind: Kind, *before: Twist) -> None:
        """From now on, but for what twists `before` say."""
        script = [weather.twist(kind, self.gate)] if weather.twist else []
        self.registry.rewrite(*before, *script)
        self.registry.guard = weather.guard() if weather.guard else None
        self.registry.requests.clear()

    async def clears(self) -> None:
        """Upstream is well, and what was said of it is over."""
        self.gate.open()
        self.registry.rewrite()
        self.registry.guard = None
        await self.serves.quiet()
        await self.clock.advance(121.0)

    async def known(self) -> None:
        """The image is here, with all that it names."""
        for kind in KINDS:
            assert (await self.serves.get(TARGETS[kind])).status == 200
        await self.serves.quiet()

    async def stored(self, kind: Kind) -> bytes | None:
        """What the store has of it."""
        return await self.serves.engine.stored(Digest.parse(images.digest_of(CONTENT[kind])))


@asynccontextmanager
async def sky(folder: Path) -> AsyncIterator[Sky]:
    """The appliance, its clock still and its registry well."""
    policy = {"deadlines": Deadlines(answer_s=0.3), "pace": Pace(1, 0.15)}
    async with ScriptedRegistry() as registry:
        for repository in ("library/alpine", "moved"):
            registry.put(repository, IMAGE, "1")
        async with appliance(registry, folder, policy=policy, is_guarded=True, clock=HastyClock()) as serves:
            above = Sky(registry, serves)
            yield above
            above.gate.open()
            await serves.quiet()


def assert_told(answer: Answer, told: Told, kind: Kind) -> None:
    """INV-3: a body that is not right never ends cleanly; what is no body has a code and a sentence."""
    assert answer.status == told.status, answer
    if told.is_short:
        assert answer.end == "short"
        assert len(answer.body) <= len(CONTENT[kind]) - HELD_BACK_BYTES or answer.body != CONTENT[kind]
    elif told.status == 200:
        assert (answer.end, answer.body) == ("whole", CONTENT[kind])
    else:
        assert (answer.code, answer.headers.get("retry-after")) == (told.code, told.retry_after)
        assert answer.message


# -- hit ---------------------------------------------------------------------------------------------------------------


@every_weather
async def test_what_is_here_is_served_in_any_weather(weather: Weather, tmp_path: Path) -> None:
    """Fresh tags, digests and blobs cost no request and no time, however upstream is."""
    async with sky(tmp_path) as above:
        await above.known()
        before = above.clock.monotonic()
        for kind in KINDS:
            above.becomes(weather, kind)
            for _ in range(2 * TRIPS_AFTER):
                assert_told(await above.serves.get(TARGETS[kind]), RIGHT, kind)
        assert above.clock.monotonic() == before
        assert above.registry.requests == []


# -- stale -------------------------------------------------------------------------------------------------------------


@every_weather
async def test_past_its_time_a_tag_goes_out_marked_and_the_rest_as_ever(weather: Weather, tmp_path: Path) -> None:
    """INV-6; only "not found" is upstream's own word about the tag. Digests and blobs know no age."""
    async with sky(tmp_path) as above:
        await above.known()
        await above.clock.advance(TTL_S)
        before = above.clock.monotonic()
        for kind in KINDS:
            above.becomes(weather, kind)
            expected = weather.past_its_time if kind == "tag" else "confirmed"
            for n_asked in (weather.n_asked + 1, weather.n_asked + 2):
                answer = await above.serves.get(TARGETS[kind])
                assert_told(answer, weather.told(kind) if expected == "gone" else RIGHT, kind)
                assert ("stale" in answer.headers.get("cache-status", "")) is (expected == "stale")
                assert len(above.registry.requests) <= (n_asked if kind == "tag" else 0)
        assert above.clock.monotonic() == before


async def test_a_revalidation_that_hangs_yields_stale_after_two_seconds(tmp_path: Path) -> None:
    """product.md, promise 3: by the clock, and not by upstream's patience; and for whoever comes later, at once."""
    async with sky(tmp_path) as above:
        await above.known()
        above.registry.rewrite(Twist(gate=above.gate, holds_headers=True))
        await above.clock.advance(TTL_S)
        asking = asyncio.ensure_future(above.serves.get(TARGETS["tag"]))
        await above.gate.reached.wait()
        await above.clock.advance(STALE_AFTER_S)
        before = above.clock.monotonic()
        for answer in (await asking, await above.serves.get(TARGETS["tag"])):
            assert answer.status == 200
            assert "stale" in answer.headers["cache-status"]
        assert above.clock.monotonic() == before


# -- miss --------------------------------------------------------------------------------------------------------------


@every_weather
@every_kind
async def test_what_is_not_here_gets_the_true_answer(weather: Weather, kind: Kind, tmp_path: Path) -> None:
    """The status of its class, its code, a sentence, and upstream's own Retry-After; and nothing unverified is kept."""
    async with sky(tmp_path) as above:
        above.becomes(weather, kind)
        before = above.clock.monotonic()
        told = weather.told(kind)
        assert_told(await above.serves.get(TARGETS[kind]), told, kind)
        await above.serves.quiet()
        assert len(above.registry.requests) <= weather.n_asked, [one.target for one in above.registry.requests]
        assert above.clock.monotonic() - before <= PAUSES_S
        assert await above.stored(kind) == (CONTENT[kind] if told == RIGHT else None)


# -- in flight ---------------------------------------------------------------------------------------------------------


@every_weather
@every_kind
async def test_what_is_on_its_way_ends_alike_for_all_who_wait(weather: Weather, kind: Kind, tmp_path: Path) -> None:
    """Whoever joined is told the same, and upstream was asked no more often than by one."""
    async with sky(tmp_path) as above:
        above.becomes(weather, kind)
        answers = await asyncio.gather(*(above.serves.get(TARGETS[kind]) for _ in range(N)))
        told = weather.told(kind)
        if kind == "blob" and told.is_short:
            # Who asks after it ended is told at once that it is bad.
            assert {answer.status for answer in answers} <= {200, 502}
            answers = [answer for answer in answers if answer.status == 200]
        for answer in answers:
            assert_told(answer, told, kind)
        assert answers
        await above.serves.quiet()
        assert len(above.registry.requests) <= weather.n_asked, [one.target for one in above.registry.requests]


@every_weather
async def test_weather_that_comes_in_the_middle_of_a_body_never_ends_it_cleanly_wrong(
    weather: Weather, tmp_path: Path
) -> None:
    """INV-3: what broke off is gone on with where upstream gives the rest, and else ends short, for all who read; what
    is here is served meanwhile, and once upstream is well the rest is had."""
    async with sky(tmp_path) as above:
        assert (await above.serves.get(TARGETS["tag"])).status == 200  # which links the layer
        gate = Gate()
        breaks = Twist(
            path="*/blobs/*", method="GET", times=1, gate=gate, hold_at=(MIDDLE["blob"],), cut_at=MIDDLE["blob"]
        )
        above.registry.rewrite(breaks)
        before = above.clock.monotonic()
        readers = [asyncio.ensure_future(above.serves.get(TARGETS["blob"])) for _ in range(N)]
        await gate.reached.wait()
        while sum(transfer.n_readers for transfer in above.serves.engine.blobs.running()) < N:
            await asyncio.sleep(0)
        above.becomes(weather, "blob")
        for kind in ("tag", "digest"):
            assert (await above.serves.get(TARGETS[kind])).status == 200
        assert above.clock.monotonic() == before
        gate.open()
        told = RIGHT if weather.blob == RIGHT else SHORT
        for answer in await asyncio.gather(*readers):
            assert_told(answer, told, "blob")
        assert above.clock.monotonic() - before <= PAUSES_S
        await above.serves.quiet()
        assert await above.stored("blob") == (LAYER if told == RIGHT else None)
        await above.clears()
        assert_told(await above.serves.get(TARGETS["blob"]), RIGHT, "blob")


# -- the circuit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weather", [one for one in WEATHERS if one.opens is not None], ids=lambda one: one.name)
async def test_the_circuit_opens_for_silence_and_for_nothing_else(weather: Weather, tmp_path: Path) -> None:
    """Then what is not here fails at once, in the class of the cause; after the pause one request asks again."""
    async with sky(tmp_path) as above:
        above.becomes(weather, "tag")
        for number in range(TRIPS_AFTER):
            await above.serves.get(f"/v2/library/alpine/manifests/absent{number}")
        n_asked = len(above.registry.requests)
        answer = await above.serves.get("/v2/library/alpine/manifests/another")
        is_left_alone = len(above.registry.requests) == n_asked
        assert is_left_alone is (weather.opens or weather.name == "throttled")
        assert answer.status == (502 if weather.opens else weather.tag.status)
        await above.clears()
        assert (await above.serves.get(TARGETS["tag"])).status == 200
