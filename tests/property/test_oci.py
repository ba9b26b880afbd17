"""Properties of the OCI values: what is written reads back, and nothing that anybody sends can do more than be refused.

T10: names, digests, tags and escapes of every kind into the parsers; the answer is a value or an error by meaning, and
what is accepted is safe as a file name, as a header and in a log.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import fields
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest, InvalidManifest, NotFound, Unsupported
from proxy.oci import challenge, pagination, ranges, referrers
from proxy.oci.codes import ErrorCode, envelope
from proxy.oci.descriptor import Descriptor, Platform
from proxy.oci.digest import ALGORITHMS, Digest, Verifier
from proxy.oci.endpoints import (
    MAX_PAGE,
    BlobGet,
    Endpoint,
    ManifestGet,
    ReferrersList,
    RepositoryPath,
    TagsList,
    VersionCheck,
    parse,
    url,
)
from proxy.oci.manifest import Manifest
from proxy.oci.mediatypes import KNOWN, OCI_INDEX, SCHEMA1_TYPES
from proxy.oci.names import Reference, Repository, SourceHost, Tag, parse_tag_or_digest

# -- values ------------------------------------------------------------------------------------------------------------

digests = st.sampled_from(sorted(ALGORITHMS)).flatmap(
    lambda algorithm: st.binary(max_size=8).map(lambda content: Digest.of(content, algorithm))
)
components = st.from_regex(r"[a-z0-9]{1,4}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
# The spec's own words are names too, and the ones that a parser gets wrong.
elements = st.one_of(components, st.sampled_from(["manifests", "blobs", "tags", "list", "referrers", "v2", "sha256"]))
repositories = st.lists(elements, min_size=1, max_size=4).map("/".join)
hosts = st.from_regex(
    r"[a-z]([a-z0-9-]{0,5}[a-z0-9])?(\.[a-z]([a-z0-9-]{0,5}[a-z0-9])?){0,2}(:[0-9]{1,5})?|\[[0-9a-f:]{2,8}\](:[0-9]{1,5})?",
    fullmatch=True,
)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}", fullmatch=True)
tag_values = tags.map(Tag)
words = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=40)
paths = st.builds(
    lambda project, host, name: RepositoryPath(project, f"{host}/{name}" if host else name),
    st.none() | components,
    st.none() | hosts,
    repositories,
)
nss = st.none() | hosts | words
endpoints: st.SearchStrategy[Endpoint] = st.one_of(
    st.builds(VersionCheck, nss),
    st.builds(ManifestGet, paths, digests | tag_values, nss),
    st.builds(BlobGet, paths, digests, nss),
    st.builds(TagsList, paths, st.none() | st.integers(0, MAX_PAGE), st.none() | words, nss),
    st.builds(ReferrersList, paths, digests, st.just("") | words, nss),
)
descriptors = st.builds(
    Descriptor,
    media_type=st.text(max_size=20),
    digest=digests,
    size=st.integers(0, (1 << 63) - 1),
    platform=st.none() | st.builds(Platform, st.text(max_size=8), st.text(max_size=8), st.text(max_size=4)),
    artifact_type=st.text(max_size=20),
    annotations=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    urls=st.lists(st.text(max_size=8), max_size=2).map(tuple),
)

# -- round trips -------------------------------------------------------------------------------------------------------


@given(digests)
def test_a_digest_reads_back(digest: Digest) -> None:
    """Digest.parse is the inverse of str."""
    assert Digest.parse(str(digest)) == digest
    assert parse_tag_or_digest(str(digest)) == digest


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6), st.sampled_from(sorted(ALGORITHMS)))
def test_a_verifier_does_not_mind_how_a_body_is_cut(body: bytes, cuts: list[int], algorithm: str) -> None:
    """INV-3: only the bytes and their order count."""
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    verifier = Verifier(Digest.of(body, algorithm))
    for start, end in pairwise(places):
        verifier.feed(body[start:end])
    assert verifier.agrees()
    assert verifier.n_bytes == len(body)


@given(hosts, repositories, tags | digests)
def test_a_reference_reads_back(host: str, name: str, target: str | Digest) -> None:
    """Reference.parse is the inverse of str, for whatever can be read at all."""
    mark = "@" if isinstance(target, Digest) else ":"
    try:
        reference = Reference.parse(f"{host}/{name}{mark}{target}")
    except BadRequest:
        return
    assert Reference.parse(str(reference)) == reference


@given(endpoints, st.sampled_from(["GET", "HEAD"]))
def test_an_endpoint_reads_back_from_its_url(endpoint: Endpoint, method: str) -> None:
    """parse(url(e)) == e, with colons escaped in any way."""
    path, _, query = url(endpoint).partition("?")
    assert parse(method, path, query) == endpoint
    assert parse(method, path.replace(":", "%3A"), query) == endpoint
    assert parse(method, path.replace(":", "%3a"), query) == endpoint


@given(descriptors)
def test_a_descriptor_reads_back(descriptor: Descriptor) -> None:
    """from_json is the inverse of to_json, through JSON."""
    assert Descriptor.from_json(json.loads(json.dumps(descriptor.to_json()))) == descriptor


@given(st.lists(descriptors, max_size=4))
def test_a_referrers_list_reads_back(listed: list[Descriptor]) -> None:
    """descriptors_of is the inverse of build, and a manifest reader agrees."""
    body = referrers.build(listed)
    assert referrers.descriptors_of(body) == tuple(listed)
    assert Manifest.parse(body, OCI_INDEX).children == tuple(listed)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Bearer", "basic", "NTLM"]),
            st.dictionaries(st.sampled_from(["realm", "service", "scope", "error"]), st.text(max_size=20), max_size=3),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_challenges_read_back(written: list[tuple[str, dict[str, str]]], one_line: bool) -> None:
    """RFC 9110 §11.6.1: quoted strings carry anything, in one line or in several."""

    def quoted(word: str) -> str:
        return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'

    lines = [
        f"{scheme} " + ", ".join(f"{name}={quoted(word)}" for name, word in params.items())
        for scheme, params in written
    ]
    found = challenge.parse([", ".join(lines)] if one_line else lines)
    assert [(one.scheme, one.params) for one in found] == [(scheme.lower(), params) for scheme, params in written]


@given(st.lists(tags, max_size=30), st.integers(1, 7))
def test_pages_together_are_the_whole_list(listed: list[str], n: int) -> None:
    """distribution-spec § Listing Tags: following `last` gives every tag once, in order, through the Link header."""
    collected: list[str] = []
    last: str | None = None
    while True:
        found, last = pagination.page(listed, n, last)
        collected += found
        if last is None:
            break
        assert len(found) == n
        target = pagination.parse_next(pagination.link_header("/v2/a/tags/list", n=n, last=last, ns="docker.io"))
        assert target is not None
        endpoint = parse("GET", *target.split("?"))
        assert endpoint == TagsList(RepositoryPath(None, "a"), n, last, "docker.io")
        assert pagination.last_of(target) == last
    assert collected == sorted(set(listed), key=lambda tag: (tag.lower(), tag))
    assert pagination.page(listed, None, None) == (tuple(collected), None)


# -- ranges ------------------------------------------------------------------------------------------------------------

specs = st.one_of(
    st.tuples(st.integers(0, 60), st.none() | st.integers(0, 60)),
    st.tuples(st.none(), st.integers(0, 60)),
)


@given(st.lists(specs, min_size=1, max_size=6), st.integers(0, 50))
def test_ranges_mean_what_a_plain_reading_says(asked: list[ranges.Spec], size: int) -> None:
    """RFC 9110 §14.1.2, byte by byte; and never more bytes than the blob has (§17.15)."""
    header = "bytes=" + ", ".join(
        f"{'' if first is None else first}-{'' if last is None else last}" for first, last in asked
    )
    read = ranges.parse(header)
    assert read == tuple(asked)
    found = ranges.resolve(read, size)
    wanted = [
        [
            n
            for n in range(size)
            if (n >= size - (last or 0) if first is None else first <= n <= (n if last is None else last))
        ]
        for first, last in asked
    ]
    sent = [list(range(part.start, part.end)) for part in found]
    if sum(map(len, wanted)) <= size:
        assert sent == [part for part in wanted if part]
    else:
        assert list(chain.from_iterable(sent)) == sorted({n for part in wanted for n in part})
    assert sum(part.length for part in found) <= size
    assert all(part.length > 0 for part in found)


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 10)), min_size=2, max_size=5))
def test_the_length_of_a_multipart_body_is_known_beforehand(places: list[tuple[int, int]]) -> None:
    """A Content-Length that is wrong by one byte breaks the connection for the next request."""
    blob = bytes(100)
    frame = ranges.multipart(
        [ranges.Range(start, start + length) for start, length in places], len(blob), "application/octet-stream", "b"
    )
    body = b"".join(head + blob[part.start : part.end] for head, part in frame.parts) + frame.trailer
    assert len(body) == frame.length


# -- whatever comes ----------------------------------------------------------------------------------------------------

#: What attackers and broken clients make paths of.
SCRAPS = [
    *[
        "/",
        "//",
        "/v2/",
        "/v2",
        "~",
        "~p/",
        "..",
        ".",
        "a",
        "A",
        "0",
        "-",
        "_",
        "__",
        ":",
        "@",
        "%",
        "?",
        "#",
        "\\",
        ";",
        " ",
    ],
    *[
        "%2f",
        "%2F",
        "%3A",
        "%3a",
        "%00",
        "%2e",
        "%25",
        "%",
        "%3",
        "%c0%af",
        "\x00",
        "\n",
        "\r\n",
        "\x7f",
        "é",
        "٣",
        "\ud800",
    ],
    *["manifests", "/manifests/", "/blobs/", "/tags/list", "/referrers/", "library/alpine", "latest", "docker.io"],
    *[
        "host.test:5000",
        "[::1]:5000",
        "user@host",
        "http://",
        "sha256:",
        "sha512:",
        "0" * 63,
        "0" * 64,
        "f" * 128,
        "F" * 64,
    ],
    "a" * 300,
]
methods = st.sampled_from(["GET", "HEAD", "GET", "HEAD", "POST", "get", "DELETE", "\x00"])
soup = st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=12).map("".join)
raw_paths = st.one_of(st.text(max_size=60), soup, soup.map(lambda rest: f"/v2/{rest}"))
raw_queries = st.one_of(
    st.just(""),
    st.text(max_size=40),
    st.lists(st.sampled_from(["ns=", "n=", "last=", "artifactType=", "&", "=", "+", *SCRAPS]), max_size=8).map("".join),
)


def strings_of(endpoint: Endpoint) -> list[str]:
    """Every string that an endpoint carries on, in whatever field."""
    found = []
    for field in fields(endpoint):
        value = getattr(endpoint, field.name)
        if isinstance(value, RepositoryPath):
            found += [value.name, value.project or "p"]
        elif value is not None:
            found.append(str(value))
    return found


def check(method: str, path: str, query: str) -> bool:
    """Parse, and hold whatever comes out to what everybody downstream relies on. Returns whether anything did."""
    try:
        endpoint = parse(method, path, query)
    except (BadRequest, NotFound, Unsupported) as refusal:
        # The sentence goes into a response and a log.
        assert envelope(ErrorCode.REQUEST_INVALID, str(refusal)).isascii()
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 1000
        return False
    assert method in ("GET", "HEAD")
    assert parse(method, *url(endpoint).partition("?")[::2]) == endpoint
    for text in strings_of(endpoint):
        assert text.isascii()
        assert text.isprintable()
    if not isinstance(endpoint, VersionCheck):
        parts = endpoint.path.name.split("/")
        assert all(re.fullmatch(r"[a-z0-9]+([._-]+[a-z0-9]+)*", part) for part in parts[1:])
        assert not {"", ".", ".."} & set(parts)
        assert not set(endpoint.path.name) & set("%\\~@?# ")
    for digest in (getattr(endpoint, "digest", None), getattr(endpoint, "target", None)):
        if isinstance(digest, Digest):
            check_is_a_safe_file_name(digest)
    return True


def check_is_a_safe_file_name(digest: Digest) -> None:
    """What a store makes a name of: no separator, no dot, no surprise in length (CVE-2024-3727)."""
    assert re.fullmatch(r"sha256|sha512", digest.algorithm)
    assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{128}", digest.hex)
    assert len(digest.hex) == ALGORITHMS[digest.algorithm]


@given(methods, raw_paths, raw_queries)
def test_no_request_does_more_than_be_refused(method: str, path: str, query: str) -> None:
    """T10: BadRequest, NotFound or Unsupported, or a value that is safe everywhere."""
    check(method, path, query)


@given(endpoints, st.randoms(use_true_random=False))
def test_a_good_request_with_one_fault_is_safe_too(endpoint: Endpoint, chance: random.Random) -> None:
    """T10: what is nearly right is what gets past a parser."""
    check("GET", *spoilt(url(endpoint), chance).partition("?")[::2])


def spoilt(text: str, chance: random.Random) -> str:
    """`text` with something put in, taken out, doubled or exchanged in up to three places."""
    for _ in range(chance.randrange(1, 4)):
        at, upto = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        piece = chance.choice(SCRAPS) if chance.random() < 0.7 else chr(chance.randrange(0x110000))
        text = chance.choice(
            [
                text[:at] + piece + text[at:],
                text[:at] + text[at + 1 :],
                text[:at] + piece + text[at + 1 :],
                text[:upto] + text[at:upto] + text[upto:],
                text[:at] + text[upto:],
            ]
        )
    return text


SEEDS = [
    "/v2/library/alpine/manifests/3.20?ns=docker.io",
    f"/v2/~platform/host.test:5000/a/b/manifests/sha256:{'0' * 64}?ns=registry.test%3A5000",
    f"/v2/a/blobs/sha512:{'f' * 128}",
    "/v2/a/b/tags/list?n=5&last=x&ns=quay.io",
    f"/v2/manifests/tags/referrers/sha256%3A{'a' * 64}?artifactType=application%2Fx",
    "/v2/?ns=docker.io",
]


@pytest.mark.parametrize("seed", range(4))
def test_many_spoilt_requests_are_refused_or_safe(seed: int) -> None:
    """T10 by volume: a plain loop tries in a second what a searching tool does in a minute. Its seed is its id."""
    chance = random.Random(seed)
    n_accepted = sum(check("GET", *spoilt(chance.choice(SEEDS), chance).partition("?")[::2]) for _ in range(8_000))
    # All refused would mean that the faults are too coarse to get anywhere.
    assert n_accepted > 500


@given(soup | st.text(max_size=200))
def test_no_text_does_more_than_not_be_a_name(text: str) -> None:
    """T10: every parser of names either gives a value that is written back the same, or says BadRequest."""
    for kind in (Digest, Repository, Tag, SourceHost, Reference):
        try:
            found = kind.parse(text)
        except BadRequest:
            continue
        if isinstance(found, Digest):
            check_is_a_safe_file_name(found)
        assert str(found).isascii()
        assert str(found).isprintable()
        assert kind.parse(str(found)) == found


# -- documents ---------------------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(KNOWN))
json_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["mediaType", "digest", "size", "platform", "urls", "x"]), inner, max_size=4)
        | descriptors.map(Descriptor.to_json)
    ),
    max_leaves=8,
)
documents = st.dictionaries(
    st.sampled_from(["mediaType", "config", "layers", "manifests", "subject", "artifactType", "annotations", "Layers"]),
    json_values,
    max_size=5,
).map(lambda document: {"schemaVersion": 2, **document})
content_types = st.sampled_from(["", "text/plain", "application/json; charset=utf-8", *sorted(KNOWN | SCHEMA1_TYPES)])


def check_manifest(body: bytes, content_type: str) -> None:
    try:
        manifest = Manifest.parse(body, content_type)
    except InvalidManifest as refusal:
        assert envelope(ErrorCode.MANIFEST_INVALID, str(refusal)).isascii()
        return
    assert manifest.media_type in KNOWN
    assert manifest.is_index == (manifest.config is None)
    assert not (manifest.children and (manifest.layers or manifest.config))
    for named in manifest.names:
        check_is_a_safe_file_name(named.digest)
        json.dumps(named.to_json(), ensure_ascii=False).encode("utf-8")


@given(documents | json_values, content_types)
def test_no_document_does_more_than_not_be_a_manifest(document: Any, content_type: str) -> None:
    """T04, T10: InvalidManifest, or a manifest of one known type with one meaning (CVE-2021-41190)."""
    check_manifest(json.dumps(document).encode(), content_type)


@given(st.binary(max_size=200) | st.text('[]{}",:\\u0123d8 manifests', max_size=100).map(str.encode), content_types)
def test_no_bytes_do_more_than_not_be_a_manifest(body: bytes, content_type: str) -> None:
    """T10: nothing but InvalidManifest comes of garbage, from a manifest or a referrers list."""
    check_manifest(body, content_type)
    try:
        referrers.descriptors_of(body)
    except InvalidManifest:
        return


# -- headers -----------------------------------------------------------------------------------------------------------

SIGNS = ['"', "\\", ",", ";", "=", " ", "\t", "<", ">", "*", "[", "%", "?", "é", "\n"]
HEADER_WORDS = ["W/", "bytes=", "-", "0-", "Bearer", "Basic", "realm", "rel", "next", "last=", "/x", "9" * 30, "a"]
header_soup = st.text(max_size=60) | st.lists(st.sampled_from(SIGNS + HEADER_WORDS), max_size=20).map("".join)


@given(header_soup, st.integers(0, 1 << 40))
def test_no_header_is_an_exception(header: str, size: int) -> None:
    """Headers are read with patience: what makes no sense says nothing."""
    for found in challenge.parse([header]):
        assert found.scheme == found.scheme.lower()
        assert all(name == name.lower() for name in found.params)
    target = pagination.parse_next(header)
    assert target is None or target.isprintable()
    pagination.last_of(header)
    read = ranges.parse(header)
    if read is not None:
        found_ranges = ranges.resolve(read, size)
        assert sum(part.length for part in found_ranges) <= size
        assert all(0 <= part.start < part.end <= size for part in found_ranges)
    ranges.if_range_matches(header, '"sha256:0"')
    ranges.etag_matches(header, '"sha256:0"')
