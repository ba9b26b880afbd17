"""telemetry/log.py: one line for each request and each thing worth knowing, whatever clients put into it (T27)."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from proxy.events import Answered, Evicted, Noticed, TagMoved, TransferEnded
from proxy.telemetry import log as module
from proxy.telemetry.log import MAX_CLIENT_CHARS, EventLog, LineWriter, LoggingBridge, safe

PLAIN = Answered("id-1", "10.0.0.1", "GET", "/v2/a/manifests/1", "containerd/2.0", kind="manifest", status=200)

#: What clients send to forge lines, to colour terminals, and to break parsers (CWE-117).
HOSTILE = [
    "/v2/\n{}",
    '/v2/\r\n{"level":"error"}',
    "/v2/\x1b[2J\x1b]0;owned\x07",
    '/v2/"}{"x":"',
    "/v2/\u2028\u2029\x85",
    "/v2/\ud800",
    "/v2/\x00\x7f",
    "/v2/%0a%0d",
    "/v2/" + "a" * 100_000,
    "/v2/\U0001f600é",
]


class Log:
    """A log into memory."""

    def __init__(self, *, as_json: bool = True, level: str = "info", requests: str = "all") -> None:
        self.stream = io.StringIO()
        self.writer = LineWriter(self.stream)
        self.log = EventLog(self.writer, lambda: 1_800_000_000.25, as_json=as_json, level=level, requests=requests)

    def lines(self) -> list[str]:
        """What was written; closes the log."""
        self.writer.close()
        text = self.stream.getvalue()
        assert text == "" or text.endswith("\n")
        return text.split("\n")[:-1]


@pytest.mark.parametrize("field", ["path", "user_agent", "method", "error"])
@pytest.mark.parametrize("text", HOSTILE, ids=[repr(text[:20]) for text in HOSTILE])
def test_whatever_a_client_sends_is_one_json_object_on_one_line(field: str, text: str) -> None:
    """T27: forged lines are impossible, and what was sent can still be read, cut to a bearable length."""
    log = Log()
    log.log.observe(replace(PLAIN, **cast("dict[str, Any]", {field: text})))
    (line,) = log.lines()
    assert line.isascii() and line.isprintable()
    document = json.loads(line)
    key = {"user_agent": "agent"}.get(field, field)
    assert text.startswith(document[key])
    if field != "error":
        assert len(document[key]) <= MAX_CLIENT_CHARS
    assert document["status"] == 200 and document["level"] == "info"


@pytest.mark.parametrize("text", HOSTILE, ids=[repr(text[:20]) for text in HOSTILE])
def test_whatever_a_client_sends_is_one_readable_line_on_a_terminal(text: str) -> None:
    """No control character of theirs reaches a terminal."""
    log = Log(as_json=False)
    log.log.observe(replace(PLAIN, path=text, error=text))
    log.log.say("error", text)
    lines = log.lines()
    assert len(lines) == 2
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u2029" for char in "".join(lines))


def test_a_line_says_what_happened() -> None:
    """The first question after an incident is who pulled what, and what came of it."""
    log = Log()
    log.log.observe(
        replace(
            PLAIN, n_bytes=10, seconds=0.0123456, outcome="denied", upstream="docker.io", repository="a", project="p",
            rule="**:1", status=403, ending="short",
        )
    )  # fmt: skip
    (line,) = log.lines()
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.250+00:00",
        "level": "warning",
        "request": "id-1",
        "remote": "10.0.0.1",
        "method": "GET",
        "path": "/v2/a/manifests/1",
        "status": 403,
        "bytes": 10,
        "ms": 12.346,
        "outcome": "denied",
        "upstream": "docker.io",
        "repository": "a",
        "project": "p",
        "rule": "**:1",
        "ending": "short",
        "agent": "containerd/2.0",
    }


@pytest.mark.parametrize(
    ("requests", "status", "n_lines"),
    [("all", 200, 1), ("errors", 200, 0), ("errors", 404, 1), ("off", 500, 0)],
)
def test_which_requests_are_logged_is_a_setting(requests: str, status: int, n_lines: int) -> None:
    """server.request_log."""
    log = Log(requests=requests)
    log.log.observe(replace(PLAIN, status=status))
    assert len(log.lines()) == n_lines


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Noticed("warning", "the disk is full"), "the disk is full"),
        (TagMoved("docker.io", "a", "1", "sha256:0", "sha256:1"), "docker.io/a:1 moved from sha256:0 to sha256:1"),
        (
            TransferEnded("docker.io", "a", "sha256:0", 7, 1.0, "broke"),
            "transfer of sha256:0 failed after 7 bytes: broke",
        ),
        (TransferEnded("docker.io", "a", "sha256:0", 7, 1.0, ""), None),
        (Evicted(1, 2), None),
    ],
)
def test_what_is_worth_an_operators_eye_is_said(event: object, said: str | None) -> None:
    """A transfer that went well is told by its request's line alone."""
    log = Log()
    log.log.observe(event)  # type: ignore[arg-type]
    assert [json.loads(line)["message"] for line in log.lines()] == ([said] if said else [])


def test_lines_below_the_level_are_not_written() -> None:
    """log.level."""
    log = Log(level="warning")
    for level in ("debug", "info", "warning", "error"):
        log.log.say(level, level)
    assert [json.loads(line)["level"] for line in log.lines()] == ["warning", "error"]


class SlowStream(io.StringIO):
    """A pipe that nobody reads until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = threading.Event()

    def write(self, text: str) -> int:
        self.is_read.wait()
        return super().write(text)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Room for few lines."""
    monkeypatch.setattr(module, "MAX_WAITING", 5)
    yield


def test_a_log_that_is_read_too_slowly_drops_lines_and_says_how_many(small: None) -> None:
    """The loop never waits for a terminal; and what is said in the place of lost lines is JSON among JSON."""
    stream = SlowStream()
    writer = LineWriter(stream)
    log = EventLog(writer, lambda: 0.0, as_json=True, level="info", requests="all")
    for n in range(100):
        log.say("info", str(n))
    stream.is_read.set()
    writer.close()
    documents = [json.loads(line) for line in stream.getvalue().splitlines()]
    (told,) = [document for document in documents if document["level"] == "warning"]
    assert int(told["message"].split()[0]) + len(documents) - 1 == 100


def test_a_log_whose_reader_is_gone_harms_nobody() -> None:
    """Serving goes on."""
    stream = io.StringIO()
    stream.close()
    writer = LineWriter(stream)
    writer.line("into the void")
    writer.close()


def test_what_libraries_say_is_a_line_of_ours_without_a_traceback() -> None:
    """A traceback is many lines, and may quote what nobody should read."""
    log = Log()
    library = logging.getLogger("test.library")
    library.propagate = False
    library.addHandler(bridge := LoggingBridge(log.log))
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        library.exception("it %s", "failed")
    library.info("not worth it")
    library.removeHandler(bridge)
    (line,) = log.lines()
    assert json.loads(line)["message"] == "test.library: it failed (ValueError: line one\nline two)"


def test_safe_text_is_cut_before_it_is_escaped() -> None:
    """The limit is on what was sent."""
    assert safe("\n" * 10, 3) == "\\x0a\\x0a\\x0a"


_MIB = 1 << 20
STANDING_OUT = {
    "failed": replace(PLAIN, status=502, error="upstream is down"),
    "a body cut short under a good status": replace(PLAIN, ending="short"),
    "a client that was cut for reading too slowly": replace(PLAIN, ending="slow"),
    "a small answer that took long": replace(PLAIN, seconds=6.0),
    "a body far slower than a link": replace(PLAIN, seconds=200.0, n_bytes=100 * _MIB),
}
ORDINARY = {
    "a hit": PLAIN,
    "not there": replace(PLAIN, status=404),
    "a client that left": replace(PLAIN, ending="gone"),
    "a large body on a slow link": replace(PLAIN, seconds=90.0, n_bytes=100 * _MIB),
}


@pytest.mark.parametrize("case", STANDING_OUT)
def test_slow_and_failed_requests_stand_out(case: str) -> None:
    """By their level, in both formats, and also where only errors are logged."""
    log = Log(requests="errors")
    log.log.observe(STANDING_OUT[case])
    (line,) = log.lines()
    assert (json.loads(line)["level"], json.loads(line)["request"]) == ("warning", "id-1")
    log = Log(as_json=False)
    log.log.observe(STANDING_OUT[case])
    (line,) = log.lines()
    assert " WARNING " in line


@pytest.mark.parametrize("case", ORDINARY)
def test_ordinary_requests_do_not_stand_out(case: str) -> None:
    """What stands out is worth nothing when everything does."""
    log = Log()
    log.log.observe(ORDINARY[case])
    (line,) = log.lines()
    assert json.loads(line)["level"] == "info"
    assert "slow" not in json.loads(line)


def test_adjusted_it_writes_as_it_is_told_from_then_on() -> None:
    """A reload changes format, level and requests without a restart."""
    log = Log(level="warning", requests="off")
    log.log.say("info", "not yet")
    log.log.observe(PLAIN)
    log.log.adjust(as_json=False, level="info", requests="all")
    log.log.say("info", "now")
    log.log.observe(PLAIN)
    assert [line.split()[1] for line in log.lines()] == ["INFO", "INFO"]
