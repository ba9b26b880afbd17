"""Refusing images with layers that are to be had elsewhere (image-spec, descriptor.md § urls).

Such `urls` are never followed by Breakwater; clients do follow them, past every rule and every cache. Where that is
not wanted, a manifest that carries them is refused as it comes from upstream.
"""

from __future__ import annotations

from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import BlobBody, ManifestHead, TagPage, Upstream, UpstreamManifest


class WithoutForeignLayers:
    """A `ports.Upstream` around another, which gives no manifest that names content elsewhere."""

    def __init__(self, upstream: Upstream, host: str) -> None:
        self._upstream = upstream
        self._host = host

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See ports.Upstream. Raises Denied for foreign layers, InvalidManifest for what is no manifest."""
        found = await self._upstream.manifest(repository, target)
        manifest = Manifest.parse(found.body, found.media_type)
        if any(descriptor.urls for descriptor in manifest.names):
            mark = "@" if isinstance(target, Digest) else ":"
            raise Denied(
                f"{self._host}/{repository}{mark}{target} has layers that clients would fetch from elsewhere, which "
                f'[upstreams."{self._host}"] foreign_layers refuses',
                rule="foreign_layers",
                project="",
            )
        return found

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream."""
        return await self._upstream.manifest_head(repository, target)

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream."""
        return await self._upstream.blob(repository, digest, offset=offset)

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See ports.Upstream."""
        return await self._upstream.blob_size(repository, digest)

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """See ports.Upstream."""
        return await self._upstream.tags(repository, n=n, last=last)

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """See ports.Upstream."""
        return await self._upstream.referrers(repository, digest, artifact_type=artifact_type)
