"""Tags: what upstream last said, for how long it stands, and one revalidation for any number of askers (INV-6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachetools import LRUCache

from proxy.engine.flights import Flights, landing
from proxy.engine.links import Links, blaming
from proxy.engine.manifests import Held, Manifests, holding_of
from proxy.engine.origins import Origin
from proxy.engine.tasks import TaskOwner
from proxy.engine.watched import WatchedTable
from proxy.errors import InvalidManifest, NotFound, StoreError, Throttled, UnknownManifest, Unreachable, UpstreamError
from proxy.events import Event, Noticed, Outcome, TagHeld, TagMoved
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.ports import Clock, Holding, ManifestHead, Records, TagRecord
from proxy.rules import freshness
from proxy.rules.routes import Route

#: Tag records kept in memory.
MAX_READY = 20_000
#: Moves of fixed tags that are shown in status.
MAX_MOVES = 200
#: How long a revalidation may take before its askers get the stale answer, in seconds (product.md, promise 3): those
#: who come later get it at once, or each would wait anew for an upstream that is known to be slow.
STALE_AFTER_S = 2.0
#: After a revalidation that failed, stale is served at once for this long before upstream is asked again, in seconds.
RECHECK_AFTER_S = 10.0


@dataclass(slots=True)
class _Entry:
    """A record and what this process knows beyond it. Monotonic times, so that a clock that jumps ages nothing."""

    record: TagRecord
    validated_monotonic: float | None = None
    retry_at: float = 0.0
    #: Until when askers wait for the revalidation that runs.
    patience_ends_at: float = 0.0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a tag means. `age_s` since upstream said so, None when unknown. `trouble`: why it is stale, or ""."""

    held: Held
    outcome: Outcome
    age_s: float | None
    trouble: str = ""


class Tags:
    """Tag records. True for this process."""

    def __init__(
        self,
        records: Records,
        manifests: Manifests,
        links: Links,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        self._records = records
        self._manifests = manifests
        self._links = links
        self._clock = clock
        self._owner = owner
        self._observe = observe
        #: (project, reference) -> what a fixed tag keeps, and what upstream means by it now (None: nothing).
        self.refused_moves: LRUCache[tuple[str, str], tuple[Digest, Digest | None]] = LRUCache(MAX_MOVES)
        self._ready: WatchedTable[tuple[Holding, Tag], _Entry] = WatchedTable(MAX_READY)
        self._asking: Flights[tuple[Holding, Tag], tuple[Held, Outcome]] = Flights(owner, "revalidate tag")

    @property
    def n_lost(self) -> int:
        """While this stands still, no tag means anything else than it did."""
        return self._ready.n_lost

    def vouch(
        self, route: Route, origin: Origin, tag: Tag, digest: Digest
    ) -> Callable[[], tuple[float, float] | None] | None:
        """Says, each time it is asked, how old the answer `digest` is and for how long it may be served unasked, both in
        seconds; or None once it may not. None when the tag is not in memory, or means something else by now.
        """
        key = (holding_of(route), tag)
        entry = self._ready.get(key)
        if entry is None or entry.record.descriptor.digest != digest:
            return None

        def fresh() -> tuple[float, float] | None:
            age_s = self._age(entry)
            left_s = freshness.fresh_for(age_s, origin.tag_policy)
            return (age_s or 0.0, left_s) if self._ready.get(key) is entry and left_s > 0 else None

        return fresh

    async def resolve(self, route: Route, origin: Origin, tag: Tag, *, is_fixed: bool = False) -> Resolved:
        """The manifest that `tag` means. Raises UnknownManifest, InvalidManifest, or what upstream raises; Unavailable
        where the disk does not tell and upstream does not, either.

        `is_fixed`: once seen, the tag keeps its digest here; a move upstream is reported and not followed.
        """
        holding = holding_of(route)
        try:
            entry = await self._entry(holding, tag)
        except StoreError as trouble:
            if is_fixed:
                raise  # what it keeps cannot be read, and it must not move for that
            self._observe(Noticed("error", f"{trouble}; asking upstream"))
            with blaming(trouble):
                return await self._first(route, origin, tag)
        if entry is None:
            return await self._first(route, origin, tag)
        answer = freshness.judge(self._age(entry), origin.tag_policy)
        if answer is freshness.Answer.SERVE:
            return await self._serve(route, origin, entry, "hit", is_fixed)
        if answer is freshness.Answer.REVALIDATE and self._clock.monotonic() < entry.retry_at:
            return await self._serve(route, origin, entry, "stale", is_fixed)
        ask = self._look_again if is_fixed else self._revalidate
        flight, is_new = self._asking.start((holding, tag), lambda: ask(route, origin, tag, entry))
        if is_new:
            entry.patience_ends_at = self._clock.monotonic() + STALE_AFTER_S
        if answer is freshness.Answer.REFUSE:
            try:
                return _asked(await landing(flight), is_new)
            except Throttled as error:
                if is_fixed or error.retry_after_s is not None:
                    raise
                # Only the rest of a budget was kept back, and that is for what cannot be had otherwise: as this.
                return await self._first(route, origin, tag)
        return await self._in_time(flight, is_new, route, origin, entry, is_fixed)

    # -- asking -----------------------------------------------------------------------------------------------------

    async def _first(self, route: Route, origin: Origin, tag: Tag) -> Resolved:
        """Never seen: the manifest itself is asked for, one request instead of a HEAD and a GET."""
        flight, is_new = self._asking.start((holding_of(route), tag), lambda: self._ask_first(route, origin, tag))
        return _asked(await landing(flight), is_new)

    async def _ask_first(self, route: Route, origin: Origin, tag: Tag) -> tuple[Held, Outcome]:
        held, outcome = await self._manifests.fetch(route, origin, tag)
        await self._write(holding_of(route), tag, held, origin)
        return held, outcome

    async def _in_time(
        self,
        flight: asyncio.Task[tuple[Held, Outcome]],
        is_new: bool,
        route: Route,
        origin: Origin,
        entry: _Entry,
        is_fixed: bool,
    ) -> Resolved:
        """The answer if it comes within STALE_AFTER_S of the asking, else the stale one while the asking goes on."""
        patience_s = entry.patience_ends_at - self._clock.monotonic()
        try:
            if patience_s <= 0 and not flight.done():
                raise TimeoutError
            async with self._owner.deadline(self._clock, patience_s):
                return _asked(await landing(flight), is_new)
        except TimeoutError:
            entry.trouble = f"{route.host} takes more than {STALE_AFTER_S:g} s to revalidate"
        except (UpstreamError, InvalidManifest, StoreError) as error:
            entry.trouble = str(error)
        return await self._serve(route, origin, entry, "stale", is_fixed)

    async def _look_again(self, route: Route, origin: Origin, tag: Tag, entry: _Entry) -> tuple[Held, Outcome]:
        """Ask what upstream means by a fixed tag now, tell of a move, and answer as before."""
        holding = holding_of(route)
        was = entry.record.descriptor
        try:
            try:
                now = (await _head(route, origin, tag, was.digest)).digest
                if now is None:
                    now = (await self._manifests.fetch(route, origin, tag))[0].descriptor.digest
            except NotFound:
                now = None
            held, outcome = await self._manifests.get(route, origin, was.digest)
        except (UpstreamError, InvalidManifest):
            entry.retry_at = self._clock.monotonic() + RECHECK_AFTER_S
            raise
        self._tell_of_move(route, tag, was.digest, now)
        await self._write(holding, tag, held, origin)
        return held, outcome

    def _tell_of_move(self, route: Route, tag: Tag, was: Digest, now: Digest | None) -> None:
        """Once for each digest that upstream moves it to."""
        name = f"{route.reference}:{tag}"
        if now == was:
            self.refused_moves.pop((route.project, name), None)
            return
        known = self.refused_moves.get((route.project, name))
        self.refused_moves[route.project, name] = (was, now)
        if known != (was, now):
            told = TagHeld(
                route.project, route.host, route.repository.value, tag.value, str(was), str(now) if now else ""
            )
            self._observe(told)

    async def _revalidate(self, route: Route, origin: Origin, tag: Tag, entry: _Entry) -> tuple[Held, Outcome]:
        """HEAD, which is free where GET is counted; the manifest is fetched only when the tag has moved."""
        holding = holding_of(route)
        was = entry.record.descriptor
        try:
            head = await _head(route, origin, tag, was.digest)
            held, outcome = await self._named(route, origin, tag, head.digest)
        except NotFound:
            await self._forget(holding, tag)
            raise
        except (UpstreamError, InvalidManifest):
            entry.retry_at = self._clock.monotonic() + RECHECK_AFTER_S
            raise
        if held.descriptor.digest != was.digest:
            self._observe(
                TagMoved(route.host, route.repository.value, tag.value, str(was.digest), str(held.descriptor.digest))
            )
        await self._write(holding, tag, held, origin)
        return held, outcome

    async def _named(self, route: Route, origin: Origin, tag: Tag, digest: Digest | None) -> tuple[Held, Outcome]:
        """What a HEAD of the tag has named. Where that names nothing, or nothing that upstream has (a lie, or a replica
        that lags), the tag itself is asked for: only its own "not found" is one."""
        if digest is not None:
            try:
                return await self._manifests.get(route, origin, digest)
            except NotFound:
                pass
        return await self._manifests.fetch(route, origin, tag)

    # -- answering --------------------------------------------------------------------------------------------------

    async def _serve(self, route: Route, origin: Origin, entry: _Entry, outcome: Outcome, is_fixed: bool) -> Resolved:
        """What the record says, from the store; evicted content is fetched again by digest."""
        held = await self._manifests.local(entry.record.descriptor)
        if held is None:
            try:
                held, fetched = await self._manifests.fetch(route, origin, entry.record.descriptor.digest)
            except NotFound:
                if is_fixed:
                    raise UnknownManifest(
                        f"{route.reference}:{entry.record.tag} keeps {entry.record.descriptor.digest} here, which has "
                        f"been evicted, and {route.host} has it no longer"
                    ) from None
                # Evicted here and deleted there: the tag has moved, and only asking for it again tells where to.
                return await self._first(route, origin, Tag(entry.record.tag))
            outcome = outcome if outcome == "stale" else fetched
        return Resolved(held, outcome, self._age(entry), entry.trouble if outcome == "stale" else "")

    def _age(self, entry: _Entry) -> float | None:
        if entry.validated_monotonic is not None:
            return self._clock.monotonic() - entry.validated_monotonic
        return freshness.age(validated_at=entry.record.validated_at, now=self._clock.wall())

    async def _entry(self, holding: Holding, tag: Tag) -> _Entry | None:
        entry: _Entry | None = self._ready.get((holding, tag))
        if entry is not None:
            return entry
        record = await self._records.tag(holding, tag)
        entry = self._ready.get((holding, tag))  # somebody may have asked upstream while we looked on disk
        if entry is None and record is not None:
            entry = self._ready[(holding, tag)] = _Entry(record)
        return entry

    def _outdate(self, holding: Holding, tag: Tag) -> None:
        self._ready.pop((holding, tag), None)

    async def _write(self, holding: Holding, tag: Tag, held: Held, origin: Origin) -> None:
        record = TagRecord(tag.value, held.descriptor, self._clock.wall(), origin.host)
        self._outdate(holding, tag)
        self._ready[(holding, tag)] = _Entry(record, self._clock.monotonic())
        try:
            await self._links.put_tag(holding, held.descriptor.digest, tag)
            await self._records.put_tag(holding, record)
        except StoreError as error:
            self._observe(Noticed("warning", f"the record of {holding}:{tag} could not be kept: {error}"))

    async def forget(self, holding: Holding, tags: Iterable[Tag]) -> None:
        """These were purged. Raises Unavailable when a record cannot be removed."""
        tags = tuple(tags)
        for tag in tags:
            self._ready.pop((holding, tag), None)
        await self._records.remove(holding, tags=tags)

    async def learn(self, holding: Holding, record: TagRecord) -> None:
        """A bundle says what a tag means; durable when it returns. Raises OutOfSpace or Unavailable."""
        await self._records.put_tag(holding, record)
        self._ready[(holding, Tag(record.tag))] = _Entry(record)

    async def _forget(self, holding: Holding, tag: Tag) -> None:
        """Upstream says that the tag is gone. Its digest stays readable: only the name is forgotten."""
        self._outdate(holding, tag)
        try:
            await self._records.remove(holding, tags=[tag])
        except StoreError as error:
            self._observe(Noticed("warning", f"the record of {holding}:{tag} could not be removed: {error}"))


async def _head(route: Route, origin: Origin, tag: Tag, was: Digest) -> ManifestHead:
    """What `tag` is upstream. Raises Unreachable where it has moved by the word of an address that does not decide."""
    head = await origin.upstream.manifest_head(route.repository, tag)
    if head.is_secondhand and head.digest != was:
        raise Unreachable(
            f"{head.source} says that {route.repository}:{tag} has moved, and the address that decides this does not "
            "answer",
            upstream=route.host,
        )
    return head


def _asked(answer: tuple[Held, Outcome], is_new: bool) -> Resolved:
    """One asked; what was a miss for that one was coalesced for the others."""
    held, outcome = answer
    return Resolved(held, "coalesced" if outcome == "miss" and not is_new else outcome, 0.0)
