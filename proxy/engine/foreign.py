"""Refusing images with layers that are to be had elsewhere (image-spec, descriptor.md § urls).

Such `urls` are never followed by Breakwater; clients do follow them, past every rule and every cache. Where that is
not wanted, a manifest that carries them is refused as it comes from upstream.
"""

from __future__ import annotations

from proxy.engine.around import AroundUpstream
from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import Upstream, UpstreamManifest


class WithoutForeignLayers(AroundUpstream):
    """An upstream which gives no manifest that names content elsewhere."""

    def __init__(self, upstream: Upstream, host: str) -> None:
        super().__init__(upstream)
        self._host = host

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See ports.Upstream. Raises Denied for foreign layers, InvalidManifest for what is no manifest."""
        found = await super().manifest(repository, target)
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
