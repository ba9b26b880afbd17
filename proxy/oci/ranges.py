"""Ranges, conditions and multipart bodies (RFC 9110 §13, §14 and §15.3.7), over whole blobs in bytes.

What is malformed is ignored, and the whole blob is served, as RFC 9110 §14.2 advises; what is well-formed and lies
outside the blob is a 416. `bytes=500-0` counts as the latter: RFC 9110 would let us ignore it, but the conformance
suite of the distribution-spec wants a 416.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: More ranges than this in one header, and the whole blob is served. Clients that fetch single files out of a layer
#: (zstd:chunked) ask for hundreds of ranges in good faith, as many as fit a header line; so the bound on what a request
#: can cost is not their number but that we never send more bytes than the blob has (see `resolve`).
MAX_RANGES = 512

_UNIT = re.compile(r"[ \t]*bytes[ \t]*=", re.IGNORECASE)
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")
_TAG = re.compile(r'(?:W/)?("[^"]*"|[^\s,"]+)')
_BOUNDARY = re.compile(r"[A-Za-z0-9-]{1,70}")
#: Digits beyond these are more than any size, and int() need not see them.
_MAX_DIGITS = 20

#: (first, last) as asked, both inclusive: (500, 999), (500, None), and (None, 500) for the last 500 bytes.
Spec = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes `start` to `end`, the latter exclusive. Never empty when it comes from `resolve`."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """How many bytes it has."""
        return self.end - self.start


def parse(header: str | None) -> tuple[Spec, ...] | None:
    """What a Range header asks for, or None: serve the whole blob.

    None stands for no header, another unit than bytes, anything malformed, and more than MAX_RANGES ranges.
    """
    if header is None:
        return None
    unit = _UNIT.match(header)
    if unit is None:
        return None
    specs: list[Spec] = []
    for part in header[unit.end() :].split(","):
        word = part.strip(" \t")
        if not word:  # RFC 9110 §5.6.1.2: empty elements of a list are ignored
            continue
        match = _SPEC.fullmatch(word)
        if match is None or word == "-" or len(specs) == MAX_RANGES:
            return None
        specs.append((_number(match[1]), _number(match[2])))
    return tuple(specs) or None


def resolve(specs: Sequence[Spec], size: int) -> tuple[Range, ...]:
    """The bytes that `specs` mean in a blob of `size` bytes; empty means 416 (RFC 9110 §15.5.17).

    Ranges that lie outside are left out, the rest are cut to the blob. They stay in the order asked, and adjacent ones
    stay apart, because clients match the parts to what they asked for; unless together they are more bytes than the
    blob has. Then they are merged and sorted, so that no request costs more than the blob (RFC 9110 §17.15). Of an
    empty blob no range can be satisfied.
    """
    ranges = [found for first, last in specs if (found := _within(first, last, size)) is not None]
    if len(ranges) > 1 and sum(found.length for found in ranges) > size:
        return tuple(_merged(ranges))
    return tuple(ranges)


def if_range_matches(header: str | None, etag: str) -> bool:
    """Whether a Range header may be honoured: no If-Range, or one that strongly matches `etag`, quotes included.

    RFC 9110 §13.1.5. A date never matches: we send no Last-Modified that it could come from.
    """
    return header is None or header.strip(" \t") == etag


def etag_matches(if_none_match: str | None, etag: str) -> bool:
    """Whether If-None-Match says that the client has it (304), by weak comparison (RFC 9110 §13.1.2).

    Several header lines are to be joined by ", ". Tags without quotes count too; older registry clients send those.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    bare = etag.removeprefix("W/").strip('"')
    return any(found.strip('"') == bare for found in _TAG.findall(if_none_match))


def content_range(part: Range, size: int) -> str:
    """The Content-Range of a 206: `bytes 500-999/2048` (RFC 9110 §14.4)."""
    return f"bytes {part.start}-{part.end - 1}/{size}"


def unsatisfied_range(size: int) -> str:
    """The Content-Range of a 416: `bytes */2048`."""
    return f"bytes */{size}"


class Multipart(NamedTuple):
    """A multipart/byteranges body: of each part the header bytes and then its range of the blob; last, `trailer`."""

    parts: tuple[tuple[bytes, Range], ...]
    trailer: bytes

    @property
    def length(self) -> int:
        """The exact Content-Length of the whole body."""
        return sum(len(head) + part.length for head, part in self.parts) + len(self.trailer)


def multipart(ranges: Sequence[Range], size: int, media_type: str, boundary: str) -> Multipart:
    """The frame around several ranges of a blob of `size` bytes (RFC 9110 §14.6).

    `boundary` is letters, digits and dashes (at most 70; what every client's parser takes without quotes), and must be
    unpredictable, or a blob could contain it. Raises ValueError for one that is not.
    """
    if not _BOUNDARY.fullmatch(boundary):
        raise ValueError(f"{boundary!r} cannot be a multipart boundary")
    parts = tuple((_part_head(boundary, media_type, content_range(part, size)), part) for part in ranges)
    return Multipart(parts, f"\r\n--{boundary}--\r\n".encode("ascii"))


def multipart_type(boundary: str) -> str:
    """The Content-Type of a response with a `multipart` body."""
    return f"multipart/byteranges; boundary={boundary}"


def _part_head(boundary: str, media_type: str, where: str) -> bytes:
    return f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: {where}\r\n\r\n".encode("ascii")


def _number(digits: str) -> int | None:
    return int(digits.lstrip("0")[:_MAX_DIGITS] or "0") if digits else None


def _within(first: int | None, last: int | None, size: int) -> Range | None:
    """The part of the blob that one spec means, or None when it means none of it."""
    if first is None:
        start, end = max(0, size - (last or 0)), size
    else:
        start, end = first, size if last is None else min(last + 1, size)
    return Range(start, end) if start < end else None


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes once each, in order, with neighbours joined."""
    merged: list[Range] = []
    for part in sorted(ranges):
        if merged and part.start <= merged[-1].end:
            merged[-1] = Range(merged[-1].start, max(merged[-1].end, part.end))
        else:
            merged.append(part)
    return merged
