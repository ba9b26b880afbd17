"""(method, path, query) <-> Endpoint: one frozen value per read endpoint of the distribution-spec.

The path is parsed once, from the right and as it was received (CVE-2024-3727; and registries have been caught
authorising the encoded path and opening the decoded one). The last two elements decide, so a repository may have an
element called `manifests`. What comes out is safe to log, to compare and to look up; which upstream it means is
`rules/routes.py`'s business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from proxy.errors import BadRequest, InvalidName, UnknownName, Unsupported
from proxy.oci.digest import Digest
from proxy.oci.names import COMPONENT, HOST, MAX_NAME, TagOrDigest, parse_tag_or_digest

#: The most tags a page may have; a larger `n` is cut to it, which the spec allows (§ Listing Tags).
MAX_PAGE = 1000
#: `/v2/~project/` + a host and a name of 255 each + `/manifests/` + a sha512, with room to spare.
MAX_PATH = 1024
#: The longest legal parameter is a media type of 255 characters (RFC 6838 §4.2), three times that when encoded.
MAX_QUERY = 2048

_MAX_NAME_IN_PATH = MAX_NAME + 1 + MAX_NAME

# The first element may be a source host with a port. The name is greedy, so the last of the four words is the one.
_SHAPE = re.compile(
    rf"/v2/(?:~({COMPONENT})/)?((?:{COMPONENT}|{HOST})(?:/{COMPONENT})*)/(manifests|blobs|tags|referrers)/([^/]+)"
)
_ANY_SHAPE = re.compile(r"/v2/.+/(?:(?:manifests|blobs|referrers)/[^/]+|tags/list)", re.DOTALL)
_PLAIN_NS = re.compile(r"ns=([A-Za-z0-9.-]{1,255})")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class RepositoryPath:
    """The path before the endpoint's own words, in the spec's grammar but not yet resolved.

    `project` comes from `/v2/~<project>/`. `name` may begin with a project's path or with a source host (and its port),
    and is no longer than a host and a repository together.
    """

    project: str | None
    name: str


@dataclass(frozen=True, slots=True)
class VersionCheck:
    """GET /v2/ (distribution-spec end-1)."""

    ns: str | None


@dataclass(frozen=True, slots=True)
class ManifestGet:
    """GET /v2/<name>/manifests/<tag-or-digest> (end-3)."""

    path: RepositoryPath
    target: TagOrDigest
    ns: str | None


@dataclass(frozen=True, slots=True)
class BlobGet:
    """GET /v2/<name>/blobs/<digest> (end-2)."""

    path: RepositoryPath
    digest: Digest
    ns: str | None


@dataclass(frozen=True, slots=True)
class TagsList:
    """GET /v2/<name>/tags/list (end-8). `n` is at most MAX_PAGE and may be 0; `last` is whatever the client sent."""

    path: RepositoryPath
    n: int | None
    last: str | None
    ns: str | None


@dataclass(frozen=True, slots=True)
class ReferrersList:
    """GET /v2/<name>/referrers/<digest> (end-12). `artifact_type` is "" for no filter."""

    path: RepositoryPath
    digest: Digest
    artifact_type: str
    ns: str | None


Endpoint = VersionCheck | ManifestGet | BlobGet | TagsList | ReferrersList


def origin_form(target: str) -> str:
    """The path and query of a request target: a server must also take the absolute form that clients send to a proxy
    (RFC 9112 §3.2.2). Its authority says nothing here: what a client sends is never used as an address."""
    if target.startswith("/"):
        return target
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        return target
    return "/" + rest.partition("/")[2]


def parse(method: str, raw_path: str, query: str) -> Endpoint:
    """The endpoint that a request names.

    `raw_path` is percent-encoded as received, without the query; `query` is what followed the `?`, or "". Raises
    Unsupported for anything but GET and HEAD under /v2, UnknownName where there is no such endpoint, InvalidName,
    InvalidTag, InvalidDigest or BadRequest where there is one but the request does not spell it.
    """
    if method not in ("GET", "HEAD"):
        if raw_path == "/v2" or raw_path.startswith("/v2/"):
            raise Unsupported(
                "this registry is read-only: GET and HEAD are all it answers; push to the upstream itself"
            )
        raise UnknownName("there is nothing here; the registry is under /v2/")
    if len(raw_path) > MAX_PATH:
        raise InvalidName(f"a path of {len(raw_path)} characters is longer than any name: at most {MAX_PATH}")
    if "%" in raw_path:
        raw_path = _decoded(raw_path)
    match = _SHAPE.fullmatch(raw_path)
    if match is None:
        return _without_repository(raw_path, query)
    project, name, kind, target = match.groups()
    if len(name) > _MAX_NAME_IN_PATH:
        raise InvalidName(f"a name of {len(name)} characters is too long: at most {MAX_NAME} after the host")
    path = RepositoryPath(project, name)
    if kind == "blobs":
        return BlobGet(path, Digest.parse(target), _ns(query))
    if kind == "manifests":
        return ManifestGet(path, parse_tag_or_digest(target), _ns(query))
    if kind == "referrers":
        digest, words = Digest.parse(target), _Query.parse(query)
        return ReferrersList(path, digest, words.any_of("artifactType"), words.one("ns"))
    if target != "list":
        raise UnknownName("tags are listed at /v2/<name>/tags/list")
    words = _Query.parse(query)
    return TagsList(path, words.number("n"), words.one("last"), words.one("ns"))


def url(endpoint: Endpoint) -> str:
    """The path and query that `parse` reads back to `endpoint`."""
    if isinstance(endpoint, VersionCheck):
        return _with_query("/v2/", ns=endpoint.ns)
    project = "" if endpoint.path.project is None else f"~{endpoint.path.project}/"
    base = f"/v2/{project}{endpoint.path.name}"
    if isinstance(endpoint, ManifestGet):
        return _with_query(f"{base}/manifests/{endpoint.target}", ns=endpoint.ns)
    if isinstance(endpoint, BlobGet):
        return _with_query(f"{base}/blobs/{endpoint.digest}", ns=endpoint.ns)
    if isinstance(endpoint, TagsList):
        n = None if endpoint.n is None else str(endpoint.n)
        return _with_query(f"{base}/tags/list", n=n, last=endpoint.last, ns=endpoint.ns)
    artifact_type = endpoint.artifact_type or None
    return _with_query(f"{base}/referrers/{endpoint.digest}", artifactType=artifact_type, ns=endpoint.ns)


def _with_query(path: str, **words: str | None) -> str:
    query = "&".join(f"{key}={quote(word, safe='')}" for key, word in words.items() if word is not None)
    return f"{path}?{query}" if query else path


def _decoded(raw_path: str) -> str:
    """The path with its colons decoded: the one character of a legal path that clients escape. Raises InvalidName."""
    decoded = raw_path.replace("%3A", ":").replace("%3a", ":")
    if "%" in decoded:
        raise InvalidName("the path has a percent-encoded character that no name, tag or digest contains")
    return decoded


def _without_repository(path: str, query: str) -> VersionCheck:
    if path in ("/v2/", "/v2"):
        return VersionCheck(_ns(query))
    if _ANY_SHAPE.fullmatch(path):
        raise InvalidName(
            f"{path[:200]!r} does not contain a repository name: lower-case letters, digits and separators, "
            "in elements divided by /"
        )
    raise UnknownName("there is no such endpoint; manifests, blobs, tags and referrers are under /v2/<name>/")


def _ns(query: str) -> str | None:
    """The `ns` parameter by the short way where the query is nothing else, as containerd sends it."""
    if not query:
        return None
    match = _PLAIN_NS.fullmatch(query)
    return match[1] if match else _Query.parse(query).one("ns")


class _Query:
    """The parameters of a query, decoded once. Blank ones count as absent; unknown ones are nobody's business."""

    __slots__ = ("_words",)

    def __init__(self, words: dict[str, list[str]]) -> None:
        self._words = words

    @classmethod
    def parse(cls, query: str) -> _Query:
        if len(query) > MAX_QUERY:
            raise BadRequest(f"a query of {len(query)} characters is too long: at most {MAX_QUERY}")
        words: dict[str, list[str]] = {}
        for pair in query.split("&"):
            key, _, word = pair.partition("=")
            words.setdefault(_text(key), []).append(_text(word))
        return cls(words)

    def one(self, key: str) -> str | None:
        """The parameter, or None. Raises BadRequest when given twice: readers would disagree on which one counts."""
        found = self._words.get(key)
        if found is None:
            return None
        if len(found) > 1:
            raise BadRequest(f"the parameter {key} is given more than once")
        return found[0] or None

    def any_of(self, key: str) -> str:
        """The parameter, or "". Given more than once it is "" too: not filtering is always a correct answer."""
        found = self._words.get(key, ())
        return found[0] if len(found) == 1 else ""

    def number(self, key: str) -> int | None:
        """The parameter as a number from 0 to MAX_PAGE, larger ones cut, or None. Raises BadRequest for any other."""
        word = self.one(key)
        if word is None:
            return None
        if not _NUMBER.fullmatch(word):
            raise BadRequest(f"{key} is the number of tags wanted, 0 or more; {word[:40]!r} is not")
        return min(int(word), MAX_PAGE)


def _text(word: str) -> str:
    """One half of a parameter, decoded. `+` stays `+`: no legal value has a space, and media types do have a plus."""
    if "%" in word and word.isascii():
        if _BROKEN_ESCAPE.search(word):
            raise BadRequest("the query has a broken percent-encoding")
        word = unquote_to_bytes(word).decode("latin-1")
    if not (word.isascii() and word.isprintable()):
        # These words come back in headers and logs.
        raise BadRequest("the query has characters outside printable ASCII")
    return word
