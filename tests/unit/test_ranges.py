"""Ranges, conditions and multipart frames (RFC 9110)."""

from __future__ import annotations

import email
import re
from email.message import Message

import pytest

from proxy.oci.ranges import (
    MAX_RANGES,
    Range,
    Spec,
    content_range,
    etag_matches,
    if_range_matches,
    multipart,
    multipart_type,
    parse,
    resolve,
    unsatisfied_range,
)

SIZE = 2048
ETAG = '"sha256:0000"'


def resolved(header: str, size: int = SIZE) -> list[tuple[int, int]] | None:
    specs = parse(header)
    return None if specs is None else [(found.start, found.end) for found in resolve(specs, size)]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("bytes=500-1499", [(500, 1500)], id="a middle"),
        pytest.param("bytes=500-", [(500, 2048)], id="to the end"),
        pytest.param("bytes=-500", [(1548, 2048)], id="the last 500"),
        pytest.param("bytes=2000-5000", [(2000, 2048)], id="cut at the end"),
        pytest.param("bytes=500-0", [], id="backwards"),
        pytest.param("bytes=5000-10000", [], id="beyond the end"),
    ],
)
def test_the_six_ranges_of_the_conformance_suite(header: str, expected: list[tuple[int, int]]) -> None:
    """distribution-spec conformance, on a blob of 2,048 bytes; an empty answer is a 416."""
    assert resolved(header) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("bytes=0-", [(0, 2048)], id="everything"),
        pytest.param("bytes=0-0", [(0, 1)], id="the first byte"),
        pytest.param("bytes=-1", [(2047, 2048)], id="the last byte"),
        pytest.param("bytes=2047-", [(2047, 2048)], id="from the last byte"),
        pytest.param("bytes=2048-", [], id="from the end"),
        pytest.param("bytes=-0", [], id="the last no bytes"),
        pytest.param("bytes=-5000", [(0, 2048)], id="a suffix longer than the blob"),
        pytest.param("bytes=0-" + "9" * 5000, [(0, 2048)], id="a last position of 5,000 digits"),
        pytest.param("bytes=" + "9" * 5000 + "-", [], id="a first position of 5,000 digits"),
        pytest.param("bytes=-" + "9" * 5000, [(0, 2048)], id="a suffix of 5,000 digits"),
        pytest.param("bytes=" + "0" * 50 + "5-9", [(5, 10)], id="leading zeros"),
        pytest.param("Bytes=1-2", [(1, 3)], id="the unit without regard to case"),
        pytest.param(" bytes = 1-2 , ,\t4-5,", [(1, 3), (4, 6)], id="white space and empty elements"),
        pytest.param("bytes=1-2,9000-,4-5", [(1, 3), (4, 6)], id="one of several outside"),
        pytest.param("bytes=4-5,1-2", [(4, 6), (1, 3)], id="in the order asked"),
        pytest.param("bytes=0-9,10-19", [(0, 10), (10, 20)], id="neighbours stay apart"),
        pytest.param("bytes=0-9,5-14", [(0, 10), (5, 15)], id="a harmless overlap stays"),
    ],
)
def test_lawful_ranges_are_cut_to_the_blob(header: str, expected: list[tuple[int, int]]) -> None:
    """RFC 9110 §14.1.2, and §15.3.7.2 for the order of parts."""
    assert resolved(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes=-",
        "bytes=a-b",
        "bytes=1",
        "bytes=1-2-3",
        "bytes=--1",
        "bytes=1 - 2",
        "bytes=+1-2",
        "bytes=1-2;3-4",
        "bytes=1-2,x",
        "bytes=٣-٤",
        "bytes 1-2",
        "items=1-2",
        "x-bytes=1-2",
        "bytes=1-2\n",
        None,
    ],
)
def test_what_is_no_range_of_bytes_is_ignored(header: str | None) -> None:
    """RFC 9110 §14.2: ignore, and serve the whole."""
    assert parse(header) is None


def test_as_many_ranges_as_a_header_line_holds_are_honoured() -> None:
    """Clients of zstd:chunked layers ask for hundreds; beyond the bound they get the whole blob, which they accept."""
    many = [f"{n * 10}-{n * 10 + 1}" for n in range(MAX_RANGES + 1)]
    specs = parse("bytes=" + ",".join(many[:-1]))
    assert specs is not None
    assert len(resolve(specs, 1 << 20)) == MAX_RANGES
    assert parse("bytes=" + ",".join(many)) is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("bytes=0-,0-,0-", [(0, 2048)], id="the whole three times"),
        pytest.param("bytes=" + ",".join(["0-"] * 500), [(0, 2048)], id="the whole 500 times"),
        pytest.param("bytes=1000-,0-1999", [(0, 2048)], id="two overlapping halves"),
        pytest.param("bytes=100-,100-,0-9", [(0, 10), (100, 2048)], id="apart from the first ten"),
    ],
)
def test_no_request_costs_more_than_the_blob(header: str, expected: list[tuple[int, int]]) -> None:
    """RFC 9110 §17.15: ranges that add up to more than the blob are merged."""
    assert resolved(header) == expected


@pytest.mark.parametrize("spec", [(0, None), (0, 0), (None, 1), (None, 0), (5, 1)])
def test_an_empty_blob_satisfies_no_range(spec: Spec) -> None:
    """There is no Content-Range for no bytes; whoever serves may answer 200 instead of 416."""
    assert resolve([spec], 0) == ()


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        (None, True),
        (ETAG, True),
        (f" {ETAG}\t", True),
        ('"sha256:1111"', False),
        (f"W/{ETAG}", False),
        ("sha256:0000", False),
        (f'{ETAG}, "x"', False),
        ("Wed, 21 Oct 2015 07:28:00 GMT", False),
        ("", False),
        ("*", False),
    ],
)
def test_if_range_compares_strongly_and_never_by_date(header: str | None, matches: bool) -> None:
    """RFC 9110 §13.1.5: on anything but the very tag the whole blob is sent."""
    assert if_range_matches(header, ETAG) is matches


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        (None, False),
        ("", False),
        ("*", True),
        (" * ", True),
        (ETAG, True),
        (f"W/{ETAG}", True),
        ("sha256:0000", True),
        (f'"a,b", W/{ETAG}', True),
        (f'"x",{ETAG}', True),
        ('"x", "y"', False),
        ('"sha256:00"', False),
        ('"x,sha256:0000"', False),
        ('"', False),
    ],
)
def test_if_none_match_compares_weakly_over_a_list(header: str | None, matches: bool) -> None:
    """RFC 9110 §13.1.2; quotes are optional, as old registry clients leave them out."""
    assert etag_matches(header, ETAG) is matches


def test_content_range_counts_as_the_rfc_does() -> None:
    """RFC 9110 §14.4: the last position is inclusive."""
    assert content_range(Range(500, 1000), SIZE) == "bytes 500-999/2048"
    assert unsatisfied_range(SIZE) == "bytes */2048"
    assert Range(500, 1000).length == 500


def test_a_multipart_body_is_what_a_mime_reader_expects() -> None:
    """RFC 9110 §14.6, read back by a parser that is not ours; its length is known beforehand."""
    blob = bytes(range(256)) * 8
    ranges = (Range(10, 13), Range(0, 1), Range(2040, 2048))
    frame = multipart(ranges, len(blob), "application/octet-stream", "b0undary")
    body = b"".join(head + blob[part.start : part.end] for head, part in frame.parts) + frame.trailer
    assert len(body) == frame.length
    message = email.message_from_bytes(f"Content-Type: {multipart_type('b0undary')}\r\n\r\n".encode() + body)
    assert not message.defects
    parts = message.get_payload()
    assert isinstance(parts, list)
    assert [(part["Content-Range"], part.get_content_type()) for part in parts if isinstance(part, Message)] == [
        ("bytes 10-12/2048", "application/octet-stream"),
        ("bytes 0-0/2048", "application/octet-stream"),
        ("bytes 2040-2047/2048", "application/octet-stream"),
    ]
    assert body.startswith(b"\r\n--b0undary\r\n")
    assert b"\r\n\r\n\x0a\x0b\x0c\r\n--b0undary\r\n" in body


def test_the_boundary_is_one_that_every_client_reads() -> None:
    """containers/image falls back to the pattern [A-Za-z-0-9:]+, and quotes are not expected."""
    found = re.search(r"boundary=([A-Za-z-0-9:]+)$", multipart_type("a-B-0"))
    assert found is not None
    assert found[1] == "a-B-0"


@pytest.mark.parametrize("boundary", ["", "a b", "a\r\nb", "a:b", "x" * 71, 'a"b', "é"])
def test_any_other_boundary_is_a_mistake_of_ours(boundary: str) -> None:
    """It comes from the caller, never from a client."""
    with pytest.raises(ValueError, match="boundary"):
        multipart((Range(0, 1),), 1, "text/plain", boundary)
