"""Manifests: whole, verified, byte for byte (INV-9), from memory, the store or upstream, in this order.

A manifest that is not linked to the asking holding is fetched from upstream for that very repository, cached or not:
the fetch is the proof that it may be seen (INV-8), and what it costs upstream tells nothing about the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachetools import TLRUCache, TTLCache

from proxy.engine.capacity import Capacity, Reservation
from proxy.engine.charges import Charges, Tab
from proxy.engine.flights import Flights, landing
from proxy.engine.links import Links, blaming
from proxy.engine.origins import Origin
from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.engine.watched import WatchedTable
from proxy.errors import InvalidManifest, Misbehaved, NotFound, Overloaded, OverQuota, StoreError, UnknownManifest
from proxy.events import Event, Noticed, Outcome
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.manifest import MAX_MANIFEST_BYTES, Manifest
from proxy.oci.names import Tag, TagOrDigest
from proxy.ports import BlobStore, Clock, Holding, Ingest
from proxy.rules.backoff import BAD_FOR_S
from proxy.rules.routes import Route

#: Manifests kept ready in memory, in bytes of body: thousands of them, within the memory target of performance.md.
MAX_READY_BYTES = 16 << 20
#: Manifests up to this size are parsed on the loop: about 2 ms.
PARSED_HERE_BYTES = 64 * 1024
#: "Not found" answers remembered at a time; a scan of random tags must not grow memory.
MAX_NEGATIVES = 10_000


def holding_of(route: Route) -> Holding:
    """The key of a route's tags and links."""
    return Holding(route.project, route.host, route.repository.value)


@dataclass(frozen=True, slots=True)
class Held:
    """A verified manifest at hand: its descriptor, its bytes and what they say."""

    descriptor: Descriptor
    body: bytes
    manifest: Manifest


class Manifests:
    """Verified manifests. True for this process."""

    def __init__(
        self,
        blobs: BlobStore,
        capacity: Capacity,
        charges: Charges,
        links: Links,
        verification: Verification,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        self._blobs = blobs
        self._capacity = capacity
        self._charges = charges
        self._links = links
        self._verification = verification
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._ready: WatchedTable[Digest, Held] = WatchedTable(
            MAX_READY_BYTES, getsizeof=lambda held: len(held.body) + 1024
        )
        self._fetching: Flights[tuple[Holding, TagOrDigest], Held] = Flights(owner, "fetch manifest")
        self._loading: Flights[Digest, bytes | None] = Flights(owner, "load manifest")
        self._absent: TLRUCache[tuple[Holding, TagOrDigest], tuple[float, str]] = TLRUCache(
            MAX_NEGATIVES, ttu=lambda _, value, now: now + value[0], timer=clock.monotonic
        )
        self._bad: TTLCache[tuple[Holding, TagOrDigest], Misbehaved | InvalidManifest] = TTLCache(
            MAX_NEGATIVES, BAD_FOR_S, timer=clock.monotonic
        )

    # -- by digest --------------------------------------------------------------------------------------------------

    async def get(self, route: Route, origin: Origin, digest: Digest) -> tuple[Held, Outcome]:
        """The manifest. Raises UnknownManifest, InvalidManifest, or what upstream raises."""
        holding = holding_of(route)
        index = await self._links.known(holding)
        if (linked := index.descriptor(digest)) is not None and (held := await self.local(linked)) is not None:
            if digest not in index.records:
                await self._link(holding, held, None)
            return held, "hit"
        if linked is not None and (held := self._ready.get(digest)) is not None:
            return held, "hit"  # a fetch ended while we looked on disk
        with blaming(index.trouble):
            return await self.fetch(route, origin, digest)

    async def local(self, descriptor: Descriptor) -> Held | None:
        """The manifest if its bytes are here and right. `descriptor` is as the asking holding knows it."""
        digest = descriptor.digest
        if (held := self._ready.get(digest)) is not None:
            self._capacity.touch(digest)
            return held
        body = await self._loading.join(digest, lambda: self._load(digest))
        if body is None:
            return None
        try:
            held = await held_of(body, digest, descriptor.media_type)
        except InvalidManifest:
            return None  # linked as a blob: bytes that are not a manifest are not served as one
        self._ready[digest] = held
        self._know_names(held)
        return held

    def is_at_hand(self, digest: Digest) -> bool:
        """Whether it is ready in memory, and so has not been evicted since."""
        return digest in self._ready

    @property
    def n_lost(self) -> int:
        """While this stands still, what was at hand is at hand."""
        return self._ready.n_lost

    def _know_names(self, held: Held) -> None:
        """What is evicted together."""
        self._capacity.names(held.descriptor.digest, [named.digest for named in held.manifest.names])

    def touch(self, digest: Digest) -> None:
        """It was served from memory just now."""
        self._capacity.touch(digest)

    def forget(self, *digests: Digest) -> None:
        """They were purged or evicted."""
        for digest in digests:
            self._ready.pop(digest, None)

    def learned(self, holding: Holding, targets: Iterable[TagOrDigest]) -> None:
        """These are here now by another way than upstream: what it said of them before no longer stands."""
        for target in targets:
            self._absent.pop((holding, target), None)
            self._bad.pop((holding, target), None)

    async def _load(self, digest: Digest) -> bytes | None:
        try:
            blob = await self._blobs.open(digest)
        except (StoreError, Overloaded) as error:
            self._observe(Noticed("error", f"cannot read {digest} from the store, asking upstream: {error}"))
            return None
        if blob is None:
            return None
        try:
            if blob.size > MAX_MANIFEST_BYTES:
                return None
            verifier = Verifier(digest)
            body = b""
            while piece := await self._owner.uninterrupted(
                blob.read(len(body), MAX_MANIFEST_BYTES, verifier), "read a manifest"
            ):
                body += piece
            if not verifier.agrees():
                await self._verification.condemn(digest, f"the stored file of {digest} does not hash to its name", blob)
                return None
        except StoreError as error:
            self._observe(Noticed("error", f"cannot read {digest} from the store, asking upstream: {error}"))
            return None
        finally:
            blob.close()
        self._verification.remember(digest, blob.identity)
        self._capacity.touch(digest)
        return body

    # -- from upstream ----------------------------------------------------------------------------------------------

    async def fetch(self, route: Route, origin: Origin, target: TagOrDigest) -> tuple[Held, Outcome]:
        """The manifest from upstream, asked for once however many wait. Raises like `get`."""
        key = (holding_of(route), target)
        if (absent := self._absent.get(key)) is not None:
            raise UnknownManifest(absent[1])
        if (bad := self._bad.get(key)) is not None:
            raise _again(bad, f"; not asked again for {BAD_FOR_S:g} s")
        flight, is_new = self._fetching.start(key, lambda: self._fetch(route, origin, target))
        return await landing(flight), "miss" if is_new else "coalesced"

    async def _fetch(self, route: Route, origin: Origin, target: TagOrDigest) -> Held:
        holding = holding_of(route)
        try:
            held = await self._verified(route, origin, target)
        except NotFound as error:
            self._absent[(holding, target)] = (origin.negative_ttl_s, str(error))
            raise
        except (Misbehaved, InvalidManifest) as error:
            self._bad[(holding, target)] = _again(error)
            raise
        await self.keep(held, route.project)
        await self._link(holding, held, target if isinstance(target, Tag) else None)
        return held

    async def _verified(self, route: Route, origin: Origin, target: TagOrDigest) -> Held:
        """Upstream's answer, once its bytes are what they are called. Raises Misbehaved, InvalidManifest."""
        answer = await origin.upstream.manifest(route.repository, target)
        claimed = target if isinstance(target, Digest) else answer.digest
        digest = Digest.of(answer.body, claimed.algorithm if claimed else "sha256")
        if claimed is not None and digest != claimed:
            raise Misbehaved(
                f"{route.host} answered {route.repository} {target} with a manifest that hashes to {digest}"
                + ("" if isinstance(target, Digest) else f" and says it is {claimed}"),
                upstream=route.host,
            )
        return await held_of(answer.body, digest, answer.media_type)

    async def keep(self, held: Held, project: str) -> None:
        """Commit the bytes to the store at the project's expense, as far as there is room; ready in memory in any case.

        A project that refuses when full does so later, when the sizes of all that the manifest names are judged.
        """
        digest = held.descriptor.digest
        self._ready[digest] = held
        tab = self._charges.open(digest)
        try:
            tab.join(project, len(held.body), is_admitted=True)
            await tab.secure(len(held.body))
            self._capacity.hold(digest)  # from here on it is not evicted under our hands
            try:
                await self._store(held, tab)
            finally:
                self._capacity.unhold(digest)
        except (StoreError, Overloaded) as error:
            self._not_kept(digest, error)
        finally:
            tab.close()

    async def _store(self, held: Held, tab: Tab) -> None:
        digest = held.descriptor.digest
        reservation = await self._capacity.reserve(len(held.body), digest)
        try:
            ingest = await self._blobs.ingest(digest, Verifier(digest))
            try:
                await self._owner.uninterrupted(ingest.write(held.body), "write a manifest")
                await self._owner.uninterrupted(self._commit(held, ingest, reservation, tab), "commit a manifest")
            except BaseException:
                await self._owner.uninterrupted(ingest.abort(), "abort a manifest")
                raise
            finally:
                ingest.close()
        finally:
            reservation.release()

    async def _commit(self, held: Held, ingest: Ingest, reservation: Reservation, tab: Tab) -> None:
        """What has its name is counted, whoever asked for it has left or not."""
        await tab.record()
        await ingest.commit()
        reservation.settle(held.descriptor.digest, len(held.body))
        tab.settle(len(held.body))
        self._know_names(held)

    async def _link(self, holding: Holding, held: Held, tag: Tag | None) -> None:
        try:
            await self._links.put_manifest(holding, held.descriptor, held.manifest, tag)
        except StoreError as error:
            self._observe(Noticed("warning", f"the link of {held.descriptor.digest} could not be kept: {error}"))

    def _not_kept(self, digest: Digest, error: Exception) -> None:
        if isinstance(error, OverQuota):
            return  # one project's business, and said when its quota was spent
        self._capacity.degraded = str(error)
        self._observe(Noticed("warning", f"manifest {digest} was served and not kept: {error}"))


def _again(bad: Misbehaved | InvalidManifest, more: str = "") -> Misbehaved | InvalidManifest:
    """The same error anew: one that was raised keeps the frames of its askers alive."""
    sentence = f"{bad}{more}"
    return Misbehaved(sentence, upstream=bad.upstream) if isinstance(bad, Misbehaved) else InvalidManifest(sentence)


async def held_of(body: bytes, digest: Digest, media_type: str) -> Held:
    """A manifest at hand, of bytes that were verified. Raises InvalidManifest like `Manifest.parse`.

    A small one is parsed here, a large one in a worker thread: one of 4 MiB takes a tenth of a second.
    """
    if len(body) <= PARSED_HERE_BYTES:
        manifest = Manifest.parse(body, media_type)
    else:
        manifest = await asyncio.to_thread(Manifest.parse, body, media_type)
    return Held(Descriptor(manifest.media_type, digest, len(body)), body, manifest)
