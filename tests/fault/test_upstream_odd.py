"""Registries as they are (peers.md §5.5): what is missing, refused, packed, paged or too much."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy import errors
from proxy.errors import Misbehaved, UnknownManifest, UnknownName
from proxy.oci.digest import Digest
from proxy.oci.manifest import MAX_MANIFEST_BYTES
from proxy.oci.names import Tag
from proxy.ports import TagPage
from proxy.upstream.answers import Budget
from tests.support import images
from tests.support.registry import ScriptedRegistry, Twist, redirect
from tests.support.upstream import ALPINE, Asking, asking

IMAGE = images.image(3, (5000,))
DIGEST = Digest.parse(IMAGE.digest)
LAYER = Digest.parse(IMAGE.blobs[-1].digest)
N_LAYER = len(IMAGE.blobs[-1].content)
LATEST = Tag("latest")


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as scripted:
        scripted.put(str(ALPINE), IMAGE, "latest")
        yield scripted


@pytest.fixture
async def asked(registry: ScriptedRegistry) -> AsyncIterator[Asking]:
    async with asking(registry) as made:
        yield made


# -- HEAD --------------------------------------------------------------------------------------------------------------


async def test_head_may_lack_digest_and_length(registry: ScriptedRegistry, asked: Asking) -> None:
    """Each part may be missing; None says so."""
    registry.rewrite(Twist(drop=["Docker-Content-Digest", "Content-Length", "Content-Type"]))
    head = await asked.client.manifest_head(ALPINE, LATEST)
    assert (head.digest, head.size, head.media_type) == (None, None, "")


@pytest.mark.parametrize("claim", ["sha256:abc", "md5:00", "", "x" * 5000])
async def test_digest_that_is_none_is_no_digest(registry: ScriptedRegistry, asked: Asking, claim: str) -> None:
    """The claim proves nothing anyway."""
    registry.rewrite(Twist(add=[("Docker-Content-Digest", claim)]))
    assert (await asked.client.manifest_head(ALPINE, LATEST)).digest is None
    assert (await asked.client.manifest(ALPINE, LATEST)).digest is None


@pytest.mark.parametrize("status", [405, 501])
async def test_refused_head_of_a_manifest_becomes_one_get(
    registry: ScriptedRegistry, asked: Asking, status: int
) -> None:
    """What the GET's headers say is the answer."""
    registry.rewrite(Twist(method="HEAD", status=status))
    head = await asked.client.manifest_head(ALPINE, LATEST)
    assert (head.digest, head.size) == (DIGEST, len(IMAGE.body))
    assert [one.method for one in registry.requests] == ["HEAD", "GET"]


async def test_refused_head_of_a_blob_becomes_a_get_of_one_byte(registry: ScriptedRegistry, asked: Asking) -> None:
    """The size is in Content-Range; a layer is not fetched to learn how long it is."""
    registry.rewrite(Twist(method="HEAD", status=405))
    assert await asked.client.blob_size(ALPINE, LAYER) == N_LAYER
    assert registry.requests[-1].header("Range") == "bytes=0-0"


async def test_refused_head_of_an_empty_blob_is_understood(registry: ScriptedRegistry, asked: Asking) -> None:
    """There is no first byte: 416 says of how many (RFC 9110 §15.5.17)."""
    registry.put_blob(str(ALPINE), b"")
    registry.rewrite(Twist(method="HEAD", status=405))
    assert await asked.client.blob_size(ALPINE, Digest.of(b"")) == 0


async def test_refused_head_with_range_ignored_leaves_the_rest_unread(
    registry: ScriptedRegistry, asked: Asking
) -> None:
    """The whole blob is on its way: its length is read, and the connection closed."""
    big = bytes(3_000_000)
    registry.put_blob(str(ALPINE), big)
    registry.rewrite(Twist(method="HEAD", status=405), Twist(ignores_range=True))
    assert await asked.client.blob_size(ALPINE, Digest.of(big)) == len(big)


async def test_storage_that_signed_for_get_alone_is_asked_by_get(registry: ScriptedRegistry) -> None:
    """A presigned address is good for one method: HEAD of it is 403."""
    async with ScriptedRegistry() as storage:
        storage.put(str(ALPINE), IMAGE)
        storage.rewrite(Twist(method="HEAD", status=403))
        registry.rewrite(redirect(f"{storage.url}/v2/library/alpine/blobs/{LAYER}"))
        async with asking(registry, allow_private=True) as asked:
            assert await asked.client.blob_size(ALPINE, LAYER) == N_LAYER


async def test_absent_by_get_after_a_refused_head_is_unknown(registry: ScriptedRegistry, asked: Asking) -> None:
    """The fallback's answer is an answer."""
    registry.rewrite(Twist(method="HEAD", status=405))
    with pytest.raises(UnknownManifest):
        await asked.client.manifest_head(ALPINE, Tag("absent"))


async def test_web_page_in_place_of_a_head_is_misbehaviour(registry: ScriptedRegistry, asked: Asking) -> None:
    """A captive portal says 200 to everything."""
    registry.rewrite(Twist(add=[("Content-Type", "text/html; charset=utf-8")]))
    with pytest.raises(Misbehaved, match="web page"):
        await asked.client.manifest_head(ALPINE, LATEST)


# -- manifests ---------------------------------------------------------------------------------------------------------


async def test_packed_manifest_is_unpacked(registry: ScriptedRegistry, asked: Asking) -> None:
    """CDNs pack JSON although nobody asked; the digest of what is inside decides."""
    registry.rewrite(Twist(packed=True))
    assert (await asked.client.manifest(ALPINE, LATEST)).body == IMAGE.body
    assert (await asked.client.manifest_head(ALPINE, LATEST)).size is None


BAD_MANIFESTS: dict[str, dict[str, Any]] = {
    "a web page": {"body": b"<html>sign in</html>", "add": [("Content-Type", "text/html; charset=utf-8")]},
    "over 4 MiB": {"body": b" " * (MAX_MANIFEST_BYTES + 1)},
    "over 4 MiB, in chunks": {"body": b" " * (MAX_MANIFEST_BYTES + 1), "framing": "chunked"},
    "over 4 MiB, packed": {"body": b" " * (MAX_MANIFEST_BYTES + 1), "packed": True},
    "a bomb": {"body": gzip.compress(bytes(200_000_000)), "add": [("Content-Encoding", "gzip")]},
    "half a gzip": {"body": gzip.compress(b"{}")[:-4], "add": [("Content-Encoding", "gzip")]},
    "packed by brotli": {"body": b"x", "add": [("Content-Encoding", "br")]},
    "packed twice": {"body": b"x", "add": [("Content-Encoding", "gzip, gzip")]},
    "no content": {"status": 204, "body": b""},
    "a part": {"status": 206},
    "not modified": {"status": 304, "body": b""},
}


@pytest.mark.parametrize("twist", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
async def test_answer_that_is_no_manifest_is_misbehaviour(
    registry: ScriptedRegistry, asked: Asking, twist: dict[str, Any]
) -> None:
    """With a sentence, and with no more of it read than the limit."""
    registry.rewrite(Twist(**twist))
    with pytest.raises(Misbehaved, match=r"registry\.test"):
        await asked.client.manifest(ALPINE, LATEST)


async def test_manifest_of_exactly_4_mib_is_taken(registry: ScriptedRegistry, asked: Asking) -> None:
    """The limit is what the specification says registries should take."""
    body = b" " * MAX_MANIFEST_BYTES
    for packed in (False, True):
        registry.rewrite(Twist(body=body, packed=packed))
        assert (await asked.client.manifest(ALPINE, LATEST)).body == body


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (None, ""),
        ("application/vnd.oci.image.index.v1+json; charset=utf-8", "application/vnd.oci.image.index.v1+json"),
        ("text/plain", "text/plain"),
    ],
)
async def test_media_type_is_passed_on_without_parameters(
    registry: ScriptedRegistry, asked: Asking, content_type: str | None, expected: str
) -> None:
    """What a document is, is decided where it is read."""
    header = [("Content-Type", content_type)] if content_type else []
    registry.rewrite(Twist(drop=["Content-Type"], add=header))
    assert (await asked.client.manifest(ALPINE, LATEST)).media_type == expected


async def test_manifest_behind_a_redirect_is_had(registry: ScriptedRegistry, asked: Asking) -> None:
    """registry.k8s.io redirects manifests too."""
    registry.put("moved", IMAGE, "latest")
    registry.rewrite(redirect("/v2/moved/manifests/latest", path="/v2/library/*"))
    assert (await asked.client.manifest(ALPINE, LATEST)).body == IMAGE.body


# -- failures, in upstream's words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("twist", "failure", "piece"),
    [
        ({"status": 404, "body": b'{"errors":[{"code":"NAME_UNKNOWN"}]}'}, UnknownName, "NAME_UNKNOWN"),
        ({"status": 404, "body": b"<html>"}, UnknownManifest, "library/alpine:latest"),
        (
            {"status": 403, "body": b'{"errors":[{"code":"DENIED","message":"no pull"}]}'},
            errors.Unauthorised,
            "no pull",
        ),
        (
            {"status": 429, "body": b"slow\x1b down", "add": [("Content-Type", "text/plain")]},
            errors.Throttled,
            "slow down",
        ),
        ({"status": 500, "body": b"x" * 100_000}, errors.Unreachable, "500"),
        ({"status": 503}, errors.Unreachable, "503"),
        ({"status": 408}, errors.Unreachable, "408"),
        ({"status": 400}, Misbehaved, "400"),
        ({"status": 500, "cut_at": 3}, errors.Unreachable, "500"),
    ],
)
async def test_status_and_words_become_a_failure(
    registry: ScriptedRegistry, asked: Asking, twist: dict[str, Any], failure: type[Exception], piece: str
) -> None:
    """Told apart, and told in a sentence."""
    registry.rewrite(Twist(**twist))
    with pytest.raises(failure) as caught:
        await asked.client.manifest(ALPINE, LATEST)
    assert type(caught.value) is failure
    assert piece in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (429, "30", 30.0),
        (429, "Fri, 15 Jan 2027 08:01:00 GMT", 60.0),
        (429, "a while", None),
        (429, "999999", 3600.0),
        (503, "5", 5.0),
    ],
)
async def test_retry_after_is_passed_on(
    registry: ScriptedRegistry, asked: Asking, status: int, header: str, seconds: float | None
) -> None:
    """By the wall clock that is an argument; a 503 with one is throttling too."""
    registry.rewrite(Twist(status=status, add=[("Retry-After", header)]))
    with pytest.raises(errors.Throttled) as caught:
        await asked.client.blob(ALPINE, LAYER)
    assert caught.value.retry_after_s == seconds


async def test_budget_is_what_was_said_last(registry: ScriptedRegistry, asked: Asking) -> None:
    """On HEAD and GET alike, on refusals too; an answer without the headers changes nothing."""
    assert asked.client.budget is None
    registry.rewrite(Twist(times=1, add=[("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "1;w=21600")]))
    await asked.client.manifest_head(ALPINE, LATEST)
    assert asked.client.budget == Budget(100, 1, 21600)
    await asked.client.manifest_head(ALPINE, LATEST)
    assert asked.client.budget == Budget(100, 1, 21600)
    registry.rewrite(Twist(status=429, add=[("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "0;w=21600")]))
    with pytest.raises(errors.Throttled):
        await asked.client.manifest(ALPINE, LATEST)
    assert asked.client.budget == Budget(100, 0, 21600)


async def test_storage_has_no_say_in_the_budget(registry: ScriptedRegistry) -> None:
    """The budget is the registry's."""
    async with ScriptedRegistry(Twist(status=200, body=b"", add=[("ratelimit-remaining", "0")])) as storage:
        registry.rewrite(redirect(f"{storage.url}/b"))
        async with asking(registry, allow_private=True) as asked:
            await (await asked.client.blob(ALPINE, LAYER)).close()
            assert asked.client.budget is None


# -- lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "last"),
    [
        ('</v2/library/alpine/tags/list?n=2&last=b>; rel="next"', "b"),
        ('</v2/library/alpine/tags/list?last=x%2Fy&n=2>; rel="next"', "x/y"),
        ('</v2/library/alpine/tags/list?next_page=opaque>; rel="next"', "b"),
        ("<?last=c>;rel=next", "c"),
        ('</other>; rel="prev"', None),
        ("garbage", None),
    ],
)
async def test_next_page_is_asked_for_by_its_last_tag(
    registry: ScriptedRegistry, asked: Asking, link: str, last: str | None
) -> None:
    """Pages of another kind fall back to the page's last tag, which is what the specification means by `last`."""
    registry.rewrite(Twist(body=b'{"name":"library/alpine","tags":["a","b"]}', add=[("Link", link)]))
    assert await asked.client.tags(ALPINE, n=2, last=None) == TagPage(("a", "b"), last)


async def test_page_size_and_place_are_sent_as_they_are(registry: ScriptedRegistry, asked: Asking) -> None:
    """Encoded, and nothing more."""
    await asked.client.tags(ALPINE, n=5, last="1.0_a")
    assert registry.requests[-1].target == "/v2/library/alpine/tags/list?n=5&last=1.0_a"


@pytest.mark.parametrize(
    ("body", "tags"),
    [
        (b'{"tags": null}', ()),
        (b"{}", ()),
        (b'{"tags": ["ok", 5, null, "-no", "a b", "", "x/y", "' + b"l" * 129 + b'"]}', ("ok",)),
    ],
    ids=["null", "none", "some are no tags"],
)
async def test_what_is_no_tag_is_left_out(
    registry: ScriptedRegistry, asked: Asking, body: bytes, tags: tuple[str, ...]
) -> None:
    """Nobody could ask for it."""
    registry.rewrite(Twist(body=body))
    assert (await asked.client.tags(ALPINE, n=None, last=None)).tags == tags


@pytest.mark.parametrize(
    "twist",
    [
        {"body": b"[]"},
        {"body": b'{"tags": {}}'},
        {"body": b"<html>", "add": [("Content-Type", "text/html")]},
        {"body": b"[" * 100_000},
        {"add": [("Link", '<http://127.0.0.1:1/v2/>; rel="next"')]},
        {"add": [("Link", '<file:///etc/passwd>; rel="next"')]},
    ],
)
async def test_list_that_is_none_is_misbehaviour(
    registry: ScriptedRegistry, asked: Asking, twist: dict[str, Any]
) -> None:
    """And a list goes on nowhere but at its own origin, because it is asked with our login."""
    registry.rewrite(Twist(**twist))
    with pytest.raises(Misbehaved):
        await asked.client.tags(ALPINE, n=None, last=None)


@pytest.mark.parametrize("status", [404, 405])
async def test_registry_without_referrers_has_none(registry: ScriptedRegistry, asked: Asking, status: int) -> None:
    """None, which is not an empty index: the tag schema may know some (distribution-spec § Referrers Tag Schema)."""
    registry.rewrite(Twist(status=status))
    assert await asked.client.referrers(ALPINE, DIGEST, artifact_type="") is None


async def test_single_page_of_referrers_is_passed_on_byte_for_byte(registry: ScriptedRegistry, asked: Asking) -> None:
    """Nothing is rewritten that need not be."""
    body = b'{ "schemaVersion":2, "manifests" : [ ]  }'
    registry.rewrite(Twist(body=body))
    assert await asked.client.referrers(ALPINE, DIGEST, artifact_type="a/b+c") == body
    assert dict(registry.requests[-1].query) == {"artifactType": "a/b+c"}


async def test_pages_of_referrers_are_joined(registry: ScriptedRegistry, asked: Asking) -> None:
    """All entries in upstream's order, in the first page's document."""
    pages = [json.dumps({"schemaVersion": 2, "manifests": [{"n": n}], "annotations": {"n": str(n)}}) for n in range(3)]
    registry.rewrite(
        Twist(times=1, body=pages[0].encode(), add=[("Link", '<?page=1>; rel="next"')]),
        Twist(times=1, body=pages[1].encode(), add=[("Link", '<?page=2>; rel="next"')]),
        Twist(times=1, body=pages[2].encode()),
    )
    joined = await asked.client.referrers(ALPINE, DIGEST, artifact_type="")
    assert joined is not None
    assert json.loads(joined) == {
        "schemaVersion": 2,
        "manifests": [{"n": 0}, {"n": 1}, {"n": 2}],
        "annotations": {"n": "0"},
    }


async def test_pages_without_an_end_are_given_up(registry: ScriptedRegistry, asked: Asking) -> None:
    """A registry that always has another page is not read for ever."""
    registry.rewrite(Twist(body=b'{"manifests": []}', add=[("Link", '<?again>; rel="next"')]))
    with pytest.raises(Misbehaved, match="without an end"):
        await asked.client.referrers(ALPINE, DIGEST, artifact_type="")
    assert len(registry.requests) <= 201
