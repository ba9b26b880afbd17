"""The pull and content-discovery parts of the distribution specification, against a running Breakwater.

The cases follow the specification's own conformance suite (the read-only part, and the range and missing-blob tests
that it only runs against registries that take pushes), each by GET and HEAD, cold and warm. The origin is a real one.
"""

from __future__ import annotations

import email
import email.policy
import http.client
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from tests.support.clients import TEST_HOST
from tests.support.images import OCI_INDEX, Image, artifact, digest_of, image, index, multi_arch
from tests.support.origin import Origin
from tests.support.process import Breakwater

_SEED = count(3000)
_ABSENT = "sha256:" + "0123456789abcdef" * 4

METHOD = pytest.mark.parametrize("method", ["GET", "HEAD"])
TEMPERATURE = pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])


KINDS: dict[str, Callable[[int], Image]] = {
    "image": lambda seed: image(seed, (100,)),
    "Docker's image": lambda seed: image(seed, (100,), docker=True),
    "index": lambda seed: multi_arch(seed, (100,)),
    "Docker's list": lambda seed: multi_arch(seed, (100,), docker=True),
}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def errors(self) -> list[str]:
        """The codes of the specification's error envelope."""
        assert self.headers["content-type"].partition(";")[0] == "application/json"
        return [error["code"] for error in json.loads(self.body)["errors"]]


#: What may differ between one answer and the same again: time, and what a multipart body is cut with.
_MOVES = {"date", "age", "cache-status"}


def ask(breakwater: Breakwater, method: str, target: str, headers: dict[str, str] | None = None) -> Reply:
    """One request, three times on a connection of its own, and the first answer. The others must be the same.

    So everything here is claimed of the warm manifest path as well (web/ready.py): an answer is kept with the first
    hit, and the next request of the same bytes does not take the long way any more.
    """
    connection = http.client.HTTPConnection("127.0.0.1", breakwater.port, timeout=60)
    try:
        first, second, third = (_ask_once(connection, method, target, headers) for _ in range(3))
    finally:
        connection.close()
    assert _still(second) == _still(first)
    assert _still(third) == _still(first)
    if (hit := second.headers.get("cache-status", "")).startswith("breakwater; hit"):
        assert third.headers["cache-status"] == hit
    return first


def _ask_once(
    connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str] | None
) -> Reply:
    """The length that was promised is the length that came."""
    connection.request(method, target, headers=headers or {})
    response = connection.getresponse()
    body = response.read()
    reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, body)
    assert "content-encoding" not in reply.headers
    assert "transfer-encoding" not in reply.headers, "an exact Content-Length on everything"
    if reply.status not in (204, 304) and method != "HEAD":
        assert reply.headers["content-length"] == str(len(body))
    return reply


def _still(reply: Reply) -> tuple[int, dict[str, str], bytes]:
    """An answer without what may differ the next time."""
    headers = {name: value for name, value in reply.headers.items() if name not in _MOVES}
    boundary = re.search(r"boundary=(.+)", headers.get("content-type", ""))
    if boundary is None:
        return reply.status, headers, reply.body
    cut = boundary[1].encode()
    headers["content-type"] = headers["content-type"].replace(boundary[1], "")
    return reply.status, headers, reply.body.replace(cut, b"")


@pytest.fixture
def pushed(origin: Origin) -> tuple[str, Image]:
    """A repository of its own, and the image that is in it under tag `1`."""
    number = next(_SEED)
    return f"library/conformance-{number}", origin.push(f"library/conformance-{number}", "1", image(number, (2000, 10)))


@pytest.fixture
def blob(origin: Origin) -> tuple[str, bytes]:
    """The target of a blob of 2,048 bytes that nobody has asked for yet, and its content."""
    number = next(_SEED)
    content = random.Random(number).randbytes(2048)
    digest = origin.push_blob(f"library/conformance-{number}", content)
    return f"/v2/library/conformance-{number}/blobs/{digest}", content


# -- version check -----------------------------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("target", ["/v2/", "/v2"])
def test_the_version_check_answers_without_an_upstream(
    breakwater: Breakwater, origin: Origin, method: str, target: str
) -> None:
    """Distribution-spec end-1; older clients look for Docker's header as well."""
    n_before = len(origin.requests())
    reply = ask(breakwater, method, target)
    assert reply.status == 200
    assert reply.headers["docker-distribution-api-version"] == "registry/2.0"
    assert json.loads(reply.body or b"{}") == {}
    assert len(origin.requests()) == n_before


# -- manifests and blobs -----------------------------------------------------------------------------------------------


@METHOD
@TEMPERATURE
@pytest.mark.parametrize("named_by", ["tag", "digest"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_served_byte_for_byte(
    breakwater: Breakwater, origin: Origin, method: str, is_warm: bool, named_by: str, kind: str
) -> None:
    """INV-9, end-3: the stored bytes and media type, with digest, length and ETag, by tag and by digest."""
    number = next(_SEED)
    wanted = KINDS[kind](number)
    repository = f"library/manifest-{number}"
    origin.push(repository, "1", wanted)
    target = f"/v2/{repository}/manifests/{'1' if named_by == 'tag' else wanted.digest}"
    if is_warm:
        ask(breakwater, "GET", target)

    reply = ask(breakwater, method, target, {"Accept": "*/*", "Accept-Encoding": "zstd;q=1.0, gzip;q=0.8"})

    assert reply.status == 200
    assert reply.headers["content-type"] == wanted.media_type
    assert reply.headers["docker-content-digest"] == wanted.digest
    assert reply.headers["content-length"] == str(len(wanted.body))
    assert reply.headers["etag"] == f'"{wanted.digest}"'
    assert reply.body == (wanted.body if method == "GET" else b"")


@METHOD
@TEMPERATURE
def test_a_blob_is_served_whole(
    breakwater: Breakwater, origin: Origin, blob: tuple[str, bytes], method: str, is_warm: bool
) -> None:
    """End-2: length, digest, ETag and Accept-Ranges; HEAD of a cold blob costs no download."""
    target, content = blob
    if is_warm:
        ask(breakwater, "GET", target)
    n_before = origin.n_requests("blob", "get")

    reply = ask(breakwater, method, target, {"Accept-Encoding": "zstd;q=1.0, gzip;q=0.8"})

    assert reply.status == 200
    assert reply.headers["content-length"] == "2048"
    assert reply.headers["docker-content-digest"] == digest_of(content)
    assert reply.headers["etag"] == f'"{digest_of(content)}"'
    assert reply.headers["accept-ranges"] == "bytes"
    assert reply.body == (content if method == "GET" else b"")
    assert origin.n_requests("blob", "get") - n_before == (1 if method == "GET" and not is_warm else 0)


@METHOD
@pytest.mark.parametrize(
    ("path", "statuses", "codes"),
    [
        pytest.param("{known}/manifests/absent", {404}, {"MANIFEST_UNKNOWN"}, id="tag that is not there"),
        pytest.param(f"{{known}}/manifests/{_ABSENT}", {404}, {"MANIFEST_UNKNOWN"}, id="manifest that is not there"),
        pytest.param(f"{{known}}/blobs/{_ABSENT}", {404}, {"BLOB_UNKNOWN"}, id="blob that is not there"),
        pytest.param(
            "library/absent/manifests/1", {404}, {"NAME_UNKNOWN", "MANIFEST_UNKNOWN"}, id="unknown repository"
        ),
        pytest.param("library/absent/tags/list", {404}, {"NAME_UNKNOWN"}, id="tags of an unknown repository"),
        pytest.param(
            "{known}/manifests/sha256:baddigeststring",
            {400, 404},
            {"DIGEST_INVALID", "MANIFEST_UNKNOWN", "MANIFEST_INVALID"},
            id="manifest by a digest that is none",
        ),
        pytest.param(
            "{known}/blobs/sha256:baddigeststring", {400, 404}, {"DIGEST_INVALID"}, id="blob by a digest that is none"
        ),
        pytest.param(
            "{known}/referrers/sha256:baddigeststring",
            {400},
            {"DIGEST_INVALID"},
            id="referrers of a digest that is none",
        ),
        pytest.param(
            "UPPER/case/manifests/1", {400, 404}, {"NAME_INVALID", "NAME_UNKNOWN"}, id="name outside the grammar"
        ),
        pytest.param(
            "{known}/manifests/1?ns=nowhere.test", {404}, {"NAME_UNKNOWN"}, id="source host that is no upstream"
        ),
    ],
)
def test_what_is_not_there_or_not_a_name_is_said_in_the_envelope(
    breakwater: Breakwater,
    pushed: tuple[str, Image],
    method: str,
    path: str,
    statuses: set[int],
    codes: set[str],
) -> None:
    """Distribution-spec, "Error Codes": a JSON envelope on GET, the same status and no body on HEAD."""
    reply = ask(breakwater, method, f"/v2/{path.format(known=pushed[0])}")
    assert reply.status in statuses
    if method == "GET":
        assert set(reply.errors) <= codes


def test_an_unknown_source_host_is_never_dialled(
    breakwater: Breakwater, origin: Origin, pushed: tuple[str, Image]
) -> None:
    """Routing: nothing a client sends is used as an address to connect to, nor mistaken for another upstream's name."""
    n_before = len(origin.requests())
    for target in (f"/v2/{pushed[0]}/manifests/1?ns=nowhere.test", f"/v2/{pushed[0]}/manifests/1?ns={origin.address}"):
        assert ask(breakwater, "GET", target).status == 404
    assert len(origin.requests()) == n_before


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["blobs/uploads/", "manifests/1", f"blobs/{_ABSENT}"])
def test_write_verbs_are_refused(breakwater: Breakwater, method: str, path: str) -> None:
    """Product, "What a client sees": 405 UNSUPPORTED; the body is not read."""
    reply = ask(breakwater, method, f"/v2/library/anything/{path}", {"Content-Length": "0"})
    assert reply.status == 405
    assert reply.errors == ["UNSUPPORTED"]


@METHOD
def test_the_source_host_is_echoed_where_ns_was_used(
    breakwater: Breakwater, pushed: tuple[str, Image], method: str
) -> None:
    """Distribution-spec, "Registry Proxying": OCI-Namespace names what `ns=` asked for."""
    repository, wanted = pushed
    for path in (f"manifests/{wanted.digest}", f"blobs/{wanted.blobs[0].digest}"):
        reply = ask(breakwater, method, f"/v2/{repository}/{path}?ns={TEST_HOST}")
        assert (reply.status, reply.headers.get("oci-namespace")) == (200, TEST_HOST)


# -- ranges and conditions ---------------------------------------------------------------------------------------------


@TEMPERATURE
@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        pytest.param("500-1499", 500, 1499, id="from the middle"),
        pytest.param("500-", 500, 2047, id="open end"),
        pytest.param("-500", 1548, 2047, id="suffix"),
        pytest.param("2000-5000", 2000, 2047, id="past the end"),
        pytest.param("0-0", 0, 0, id="one byte"),
        pytest.param("-5000", 0, 2047, id="suffix longer than the blob"),
    ],
)
def test_a_range_is_served(
    breakwater: Breakwater, blob: tuple[str, bytes], is_warm: bool, asked: str, first: int, last: int
) -> None:
    """RFC 9110 §14: 206 with exactly these bytes, of a blob that is here and of one that is not."""
    target, content = blob
    if is_warm:
        ask(breakwater, "GET", target)
    reply = ask(breakwater, "GET", target, {"Range": f"bytes={asked}"})
    assert reply.status == 206
    assert reply.headers["content-range"] == f"bytes {first}-{last}/2048"
    assert reply.headers["docker-content-digest"] == digest_of(content)
    assert reply.body == content[first : last + 1]


@TEMPERATURE
@pytest.mark.parametrize("asked", ["500-0", "5000-10000"], ids=["end before its start", "beyond the end"])
def test_a_range_that_cannot_be_satisfied_is_416(
    breakwater: Breakwater, blob: tuple[str, bytes], is_warm: bool, asked: str
) -> None:
    """RFC 9110 §15.5.17: the answer says how long the blob is."""
    target, _ = blob
    if is_warm:
        ask(breakwater, "GET", target)
    reply = ask(breakwater, "GET", target, {"Range": f"bytes={asked}"})
    assert reply.status == 416
    assert reply.headers["content-range"] == "bytes */2048"


@TEMPERATURE
def test_several_ranges_are_one_multipart_body(breakwater: Breakwater, blob: tuple[str, bytes], is_warm: bool) -> None:
    """RFC 9110 §14.6; the boundary has only letters that podman's parser of partial pulls knows."""
    target, content = blob
    if is_warm:
        ask(breakwater, "GET", target)
    reply = ask(breakwater, "GET", target, {"Range": "bytes=0-99,1000-1000,-48"})
    assert reply.status == 206
    kind = reply.headers["content-type"]
    assert re.fullmatch(r"multipart/byteranges; boundary=[A-Za-z\-0-9:]+", kind)
    parsed = email.message_from_bytes(
        b"MIME-Version: 1.0\r\nContent-Type: " + kind.encode() + b"\r\n\r\n" + reply.body, policy=email.policy.HTTP
    )
    parts = [(part["Content-Range"], _payload(reply.body, part["Content-Range"])) for part in parsed.iter_parts()]
    assert parts == [
        ("bytes 0-99/2048", content[:100]),
        ("bytes 1000-1000/2048", content[1000:1001]),
        ("bytes 2000-2047/2048", content[2000:]),
    ]


def _payload(body: bytes, content_range: str) -> bytes:
    """The bytes of one part, cut out by their announced length: mail parsers take liberties with binary bodies."""
    first, last = map(int, re.findall(r"\d+", content_range)[:2])
    start = body.index(b"\r\n\r\n", body.index(content_range.encode())) + 4
    return body[start : start + last - first + 1]


@TEMPERATURE
def test_a_range_on_head_is_ignored(breakwater: Breakwater, blob: tuple[str, bytes], is_warm: bool) -> None:
    """RFC 9110 §14.2: range handling is defined for GET only."""
    target, _ = blob
    if is_warm:
        ask(breakwater, "GET", target)
    reply = ask(breakwater, "HEAD", target, {"Range": "bytes=0-99"})
    assert (reply.status, reply.headers["content-length"]) == (200, "2048")


@TEMPERATURE
@pytest.mark.parametrize(
    ("validator", "status"),
    [("{etag}", 206), ('"sha256:other"', 200), ("W/{etag}", 200)],
    ids=["same", "other", "weak"],
)
def test_if_range_decides_between_the_part_and_the_whole(
    breakwater: Breakwater, blob: tuple[str, bytes], is_warm: bool, validator: str, status: int
) -> None:
    """RFC 9110 §13.1.5: a strong validator that matches gives the range; anything else gives everything."""
    target, content = blob
    if is_warm:
        ask(breakwater, "GET", target)
    condition = validator.format(etag=f'"{digest_of(content)}"')
    reply = ask(breakwater, "GET", target, {"Range": "bytes=0-99", "If-Range": condition})
    assert reply.status == status
    assert reply.body == (content[:100] if status == 206 else content)


@METHOD
@TEMPERATURE
@pytest.mark.parametrize("what", ["manifest by tag", "manifest by digest", "blob"])
@pytest.mark.parametrize(
    ("validator", "status"),
    [("{etag}", 304), ("W/{etag}", 304), ('"sha256:other", {etag}', 304), ('"sha256:other"', 200)],
    ids=["same", "weak", "in a list", "other"],
)
def test_a_client_that_has_it_is_told_so(
    breakwater: Breakwater,
    pushed: tuple[str, Image],
    method: str,
    is_warm: bool,
    what: str,
    validator: str,
    status: int,
) -> None:
    """RFC 9110 §13.1.2: If-None-Match compares weakly; 304 has the ETag and no body."""
    repository, wanted = pushed
    digest = wanted.blobs[0].digest if what == "blob" else wanted.digest
    target = {
        "manifest by tag": f"/v2/{repository}/manifests/1",
        "manifest by digest": f"/v2/{repository}/manifests/{digest}",
        "blob": f"/v2/{repository}/blobs/{digest}",
    }[what]
    if is_warm:
        ask(breakwater, "GET", target)
    reply = ask(breakwater, method, target, {"If-None-Match": validator.format(etag=f'"{digest}"')})
    assert reply.status == status
    assert reply.headers["etag"] == f'"{digest}"'
    assert bool(reply.body) == (status == 200 and method == "GET")


# -- content discovery -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged(origin: Origin) -> tuple[str, list[str]]:
    """A repository with five tags, and these in lexical order."""
    tags = ["a", "b1", "b2", "v1.0", "v2.0"]
    wanted = image(next(_SEED), (100,))
    for tag in tags:
        origin.push("library/tagged", tag, wanted)
    return "library/tagged", tags


def test_tags_are_listed(breakwater: Breakwater, tagged: tuple[str, list[str]]) -> None:
    """End-8a: every tag, in lexical order."""
    repository, tags = tagged
    reply = ask(breakwater, "GET", f"/v2/{repository}/tags/list")
    assert reply.status == 200
    assert json.loads(reply.body) == {"name": repository, "tags": tags}


@pytest.mark.parametrize("n", [1, 2, 4, 5, 100])
def test_tags_are_paged_to_the_end(breakwater: Breakwater, tagged: tuple[str, list[str]], n: int) -> None:
    """End-8b: at most `n` a page, and a Link to the next where there is one (RFC 8288)."""
    repository, tags = tagged
    target: str | None = f"/v2/{repository}/tags/list?n={n}"
    found: list[str] = []
    for _ in range(10):
        if target is None:
            break
        reply = ask(breakwater, "GET", target)
        page = json.loads(reply.body)["tags"]
        assert len(page) <= n
        found += page
        link = re.fullmatch(r'<([^>]+)>; ?rel="next"', reply.headers.get("link", ""))
        target = link[1] if link else None
    assert found == tags


def test_tags_after_a_given_one_are_listed(breakwater: Breakwater, tagged: tuple[str, list[str]]) -> None:
    """End-8b: `last` is exclusive, and need not be a tag itself."""
    repository, tags = tagged
    for last, expected in (("b1", tags[2:]), ("b", tags[1:]), ("v2.0", [])):
        reply = ask(breakwater, "GET", f"/v2/{repository}/tags/list?n=10&last={last}")
        assert (reply.status, json.loads(reply.body)["tags"] or []) == (200, expected)


def test_a_page_of_no_tags_is_empty(breakwater: Breakwater, tagged: tuple[str, list[str]]) -> None:
    """End-8b: `n=0` asks for an empty list, and gets no Link."""
    reply = ask(breakwater, "GET", f"/v2/{tagged[0]}/tags/list?n=0")
    assert (reply.status, json.loads(reply.body)["tags"] or []) == (200, [])
    assert "link" not in reply.headers


def _referrers(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200
    assert reply.headers["content-type"] == OCI_INDEX
    document = json.loads(reply.body)
    assert (document["schemaVersion"], document["mediaType"]) == (2, OCI_INDEX)
    manifests: list[dict[str, Any]] = document["manifests"]
    return manifests


@pytest.mark.parametrize("subject", ["a manifest", "nothing"])
def test_no_referrers_are_an_empty_index(breakwater: Breakwater, pushed: tuple[str, Image], subject: str) -> None:
    """End-12a: a registry that has the referrers API never answers 404 for want of referrers."""
    repository, wanted = pushed
    digest = wanted.digest if subject == "a manifest" else _ABSENT
    assert _referrers(ask(breakwater, "GET", f"/v2/{repository}/referrers/{digest}")) == []


def test_referrers_are_found_where_upstream_only_has_the_tag_schema(
    breakwater: Breakwater, origin: Origin, pushed: tuple[str, Image]
) -> None:
    """Distribution-spec, "Referrers Tag Schema": this origin has no referrers API, so the index is under a tag."""
    repository, subject = pushed
    signature = artifact(subject, "application/vnd.example.signature", b"signed")
    sbom = artifact(subject, "application/vnd.example.sbom", b"parts")
    for each in (signature, sbom):
        origin.push(repository, None, each)
    entries = [
        {**signature.descriptor, "artifactType": "application/vnd.example.signature"},
        {**sbom.descriptor, "artifactType": "application/vnd.example.sbom"},
    ]
    listed = index([], extra={"manifests": entries})
    origin.push(repository, subject.digest.replace(":", "-"), listed)

    target = f"/v2/{repository}/referrers/{subject.digest}"
    found = _referrers(ask(breakwater, "GET", target))
    assert {entry["digest"] for entry in found} == {signature.digest, sbom.digest}

    filtered = ask(breakwater, "GET", f"{target}?artifactType=application/vnd.example.sbom")
    assert [entry["digest"] for entry in _referrers(filtered)] == [sbom.digest]
    assert filtered.headers["oci-filters-applied"] == "artifactType"
