"""One line per request and per thing worth knowing; JSON or readable; safe against what clients put into it.

Lines are written by a thread of their own: a slow terminal or a full pipe must not hold the loop. What cannot be
written, or not in time, is dropped and counted, never piled up.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quoted
from typing import Protocol

from proxy.events import Answered, Changed, Event, Noticed, Repeat, TagHeld, TagMoved, TransferEnded

#: Lines that may wait for the writing thread.
MAX_WAITING = 20_000
#: How long the writing thread gathers lines before it writes them, in seconds.
GATHER_S = 0.05
#: Characters of anything a client sent that go into a line.
MAX_CLIENT_CHARS = 512

#: A request that took longer than this stands out, in seconds; a body has as long again as it takes at this many bytes
#: per second, so that a large layer on a slow link is no news.
SLOW_S = 5.0
SLOW_BYTES_PER_S = 1 << 20

#: Control characters, and the separators that some log shippers take for line ends (CWE-117).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Sink(Protocol):
    """Where lines go. Called by one thread alone."""

    def write(self, text: str, /) -> int:
        """Take lines. Raises OSError or ValueError."""
        ...

    def flush(self) -> None:
        """Hand on what was taken. Raises OSError or ValueError."""
        ...


class LineWriter:
    """Writes lines to a stream from its own thread, a batch at a time.

    The thread is woken by the first line of a batch and then waits GATHER_S for more: waking it for every line would
    cost each request a switch of threads.
    """

    def __init__(self, stream: Sink, *, at_end: Callable[[], None] | None = None) -> None:
        """`at_end` is called by the writing thread after the last line: to close what nobody else does."""
        self._stream = stream
        self._at_end = at_end
        self._lines: deque[str] = deque()
        self._n_dropped = 0
        #: What is written in the place of lines that were dropped, by their number. Called by the writing thread.
        self.of_dropped: Callable[[int], str] = "{} log lines were dropped".format
        self._has_lines = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """Write `text` and a line end, soon. Never waits; beyond MAX_WAITING lines the rest is counted only."""
        if len(self._lines) >= MAX_WAITING:
            self._n_dropped += 1
            return
        self._lines.append(text)
        if not self._has_lines.is_set():
            self._has_lines.set()

    def close(self) -> None:
        """Write what waits, then stop."""
        self._is_closing.set()
        self._has_lines.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._has_lines.wait()
            self._is_closing.wait(GATHER_S)
            self._has_lines.clear()
            self._write()
        self._write()
        if self._at_end is not None:
            self._at_end()

    def _write(self) -> None:
        lines = []
        while self._lines:  # not a swap of lists: a line appended to the old one meanwhile would be lost
            lines.append(self._lines.popleft())
        n_lines = len(lines)
        dropped, self._n_dropped = self._n_dropped, 0
        if dropped:
            lines.append(self.of_dropped(dropped))
        if not lines:
            return
        try:
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._n_dropped += dropped + n_lines  # a disk may come back; where nobody reads any more, serving goes on


class EventLog:
    """Turns events into lines."""

    def __init__(
        self, writer: LineWriter, wall: Callable[[], float], *, as_json: bool, level: str, requests: str
    ) -> None:
        """`wall` gives seconds since 1970; `requests` is "all", "errors" or "off"."""
        self._writer = writer
        self._wall = wall
        self._as_json = as_json
        self._level = _LEVELS[level]
        self._requests = requests
        #: Moves when the settings of the log do: lines that were prepared for the old ones are prepared anew.
        self._n_adjusted = 0
        #: A second and how it is written, put here as one: the writing thread stamps lines, too.
        self._stamped = (-1, "")
        writer.of_dropped = lambda n: self._line(
            "warning", f"{n} log lines were dropped: it is read too slowly, or fails"
        )

    def adjust(self, *, as_json: bool, level: str, requests: str) -> None:
        """From the next line on like this."""
        self._as_json, self._level, self._requests = as_json, _LEVELS[level], requests
        self._n_adjusted += 1

    def observe(self, event: Event) -> None:
        """Write the event, if it is one that is written."""
        if isinstance(event, Answered):
            if (line := self._line_of(event)) is not None:
                self._writer.line(line(self._now(), event.request_id, event.remote))
        elif isinstance(event, Noticed):
            self.say(event.level, event.sentence)
        elif isinstance(event, Changed):
            self.say("info", f"{event.what} {event.name!r} {event.how}")
        elif isinstance(event, TagHeld):
            what = f"was moved to {event.now}" if event.now else "was deleted"
            name = f"{event.upstream}/{event.repository}:{event.tag}"
            self.say(
                "warning", f"{name} {what} upstream; project {event.project!r} keeps {event.kept}, as it is immutable"
            )
        elif isinstance(event, TagMoved):
            self.say("info", f"{event.upstream}/{event.repository}:{event.tag} moved from {event.was} to {event.now}")
        elif isinstance(event, TransferEnded) and event.failure:
            self.say("warning", f"transfer of {event.digest} failed after {event.n_bytes} bytes: {event.failure}")

    def repeats(self, said: Answered) -> Repeat:
        """How to write that `said` was answered once more."""
        line, n_adjusted, write = self._line_of(said), self._n_adjusted, self._writer.line

        def again(request_id: str, remote: str, at: float) -> None:
            nonlocal line, n_adjusted
            if n_adjusted != self._n_adjusted:
                line, n_adjusted = self._line_of(said), self._n_adjusted
            if line is not None:
                write(line(self._stamp(at), request_id, remote))

        return again

    def say(self, level: str, sentence: str) -> None:
        """One line for an operator."""
        if _LEVELS[level] < self._level:
            return
        self._writer.line(self._line(level, sentence))

    def _line(self, level: str, sentence: str) -> str:
        if self._as_json:
            return json.dumps({"time": self._now(), "level": level, "message": sentence})
        return f"{self._now()} {level.upper():7} {safe(sentence, 4096)}"

    def _line_of(self, event: Answered) -> Callable[[str, str, str], str] | None:
        """The line of a request, made of its time, id and address; all the rest is put together here, once. None where
        it is not written."""
        is_slow = event.seconds > SLOW_S + event.n_bytes / SLOW_BYTES_PER_S
        # A body that was cut short had a good status, and is the worst of failures.
        stands_out = event.status >= 500 or event.ending in ("short", "slow") or is_slow
        if self._requests == "off" or (self._requests == "errors" and event.status < 400 and not stands_out):
            return None
        if self._as_json:
            level = "warning" if stands_out else "info"
            line: dict[str, str | int | float] = {
                "method": event.method[:32],
                "path": event.path[:MAX_CLIENT_CHARS],
                "status": event.status,
                "bytes": event.n_bytes,
                "ms": round(event.seconds * 1000, 3),
            }
            for key in ("outcome", "upstream", "repository", "project", "caller", "rule", "error"):
                if value := getattr(event, key):
                    line[key] = value
            if event.ending != "whole":
                line["ending"] = event.ending
            if is_slow:
                line["slow"] = True
            if event.user_agent:
                line["agent"] = event.user_agent[:MAX_CLIENT_CHARS]
            rest = json.dumps(line)[1:]  # ASCII: json escapes everything else
            return lambda time, request, remote: (
                f'{{"time": "{time}", "level": "{level}", "request": {quoted(request)}, "remote": {quoted(remote)}, {rest}'
            )
        level = "WARNING" if stands_out else "INFO   "
        before = [
            safe(event.method, 32),
            safe(event.path, MAX_CLIENT_CHARS),
            str(event.status),
            f"{event.n_bytes}B",
            f"{event.seconds * 1000:.1f}ms",
            event.outcome or "-",
        ]
        after = [""]
        if event.ending != "whole":
            after.append(event.ending)
        if is_slow:
            after.append("slow")
        if event.error:
            after.append(safe(event.error, 2048))
        head, tail = " ".join(before), " ".join(after)
        return lambda time, request, remote: f"{time} {level} {remote} {head} {request}{tail}"

    def _now(self) -> str:
        return self._stamp(self._wall())

    def _stamp(self, wall: float) -> str:
        """ISO 8601 in UTC to the millisecond. The date is worked out once a second."""
        second, (stamped, text) = int(wall), self._stamped
        if second != stamped:
            text = datetime.fromtimestamp(second, UTC).isoformat()[:-6]
            self._stamped = (second, text)
        return f"{text}.{int((wall - second) * 1000):03d}+00:00"


class LoggingBridge(logging.Handler):
    """What libraries log, as our lines: the message alone, never a traceback."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        sentence = f"{record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            sentence += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
        self._log.say(level, sentence)


def safe(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, on one line, without anything a terminal or a log shipper would act on."""
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text[:limit])
