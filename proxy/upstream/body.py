"""A blob's body on its way from upstream, and how slow it may be."""

from __future__ import annotations

import asyncio
from collections import deque

from proxy.errors import Misbehaved, Timeout, Unreachable
from proxy.ports import Clock
from proxy.upstream.policy import Pace
from proxy.upstream.wire import Reply


class Pacer:
    """Whether a body keeps its pace, over any window of time spent waiting for it.

    Time in which nobody waits does not count: a slow disk of ours is not a slow upstream. Pure; times are arguments.
    """

    #: Samples kept over one window: the error of the measurement is one sixteenth of it.
    _GRAIN = 16

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._least = pace.min_bytes_per_s * pace.window_s
        self._waited_s = 0.0
        self._n_bytes = 0
        #: (seconds waited, bytes had by then), oldest first; the first is a window old or the beginning.
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])

    def record(self, waited_s: float, n_bytes: int) -> None:
        """`n_bytes` came after `waited_s` seconds of waiting."""
        samples, grain_s = self._samples, self._pace.window_s / self._GRAIN
        if waited_s >= grain_s and samples[-1][0] < self._waited_s:
            samples.append((self._waited_s, self._n_bytes))  # what came before a long wait is not to be counted into it
        self._waited_s += waited_s
        self._n_bytes += n_bytes
        if self._waited_s - samples[-1][0] >= grain_s:
            samples.append((self._waited_s, self._n_bytes))
        while len(samples) > 1 and samples[1][0] <= self._waited_s - self._pace.window_s:
            samples.popleft()

    @property
    def patience_s(self) -> float:
        """How long the next byte may take before some window held too few; 0 or less when one did already."""
        for at_s, had in self._samples:
            if self._n_bytes - had < self._least:
                return at_s + self._pace.window_s - self._waited_s
        return self._pace.window_s


class RegistryBody:
    """Implements `ports.BlobBody` over one answer."""

    __slots__ = ("_clock", "_is_closed", "_pacer", "_position", "_reply", "_upstream", "offset", "size", "source")

    def __init__(
        self, reply: Reply, *, size: int | None, offset: int, source: str, upstream: str, clock: Clock, pace: Pace
    ) -> None:
        self.size = size
        self.offset = offset
        self.source = source
        self._reply = reply
        self._upstream = upstream
        self._clock = clock
        self._pacer = Pacer(pace)
        self._position = offset
        self._is_closed = False

    async def read(self) -> bytes:
        """See `ports.BlobBody.read`. A body longer than `size` raises Misbehaved as soon as it is."""
        if self._is_closed:
            raise Unreachable(f"upstream {self._upstream}: the body was closed", upstream=self._upstream)
        piece = self._reply.buffered()
        if piece:
            self._pacer.record(0.0, len(piece))
        else:
            piece = await self._awaited()
        self._position += len(piece)
        if self.size is not None:
            if self._position > self.size:
                raise Misbehaved(
                    f"upstream {self._upstream} sends more than the {self.size} bytes it announced",
                    upstream=self._upstream,
                )
            if not piece and self._position < self.size:
                raise Unreachable(
                    f"upstream {self._upstream}: the body ended at {self._position} of {self.size} bytes",
                    upstream=self._upstream,
                )
        return piece

    async def close(self) -> None:
        """See `ports.BlobBody.close`."""
        if not self._is_closed:
            self._is_closed = True
            self._reply.close()

    async def _awaited(self) -> bytes:
        started = self._clock.monotonic()
        try:
            # The clock measures; the loop's own timer only ends a wait in which nothing comes at all.
            async with asyncio.timeout(max(self._pacer.patience_s, 0.0)):
                piece = await self._reply.piece()
        except TimeoutError:
            raise self._too_slow() from None
        self._pacer.record(self._clock.monotonic() - started, len(piece))
        if piece and self._pacer.patience_s <= 0:
            raise self._too_slow()
        return piece

    def _too_slow(self) -> Timeout:
        return Timeout(
            f"upstream {self._upstream}: the body came slower than its minimum, and stopped at byte {self._position}",
            upstream=self._upstream,
        )
