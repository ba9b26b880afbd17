"""What is here, read without asking anybody: the source of export, and of import's own check.

Policy holds here as on the read path (INV-8): what may not be pulled may not be carried out either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.engine.links import HoldingIndex, Links
from proxy.engine.manifests import Held, Manifests, holding_of
from proxy.engine.pull import check_closure
from proxy.errors import UnknownManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.names import Tag, TagOrDigest
from proxy.ports import Records, TagRecord
from proxy.rules.gates.allowlist import Rules
from proxy.rules.routes import Route


class Shelf:
    """One repository as its records and the store have it: a `walk.Source`."""

    def __init__(self, route: Route, rules: Rules, *, records: Records, links: Links, manifests: Manifests) -> None:
        self._route = route
        self._rules = rules
        self._records = records
        self._links = links
        self._manifests = manifests
        #: The records of the tags that were asked for.
        self.tags: dict[Tag, TagRecord] = {}

    async def manifest(self, target: TagOrDigest) -> Held:
        """See walk.Source. Raises Denied, or UnknownManifest for what is not here, whatever upstream has."""
        index = await self._links.of(holding_of(self._route))
        if isinstance(target, Tag):
            descriptor = await self._tagged(target)
        else:
            descriptor = self._linked(index, target)
        held = await self._manifests.local(descriptor)
        if held is None:
            raise UnknownManifest(f"{self._route.reference}: the manifest {descriptor.digest} was evicted; prefetch it")
        check_closure(self._route, self._rules, held)
        return held

    async def _tagged(self, tag: Tag) -> Descriptor:
        self._rules.check_tag(self._route.reference, tag)
        record = await self._records.tag(holding_of(self._route), tag)
        if record is None:
            raise UnknownManifest(f"{self._route.reference}:{tag} is not in this store; prefetch it first")
        self.tags[tag] = record
        return record.descriptor

    def _linked(self, index: HoldingIndex, digest: Digest) -> Descriptor:
        descriptor = index.descriptor(digest)
        if descriptor is None:
            raise UnknownManifest(f"{self._route.reference}@{digest} is not in this store; prefetch it first")
        self._rules.check_digest(self._route.reference, digest, lambda: index.tags_of(digest))
        return descriptor

    async def referrers(self, digest: Digest) -> Iterable[Descriptor]:
        """See walk.Source."""
        index = await self._links.of(holding_of(self._route))
        return [record.descriptor for record in index.referrers_of(digest)]


class Arrived:
    """Manifests that an import has brought, before anything links to them: a `walk.Source` by digest alone."""

    def __init__(
        self,
        manifests: Manifests,
        waiting: Mapping[Digest, Held],
        entries: Iterable[Descriptor],
    ) -> None:
        """`waiting`: manifests that are not in the store yet. `entries` are the bundle's own, among them referrers."""
        self._manifests = manifests
        self._waiting = waiting
        self._entries = entries
        self._referring: dict[Digest, list[Descriptor]] | None = None

    async def manifest(self, target: TagOrDigest) -> Held:
        """See walk.Source."""
        held = await self.maybe(target) if isinstance(target, Digest) else None
        if held is None:
            raise UnknownManifest(f"the manifest {target} is neither in the bundle nor here")
        return held

    async def maybe(self, digest: Digest) -> Held | None:
        """The manifest, if it has come."""
        return self._waiting.get(digest) or await self._manifests.local(Descriptor("", digest, 0))

    async def referrers(self, digest: Digest) -> Iterable[Descriptor]:
        """See walk.Source."""
        if self._referring is None:
            self._referring = {}
            for entry in self._entries:
                held = await self.maybe(entry.digest)
                if held is not None and held.manifest.subject is not None:
                    self._referring.setdefault(held.manifest.subject.digest, []).append(held.descriptor)
        return self._referring.get(digest, [])
