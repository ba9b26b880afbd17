"""Taking things out by hand: names first, then the rights, then those bytes that nobody has a right to any more.

In this order a crash in between leaves less to see and never a name that leads nowhere; what bytes it leaves go by
eviction. Pinned images stay whole. What is being read stays on disk until eviction takes it: no name leads there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from proxy.engine.capacity import Capacity
from proxy.engine.links import Links
from proxy.engine.manifests import Manifests
from proxy.engine.tags import Tags
from proxy.events import Changed, Event
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, Records, TagRecord
from proxy.rules.closure import cosign_tags
from proxy.rules.selection import Selection

#: Blobs deleted at a time, so that transfers that need room are not kept waiting.
BATCH = 256


@dataclass(frozen=True, slots=True)
class Purged:
    """What went, or with `is_done` false would go. Sizes in bytes. `tags` are complete names, without the project."""

    what: str
    is_done: bool
    tags: tuple[str, ...]
    n_manifests: int
    n_blobs: int
    n_bytes: int
    #: Blobs that stay until eviction takes them, because somebody reads them now.
    n_busy: int
    #: Images that were meant, and stay because they are pinned or their upstream is sealed.
    n_pinned: int

    @property
    def found_anything(self) -> bool:
        """Whether there was anything to take out."""
        return bool(self.tags or self.n_manifests or self.n_blobs or self.n_busy)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What goes from one holding; `bytes_of` is all that the links which go have named."""

    tags: frozenset[str]
    links: frozenset[Digest]
    n_manifests: int
    bytes_of: frozenset[Digest]
    n_pinned: int = 0


class Purge:
    """Purges one thing at a time. True for this process."""

    def __init__(
        self,
        records: Records,
        links: Links,
        tags: Tags,
        manifests: Manifests,
        capacity: Capacity,
        observe: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """`observe` is told of each purge that was done."""
        self._records = records
        self._links = links
        self._tags = tags
        self._manifests = manifests
        self._capacity = capacity
        self._observe = observe
        self._purging = asyncio.Lock()

    async def run(self, what: str, *, project: str = "", dry_run: bool = False) -> Purged:
        """Take out what `what` selects (rules/selection.py), in all projects or one.

        Raises BadRequest for what selects nothing by its form, Unavailable or OutOfSpace when the disk fails.
        An image goes with what only it names, and with what refers to it; blobs that another image names stay. A digest
        alone means those very bytes: they go though images name them, and are fetched again when somebody asks.
        """
        selection = Selection.parse(what)
        await self._capacity.counted()
        async with self._purging:
            chosen = await self._choose(selection, project)
            doomed = await self._doomed(chosen, selection, project)
            going = [digest for digest in doomed if self._capacity.may_go(digest)]
            n_bytes = sum(self._capacity.ledger.size_of(digest) or 0 for digest in going)
            if not dry_run:
                await self._take_out(chosen, doomed)
                for start in range(0, len(going), BATCH):
                    # What somebody has begun to read meanwhile stays as well.
                    await self._capacity.evict(
                        [each for each in going[start : start + BATCH] if self._capacity.may_go(each)]
                    )
        if not dry_run and (chosen or doomed):
            self._observe(Changed("content", selection.text, f"purged, {n_bytes} bytes"))
        return Purged(
            selection.text,
            not dry_run,
            tuple(sorted(f"{holding}:{tag}" for holding, each in chosen.items() for tag in each.tags)),
            sum(each.n_manifests for each in chosen.values()),
            len(going),
            n_bytes,
            len(doomed) - len(going),
            sum(each.n_pinned for each in chosen.values()),
        )

    async def _choose(self, selection: Selection, project: str) -> dict[Holding, _Chosen]:
        chosen = {}
        async for holding, tags, links in self._records.scan():
            if (project and holding.project != project) or not selection.covers(str(holding)):
                continue
            one = _chosen(selection, tags, links, self._capacity.pinned)
            if one.tags or one.links or one.n_pinned:
                chosen[holding] = one
        return chosen

    async def _doomed(self, chosen: Mapping[Holding, _Chosen], selection: Selection, project: str) -> list[Digest]:
        """The stored digests that no link names any more once `chosen` is gone."""
        doomed = {digest for each in chosen.values() for digest in each.bytes_of}
        async for holding, _, links in self._records.scan():
            if not doomed:
                break
            gone: Container[Digest] = chosen[holding].links if holding in chosen else ()
            for link in links:
                if link.descriptor.digest not in gone:
                    doomed.discard(link.descriptor.digest)
                    doomed.difference_update(named.digest for named in link.names)
        if selection.digest is not None and selection.glob is None and not project:
            doomed.add(selection.digest)
        ledger, pinned = self._capacity.ledger, self._capacity.pinned
        return sorted(digest for digest in doomed if digest in ledger and digest not in pinned)

    async def _take_out(self, chosen: Mapping[Holding, _Chosen], doomed: Iterable[Digest]) -> None:
        for holding, one in chosen.items():
            await self._tags.forget(holding, [Tag(tag) for tag in sorted(one.tags)])
            for digest in sorted(one.links):
                await self._links.drop(holding, digest)
        for digest in doomed:
            self._manifests.forget(digest)


def _chosen(
    selection: Selection, tags: Sequence[TagRecord], links: Sequence[LinkRecord], pinned: Container[Digest]
) -> _Chosen:
    """What goes from one holding: tags, the manifests they led to, what only those name, and what refers to them."""
    by_digest = {link.descriptor.digest: link for link in links}
    meant = {record.tag: record.descriptor.digest for record in tags if selection.takes_tag(record.tag)}
    if selection.digest is not None:
        meant = {record.tag: selection.digest for record in tags if record.descriptor.digest == selection.digest}
        roots = {selection.digest}
    elif selection.is_whole:
        roots = set(by_digest)
    else:
        # Older images of a moving tag go with it: nothing but that name ever led to them.
        older = {digest for digest, link in by_digest.items() if link.tags and set(link.tags) <= set(meant)}
        roots = set(meant.values()) | older
    roots &= set(by_digest)
    stays = {digest for digest in roots if digest in pinned}
    meant = {tag: digest for tag, digest in meant.items() if digest not in stays}
    named_otherwise = {record.descriptor.digest for record in tags if record.tag not in meant}
    gone = _with_dependants(roots - stays - named_otherwise, by_digest, kept=stays | named_otherwise)
    # Signatures of what goes, under the tags that cosign makes of a digest.
    signatures = {tag.value for digest in gone for tag in cosign_tags(digest)}
    for record in tags:
        if record.tag in signatures:
            meant[record.tag] = record.descriptor.digest
            gone |= {record.descriptor.digest} & set(by_digest)
    bytes_of = {named.digest for digest in gone for named in by_digest[digest].names} | gone
    n_manifests = sum(by_digest[digest].is_manifest for digest in gone)
    return _Chosen(frozenset(meant), frozenset(gone), n_manifests, frozenset(bytes_of), len(stays))


def _with_dependants(roots: set[Digest], by_digest: Mapping[Digest, LinkRecord], *, kept: set[Digest]) -> set[Digest]:
    """`roots`, the manifests that only those name, however deep, and those that refer to any of them."""
    gone = set(roots)
    while True:
        named_by_gone: set[Digest] = set()
        named_by_others: set[Digest] = set(kept)
        for digest, link in by_digest.items():
            (named_by_gone if digest in gone else named_by_others).update(named.digest for named in link.names)
        more = {
            digest
            for digest, link in by_digest.items()
            if digest not in gone
            and digest not in named_by_others
            and (digest in named_by_gone or (link.subject is not None and link.subject in gone))
        }
        if not more:
            return gone
        gone |= more
