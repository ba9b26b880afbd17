"""How fast bodies may come from one upstream, all together.

Each piece is taken first and paid for after, so a body of the size of a piece is never delayed before its first
byte, and over any time the rate holds but for one piece of each transfer. Transfers take turns in the order in which
they come back for more: one that is alone has the whole rate, and of n that read all the time each has its n-th part.
The rate may change at any time, for transfers that run, too.
"""

from __future__ import annotations

from proxy.oci.digest import Digest
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import BlobBody, Clock, ManifestHead, TagPage, Upstream, UpstreamManifest


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


class LimitedUpstream:
    """A `ports.Upstream` around another, whose blobs come at the rate of `share`. Documents are small and pass."""

    def __init__(self, upstream: Upstream, share: Share) -> None:
        self._upstream = upstream
        self._share = share

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See ports.Upstream."""
        return await self._upstream.manifest(repository, target)

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream."""
        return await self._upstream.manifest_head(repository, target)

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream. The body keeps to the rate."""
        return _LimitedBody(await self._upstream.blob(repository, digest, offset=offset), self._share)

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See ports.Upstream."""
        return await self._upstream.blob_size(repository, digest)

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """See ports.Upstream."""
        return await self._upstream.tags(repository, n=n, last=last)

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """See ports.Upstream."""
        return await self._upstream.referrers(repository, digest, artifact_type=artifact_type)


class _LimitedBody:
    """A body that waits its turn before each piece but its first."""

    __slots__ = ("_body", "_next_at", "_share", "offset", "size", "source")

    def __init__(self, body: BlobBody, share: Share) -> None:
        self._body = body
        self._share = share
        self._next_at = 0.0
        self.size = body.size
        self.offset = body.offset
        self.source = body.source

    async def read(self) -> bytes:
        """See ports.BlobBody."""
        await self._share.reached(self._next_at)
        piece = await self._body.read()
        self._next_at = self._share.charge(len(piece))
        return piece

    async def close(self) -> None:
        """See ports.BlobBody."""
        await self._body.close()
