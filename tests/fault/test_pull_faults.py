"""What upstreams do wrong, and what a client gets for it: one table, over real sockets on both sides.

Each fault is tried on a manifest by tag, one by digest, and a blob, cold. Told are the answer (status, code,
Retry-After; or a short body that ends with FIN and never RST), that nothing is kept, how often upstream was asked, and
whether asking again at once asks upstream again. Once upstream is well and the time of the bad mark is over, the same
request must be answered right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from proxy.oci.digest import Digest
from proxy.rules.transfer import HELD_BACK_BYTES
from proxy.upstream.policy import Deadlines, Pace
from tests.support import images
from tests.support.appliance import Answer, Appliance, appliance
from tests.support.registry import Gate, Guard, ScriptedRegistry, Twist, redirect

IMAGE = images.image(7, (300 * images.KIB,))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
LAYER_DIGEST = images.digest_of(LAYER)
#: A byte where bodies break: of the layer before the end that is held back.
K = {"tag": 200, "digest": 200, "blob": 100_000}

SCHEMA1 = json.dumps({"schemaVersion": 1, "name": "library/alpine", "fsLayers": [], "history": []}).encode()
SCHEMA1_TYPE = "application/vnd.docker.distribution.manifest.v1+prettyjws"
PAGE = b"<html><body>Please log in to the hotel's network</body></html>"

Kind = Literal["tag", "digest", "blob"]
KINDS: tuple[Kind, ...] = ("tag", "digest", "blob")
TARGETS = {
    "tag": "/v2/library/alpine/manifests/1",
    "digest": f"/v2/library/alpine/manifests/{IMAGE.digest}",
    "blob": f"/v2/library/alpine/blobs/{LAYER_DIGEST}",
}
CONTENT = {"tag": IMAGE.body, "digest": IMAGE.body, "blob": LAYER}


@dataclass(frozen=True, slots=True)
class Told:
    """What a client is told."""

    status: int
    code: str = ""
    retry_after: str | None = None
    #: Requests that upstream got for it, tokens and redirects among them. None: what breaks off may take bytes with it
    #: that nobody had read yet, so that it cannot be said how often there was progress.
    n_asked: int | None = 1
    #: The headers had left when it showed: the body ends short of its length, with FIN.
    is_short: bool = False
    #: Asked again within 30 s, upstream is left in peace.
    is_marked: bool = False


RIGHT = Told(200)
UNREACHABLE = Told(502, "UNAVAILABLE")
MARKED = Told(502, "UNAVAILABLE", is_marked=True)
#: A blob's headers have left by the time that it shows: the body ends short.
SHORT = Told(200, is_short=True, is_marked=True)
#: Resumed three times without progress, and then taken for what it is.
STUCK = Told(200, is_short=True, is_marked=True, n_asked=None)
GARBLED = Told(502, "MANIFEST_INVALID", is_marked=True)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way of failing, and what comes of it for each kind. A kind that is not told of is not tried."""

    name: str
    tag: Told | None
    digest: Told | None
    blob: Told | None
    twist: Callable[[Kind, Gate], Twist] | None = None
    guard: Callable[[], Guard] | None = None

    def told(self, kind: Kind) -> Told | None:
        found: Told | None = getattr(self, kind)
        return found


Script = Callable[[Kind, Gate], Twist]


def always(**words: Any) -> Script:
    """Each GET in the same way."""
    return lambda _, __: Twist(method="GET", **words)


def breaking(**words: Any) -> Script:
    """Each GET at the kind's byte K."""
    return lambda kind, _: Twist(method="GET", cut_at=K[kind], **words)


def refusing(status: int, *headers: tuple[str, str]) -> Script:
    """Any method: a token that is wanted, or a limit that is reached, is no matter of GET alone."""
    return lambda _, __: Twist(status=status, add=[("Content-Type", "application/json"), *headers], body=b"{}")


FAULTS = [
    # -- the connection
    Fault("ends short once", UNREACHABLE, UNREACHABLE, Told(200, n_asked=2), breaking(times=1)),
    Fault("ends short each time", UNREACHABLE, UNREACHABLE, STUCK, breaking(ignores_range=True)),
    Fault(
        "resets in the middle each time", UNREACHABLE, UNREACHABLE, STUCK,
        breaking(cut="rst", ignores_range=True),
    ),
    Fault("resets before any answer", UNREACHABLE, UNREACHABLE, UNREACHABLE, always(no_answer="rst")),
    Fault("closes before any answer", UNREACHABLE, UNREACHABLE, UNREACHABLE, always(no_answer="fin")),
    Fault("speaks no HTTP", MARKED, MARKED, MARKED, always(raw=b"220 smtp ready\r\n\r\n")),
    # -- the bytes
    Fault("sends another byte in the middle", MARKED, MARKED, SHORT, always(flip_at=150)),
    Fault(
        "sends more, and says so", GARBLED, MARKED, MARKED,
        lambda kind, _: Twist(method="GET", body=CONTENT[kind] + b"more"),
    ),
    Fault(
        "sends more, in chunks", GARBLED, MARKED, SHORT,
        lambda kind, _: Twist(method="GET", body=CONTENT[kind] + b"more", framing="chunked"),
    ),
    Fault(
        "sends less, in chunks", GARBLED, MARKED, SHORT,
        lambda kind, _: Twist(method="GET", body=CONTENT[kind][: K[kind]], framing="chunked"),
    ),
    Fault("sends a page for people", MARKED, MARKED, MARKED, always(body=PAGE, add=[("Content-Type", "text/html")])),
    Fault("sends 5 MiB for a manifest", MARKED, MARKED, None, always(body=b" " * (5 << 20))),
    Fault(
        "sends a manifest of schema 1", GARBLED, MARKED, None,
        always(body=SCHEMA1, add=[("Content-Type", SCHEMA1_TYPE)]),
    ),
    Fault("packs the body and says so", RIGHT, RIGHT, MARKED, always(packed=True)),
    Fault(
        "calls it by another digest", MARKED, RIGHT, RIGHT,
        always(add=[("Docker-Content-Digest", images.digest_of(b"another"))]),
    ),
    # -- the frame: nothing wrong with these
    Fault("says no length and closes", RIGHT, RIGHT, RIGHT, always(framing="eof")),
    Fault("sends chunks", RIGHT, RIGHT, RIGHT, always(framing="chunked")),
    # -- time
    Fault(
        "stalls before the headers", TIMEOUT := Told(504, "UNAVAILABLE"), TIMEOUT, TIMEOUT,
        lambda _, gate: Twist(method="GET", gate=gate, holds_headers=True),
    ),
    Fault(
        "stalls in the middle", TIMEOUT, TIMEOUT, Told(200, is_short=True, n_asked=4),
        lambda kind, gate: Twist(method="GET", gate=gate, hold_at=(K[kind],), ignores_range=True),
    ),
    # -- refusals
    Fault(
        "wants a login again and again", LOOP := Told(403, "DENIED", n_asked=3), LOOP, LOOP,
        guard=lambda: Guard(scheme="bearer", refuses_all=True),
    ),
    Fault("forbids", Told(403, "DENIED"), Told(403, "DENIED"), Told(403, "DENIED"), refusing(403)),
    Fault(
        "asks to come back in 7 s", LATER := Told(503, "TOOMANYREQUESTS", "7"), LATER, LATER,
        refusing(429, ("Retry-After", "7")),
    ),
    Fault(
        "asks to come back some time", SOON := Told(503, "TOOMANYREQUESTS", "30"), SOON, SOON,
        refusing(429),
    ),
    Fault("is overloaded for 9 s", NINE := Told(503, "TOOMANYREQUESTS", "9"), NINE, NINE,
          refusing(503, ("Retry-After", "9"))),
    Fault("fails", UNREACHABLE, UNREACHABLE, UNREACHABLE, refusing(500)),
    Fault("answers out of this world", MARKED, MARKED, MARKED, refusing(299)),
    Fault(
        "does not have it", ABSENT := Told(404, "MANIFEST_UNKNOWN", is_marked=True), ABSENT,
        Told(404, "BLOB_UNKNOWN"), refusing(404),
    ),
    # -- redirects with traps
    Fault(
        "redirects to the machine's metadata", MARKED, MARKED, MARKED,
        lambda _, __: redirect("http://169.254.169.254/latest/meta-data/", method="GET"),
    ),
    Fault("redirects to a file", MARKED, MARKED, MARKED, lambda _, __: redirect("file:///etc/passwd", method="GET")),
    Fault(
        "redirects in circles", SIX := Told(502, "UNAVAILABLE", n_asked=6, is_marked=True), SIX, SIX,
        lambda _, __: redirect("?again", method="GET"),
    ),
    Fault("redirects to nowhere", MARKED, MARKED, MARKED, always(status=307, body=b"")),
]  # fmt: skip

CASES = [
    pytest.param(fault, kind, told, id=f"{fault.name}-{kind}")
    for fault in FAULTS
    for kind in KINDS
    if (told := fault.told(kind)) is not None
]


async def _linked(serves: Appliance) -> None:
    """Make the layer known, as a client that has pulled the manifest does."""
    answer = await serves.get("/v2/library/alpine/manifests/known")
    assert answer.status == 200


def _assert_told(answer: Answer, told: Told, content: bytes) -> None:
    assert answer.status == told.status, answer
    assert answer.end == ("short" if told.is_short else "whole"), answer.end
    if told.status == 200:
        assert len(answer.body) <= len(content) - HELD_BACK_BYTES if told.is_short else answer.body == content
        return
    assert answer.code == told.code, answer.body
    assert answer.message
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == told.retry_after


@pytest.mark.parametrize(("fault", "kind", "told"), CASES)
async def test_a_fault_upstream_gets_a_true_answer_and_leaves_nothing_behind(
    fault: Fault, kind: Kind, told: Told, tmp_path: Path
) -> None:
    """INV-1, INV-2, INV-3: what upstream does wrong never ends a body cleanly and never gets a name in the store."""
    gate = Gate()
    async with ScriptedRegistry() as registry:
        registry.put("library/alpine", IMAGE, "1")
        if kind == "blob":  # a manifest that names the layer, and is not the one that the other kinds ask for
            other = images.manifest(images.Blob(b"{}", images.OCI_CONFIG), [images.Blob(LAYER, images.OCI_LAYER)])
            registry.put("library/alpine", other, "known")
        policy = {"deadlines": Deadlines(answer_s=0.5), "pace": Pace(1, 0.15)}
        async with appliance(registry, tmp_path, policy=policy) as serves:
            if kind == "blob":
                await _linked(serves)
            kept_before = set(await _names(serves))
            registry.rewrite(*([fault.twist(kind, gate)] if fault.twist else []))
            registry.guard = fault.guard() if fault.guard else None
            registry.requests.clear()

            answer = await serves.get(TARGETS[kind])
            await serves.quiet()
            _assert_told(answer, told, CONTENT[kind])
            n_asked = len(registry.requests)
            assert told.n_asked in (None, n_asked), [one.target for one in registry.requests]
            assert n_asked <= 6
            if told.status != 200 or told.is_short:
                assert set(await _names(serves)) == kept_before
            assert [*tmp_path.glob("**/ingest")] != [] == [*tmp_path.glob("**/ingest/*")]

            again = await serves.get(TARGETS[kind])
            await serves.quiet()
            is_left_in_peace = len(registry.requests) == n_asked
            if told.is_marked or (told.status == 200 and not told.is_short):
                assert is_left_in_peace, "asked again within the time of the mark"
            elif not fault.guard:  # a refused login is not tried again within a minute, and that is a token's matter
                assert not is_left_in_peace
            if told.is_short and told.is_marked:
                assert (again.status, again.code) == (502, "UNAVAILABLE")

            gate.open()
            registry.rewrite()
            registry.guard = None
            await serves.engine.clock.advance(61)
            well = await serves.get(TARGETS[kind])
            assert (well.status, well.end, well.body) == (200, "whole", CONTENT[kind])
            await serves.quiet()
            wanted = Digest.parse(images.digest_of(CONTENT[kind]))
            assert await serves.engine.stored(wanted) == CONTENT[kind]


async def test_the_bad_mark_lasts_30_seconds(tmp_path: Path) -> None:
    """Clients that resume after a short body come back at once, and must not start a storm; but not forever."""
    async with ScriptedRegistry(Twist(method="GET", path="*/blobs/*", flip_at=5)) as registry:
        registry.put("library/alpine", IMAGE, "1")
        async with appliance(registry, tmp_path) as serves:
            await serves.get(TARGETS["tag"])
            for _ in range(5):
                await serves.get(TARGETS["blob"], more={"Range": "bytes=1000-"})
                await serves.quiet()
            assert len(registry.asked("*/blobs/*", "GET")) == 1
            await serves.engine.clock.advance(29.9)
            assert (await serves.get(TARGETS["blob"])).status == 502
            assert len(registry.asked("*/blobs/*", "GET")) == 1
            registry.rewrite()
            await serves.engine.clock.advance(0.2)
            answer = await serves.get(TARGETS["blob"])
            assert hashlib.sha256(answer.body).hexdigest() == LAYER_DIGEST.removeprefix("sha256:")
            assert len(registry.asked("*/blobs/*", "GET")) == 2


async def _names(serves: Appliance) -> list[Digest]:
    return [blob.digest async for batch in serves.engine.store.blobs.scan() for blob in batch]
