"""The one read path: route, gate, then tags, manifests or blobs. A list of steps; a feature adds a step, not a branch.

Every way to bytes passes the same gate (INV-8): tag, digest, blob, range, HEAD, referrers, lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.engine.blobs import Blobs, Opened
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.listings import Listings, Referrers
from proxy.engine.manifests import Held, Manifests, holding_of
from proxy.engine.origins import Origin, Origins
from proxy.engine.tags import Tags
from proxy.events import Outcome
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, TagsList
from proxy.oci.names import Tag
from proxy.ports import TagPage
from proxy.rules.gates.allowlist import Rules
from proxy.rules.routes import Route, Routes


@dataclass(frozen=True, slots=True)
class Plan:
    """What settings decide about pulls. One immutable value: a reload makes another and swaps it in whole."""

    routes: Routes
    rules: Mapping[str, Rules]
    origins: Origins


@dataclass(frozen=True, slots=True)
class Pulled:
    """A manifest to answer with. `age_s`: since upstream vouched for the tag, None for digests or when unknown."""

    route: Route
    held: Held
    outcome: Outcome
    age_s: float | None = None
    trouble: str = ""


class Pull:
    """Answers what clients ask. Raises the errors of proxy/errors.py and nothing else."""

    def __init__(
        self,
        plan: Plan,
        *,
        tags: Tags,
        manifests: Manifests,
        blobs: Blobs,
        listings: Listings,
        links: Links,
        charges: Charges,
    ) -> None:
        self.plan = plan
        self._tags = tags
        self._manifests = manifests
        self._blobs = blobs
        self._listings = listings
        self._links = links
        self._charges = charges

    async def manifest(self, asked: ManifestGet) -> Pulled:
        """The manifest that a tag or digest means. Its config and layers pass the gate with it: a client that has been
        given a manifest may have nowhere else to go for the rest (peers.md §5.3)."""
        route, origin, rules = self._route(asked)
        if isinstance(asked.target, Tag):
            rules.check_tag(route.reference, asked.target)
            resolved = await self._tags.resolve(route, origin, asked.target)
            rules.check_content(route.reference, resolved.held.descriptor.digest)
            pulled = Pulled(route, resolved.held, resolved.outcome, resolved.age_s, resolved.trouble)
        else:
            await self._check_digest(route, rules, asked.target)
            held, outcome = await self._manifests.get(route, origin, asked.target)
            pulled = Pulled(route, held, outcome)
        self._check_closure(route, rules, pulled.held)
        self._pay(route, pulled.held)
        return pulled

    async def blob(self, asked: BlobGet) -> tuple[Route, Opened]:
        """A blob, ready to be read; the size is known, the bytes may still be coming."""
        route, origin, rules = self._route(asked)
        await self._check_digest(route, rules, asked.digest)
        return route, await self._blobs.open(route, origin, asked.digest)

    async def blob_size(self, asked: BlobGet) -> tuple[Route, int, Outcome]:
        """A blob's size in bytes, for HEAD."""
        route, origin, rules = self._route(asked)
        await self._check_digest(route, rules, asked.digest)
        size, outcome = await self._blobs.size(route, origin, asked.digest)
        return route, size, outcome

    async def tags(self, asked: TagsList) -> tuple[Route, TagPage, Outcome]:
        """One page of the tags that this caller may pull."""
        route, origin, rules = self._route(asked)
        rules.check_repository(route.reference)
        page, outcome = await self._listings.tags(
            route, origin, n=asked.n, last=asked.last, visible=lambda tag: rules.lists_tag(route.reference, tag)
        )
        return route, page, outcome

    async def referrers(self, asked: ReferrersList) -> tuple[Route, Referrers]:
        """What refers to a digest."""
        route, origin, rules = self._route(asked)
        await self._check_digest(route, rules, asked.digest)
        return route, await self._listings.referrers(route, origin, asked.digest)

    def _route(self, asked: ManifestGet | BlobGet | TagsList | ReferrersList) -> tuple[Route, Origin, Rules]:
        route = self.plan.routes.route(asked.path, asked.ns)
        return route, self.plan.origins.of(route), self.plan.rules[route.project]

    async def _check_digest(self, route: Route, rules: Rules, digest: Digest) -> None:
        if rules.is_open:
            return
        index = await self._links.of(holding_of(route))
        rules.check_digest(route.reference, digest, lambda: index.tags_of(digest))

    def _pay(self, route: Route, held: Held) -> None:
        """The project pays for the manifest, and is asked whether it could pay for what belongs to it."""
        manifest = held.manifest
        parts = [part for part in (manifest.config, *manifest.layers) if part is not None]
        self._charges.admit(route.project, f"{route.reference}@{held.descriptor.digest}", held.descriptor, parts)
        self._charges.use(route.project, held.descriptor.digest)

    @staticmethod
    def _check_closure(route: Route, rules: Rules, held: Held) -> None:
        if rules.is_open:
            return
        manifest = held.manifest
        for part in (manifest.config, *manifest.layers):
            if part is not None:
                rules.check_content(route.reference, part.digest)
