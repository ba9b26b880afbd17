"""Reading what upstreams say, without believing it."""

from __future__ import annotations

import gzip
import json

import pytest
from multidict import CIMultiDict

from proxy.upstream import answers
from proxy.upstream.answers import Budget, ContentRange


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 0-0/1", ContentRange(0, 0, 1)),
        ("bytes 500-999/1000", ContentRange(500, 999, 1000)),
        ("bytes 500-999/*", ContentRange(500, 999, None)),
        (" bytes 0-9/10 ", ContentRange(0, 9, 10)),
        (None, None),
        ("", None),
        ("bytes */1000", None),
        ("bytes 10-9/1000", None),
        ("bytes 0-1000/1000", None),
        ("bytes 0-9/10, 20-29/30", None),
        ("bytes=0-9/10", None),
        ("bytes -5-9/10", None),
        ("items 0-9/10", None),
        ("bytes 0-" + "9" * 400 + "/*", None),
    ],
)
def test_content_range_is_one_sensible_range_or_nothing(text: str | None, expected: ContentRange | None) -> None:
    """RFC 9110 §14.4."""
    assert ContentRange.maybe_parse(text) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}, Budget(100, 76, 21600)),
        ({"RateLimit-Limit": "100", "RateLimit-Remaining": "0"}, Budget(100, 0, None)),
        ({"ratelimit-remaining": "5; w=60"}, Budget(None, 5, 60)),
        ({"ratelimit-limit": "many", "ratelimit-remaining": ""}, None),
        ({"ratelimit-remaining": "-1"}, None),
    ],
)
def test_budget_is_what_the_rate_limit_headers_tell(headers: dict[str, str], expected: Budget | None) -> None:
    """Docker Hub's headers; garbage is no budget."""
    assert Budget.maybe_of(CIMultiDict(headers)) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content-Length": "12"}, 12),
        ({"Content-Length": "12", "Content-Encoding": "identity"}, 12),
        ({"Content-Length": "12", "Content-Encoding": "gzip"}, None),
        ({"Content-Length": "+12"}, None),
        ({"Content-Length": "9" * 400}, None),
        ({}, None),
    ],
)
def test_length_is_that_of_the_content_itself(headers: dict[str, str], expected: int | None) -> None:
    """The length of a packed body says nothing about the blob."""
    assert answers.maybe_length(CIMultiDict(headers)) == expected


@pytest.mark.parametrize(
    ("etag", "expected"), [('"abc"', '"abc"'), ('W/"abc"', None), ("abc", None), ("", None), ('"a"b"', None)]
)
def test_only_strong_etags_count(etag: str, expected: str | None) -> None:
    """If-Range with a weak one is forbidden (RFC 9110 §13.1.5)."""
    assert answers.maybe_strong_etag(CIMultiDict({"ETag": etag})) == expected


def test_gzip_is_unpacked_as_far_as_the_limit() -> None:
    """A bomb costs one byte more than the limit, and no more."""
    bomb = gzip.compress(bytes(10_000_000))
    assert answers.gunzip(bomb, limit=1000) == bytes(1001)
    assert answers.gunzip(gzip.compress(b"abc"), limit=3) == b"abc"
    assert answers.gunzip(gzip.compress(b"abc") + gzip.compress(b"def"), limit=10) == b"abcdef"


@pytest.mark.parametrize(
    "packed",
    [b"", b"abc", gzip.compress(b"abc")[:-1], gzip.compress(b"abc") + b"x"],
    ids=["empty", "no gzip", "cut", "more behind it"],
)
def test_gzip_that_is_not_whole_is_nothing(packed: bytes) -> None:
    """Half a document is not a document."""
    assert answers.gunzip(packed, limit=100) is None


def _envelope(**error: object) -> bytes:
    return json.dumps({"errors": [error]}).encode()


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (_envelope(code="DENIED", message="no pull"), "application/json", "DENIED no pull"),
        (_envelope(code="DENIED", message="no pull"), "", "DENIED no pull"),
        (_envelope(code=5, message="no pull"), "application/json", "no pull"),
        (_envelope(message="a\r\nb\x1b[31mc\u2028d"), "application/json", "a b [31mc d"),
        (_envelope(message="x" * 5000), "application/json", "x" * 200),
        (b"too many requests\n", "text/plain; charset=utf-8", "too many requests"),
        (b"<html>no</html>", "text/html", ""),
        (b"[" * 100_000, "application/json", ""),
        (b'{"errors": {}}', "application/json", ""),
        (b'{"errors": ["x"]}', "application/json", ""),
        (b"\xff\xfe", "text/plain", ""),
    ],
)
def test_words_of_an_upstream_are_cut_and_cleaned(body: bytes, content_type: str, expected: str) -> None:
    """They end in sentences of ours, and so in logs and answers: one printable line, at most 200 characters."""
    assert answers.words_of(body, CIMultiDict({"Content-Type": content_type})) == expected
