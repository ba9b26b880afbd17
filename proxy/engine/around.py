"""What stands around an upstream, or around several: every question passes one place, and each may be answered apart.

A child says in `_asked` whom to ask and what becomes of the answer, and overrides the questions that it is about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.oci.digest import Digest
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import BlobBody, ManifestHead, TagPage, Upstream, UpstreamManifest

T = TypeVar("T")


class AroundUpstreams(ABC):
    """A `ports.Upstream` whose answers come from others."""

    @abstractmethod
    async def _asked(self, ask: Callable[[Upstream], Awaitable[T]]) -> T:
        """The answer to a question, which `ask` puts to an upstream."""

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.manifest(repository, target))

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.manifest_head(repository, target))

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.blob(repository, digest, offset=offset))

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.blob_size(repository, digest))

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.tags(repository, n=n, last=last))

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """See ports.Upstream."""
        return await self._asked(lambda upstream: upstream.referrers(repository, digest, artifact_type=artifact_type))


class AroundUpstream(AroundUpstreams):
    """The same around `upstream` alone, which is asked as it is."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def _asked(self, ask: Callable[[Upstream], Awaitable[T]]) -> T:
        return await ask(self._upstream)


class AroundBody:
    """A `ports.BlobBody` around another, which is read as it is."""

    __slots__ = ("_body", "offset", "size", "source")

    def __init__(self, body: BlobBody) -> None:
        self._body = body
        self.size = body.size
        self.offset = body.offset
        self.source = body.source

    async def read(self) -> bytes:
        """See ports.BlobBody."""
        return await self._body.read()

    async def close(self) -> None:
        """See ports.BlobBody."""
        await self._body.close()
