"""Which upstreams answer, told from the events of their requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from proxy.events import Event, UpstreamAsked, UpstreamUnreached


class UpstreamHealth:
    """What the last requests to each upstream came to."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._requests: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._last_error: dict[str, tuple[str, float]] = {}
        self._down: set[str] = set()

    def observe(self, event: Event) -> None:
        """Take note of an upstream's answer."""
        if isinstance(event, UpstreamUnreached):
            self._failures[event.upstream] += 1
            self._down.add(event.upstream)
            self._last_error[event.upstream] = (event.why, self._monotonic())
            return
        if not isinstance(event, UpstreamAsked):
            return
        host = event.upstream
        self._requests[host] += 1
        if event.status == 0 or event.status >= 500 or event.status == 429:
            self._failures[host] += 1
            self._down.add(host)
            said = f"answered {event.status}" if event.status else "gave no answer"
            self._last_error[host] = (f"{event.method} {event.kind} {said}", self._monotonic())
        else:
            self._down.discard(host)

    def forget_others(self, hosts: Collection[str]) -> None:
        """Only these are asked from now on: of what was taken away, or sealed, there is no trouble to tell."""
        self._down &= set(hosts)

    def is_up(self, host: str) -> bool:
        """Whether its last answer was one; true before the first."""
        return host not in self._down

    def failing(self) -> list[str]:
        """Those that are not up."""
        return sorted(self._down)

    def of(self, host: str) -> dict[str, Any]:
        """One upstream's entry in the status document."""
        error = self._last_error.get(host)
        return {
            "state": "ok" if self.is_up(host) else "failing",
            "last_error": f"{error[0]}, {self._monotonic() - error[1]:.0f} s ago" if error else None,
            "requests": self._requests[host],
            "failures": self._failures[host],
        }
