"""Reading what upstreams say about themselves and their bodies. Pure; nothing here believes a word it reads."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from proxy.errors import InvalidDigest
from proxy.oci import mediatypes
from proxy.oci.digest import Digest

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,18})")
_LIMIT = re.compile(r"\s*([0-9]{1,12})\s*(?:;\s*w=([0-9]{1,12}))?")
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")

#: An upstream's words in a sentence of ours, at most.
MAX_WORDS = 200


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A 206's Content-Range: the bytes from `first` to `last`, both included, of `total` (None: not said)."""

    first: int
    last: int
    total: int | None

    @classmethod
    def maybe_parse(cls, text: str | None) -> ContentRange | None:
        """RFC 9110 §14.4; None for anything that is not one byte range that makes sense."""
        match = _CONTENT_RANGE.fullmatch((text or "").strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2])
        total = None if match[3] == "*" else int(match[3])
        return cls(first, last, total) if first <= last and (total is None or last < total) else None


def unsatisfied_total(text: str | None) -> int | None:
    """The size that a 416 tells in `Content-Range: bytes */size` (RFC 9110 §15.5.17)."""
    match = _UNSATISFIED.fullmatch((text or "").strip())
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Budget:
    """What upstream last said of its rate limit: `remaining` of `limit` requests in `window_s` seconds.

    The headers are Docker Hub's `ratelimit-limit: 100;w=21600` (draft-polli-ratelimit-headers-02); each part may be
    missing.
    """

    limit: int | None
    remaining: int | None
    window_s: int | None

    @classmethod
    def maybe_of(cls, headers: Mapping[str, str]) -> Budget | None:
        """The budget that an answer's headers tell, or None when they tell none that can be read."""
        limit = _LIMIT.match(headers.get("ratelimit-limit", ""))
        remaining = _LIMIT.match(headers.get("ratelimit-remaining", ""))
        if limit is None and remaining is None:
            return None
        window = next((int(match[2]) for match in (limit, remaining) if match and match[2]), None)
        return cls(int(limit[1]) if limit else None, int(remaining[1]) if remaining else None, window)


def maybe_length(headers: Mapping[str, str]) -> int | None:
    """The Content-Length, where it is the length of the content itself (that is, not of an encoded form)."""
    text = headers.get("Content-Length", "")
    if content_encoding(headers) or not (text.isascii() and text.isdigit()) or len(text) > 18:
        return None
    return int(text)


def maybe_digest(headers: Mapping[str, str]) -> Digest | None:
    """What Docker-Content-Digest claims, if it is a digest."""
    try:
        return Digest.parse(headers.get("Docker-Content-Digest", "").strip())
    except InvalidDigest:
        return None


def maybe_strong_etag(headers: Mapping[str, str]) -> str | None:
    """The ETag, if it is a strong one: the only kind that If-Range may carry (RFC 9110 §13.1.5)."""
    etag = headers.get("ETag", "").strip()
    return etag if _STRONG_ETAG.fullmatch(etag) else None


def media_type(headers: Mapping[str, str]) -> str:
    """The media type without parameters, "" if none."""
    return mediatypes.bare(headers.get("Content-Type", ""))


def is_web_page(headers: Mapping[str, str]) -> bool:
    """Whether this is a page for people: a captive portal or a load balancer speaks where a registry should."""
    return media_type(headers) in ("text/html", "application/xhtml+xml")


def content_encoding(headers: Mapping[str, str]) -> str:
    """The Content-Encoding in lower case, "" when the body is the content itself."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def gunzip(packed: bytes, *, limit: int) -> bytes | None:
    """What `packed` unpacks to, at most `limit` + 1 bytes of it; None when it is not whole gzip."""
    pieces: list[bytes] = []
    room = limit + 1
    while packed:
        member = zlib.decompressobj(wbits=31)
        try:
            piece = member.decompress(packed, room)
        except zlib.error:
            return None
        pieces.append(piece)
        room -= len(piece)
        if room <= 0:
            break
        if not member.eof:
            return None
        packed = member.unused_data
    return b"".join(pieces) if pieces else None


def words_of(body: bytes, headers: Mapping[str, str]) -> str:
    """What an error body says in its own words, cut and stripped of anything that could pass for a log line of ours.

    The OCI envelope's first message where there is one (distribution-spec § Error Codes), plain text as it is, and
    nothing of a web page.
    """
    text = ""
    if media_type(headers) == "text/plain":
        text = body.decode("utf-8", "replace")
    else:
        found = _first_error(body)
        text = " ".join(str(found[key]) for key in ("code", "message") if isinstance(found.get(key), str))
    return " ".join(_UNPRINTABLE.sub(" ", text[: MAX_WORDS * 2]).split())[:MAX_WORDS]


def names_unknown(body: bytes) -> bool:
    """Whether a 404's envelope says that the repository itself is unknown."""
    return _first_error(body).get("code") == "NAME_UNKNOWN"


def _first_error(body: bytes) -> Mapping[str, object]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    errors = document.get("errors") if isinstance(document, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    return first if isinstance(first, dict) else {}
