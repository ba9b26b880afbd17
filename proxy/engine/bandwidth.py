"""How fast bodies may come from one upstream, all together.

Each piece is taken first and paid for after, so a body of the size of a piece is never delayed before its first
byte, and over any time the rate holds but for one piece of each transfer. Transfers take turns in the order in which
they come back for more: one that is alone has the whole rate, and of n that could have more each has its n-th part,
because what waits for its turn finds a full buffer. The rate may change at any time, for transfers that run, too.
"""

from __future__ import annotations

from typing import Protocol

from proxy.engine.around import AroundBody, AroundUpstream
from proxy.oci.digest import Digest
from proxy.oci.names import Repository
from proxy.ports import BlobBody, Clock, Upstream
from proxy.rules.bandwidth import UNLIMITED, Bandwidth

#: Whoever waits for a turn looks again after so many seconds at the latest: so soon a new rate is noticed.
LOOK_EVERY_S = 2.0


class Toll(Protocol):
    """What is asked between two pieces of a body."""

    def charge(self, n_bytes: int) -> float:
        """So many bytes came. Returns the mark that is to be `reached` before whoever took them takes more."""
        ...

    async def reached(self, mark: float) -> None:
        """Return once all that was taken before the mark is paid for."""
        ...


class Share:
    """The bandwidth of one upstream or project, shared by all its bodies."""

    __slots__ = ("_bandwidth", "_clock", "_n_paid", "_n_taken", "_paid_at")

    def __init__(self, clock: Clock, bandwidth: Bandwidth = UNLIMITED) -> None:
        self._clock = clock
        self._bandwidth = bandwidth
        #: Bytes that were taken in all, and for how many of them time has passed since.
        self._n_taken = 0.0
        self._n_paid = 0.0
        self._paid_at = clock.monotonic()

    @property
    def rate(self) -> float | None:
        """Bytes per second at this time of day; None for as fast as they come."""
        return self._bandwidth.at(self._clock.wall())

    def follow(self, bandwidth: Bandwidth) -> None:
        """From now on this one."""
        self._pay()
        self._bandwidth = bandwidth

    def charge(self, n_bytes: int) -> float:
        """So many bytes came. Returns the mark that is to be `reached` before whoever took them takes more."""
        self._pay()
        self._n_taken += n_bytes
        return self._n_taken

    async def reached(self, mark: float) -> None:
        """Return once all that was taken before the mark is paid for."""
        while (wait_s := self.wait_s(mark)) > 0:
            await self._clock.sleep(min(LOOK_EVERY_S, wait_s))

    def wait_s(self, mark: float) -> float:
        """How long the mark is away at the rate of now, in seconds."""
        owed = mark - self._pay()
        return owed / (self.rate or owed) if owed >= 0.5 else 0.0  # less than a byte is what adding up fractions leaves

    def wait_for_s(self, n_bytes: int) -> float:
        """How long so many bytes more would have to wait, in seconds."""
        return self.wait_s(self._n_taken + n_bytes)

    def refund(self, n_bytes: int) -> None:
        """So many bytes that were charged are paid for by somebody else. Those who wait behind them move up."""
        self._pay()
        self._n_paid = min(self._n_taken, self._n_paid + n_bytes)

    def _pay(self) -> float:
        """Count the time since the last look; returns how many bytes are paid for. Time without bytes buys nothing."""
        now, rate = self._clock.monotonic(), self.rate
        earned = self._n_taken if rate is None else (now - self._paid_at) * rate
        self._n_paid = min(self._n_taken, self._n_paid + earned)
        self._paid_at = now
        return self._n_paid


class LimitedUpstream(AroundUpstream):
    """An upstream whose blobs come at the rate of `share`. Documents are small and pass."""

    def __init__(self, upstream: Upstream, share: Toll) -> None:
        super().__init__(upstream)
        self._share = share

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream. The body keeps to the rate."""
        return _LimitedBody(await super().blob(repository, digest, offset=offset), self._share)


class _LimitedBody(AroundBody):
    """A body that waits its turn before each piece but its first."""

    __slots__ = ("_mark", "_share")

    def __init__(self, body: BlobBody, share: Toll) -> None:
        super().__init__(body)
        self._share = share
        self._mark = 0.0

    async def read(self) -> bytes:
        """See ports.BlobBody."""
        await self._share.reached(self._mark)
        piece = await super().read()
        self._mark = self._share.charge(len(piece))
        return piece
