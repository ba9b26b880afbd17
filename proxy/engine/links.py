"""Who may see which digest: links, indexed in memory a holding at a time (INV-8, house.md conviction 9).

The records on disk are the truth; an index is loaded when a holding is first asked about and dropped when it has not
been asked about for long. Bytes are shared, permission is not: a digest that is not linked opens nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakValueDictionary

from cachetools import LRUCache

from proxy.engine.flights import Flights
from proxy.engine.tasks import TaskOwner
from proxy.errors import NotFound, StoreError, UpstreamError
from proxy.events import Event, Noticed
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, Records

#: How many digests all indexes together hold before the least recently asked holding is dropped: some 60 MiB.
MAX_INDEXED_DIGESTS = 200_000


@contextmanager
def blaming(trouble: StoreError | None) -> Iterator[None]:
    """Where the disk did not tell what is here and upstream did not help, the disk is the answer.

    Upstream's "not found" would be a false one: a sealed upstream says that of everything (product.md, promise 3).
    """
    try:
        yield
    except (NotFound, UpstreamError) as error:
        if trouble is None:
            raise
        raise trouble from error


class HoldingIndex:
    """The links of one holding: what is linked, as what, and what names it."""

    def __init__(self, records: Iterator[LinkRecord] | None = None, *, trouble: StoreError | None = None) -> None:
        #: Why nothing is known here, where the disk did not tell. Then "not linked" means "cannot be read".
        self.trouble = trouble
        self.records: dict[Digest, LinkRecord] = {}
        #: digest -> descriptor as some manifest of this holding names it
        self.named: dict[Digest, Descriptor] = {}
        self._parents: dict[Digest, set[Digest]] = {}
        for record in records or ():
            self.add(record)

    def __len__(self) -> int:
        return 1 + len(self.records) + len(self.named)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self.records or digest in self.named

    def add(self, record: LinkRecord) -> None:
        """Count a link in; a later one of the same digest takes its place."""
        digest = record.descriptor.digest
        self.records[digest] = record
        for named in record.names:
            self.named[named.digest] = named
            self._parents.setdefault(named.digest, set()).add(digest)

    def drop(self, digest: Digest) -> None:
        """Forget a link, and what only it named."""
        record = self.records.pop(digest, None)
        for named in record.names if record else ():
            parents = self._parents.get(named.digest, set())
            parents.discard(digest)
            if not parents:
                self._parents.pop(named.digest, None)
                self.named.pop(named.digest, None)

    def descriptor(self, digest: Digest) -> Descriptor | None:
        """What the holding knows of it: media type and size."""
        record = self.records.get(digest)
        return record.descriptor if record else self.named.get(digest)

    def tags_of(self, digest: Digest) -> Iterator[str]:
        """The tags that resolved to it here, or to a manifest that names it, however deep."""
        seen: set[Digest] = set()
        waiting = [digest]
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if (record := self.records.get(one)) is not None:
                yield from record.tags
            waiting.extend(self._parents.get(one, ()))

    def referrers_of(self, subject: Digest) -> list[LinkRecord]:
        """The manifests here whose subject it is."""
        return [record for record in self.records.values() if record.subject == subject]


class Links:
    """Links of every holding. True for this process."""

    def __init__(self, records: Records, owner: TaskOwner, observe: Callable[[Event], None] = lambda _: None) -> None:
        self._records = records
        self._observe = observe
        self._indexes: LRUCache[Holding, HoldingIndex] = LRUCache(MAX_INDEXED_DIGESTS, getsizeof=len)
        self._loading: Flights[Holding, HoldingIndex] = Flights(owner, "load links")
        #: How often a right was taken away. An answer that is kept ready is judged anew when this moves.
        self.n_dropped = 0
        #: One for each link that is being written, for as long as somebody holds or wants it.
        self._writing: WeakValueDictionary[tuple[Holding, Digest], asyncio.Lock] = WeakValueDictionary()

    async def of(self, holding: Holding) -> HoldingIndex:
        """The index of a holding. Raises Unavailable when the disk fails."""
        index = self._indexes.get(holding)
        return index if index is not None else await self._loading.join(holding, lambda: self._load(holding))

    async def known(self, holding: Holding) -> HoldingIndex:
        """As `of`; where the disk fails, an index of nothing with that `trouble`: upstream is asked, as for what is not
        linked, and what it then says goes through `blaming`.

        Not for rules. They must not take "cannot be read" for "never seen here".
        """
        index = self._indexes.get(holding)
        if index is not None:
            return index
        try:
            return await self.of(holding)
        except StoreError as error:
            self._observe(Noticed("error", f"{error}; asking upstream"))
            return HoldingIndex(trouble=error)

    def at_hand(self, holding: Holding) -> HoldingIndex | None:
        """The index if it is in memory: no waiting, for the warm path."""
        return self._indexes.get(holding)

    async def _load(self, holding: Holding) -> HoldingIndex:
        index = HoldingIndex(iter(await self._records.links(holding)))
        self._keep(holding, index)
        return index

    def _keep(self, holding: Holding, index: HoldingIndex) -> None:
        self._indexes.pop(holding, None)  # its size has changed, and the table asks for sizes only once
        if len(index) <= MAX_INDEXED_DIGESTS:
            self._indexes[holding] = index

    async def put_manifest(self, holding: Holding, descriptor: Descriptor, manifest: Manifest, tag: Tag | None) -> None:
        """Link a manifest and what it names; durable when it returns. Raises OutOfSpace or Unavailable.

        The right to see them holds in memory from here on, even when the disk fails: the request that brought the
        manifest has shown it.
        """
        index = await self.of(holding)
        known = index.records.get(descriptor.digest)
        tags = known.tags if known else ()
        if tag is not None and tag.value not in tags:
            tags = (*tags, tag.value)
        elif known is not None and known.is_manifest:
            return
        record = LinkRecord(
            descriptor=descriptor,
            names=manifest.names,
            subject=manifest.subject.digest if manifest.subject else None,
            artifact_type=manifest.said_type,
            annotations=dict(manifest.annotations) if manifest.subject else {},
            tags=tags,
        )
        await self._put(holding, record)

    async def put_tag(self, holding: Holding, digest: Digest, tag: Tag) -> None:
        """Remember that `tag` resolved to a manifest that is linked already. Raises OutOfSpace or Unavailable."""
        index = await self.of(holding)
        known = index.records.get(digest)
        if known is not None and tag.value not in known.tags:
            await self._put(holding, replace(known, tags=(*known.tags, tag.value)))

    async def put_blob(self, holding: Holding, descriptor: Descriptor) -> None:
        """Link a blob that upstream confirmed for this repository outside any manifest. Raises like `put_manifest`."""
        index = await self.of(holding)
        if descriptor.digest not in index:
            await self._put(holding, LinkRecord(descriptor=descriptor, is_manifest=False))

    async def _put(self, holding: Holding, record: LinkRecord) -> None:
        index = await self.of(holding)
        index.add(record)
        self._keep(holding, index)
        async with self._in_turn(holding, record.descriptor.digest):
            await self._records.put_link(holding, record)

    def _in_turn(self, holding: Holding, digest: Digest) -> asyncio.Lock:
        """What is written of one link is written in the order in which it was decided: two tags of one manifest that are
        pulled at once must both be in the record, and a right that was taken stays taken."""
        return self._writing.setdefault((holding, digest), asyncio.Lock())

    async def drop(self, holding: Holding, digest: Digest) -> None:
        """Take the right away."""
        index = await self.of(holding)
        index.drop(digest)
        self.n_dropped += 1  # not before: who is vouched for in between would be for good
        self._keep(holding, index)
        async with self._in_turn(holding, digest):
            await self._records.remove(holding, links=[digest])
