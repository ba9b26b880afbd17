"""The warm manifest path: whole answers, ready to be written, found by the very bytes of the request.

Thousands of kubelets send the same few requests byte for byte. The first of each kind takes the long way: parsed, routed,
judged, answered. If that was a manifest from memory, the answer is kept beside the request's bytes, and the next request
of exactly these bytes gets it without being parsed again. The same bytes mean the same request, so no shortcut can
change an answer; what can is time and rules, and both are asked every time through `again`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate

from aiohttp import web
from cachetools import LRUCache

from proxy.events import Answered, Event
from proxy.ports import Clock

#: What the table holds at most: requests, heads and bodies.
MAX_BYTES = 8 << 20
#: A request longer than this is not a kubelet's.
MAX_REQUEST_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Ready:
    """What a handler offers to be kept: it would give the same answer again for as long as `again` gives an age.

    `again` returns the answer's age in seconds, or None when it no longer stands; `has_age`: whether an Age is sent.
    `said` is what is reported of each answer.
    """

    said: Answered
    body: bytes
    again: Callable[[], float | None]
    has_age: bool


#: Where a handler leaves its offer: a key of the request.
READY = web.RequestKey("breakwater.ready", Ready)


class _Answer:
    """A kept answer, put together again once a second for its Date and Age."""

    __slots__ = ("_second", "_whole", "head", "ready", "size")

    def __init__(self, ready: Ready, head: bytes) -> None:
        self.ready = ready
        self.head = head
        self.size = len(head) + len(ready.body) + 512
        self._second = -1
        self._whole = b""

    def whole(self, wall: float, age_s: float) -> bytes:
        """The answer's bytes at this wall-clock time and age."""
        second = int(wall)
        if second != self._second:
            aged = b"Age: %d\r\n" % age_s if self.ready.has_age else b""
            date = formatdate(second, usegmt=True).encode("ascii")
            self._whole = b"%b%bDate: %b\r\n\r\n%b" % (self.head, aged, date, self.ready.body)
            self._second = second
        return self._whole


class ReadyTable:
    """Kept answers by request bytes. True for this process; bounded by bytes."""

    def __init__(self, *, clock: Clock, observe: Callable[[Event], None], request_id: Callable[[], str]) -> None:
        """`observe` is told of each answer; `request_id` makes an id for it."""
        self._clock = clock
        self._observe = observe
        self._request_id = request_id
        self._answers: LRUCache[bytes, _Answer] = LRUCache(MAX_BYTES, getsizeof=lambda answer: answer.size)

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, request: bytes, remote: str) -> bytes | None:
        """The whole answer to these very bytes, already reported; or None: take the long way."""
        answer = self._answers.get(request)
        if answer is None:
            return None
        age_s = answer.ready.again()
        if age_s is None:
            del self._answers[request]
            return None
        self._observe(replace(answer.ready.said, request_id=self._request_id(), remote=remote, seconds=0.0))
        return answer.whole(self._clock.wall(), age_s)

    def keep(self, request: bytes, response: web.StreamResponse, ready: Ready) -> None:
        """Remember the answer that `response` was to `request`, with the headers that really went out."""
        lines = [b"HTTP/1.1 %d %b\r\n" % (response.status, (response.reason or "").encode("ascii"))]
        for name, value in response.headers.items():
            if name not in ("Date", "Age"):
                lines.append(f"{name}: {value}\r\n".encode("latin-1"))
        answer = _Answer(ready, b"".join(lines))
        if len(request) <= MAX_REQUEST_BYTES and answer.size < MAX_BYTES // 8:
            self._answers[request] = answer
