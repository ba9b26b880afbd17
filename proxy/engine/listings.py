"""What a repository has: its tags, and what refers to a digest in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetools import TLRUCache, TTLCache

from proxy.engine.flights import Flights, landing
from proxy.engine.links import Links
from proxy.engine.manifests import Manifests, holding_of
from proxy.engine.origins import Origin
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.errors import Misbehaved, NotFound, UpstreamError
from proxy.events import Event, Outcome
from proxy.oci import pagination, referrers
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.ports import Clock, Holding, TagPage
from proxy.rules.routes import Route

#: Referrers lists remembered at a time.
MAX_LISTS = 5_000
#: Tags of one repository that are listed at most. The largest public repositories have some tens of thousands.
MAX_TAGS = 200_000
#: Tags asked for at a time; registries answer with as many as they like.
TAGS_PER_PAGE = 1000
#: How long a list is remembered for the pages after the first, in seconds; the first page is always upstream's.
PAGING_S = 300.0


@dataclass(frozen=True, slots=True)
class Referrers:
    """What refers to a digest. `trouble`: why it may be incomplete, or ""."""

    descriptors: tuple[Descriptor, ...]
    outcome: Outcome
    trouble: str = ""


class Listings:
    """Lists are upstream's; where upstream cannot answer, or is sealed, what is known here."""

    def __init__(
        self,
        links: Links,
        manifests: Manifests,
        tags: Tags,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        self._links = links
        self._manifests = manifests
        self._tags = tags
        self._listing: Flights[Holding, Sequence[str]] = Flights(owner, "list tags")
        self._tag_lists: TTLCache[Holding, Sequence[str]] = TTLCache(
            2 * MAX_TAGS, PAGING_S, timer=clock.monotonic, getsizeof=lambda tags: len(tags) + 1
        )
        self._referring: Flights[tuple[Holding, Digest], tuple[Descriptor, ...]] = Flights(owner, "list referrers")
        self._known: TLRUCache[tuple[Holding, Digest], tuple[float, tuple[Descriptor, ...]]] = TLRUCache(
            MAX_LISTS, ttu=lambda _, value, now: now + value[0], timer=clock.monotonic
        )

    async def tags(
        self, route: Route, origin: Origin, *, n: int | None, last: str | None, visible: Callable[[str], bool]
    ) -> tuple[TagPage, Outcome]:
        """One page of those tags that are `visible`, in the spec's order (distribution-spec § Listing Tags).

        Raises UnknownName, or what upstream raises.
        """
        holding = holding_of(route)
        remembered = self._tag_lists.get(holding)
        if last is not None and remembered is not None:
            return self._page(remembered, n, last, visible), "hit"
        if origin.tag_policy.sealed:
            index = await self._links.of(holding)
            here = sorted({tag for record in index.records.values() for tag in record.tags})
            if not here:
                await origin.upstream.tags(route.repository, n=n, last=last)  # says that it is sealed
            return self._page(here, n, last, visible), "hit"
        flight, is_new = self._listing.start(holding, lambda: self._all_tags(route, origin))
        try:
            found = await landing(flight)
        except UpstreamError:
            if remembered is None:
                raise
            return self._page(remembered, n, last, visible), "stale"
        return self._page(found, n, last, visible), "miss" if is_new else "coalesced"

    @staticmethod
    def _page(tags: Sequence[str], n: int | None, last: str | None, visible: Callable[[str], bool]) -> TagPage:
        found, following = pagination.page([tag for tag in tags if visible(tag)], n, last)
        return TagPage(found, following)

    async def _all_tags(self, route: Route, origin: Origin) -> Sequence[str]:
        """Every page of upstream's list. Many registries sort by nothing and page by nothing that the spec knows
        (docker-registry 2.8 ignores n and last), so paging in the spec's order takes the whole list."""
        found: dict[str, None] = {}
        last: str | None = None
        while True:
            page = await origin.upstream.tags(route.repository, n=TAGS_PER_PAGE, last=last)
            n_before = len(found)
            found.update(dict.fromkeys(page.tags))
            if page.last is None or len(found) == n_before:
                break
            if len(found) > MAX_TAGS:
                raise Misbehaved(f"{route.reference} has more than {MAX_TAGS} tags", upstream=route.host)
            last = page.last
        self._tag_lists[holding_of(route)] = tags = tuple(found)
        return tags

    async def referrers(self, route: Route, origin: Origin, digest: Digest) -> Referrers:
        """Everything that refers to `digest` (distribution-spec § Listing Referrers); empty where nothing does.

        Upstream's API, else the tag schema, and in both cases what is linked here. When upstream cannot answer, what is
        known here, marked. Raises nothing that upstream raises, unless nothing at all is known here of the digest.
        """
        holding = holding_of(route)
        key = (holding, digest)
        index = await self._links.of(holding)
        here = tuple(
            Descriptor(
                record.descriptor.media_type,
                record.descriptor.digest,
                record.descriptor.size,
                artifact_type=record.artifact_type,
                annotations=dict(record.annotations),
            )
            for record in index.referrers_of(digest)
        )
        if (known := self._known.get(key)) is not None:
            return Referrers(referrers.merge(known[1], here), "hit")
        flight, is_new = self._referring.start(key, lambda: self._ask(route, origin, digest))
        try:
            there = await landing(flight)
        except UpstreamError as error:
            if not here and digest not in index:
                raise
            return Referrers(here, "stale", str(error))
        return Referrers(referrers.merge(there, here), "miss" if is_new else "coalesced")

    async def _ask(self, route: Route, origin: Origin, digest: Digest) -> tuple[Descriptor, ...]:
        body = await origin.upstream.referrers(route.repository, digest, artifact_type="")
        if body is not None:
            found = referrers.descriptors_of(body)
        else:
            found = await self._by_tag_schema(route, origin, digest)
        self._known[(holding_of(route), digest)] = (origin.tag_policy.tag_ttl_s, found)
        return found

    async def _by_tag_schema(self, route: Route, origin: Origin, digest: Digest) -> tuple[Descriptor, ...]:
        """distribution-spec § Referrers Tag Schema: an index under a tag made of the digest."""
        try:
            resolved = await self._tags.resolve(route, origin, referrers.fallback_tag(digest))
        except NotFound:
            return ()
        return resolved.held.manifest.children
