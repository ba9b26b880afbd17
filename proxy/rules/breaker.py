"""When to stop asking an upstream that does not answer, and when to try again. Pure: time and chance are arguments.

Closed: everybody asks. Open, after `TRIPS_AFTER` failures with nothing but failures between: nobody asks until a time
that doubles from `FIRST_S` to `LONGEST_S`. Half-open, once that time has come: one asks, and decides for all.
What counts as a failure is for the caller to say (engine/guarded.py).
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half-open"]

#: Failures in a row. More than the resumes that one broken transfer has, so that one of them alone never opens it.
TRIPS_AFTER = 5
#: How long it stays open the first time, and at most, in seconds.
FIRST_S = 5.0
LONGEST_S = 60.0


class Breaker:
    """The state for one address and one identity."""

    __slots__ = ("_is_probing", "_n_failed", "_n_opened", "_open_until")

    def __init__(self) -> None:
        self._n_failed = 0
        self._n_opened = 0
        self._open_until: float | None = None
        self._is_probing = False

    def state(self, now: float) -> State:
        """Where it stands; `now` in seconds of a clock that never goes back, as everywhere here."""
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half-open"

    def wait_s(self, now: float) -> float | None:
        """None when one may ask, and then one of `succeeded`, `failed` or `left` must follow; else seconds to wait.

        While somebody probes the rest wait for the outcome: they are told a second.
        """
        if self._open_until is None:
            return None
        if now < self._open_until:
            return self._open_until - now
        if self._is_probing:
            return 1.0
        self._is_probing = True
        return None

    def succeeded(self) -> bool:
        """Upstream answered, whatever it said. True when that closed what was open."""
        was_open = self._open_until is not None
        self._n_failed = self._n_opened = 0
        self._open_until = None
        self._is_probing = False
        return was_open

    def failed(self, now: float, chance: float) -> bool:
        """It did not answer. True when that opened what was closed. `chance` in [0, 1) spreads the next attempt.

        Requests that were under way when it opened say nothing new.
        """
        was_closed = self._open_until is None
        self._n_failed += 1
        if was_closed and self._n_failed < TRIPS_AFTER:
            return False
        if not was_closed and not self._is_probing:
            return False
        self._is_probing = False
        self._open_until = now + min(LONGEST_S, FIRST_S * 2.0**self._n_opened) * (0.75 + chance / 4)
        self._n_opened = min(self._n_opened + 1, 16)
        return was_closed

    def left(self) -> None:
        """Whoever asked went away without an outcome: the next may probe."""
        self._is_probing = False
