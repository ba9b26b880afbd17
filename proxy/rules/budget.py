"""What an upstream still grants us, and who may spend it. Pure: time is an argument.

An upstream that throttles is left alone by everybody until the time it named. One that tells how much is left
(`ratelimit-remaining`) and is nearly spent is asked for what clients wait for, and no longer whether tags have moved:
those go out stale, marked. Now and then one such question passes, because the answer tells what is left, and Docker
Hub does not charge for it.
"""

from __future__ import annotations

import math
from typing import Protocol

#: How long an upstream that throttles and does not say for how long is left alone, in seconds.
UNSAID_S = 30.0
#: Below the floor, whether tags have moved is asked once in so many seconds, of the whole upstream.
LOOK_EVERY_S = 60.0


class Quote(Protocol):
    """What upstream said of its limit: `remaining` of `limit` requests in `window_s` seconds, each where it said so."""

    @property
    def limit(self) -> int | None: ...
    @property
    def remaining(self) -> int | None: ...
    @property
    def window_s(self) -> int | None: ...


class Budget:
    """The budget of one address and one identity. `floor`: at this many remaining requests revalidations stop."""

    __slots__ = ("_heard_at", "_look_at", "_throttled_until", "floor", "quote")

    def __init__(self, floor: int = 10) -> None:
        self.floor = floor
        #: What was heard last, None while nothing was.
        self.quote: Quote | None = None
        self._heard_at = 0.0
        self._look_at = -math.inf
        self._throttled_until = -math.inf

    def hear(self, quote: Quote | None, now: float) -> None:
        """Take what the last answer said. The same object again is old news."""
        if quote is not None and quote is not self.quote:
            self.quote = quote
            self._heard_at = now

    def throttle(self, retry_after_s: float | None, now: float) -> None:
        """Upstream asked to come back later: after so many seconds, or it did not say (None)."""
        until = now + (UNSAID_S if retry_after_s is None else retry_after_s)
        self._throttled_until = max(self._throttled_until, until)

    def wait_s(self, now: float) -> float | None:
        """Seconds for which nobody asks anything, or None."""
        wait = self._throttled_until - now
        return wait if wait > 0 else None

    def is_low(self, now: float) -> bool:
        """Whether what is left is for misses. What was heard a whole window ago no longer counts."""
        quote = self.quote
        if quote is None or quote.remaining is None or quote.remaining > self.floor:
            return False
        if quote.limit is not None and quote.limit <= self.floor:
            return quote.remaining == 0  # a floor above the limit would stop revalidation for good
        return quote.window_s is None or now < self._heard_at + quote.window_s

    def may_look(self, now: float) -> bool:
        """Whether a revalidation may pass now. Below the floor, saying yes uses up the turn."""
        if not self.is_low(now):
            return True
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_EVERY_S
        return True
