"""Endpoints: what a method, a path and a query mean (distribution-spec § Endpoints)."""

from __future__ import annotations

import pytest

from proxy.errors import BadRequest, InvalidDigest, InvalidName, InvalidTag, UnknownName, Unsupported
from proxy.oci.digest import Digest
from proxy.oci.endpoints import (
    MAX_PAGE,
    MAX_PATH,
    MAX_QUERY,
    BlobGet,
    Endpoint,
    ManifestGet,
    ReferrersList,
    RepositoryPath,
    TagsList,
    VersionCheck,
    origin_form,
    parse,
    url,
)
from proxy.oci.names import Tag

HEX = "0123456789abcdef" * 4
SHA = f"sha256:{HEX}"
DIGEST = Digest("sha256", HEX)
ALPINE = RepositoryPath(None, "library/alpine")

CASES = [
    pytest.param("/v2/", "", VersionCheck(None), id="the version check"),
    pytest.param("/v2/library/alpine/manifests/3.20", "", ManifestGet(ALPINE, Tag("3.20"), None), id="a tag"),
    pytest.param(f"/v2/library/alpine/manifests/{SHA}", "", ManifestGet(ALPINE, DIGEST, None), id="a manifest digest"),
    pytest.param(f"/v2/library/alpine/blobs/{SHA}", "", BlobGet(ALPINE, DIGEST, None), id="a blob"),
    pytest.param("/v2/library/alpine/tags/list", "", TagsList(ALPINE, None, None, None), id="tags"),
    pytest.param(
        "/v2/library/alpine/tags/list",
        "n=2&last=3.19&ns=docker.io",
        TagsList(ALPINE, 2, "3.19", "docker.io"),
        id="a page of tags",
    ),
    pytest.param(f"/v2/library/alpine/referrers/{SHA}", "", ReferrersList(ALPINE, DIGEST, "", None), id="referrers"),
    pytest.param(
        f"/v2/library/alpine/referrers/{SHA}",
        "artifactType=application%2Fvnd.x%2Bjson",
        ReferrersList(ALPINE, DIGEST, "application/vnd.x+json", None),
        id="referrers of one type",
    ),
    pytest.param(
        "/v2/~platform/library/alpine/manifests/1",
        "ns=docker.io",
        ManifestGet(RepositoryPath("platform", "library/alpine"), Tag("1"), "docker.io"),
        id="a project by its sign",
    ),
    pytest.param(
        "/v2/registry.test:5000/a/b/manifests/1",
        "",
        ManifestGet(RepositoryPath(None, "registry.test:5000/a/b"), Tag("1"), None),
        id="a source host with a port",
    ),
    pytest.param(
        f"/v2/sha512/blobs/sha512:{HEX}{HEX}",
        "",
        BlobGet(RepositoryPath(None, "sha512"), Digest("sha512", HEX + HEX), None),
        id="a sha512",
    ),
    pytest.param(
        "/v2/a/manifests/b/blobs/tags/manifests/manifests",
        "",
        ManifestGet(RepositoryPath(None, "a/manifests/b/blobs/tags"), Tag("manifests"), None),
        id="the spec's own words in a name",
    ),
    pytest.param(
        "/v2/a/manifests/tags/list",
        "",
        TagsList(RepositoryPath(None, "a/manifests"), None, None, None),
        id="the tags of a repository called manifests",
    ),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "query", "endpoint"), CASES)
def test_every_read_endpoint_is_understood(method: str, path: str, query: str, endpoint: Endpoint) -> None:
    """distribution-spec § Endpoints, GET and HEAD alike."""
    assert parse(method, path, query) == endpoint


@pytest.mark.parametrize(("path", "query", "endpoint"), CASES)
def test_a_url_is_read_back_to_its_endpoint(path: str, query: str, endpoint: Endpoint) -> None:
    """url is the inverse of parse."""
    written, _, words = url(endpoint).partition("?")
    assert written == path
    assert parse("GET", written, words) == endpoint


@pytest.mark.parametrize(
    ("target", "origin"),
    [
        ("/v2/a/manifests/1?ns=x", "/v2/a/manifests/1?ns=x"),
        ("http://here:5000/v2/a/tags/list?n=1", "/v2/a/tags/list?n=1"),
        ("HTTPS://here/v2/", "/v2/"),
        ("http://here", "/"),
        ("ftp://here/v2/", "ftp://here/v2/"),
        ("*", "*"),
        ("here:443", "here:443"),
        ("//v2/", "//v2/"),
    ],
)
def test_the_absolute_form_of_a_target_is_taken_as_its_path(target: str, origin: str) -> None:
    """RFC 9112 §3.2.2: a server must accept it, whoever it names. Other forms are no request of ours."""
    assert origin_form(target) == origin


def test_the_version_check_needs_no_trailing_slash() -> None:
    """Clients ask both ways."""
    assert parse("GET", "/v2", "") == parse("GET", "/v2/", "") == VersionCheck(None)
    assert parse("GET", "/v2/", "ns=quay.io") == VersionCheck("quay.io")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "get", "Head", "", "GET "])
@pytest.mark.parametrize(
    "path", ["/v2", "/v2/", "/v2/a/blobs/uploads/", f"/v2/a/manifests/{SHA}", "/v2/%00", "/v2/" + "a" * 5000]
)
def test_every_other_verb_is_refused_before_the_path_is_read(method: str, path: str) -> None:
    """T06: the table of verbs denies by default, whatever the path; guards by path have been slipped past."""
    with pytest.raises(Unsupported, match="read-only"):
        parse(method, path, "")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    ["", "/", "v2/", "/v1/", "/V2/", "/v22", "/v2x/a/manifests/1", "//v2/", "http://evil.test/v2/", "/v2\\", "*"],
)
def test_there_is_nothing_outside_v2(method: str, path: str) -> None:
    """Absolute forms and look-alikes are not this registry."""
    with pytest.raises(UnknownName):
        parse(method, path, "")


@pytest.mark.parametrize(
    "path",
    [
        "/v2//",
        "/v2/_catalog",
        "/v2/alpine",
        "/v2/manifests/latest",
        "/v2//manifests/latest",
        "/v2/alpine/manifests/",
        "/v2/alpine/manifests/1/",
        "/v2/alpine/manifests",
        "/v2/alpine/tags/",
        "/v2/alpine/tags/other",
        "/v2/alpine/tags/list/",
        "/v2/alpine/blobs/uploads/",
        "/v2/alpine/blobs/uploads/1",
        "/v2/alpine/Manifests/1",
    ],
)
def test_what_is_no_endpoint_is_unknown(path: str) -> None:
    """An address that the spec does not have is a 404, not a guess."""
    with pytest.raises(UnknownName):
        parse("GET", path, "")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Library/alpine", id="upper case"),
        pytest.param("..", id="the parent folder"),
        pytest.param("a/../../etc", id="the parent folder within"),
        pytest.param(".", id="this folder"),
        pytest.param("a//b", id="an empty element"),
        pytest.param("a/host.test:5000", id="a port after the first element"),
        pytest.param("~platform", id="a project and no name"),
        pytest.param("~/a", id="a project without a name"),
        pytest.param("~Platform/a", id="a project in upper case"),
        pytest.param("~p/~q/a", id="two projects"),
        pytest.param("a/~p", id="a project further on"),
        pytest.param("user@host.test/a", id="userinfo"),
        pytest.param("host.test:/a", id="a port without a number"),
        pytest.param("host.test:123456/a", id="a port with six digits"),
        pytest.param("a\\b", id="a backslash"),
        pytest.param("a b", id="a space"),
        pytest.param("a\n", id="a newline"),
        pytest.param("a\0", id="a NUL"),
        pytest.param("é", id="another script"),
        pytest.param("a;b", id="a path parameter"),
        pytest.param("a" * 700, id="700 characters"),
        pytest.param("a" * 5000, id="5,000 characters"),
    ],
)
@pytest.mark.parametrize("rest", ["manifests/1", f"blobs/{SHA}", "tags/list", f"referrers/{SHA}"])
def test_what_is_no_name_is_refused_at_every_endpoint(name: str, rest: str) -> None:
    """Every element is a repository component, the first may be a host; nothing else comes near a file or a host."""
    with pytest.raises(InvalidName):
        parse("GET", f"/v2/{name}/{rest}", "")


@pytest.mark.parametrize("escape", ["%3A", "%3a"])
def test_a_colon_may_be_escaped(escape: str) -> None:
    """Some clients escape the colon of a digest or a port; both spellings are one endpoint."""
    escaped = f"/v2/host.test{escape}5000/a/blobs/sha256{escape}{HEX}"
    assert parse("GET", escaped, "") == parse("GET", escaped.replace(escape, ":"), "")


@pytest.mark.parametrize(
    "path",
    [
        "/v2/a%2fb/manifests/1",
        "/v2/a%2F..%2F..%2Fetc/manifests/1",
        "/v2/a/manifests/%31",
        "/v2/a%00/manifests/1",
        "/v2/a/manifests/1%0a",
        "/v2/a%253A5000/b/manifests/1",
        "/v2/a/blobs/sha256%%3A3A" + HEX,
        "/v2/a/manifests/1%",
        "/v2%2fa/manifests/1",
        "/%76%32/",
    ],
)
def test_no_other_escape_is_decoded(path: str) -> None:
    """The path is read once and as received: what is authorised is what is opened."""
    with pytest.raises((InvalidName, UnknownName)):
        parse("GET", path, "")


@pytest.mark.parametrize("kind", ["manifests", "blobs", "referrers"])
@pytest.mark.parametrize(
    "digest", ["sha256:baddigeststring", f"sha256:{HEX.upper()}", f"md5:{HEX}", f"sha256:{HEX}0", ":"]
)
def test_a_broken_digest_is_a_bad_request(kind: str, digest: str) -> None:
    """The conformance suite asks for manifests/sha256:baddigeststring; referrers MUST answer 400."""
    with pytest.raises(InvalidDigest):
        parse("GET", f"/v2/alpine/{kind}/{digest}", "")


@pytest.mark.parametrize("tag", [".", "..", "-x", "a" * 129, "a b", "é", "a\n", "a\0"])
def test_a_broken_tag_is_a_bad_request(tag: str) -> None:
    """distribution-spec § Pulling manifests, <tag>."""
    with pytest.raises(InvalidTag):
        parse("GET", f"/v2/alpine/manifests/{tag}", "")


@pytest.mark.parametrize(
    ("query", "ns"),
    [
        ("ns=docker.io", "docker.io"),
        ("ns=registry.test%3A5000", "registry.test:5000"),
        ("ns=registry.test:5000", "registry.test:5000"),
        ("ns=%5B%3A%3A1%5D%3A5000", "[::1]:5000"),
        ("other=1&ns=quay.io&x", "quay.io"),
        ("ns=", None),
        ("ns", None),
        ("&&", None),
        ("NS=docker.io", None),
        ("ns=Docker.IO", "Docker.IO"),
        ("%6es=quay.io", "quay.io"),
    ],
)
@pytest.mark.parametrize("path", ["/v2/", "/v2/a/manifests/1", f"/v2/a/blobs/{SHA}", f"/v2/a/referrers/{SHA}"])
def test_ns_is_read_at_every_endpoint(path: str, query: str, ns: str | None) -> None:
    """distribution-spec § Registry Proxying; a blank one counts as absent, and none is looked at as a host here."""
    assert parse("GET", path, query).ns == ns


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("ns=a&ns=b", id="ns twice"),
        pytest.param("ns=a&ns=a", id="ns twice, the same"),
        pytest.param("ns=&ns=a", id="ns twice, once blank"),
        pytest.param("ns=%", id="a broken escape"),
        pytest.param("ns=%zz", id="an escape that is no hex"),
        pytest.param("x=%f", id="a broken escape elsewhere"),
        pytest.param("ns=a%0d%0ab", id="a line break"),
        pytest.param("ns=%00", id="a NUL"),
        pytest.param("ns=%ff", id="no UTF-8"),
        pytest.param("ns=%C3%A9", id="another script"),
        pytest.param("ns=é", id="another script, raw"),
        pytest.param("ns=é%41", id="another script beside an escape"),
        pytest.param("ns=\ud800%41", id="half a surrogate pair"),
        pytest.param("ns=" + "a" * MAX_QUERY, id="a query too long"),
    ],
)
@pytest.mark.parametrize("path", ["/v2/", "/v2/a/manifests/1", "/v2/a/tags/list", f"/v2/a/referrers/{SHA}"])
def test_a_query_that_two_readers_would_read_in_two_ways_is_refused(path: str, query: str) -> None:
    """What is echoed in OCI-Namespace and logs is printable ASCII; what is given twice has no meaning."""
    with pytest.raises(BadRequest):
        parse("GET", path, query)


@pytest.mark.parametrize(
    ("query", "n"),
    [
        ("", None),
        ("n=", None),
        ("n=0", 0),
        ("n=1", 1),
        ("n=007", 7),
        ("n=1000", 1000),
        ("n=1001", MAX_PAGE),
        pytest.param("n=" + "9" * 1500, MAX_PAGE, id="1,500 digits"),
    ],
)
def test_n_is_a_number_and_cut_to_the_largest_page(query: str, n: int | None) -> None:
    """distribution-spec § Listing Tags: 0 is lawful, and a registry may return fewer than asked."""
    endpoint = parse("GET", "/v2/a/tags/list", query)
    assert isinstance(endpoint, TagsList)
    assert endpoint.n == n


@pytest.mark.parametrize("n", ["-1", "+1", "1.0", "1e3", "x", "0x10", "1_000", "%20", "1%20", "%D9%A3", "1&n=2"])
def test_an_n_that_is_no_number_is_refused(n: str) -> None:
    """A page size that cannot be read is the client's mistake, not everything."""
    with pytest.raises(BadRequest):
        parse("GET", "/v2/a/tags/list", f"n={n}")


def test_a_raw_plus_in_a_media_type_stays_a_plus() -> None:
    """Clients forget to escape it, and no media type has a space."""
    endpoint = parse("GET", f"/v2/a/referrers/{SHA}", "artifactType=application/vnd.x+json")
    assert isinstance(endpoint, ReferrersList)
    assert endpoint.artifact_type == "application/vnd.x+json"


def test_two_artifact_types_are_no_filter() -> None:
    """distribution-spec § Listing Referrers: a registry may decline to filter, and clients then do it themselves."""
    endpoint = parse("GET", f"/v2/a/referrers/{SHA}", "artifactType=a&artifactType=b")
    assert isinstance(endpoint, ReferrersList)
    assert endpoint.artifact_type == ""


def test_the_longest_lawful_path_fits() -> None:
    """A project, a host and a name of 255 characters each, and a sha512."""
    host, name = ".".join(["h" * 63] * 3) + ":65535", "n" * 255
    path = f"/v2/~{'p' * 60}/{host}/{name}/manifests/sha512:{HEX}{HEX}"
    assert len(path) < MAX_PATH
    assert parse("GET", path, "") == ManifestGet(
        RepositoryPath("p" * 60, f"{host}/{name}"), Digest("sha512", HEX + HEX), None
    )


@pytest.mark.parametrize(
    "path",
    ["/v2/" + "a-" * 505, "/v2/" + "a." * 505, "/v2/" + "a/" * 505, "/v2/" + "a/manifests/" * 80, "/v2/" + "a__" * 330],
    ids=["dashes", "dots", "slashes", "the spec's own words", "underscores"],
)
def test_paths_made_to_backtrack_are_refused_like_others(path: str) -> None:
    """The grammar has no two ways to read one name; with such an input a bad pattern would not come back."""
    with pytest.raises((UnknownName, InvalidName)):
        parse("GET", path, "")
