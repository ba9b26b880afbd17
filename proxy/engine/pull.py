"""The one read path: route, gate, then tags, manifests or blobs. A list of steps; a feature adds a step, not a branch.

Every way to bytes passes the same gate (INV-8): tag, digest, blob, range, HEAD, referrers, lists.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from math import inf

from proxy.engine.admission import Admissions
from proxy.engine.blobs import Blobs, Opened, let_go
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.listings import Listings, Referrers
from proxy.engine.manifests import Held, Manifests, holding_of
from proxy.engine.origins import Origin, Origins
from proxy.engine.tags import Tags
from proxy.errors import Denied
from proxy.events import Outcome
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, TagsList
from proxy.oci.mediatypes import is_index
from proxy.oci.names import Tag
from proxy.ports import TagPage
from proxy.rules.gates.access import ANONYMOUS, Access, Caller, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.gates.immutability import Immutable
from proxy.rules.routes import Route, Routes


@dataclass(frozen=True, slots=True)
class Plan:
    """What settings decide about pulls. One immutable value: a reload makes another and swaps it in whole."""

    routes: Routes
    rules: Mapping[str, Rules]
    origins: Origins
    #: Readers by project; one that is not here has none but operators. Empty where there are no robots.
    access: Mapping[str, Access] = field(default_factory=dict)
    robots: Mapping[str, Robot] = field(default_factory=dict)
    #: Tags that keep their digest, by project.
    immutable: Mapping[str, Immutable] = field(default_factory=dict)
    #: Whether any upstream judges clients' own logins. There are no robots then.
    takes_logins: bool = False


@dataclass(frozen=True, slots=True)
class Pulled:
    """A manifest to answer with. `age_s`: since upstream vouched for the tag, None for digests or when unknown.

    `plan` and `n_dropped` (Links.n_dropped) are those that it was judged by: it may have waited since, and others may
    be in effect by now.
    """

    route: Route
    held: Held
    outcome: Outcome
    plan: Plan
    n_dropped: int
    age_s: float | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Vouched:
    """An answer would be given again. `age_s`: how old it is; `fresh_for_s`: how long that is so if nothing changes,
    both in seconds; `holds` says whether nothing has changed, for the price of a few comparisons."""

    age_s: float
    fresh_for_s: float
    holds: Callable[[], bool]


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
        admissions: Admissions,
    ) -> None:
        self.plan = plan
        self._tags = tags
        self._manifests = manifests
        self._blobs = blobs
        self._listings = listings
        self._links = links
        self._charges = charges
        self._admissions = admissions

    async def manifest(self, asked: ManifestGet, caller: Caller = ANONYMOUS) -> Pulled:
        """The manifest that a tag or digest means. Its config and layers pass the gate with it: a client that has been
        given a manifest may have nowhere else to go for the rest (peers.md §5.3)."""
        plan, n_dropped = self.plan, self._links.n_dropped
        async with self._admitted(asked, caller) as (route, origin, rules):
            if isinstance(asked.target, Tag):
                rules.check_tag(route.reference, asked.target)
                is_fixed = plan.immutable.get(route.project, Immutable()).covers(asked.target)
                found = await self._tags.resolve(route, origin, asked.target, is_fixed=is_fixed)
                pulled = Pulled(route, found.held, found.outcome, plan, n_dropped, found.age_s, found.trouble)
            else:
                await self._check_digest(route, rules, asked.target)
                held, outcome = await self._manifests.get(route, origin, asked.target)
                pulled = Pulled(route, held, outcome, plan, n_dropped)
        check_closure(route, rules, pulled.held)
        self._pay(route, pulled.held)
        return pulled

    def vouch(
        self, asked: ManifestGet, pulled: Pulled, caller: Caller = ANONYMOUS
    ) -> Callable[[], Vouched | None] | None:
        """Says, each time it is asked, whether `caller` would be answered with `pulled` again, and for how long; or None
        for no.

        For answers kept ready: it counts as a use, and says no once the plan has changed, a link was taken away (a
        purge), the project cannot pay, upstream is to be asked about the caller again, or the tag's time is up. None
        when the answer cannot be vouched for at all.
        """
        plan, n_dropped = pulled.plan, pulled.n_dropped
        links, tags, manifests = self._links, self._tags, self._manifests
        if pulled.outcome != "hit" or pulled.trouble or self.plan is not plan or links.n_dropped != n_dropped:
            return None
        route, digest = pulled.route, pulled.held.descriptor.digest
        account = self._charges.book.of(route.project)
        origin = plan.origins.of(route)
        admits = self._admissions.vouch(route, origin, caller)
        fresh: Callable[[], tuple[float, float] | None] | None = lambda: (0.0, inf)  # noqa: E731
        if isinstance(asked.target, Tag):
            fresh = tags.vouch(route, origin, asked.target, digest)
        if fresh is None:
            return None

        def again() -> Vouched | None:
            if self.plan is not plan or links.n_dropped != n_dropped or (aged := fresh()) is None:
                return None
            if admits is not None and not admits():
                return None
            if not manifests.is_at_hand(digest):
                return None  # it was evicted, or has not been asked for in a long time
            try:
                self._pay(route, pulled.held)
            except Denied:
                return None  # the long way says why
            manifests.touch(digest)
            n_tags, n_manifests = tags.n_lost, manifests.n_lost
            n_dropped_charges, charged, reserved = account.n_dropped, account.charged, account.reserved

            def holds() -> bool:
                return (
                    self.plan is plan
                    and links.n_dropped == n_dropped
                    and tags.n_lost == n_tags
                    and manifests.n_lost == n_manifests
                    and account.n_dropped == n_dropped_charges
                    and account.charged == charged  # a project that refuses when full may be full now
                    and account.reserved == reserved
                    and (admits is None or admits())
                )

            return Vouched(*aged, holds)

        return again

    async def blob(self, asked: BlobGet, caller: Caller = ANONYMOUS) -> tuple[Route, Opened]:
        """A blob, ready to be read; the size is known, the bytes may still be coming."""
        async with self._admitted(asked, caller) as (route, origin, rules):
            if not await self._check_blob(route, rules, asked.digest) and rules.max_blob is not None:
                size, _ = await self._blobs.size(route, origin, asked.digest)
                rules.check_size(route.reference, asked.digest, size)  # before a byte of it is fetched
            opened = await self._blobs.open(route, origin, asked.digest)
        try:
            rules.check_size(route.reference, asked.digest, opened.size)
        except Denied:
            let_go(opened.source)
            raise
        return route, opened

    async def blob_instead(self, asked: BlobGet, caller: Caller = ANONYMOUS, *, rotten: str = "") -> Opened:
        """The same blob from upstream, where the stored file could not be read on; `rotten`: why it is not right."""
        async with self._admitted(asked, caller) as (route, origin, rules):
            await self._check_blob(route, rules, asked.digest)
            return await self._blobs.instead(route, origin, asked.digest, rotten=rotten)

    async def blob_size(self, asked: BlobGet, caller: Caller = ANONYMOUS) -> tuple[Route, int, Outcome]:
        """A blob's size in bytes, for HEAD."""
        async with self._admitted(asked, caller) as (route, origin, rules):
            await self._check_blob(route, rules, asked.digest)
            size, outcome = await self._blobs.size(route, origin, asked.digest)
        rules.check_size(route.reference, asked.digest, size)
        return route, size, outcome

    async def tags(self, asked: TagsList, caller: Caller = ANONYMOUS) -> tuple[Route, TagPage, Outcome]:
        """One page of the tags that this caller may pull."""
        async with self._admitted(asked, caller) as (route, origin, rules):
            rules.check_repository(route.reference)
            page, outcome = await self._listings.tags(
                route, origin, n=asked.n, last=asked.last, visible=lambda tag: rules.lists_tag(route.reference, tag)
            )
        return route, page, outcome

    async def referrers(self, asked: ReferrersList, caller: Caller = ANONYMOUS) -> tuple[Route, Referrers]:
        """What refers to a digest."""
        async with self._admitted(asked, caller) as (route, origin, rules):
            await self._check_digest(route, rules, asked.digest)
            found = await self._listings.referrers(route, origin, asked.digest)
        if rules.is_open:
            return route, found
        visible = tuple(each for each in found.descriptors if rules.lists_part(route.reference, each))
        return route, replace(found, descriptors=visible)

    @asynccontextmanager
    async def _admitted(
        self, asked: ManifestGet | BlobGet | TagsList | ReferrersList, caller: Caller
    ) -> AsyncIterator[tuple[Route, Origin, Rules]]:
        """Where it leads, once the caller may read there: before anything is looked up (INV-8)."""
        plan = self.plan
        route = plan.routes.route(asked.path, asked.ns)
        if plan.robots:
            plan.access.get(route.project, Access(route.project, is_public=False)).check(caller)
        origin, rules = plan.origins.of(route), plan.rules[route.project]
        if origin.pass_through is None:
            yield route, origin, rules
            return
        rules.check_repository(route.reference)  # a refusal of ours costs upstream nothing
        async with self._admissions.admitted(route, origin, asked, caller) as theirs:
            yield route, theirs, rules

    async def _check_digest(self, route: Route, rules: Rules, digest: Digest) -> None:
        if rules.is_open:
            return
        index = await self._links.of(holding_of(route))
        rules.check_digest(route.reference, digest, lambda: index.tags_of(digest))

    async def _check_blob(self, route: Route, rules: Rules, digest: Digest) -> bool:
        """Like a digest; and where a manifest says what it is and how large, that, too. False where none does."""
        await self._check_digest(route, rules, digest)
        if rules.is_open:
            return False
        index = await self._links.of(holding_of(route))
        record, named = index.records.get(digest), index.named.get(digest)
        if record is not None and record.is_manifest:
            # The bytes of a manifest, asked for as a blob: what is denied there is denied here.
            named = record.descriptor
            for part in () if is_index(named.media_type) else record.names:
                rules.check_part(route.reference, part)
        if named is None:
            rules.check_types(route.reference, digest, ())
            return False
        rules.check_part(route.reference, named)
        return True

    def _pay(self, route: Route, held: Held) -> None:
        """The project pays for the manifest, and is asked whether it could pay for what belongs to it."""
        manifest = held.manifest
        parts = [part for part in (manifest.config, *manifest.layers) if part is not None]
        self._charges.admit(route.project, f"{route.reference}@{held.descriptor.digest}", held.descriptor, parts)
        self._charges.use(route.project, held.descriptor.digest)


def check_closure(route: Route, rules: Rules, held: Held) -> None:
    """A manifest with its config and layers, by every rule that looks at content. Raises Denied."""
    if rules.is_open:
        return
    manifest, descriptor = held.manifest, held.descriptor
    rules.check_content(route.reference, descriptor.digest)
    rules.check_types(route.reference, descriptor.digest, (descriptor.media_type, manifest.said_type))
    for part in (manifest.config, *manifest.layers):
        if part is not None:
            rules.check_part(route.reference, part)
