"""The warm manifest path: whole answers, ready to be written, found by the very bytes of the request.

Thousands of kubelets send the same few requests byte for byte. The first of each kind takes the long way: parsed, routed,
judged, answered. If that was a manifest from memory, the answer is kept beside the request's bytes, and the next request
of exactly these bytes gets it without being parsed again. The same bytes mean the same request, so no shortcut can
change an answer; what can is time and rules. Both are asked each time: whether anything has changed since the answer
was judged, which costs a few comparisons, and in full (`Ready.again`) whenever something has, and once a second.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from hashlib import blake2b
from math import inf

from aiohttp import web

from proxy.engine.pull import Vouched
from proxy.events import Answered, Repeat
from proxy.ports import Clock

#: What the table holds at most: requests, heads and bodies.
MAX_BYTES = 8 << 20
#: A request longer than this is not a kubelet's.
MAX_REQUEST_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Ready:
    """What a handler offers to be kept: it would give the same answer again for as long as `again` vouches for it.

    `said` is what was reported of the answer; `good_until`: when what the request showed ends to be good, monotonic;
    `has_age`: whether an Age is sent; `is_secret`: the request's bytes hold a password, and are not to be kept.
    """

    said: Answered
    body: bytes
    again: Callable[[], Vouched | None]
    has_age: bool
    good_until: float = inf
    is_secret: bool = False


#: Where a handler leaves its offer: a key of the request.
READY = web.RequestKey("breakwater.ready", Ready)


def _never() -> bool:
    return False


class _Answer:
    """A kept answer, put together again once a second for its Date and Age."""

    __slots__ = ("head", "holds", "ready", "repeat", "size", "until", "whole")

    def __init__(self, request: bytes, ready: Ready, head: bytes, repeat: Repeat) -> None:
        self.ready = ready
        self.head = head
        self.repeat = repeat
        #: With what is prepared for watchers; without the body in `ready`, which the engine holds as well.
        self.size = len(request) + 2 * len(head) + len(ready.body) + 1024
        #: `whole` may be sent until then (monotonic), while `holds()`.
        self.until = -inf
        self.holds: Callable[[], bool] = _never
        self.whole = b""

    def judge(self, now: float, wall: float) -> bool:
        """Ask in full whether it stands, and make it ready for the rest of this second of the wall clock."""
        vouched = self.ready.again() if now < self.ready.good_until else None
        if vouched is None:
            return False
        aged = b"Age: %d\r\n" % vouched.age_s if self.ready.has_age else b""
        date = formatdate(int(wall), usegmt=True).encode("ascii")
        self.whole = b"%b%bDate: %b\r\n\r\n%b" % (self.head, aged, date, self.ready.body)
        self.until = now + min(vouched.fresh_for_s, 1 - wall % 1, self.ready.good_until - now)
        self.holds = vouched.holds
        return True


class ReadyTable:
    """Kept answers by request bytes. True for this process; bounded by bytes, the one judged longest ago goes first."""

    def __init__(
        self,
        *,
        clock: Clock,
        repeats: Callable[[Answered], Repeat],
        request_id: Callable[[], str],
    ) -> None:
        """`repeats` says how to report an answer given again: by request id, address of the client and wall-clock
        time (wiring/watching.py); `request_id` makes an id."""
        self._clock = clock
        self._repeats = repeats
        self._request_id = request_id
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._n_bytes = 0
        #: What requests that hold a password are known by: of no use to whoever reads this process's memory.
        self._key = secrets.token_bytes(32)
        self._has_secrets = False

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, request: bytes, remote: str) -> bytes | None:
        """The whole answer to these very bytes, already reported; or None: take the long way."""
        answer = self._answers.get(request)
        if answer is None:
            if not self._has_secrets:
                return None
            request = self._hashed(request)
            if (answer := self._answers.get(request)) is None:
                return None
        now, wall = self._clock.monotonic(), self._clock.wall()
        if now >= answer.until or not answer.holds():
            if not answer.judge(now, wall):
                self._drop(request)
                return None
            self._answers.move_to_end(request)
        answer.repeat(self._request_id(), remote, wall)
        return answer.whole

    def keep(self, request: bytes, response: web.StreamResponse, ready: Ready) -> None:
        """Remember the answer that `response` was to `request`, with the headers that really went out."""
        if len(request) > MAX_REQUEST_BYTES:
            return
        lines = [b"HTTP/1.1 %d %b\r\n" % (response.status, (response.reason or "").encode("ascii"))]
        for name, value in response.headers.items():
            if name not in ("Date", "Age"):
                lines.append(f"{name}: {value}\r\n".encode("latin-1"))
        said = replace(ready.said, seconds=0.0)
        answer = _Answer(request, ready, b"".join(lines), self._repeats(said))
        if answer.size > MAX_BYTES // 8:
            return
        if ready.is_secret:
            self._has_secrets = True
            request = self._hashed(request)
        if request in self._answers:
            self._drop(request)
        self._answers[request] = answer
        self._n_bytes += answer.size
        while self._n_bytes > MAX_BYTES:
            self._drop(next(iter(self._answers)))

    def _hashed(self, request: bytes) -> bytes:
        return blake2b(request, key=self._key, digest_size=32).digest()

    def _drop(self, request: bytes) -> None:
        self._n_bytes -= self._answers.pop(request).size
