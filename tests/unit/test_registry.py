"""web/registry.py by behaviour: requests become answers, to the letter that clients expect (peers.md §5)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from email import message_from_bytes
from email.message import Message

import pytest

from proxy.errors import Unreachable
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from tests.support import images
from tests.support.appliance import Answer, Appliance, HastyClock, read_answer, serving
from tests.support.engine import HOST, FakeUpstream, Script, engine

IMAGE = images.image(5, (200_000,))
LAYER = IMAGE.blobs[-1].content
LAYER_DIGEST = str(Digest.of(LAYER))
MANIFEST = "/v2/library/alpine/manifests/1"
BLOB = f"/v2/library/alpine/blobs/{LAYER_DIGEST}"


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream(piece_bytes=50_000)
    found.put(IMAGE, "1", "2", "latest")
    return found


@pytest.fixture
async def serves(upstream: FakeUpstream) -> AsyncIterator[Appliance]:
    async with engine(upstream, clock=HastyClock()) as running, serving(running) as made:
        yield made


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", ["1", IMAGE.digest], ids=["by tag", "by digest"])
async def test_a_manifest_is_answered_to_the_letter(serves: Appliance, method: str, target: str) -> None:
    """INV-9: byte for byte, its own media type without a charset, exact length, digest and ETag; HEAD the same."""
    for outcome in ("fwd=miss; stored", "hit"):
        answer = await serves.get(f"/v2/library/alpine/manifests/{target}", method=method)
        assert (answer.status, answer.end) == (200, "whole")
        assert answer.body == (IMAGE.body if method == "GET" else b"")
        assert answer.headers["content-length"] == str(len(IMAGE.body))
        assert answer.headers["content-type"] == IMAGE.media_type
        assert answer.headers["docker-content-digest"] == IMAGE.digest
        assert answer.headers["etag"] == f'"{IMAGE.digest}"'
        assert answer.headers["cache-status"] == f"breakwater; {outcome}"
        assert "content-encoding" not in answer.headers and "oci-namespace" not in answer.headers
        assert ("age" in answer.headers) is (target == "1")


async def test_age_and_staleness_are_told(serves: Appliance, upstream: FakeUpstream) -> None:
    """RFC 9111 Age and RFC 9211 Cache-Status: how old, and that it is stale."""
    await serves.get(MANIFEST)
    await serves.engine.clock.advance(90)
    assert (await serves.get(MANIFEST)).headers["age"] == "90"
    upstream.failure = Unreachable("down", upstream=HOST)
    await serves.engine.clock.advance(600)
    stale = await serves.get(MANIFEST)
    assert (stale.status, stale.body) == (200, IMAGE.body)
    assert (stale.headers["cache-status"], stale.headers["age"]) == ("breakwater; hit; detail=stale", "690")
    assert serves.answered[-1].outcome == "stale" and serves.answered[-1].error


@pytest.mark.parametrize(
    ("sent", "status"),
    [(f'"{IMAGE.digest}"', 304), (f'W/"{IMAGE.digest}"', 304), ("*", 304), ('"other"', 200)],
)
async def test_a_client_that_has_it_is_told_so(serves: Appliance, sent: str, status: int) -> None:
    """RFC 9110 § If-None-Match: the ETag is the digest."""
    answer = await serves.get(MANIFEST, more={"If-None-Match": sent})
    assert (answer.status, answer.body) == (status, b"" if status == 304 else IMAGE.body)
    assert answer.headers["etag"] == f'"{IMAGE.digest}"'


async def test_ns_is_echoed(serves: Appliance) -> None:
    """distribution-spec § Registry Proxying: OCI-Namespace where `ns` was used."""
    for target in (MANIFEST, BLOB, "/v2/library/alpine/tags/list", "/v2/"):
        answer = await serves.get(f"{target}?ns={HOST}")
        assert (answer.status, answer.headers["oci-namespace"]) == (200, HOST)


async def test_what_upstream_calls_nonsense_is_encoded_identically(serves: Appliance) -> None:
    """Identity encoding always, whatever the client would take."""
    answer = await serves.get(MANIFEST, more={"Accept-Encoding": "gzip, br, zstd"})
    assert answer.body == IMAGE.body and "content-encoding" not in answer.headers


# -- blobs -------------------------------------------------------------------------------------------------------------


async def test_a_blob_is_answered_to_the_letter(serves: Appliance) -> None:
    """Cold, coalesced by HEAD, and warm."""
    for n, outcome in enumerate(("fwd=miss; stored", "hit")):
        answer = await serves.get(BLOB)
        assert (answer.status, answer.body, answer.end) == (200, LAYER, "whole")
        assert answer.headers["content-length"] == str(len(LAYER))
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["docker-content-digest"] == LAYER_DIGEST
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["cache-status"] == f"breakwater; {outcome}", n
        await serves.quiet()
    head = await serves.get(BLOB, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(LAYER)))


RANGES = {
    "single": ("bytes=10-19", 206, LAYER[10:20], f"bytes 10-19/{len(LAYER)}"),
    "open": ("bytes=199990-", 206, LAYER[199990:], f"bytes 199990-{len(LAYER) - 1}/{len(LAYER)}"),
    "suffix": ("bytes=-5", 206, LAYER[-5:], f"bytes {len(LAYER) - 5}-{len(LAYER) - 1}/{len(LAYER)}"),
    "beyond the end": (f"bytes={len(LAYER)}-", 416, None, f"bytes */{len(LAYER)}"),
    "of nothing": ("bytes=-0", 416, None, f"bytes */{len(LAYER)}"),
    "malformed, so ignored": ("bytes=x-y", 200, LAYER, None),
    "of another unit, so ignored": ("lines=1-2", 200, LAYER, None),
}


@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(("asked", "status", "body", "where"), RANGES.values(), ids=RANGES.keys())
async def test_a_range_is_answered_alike_warm_and_cold(
    serves: Appliance, upstream: FakeUpstream, asked: str, status: int, body: bytes | None, where: str | None,
    is_warm: bool,
) -> None:  # fmt: skip
    """RFC 9110 § 14; INV-3 and ranges: a range of an uncached blob joins the one transfer, which goes on without it."""
    if is_warm:
        await serves.get(BLOB)
        await serves.quiet()
    answer = await serves.get(BLOB, more={"Range": asked})
    assert (answer.status, answer.end, answer.headers.get("content-range")) == (status, "whole", where)
    if body is None:
        assert answer.code == "RANGE_INVALID"
    else:
        assert answer.body == body
    await serves.quiet()
    assert await serves.engine.stored(Digest.parse(LAYER_DIGEST)) == LAYER
    assert upstream.count("blob") == 1


async def test_several_ranges_come_as_parts(serves: Appliance) -> None:
    """RFC 9110 § 14.6 multipart/byteranges, with an exact length."""
    answer = await serves.get(BLOB, more={"Range": "bytes=0-3,100-109,-2"})
    assert (answer.status, answer.end) == (206, "whole")
    message = message_from_bytes(b"Content-Type: " + answer.headers["content-type"].encode() + b"\r\n" + answer.body)
    parts = message.get_payload()
    assert isinstance(parts, list)
    assert [part["Content-Range"] for part in parts if isinstance(part, Message)] == [
        f"bytes 0-3/{len(LAYER)}",
        f"bytes 100-109/{len(LAYER)}",
        f"bytes {len(LAYER) - 2}-{len(LAYER) - 1}/{len(LAYER)}",
    ]
    for piece in (LAYER[:4], LAYER[100:110], LAYER[-2:]):
        assert piece in answer.body


@pytest.mark.parametrize(
    ("sent", "status"), [(f'"{LAYER_DIGEST}"', 206), ('"other"', 200), (f'W/"{LAYER_DIGEST}"', 200)]
)
async def test_a_range_of_something_else_is_the_whole(serves: Appliance, sent: str, status: int) -> None:
    """RFC 9110 § If-Range: only a strong match takes a part."""
    answer = await serves.get(BLOB, more={"Range": "bytes=0-9", "If-Range": sent})
    assert (answer.status, answer.body) == (status, LAYER[:10] if status == 206 else LAYER)


async def test_a_body_that_turns_out_wrong_ends_short_with_fin(serves: Appliance, upstream: FakeUpstream) -> None:
    """INV-3: containerd resumes after a short end with FIN, and fails the pull after RST."""
    upstream.scripts[Digest.parse(LAYER_DIGEST)] = [Script(len(LAYER), [LAYER[:-1] + b"?"])]
    answer = await serves.get(BLOB)
    assert (answer.status, answer.end) == (200, "short")
    await serves.quiet()
    said = serves.answered[-1]
    assert (said.ending, said.outcome, said.status) == ("short", "failed", 200)
    assert "does not hash" in said.error


async def test_a_client_that_leaves_is_no_failure(serves: Appliance, upstream: FakeUpstream) -> None:
    """INV-4: the transfer goes on for whoever comes next, and the log says that this one went."""
    gate = asyncio.Event()
    upstream.scripts[Digest.parse(LAYER_DIGEST)] = [Script(len(LAYER), [LAYER[:150_000], gate, LAYER[150_000:]])]
    reader, writer = await asyncio.open_connection("127.0.0.1", serves.port)
    writer.write(f"GET {BLOB} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readexactly(1000)
    writer.transport.abort()
    while not serves.answered:
        await asyncio.sleep(0)
    assert serves.answered[0].ending == "gone"
    second = asyncio.create_task(serves.get(BLOB))
    gate.set()
    assert (await second).body == LAYER
    assert upstream.count("blob") == 1


async def test_headers_leave_in_time_and_the_fetch_goes_on(upstream: FakeUpstream) -> None:
    """Promise 3: 504 before the client's own deadline; asking again finds the fetch further."""
    upstream.gate = asyncio.Event()
    async with engine(upstream, clock=HastyClock()) as running, serving(running, header_deadline_s=0.05) as serves:
        answer = await serves.get(MANIFEST)
        assert (answer.status, answer.code) == (504, "UNAVAILABLE")
        upstream.gate.set()
        await running.idle()
        answer = await serves.get(MANIFEST)
        assert (answer.status, answer.body) == (200, IMAGE.body)
        assert upstream.kinds() == ["manifest"]


# -- lists -------------------------------------------------------------------------------------------------------------


async def test_tags_come_in_pages_with_a_link_to_the_next(serves: Appliance) -> None:
    """distribution-spec § Listing Tags: n, last and Link; following it finds all of them."""
    target, found = "/v2/library/alpine/tags/list?n=2", []
    while target:
        answer = await serves.get(target)
        document = answer.body.decode()
        found += re.findall(r'"(1|2|latest)"', document)
        link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
        target = link[1] if link else ""
    assert found == ["1", "2", "latest"]


@pytest.mark.parametrize("filtered", ["", "?artifactType=application/vnd.test.signature"])
async def test_referrers_are_an_index(serves: Appliance, upstream: FakeUpstream, filtered: str) -> None:
    """distribution-spec § Listing Referrers: always an index, and OCI-Filters-Applied where it was filtered."""
    upstream.put(images.artifact(IMAGE, "application/vnd.test.signature", b"s"))
    upstream.put(images.artifact(IMAGE, "application/vnd.test.sbom", b"b"))
    answer = await serves.get(f"/v2/library/alpine/referrers/{IMAGE.digest}{filtered}")
    assert (answer.status, answer.headers["content-type"]) == (200, images.OCI_INDEX)
    assert answer.body.count(b'"artifactType"') == (1 if filtered else 2)
    assert answer.headers.get("oci-filters-applied") == ("artifactType" if filtered else None)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize("target", ["/v2/library/alpine/blobs/uploads/", MANIFEST, BLOB, "/v2/"])
async def test_writing_is_refused_without_reading_what_was_to_be_written(
    serves: Appliance, method: str, target: str
) -> None:
    """product.md: write verbs answer 405 UNSUPPORTED; of a gigabyte that is announced not a byte is waited for."""
    answer = await serves.get(target, method=method, more={"Content-Length": str(1 << 30)})
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "UNSUPPORTED", "GET, HEAD")
    assert answer.headers["connection"] == "close"


HOSTILE = {
    "unknown upstream": ("/v2/x/y/manifests/1?ns=evil.test", 404, "NAME_UNKNOWN"),
    "an address as ns": ("/v2/x/y/manifests/1?ns=169.254.169.254", 404, "NAME_UNKNOWN"),
    "unknown project": ("/v2/~nobody/x/manifests/1", 404, "NAME_UNKNOWN"),
    "unknown tag": ("/v2/library/alpine/manifests/nope", 404, "MANIFEST_UNKNOWN"),
    "unknown digest": (f"/v2/library/alpine/manifests/sha256:{'0' * 64}", 404, "MANIFEST_UNKNOWN"),
    "unknown blob": (f"/v2/library/alpine/blobs/sha256:{'0' * 64}", 404, "BLOB_UNKNOWN"),
    "bad digest": ("/v2/library/alpine/blobs/sha256:00", 400, "DIGEST_INVALID"),
    "bad tag": ("/v2/library/alpine/manifests/-x", 400, "TAG_INVALID"),
    "bad name": ("/v2/Library/alpine/manifests/1", 400, "NAME_INVALID"),
    "dots": ("/v2/../../etc/passwd/manifests/1", 400, "NAME_INVALID"),
    "encoded slash": ("/v2/a%2fb/manifests/1", 400, "NAME_INVALID"),
    "no endpoint": ("/v2/library/alpine/nothing/1", 404, "NAME_UNKNOWN"),
    "not the registry": ("/", 404, "NAME_UNKNOWN"),
    "bad number": ("/v2/library/alpine/tags/list?n=x", 400, "REQUEST_INVALID"),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("target", "status", "code"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_what_cannot_be_had_is_said_in_the_specs_words(
    serves: Appliance, target: str, status: int, code: str, method: str
) -> None:
    """distribution-spec § Error Codes: JSON, and never a page of the server's own."""
    answer = await serves.get(target, method=method)
    assert (answer.status, answer.end) == (status, "whole")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["server"] == "Breakwater"
    if method == "GET":
        assert answer.code == code and answer.message
    else:
        assert answer.body == b""


async def test_a_refusal_by_a_rule_names_it_and_is_counted_so(upstream: FakeUpstream) -> None:
    """403 DENIED with which rule of which project; the event has the same words."""
    rules = Rules("default", deny=(Glob.parse("**:1"),))
    async with engine(upstream, rules=[rules]) as running, serving(running) as serves:
        answer = await serves.get(MANIFEST)
        assert (answer.status, answer.code) == (403, "DENIED")
        assert "**:1" in answer.message
        said = serves.answered[-1]
        assert (said.outcome, said.rule, said.project) == ("denied", "**:1", "default")


async def test_a_bug_of_ours_is_a_500_that_is_counted(serves: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly one event comes of each request, also of one that should never have been."""

    async def broken(_: ManifestGet, *__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(serves.engine.pull, "manifest", broken)
    answer = await serves.get(MANIFEST)
    assert (answer.status, answer.code) == (500, "UNKNOWN")
    assert "bug" not in answer.message
    assert [(said.status, said.kind, said.outcome) for said in serves.answered] == [(500, "manifest", "failed")]


# -- connections and ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brought", "is_taken"), [("abc-123.X:y_z", True), ("", False), ("a" * 65, False), ("a b", False)]
)
async def test_a_request_id_is_taken_over_only_when_it_is_harmless(
    serves: Appliance, brought: str, is_taken: bool
) -> None:
    """CWE-117: what goes into a log line or a header is checked where it comes in."""
    await serves.get("/v2/", more={"X-Request-Id": brought})
    assert (serves.answered[-1].request_id == brought) is is_taken
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", serves.answered[-1].request_id)


async def test_requests_follow_each_other_on_one_connection(serves: Appliance) -> None:
    """Errors among them do not end it; each has an event of its own, with its bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", serves.port)
    targets = ["/v2/", MANIFEST, "/v2/library/alpine/manifests/nope", MANIFEST, BLOB, "/v2/"]
    answers: list[Answer] = []
    for target in targets:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answers.append(await read_answer(reader))
    assert [answer.status for answer in answers] == [200, 200, 404, 200, 200, 200]
    assert len({said.request_id for said in serves.answered}) == len(serves.answered) == len(targets)
    assert [said.n_bytes for said in serves.answered if said.kind == "blob"] == [len(LAYER)]
    writer.close()
    await writer.wait_closed()


async def test_a_hundred_cold_pulls_ask_upstream_once_for_each_thing(serves: Appliance, upstream: FakeUpstream) -> None:
    """INV-4 through sockets: HEAD then GET, manifests and blobs, whole and in parts, all at once."""
    answers = await asyncio.gather(
        *(serves.get(MANIFEST) for _ in range(40)),
        *(serves.get(BLOB) for _ in range(30)),
        *(serves.get(BLOB, more={"Range": f"bytes={n * 1000}-"}) for n in range(30)),
    )
    assert {answer.status for answer in answers} == {200, 206}
    assert all(LAYER.endswith(answer.body) for answer in answers[40:])
    assert (upstream.count("manifest"), upstream.count("blob")) == (1, 1)
