"""How fast bodies may come from one upstream, all together.

Each piece is taken first and paid for after, so a body of the size of a piece is never delayed before its first
byte, and over any time the rate holds but for one piece of each transfer. Transfers take turns in the order in which
they come back for more: one that is alone has the whole rate, and of n that read all the time each has its n-th part.
The rate may change at any time, for transfers that run, too.
"""

from __future__ import annotations

from proxy.engine.around import AroundBody, AroundUpstream
from proxy.oci.digest import Digest
from proxy.oci.names import Repository
from proxy.ports import BlobBody, Clock, Upstream


class Share:
    """The rate of one upstream in bytes per second, None for as fast as it comes. Shared by all its bodies."""

    __slots__ = ("_clock", "_free_at", "rate")

    def __init__(self, clock: Clock, rate: float | None = None) -> None:
        self._clock = clock
        self._free_at = 0.0
        self.rate = rate

    def charge(self, n_bytes: int) -> float:
        """So many bytes came. Returns when, by the clock, whoever took them may take more."""
        now = self._clock.monotonic()
        if self.rate is None:
            return now
        self._free_at = max(self._free_at, now) + n_bytes / self.rate
        return self._free_at

    async def reached(self, at: float) -> None:
        """Return at the time that `charge` gave."""
        if (wait_s := at - self._clock.monotonic()) > 0:
            await self._clock.sleep(wait_s)


class LimitedUpstream(AroundUpstream):
    """An upstream whose blobs come at the rate of `share`. Documents are small and pass."""

    def __init__(self, upstream: Upstream, share: Share) -> None:
        super().__init__(upstream)
        self._share = share

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream. The body keeps to the rate."""
        return _LimitedBody(await super().blob(repository, digest, offset=offset), self._share)


class _LimitedBody(AroundBody):
    """A body that waits its turn before each piece but its first."""

    __slots__ = ("_next_at", "_share")

    def __init__(self, body: BlobBody, share: Share) -> None:
        super().__init__(body)
        self._share = share
        self._next_at = 0.0

    async def read(self) -> bytes:
        """See ports.BlobBody."""
        await self._share.reached(self._next_at)
        piece = await super().read()
        self._next_at = self._share.charge(len(piece))
        return piece
