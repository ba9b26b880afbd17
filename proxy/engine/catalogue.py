"""What is cached, for people: repositories by name, and one image with its platforms, layers, tags and referrers.

Reads records and the ledger. Looking is not using: the order of eviction stays as it is, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from proxy.engine.capacity import Capacity
from proxy.engine.flights import Flights
from proxy.engine.links import HoldingIndex, Links
from proxy.engine.tasks import TaskOwner
from proxy.errors import BreakwaterError
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.mediatypes import is_index
from proxy.oci.names import Reference, Tag
from proxy.ports import Clock, Holding, LinkRecord, Records, TagRecord
from proxy.rules.closure import ATTESTED, cosign_tags

#: How long one reading of all records serves further searches, in seconds: somebody types.
SNAPSHOT_S = 5.0
#: Tags shown of one repository at most.
MAX_TAGS = 500


@dataclass(frozen=True, slots=True)
class Stored:
    """One repository of one project. `cached_bytes` counts each blob once; others may share them."""

    holding: Holding
    tags: tuple[TagRecord, ...]
    n_tags: int
    n_manifests: int
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """A config or layer of an image."""

    descriptor: Descriptor
    is_cached: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """One manifest of an image: for one platform, or an attestation of one.

    `is_known`: its manifest has been seen here, so that `parts` says what it consists of. Sizes in bytes, manifest
    included; `total_bytes` is that of the manifest alone where the rest is not known.
    """

    descriptor: Descriptor
    is_known: bool
    is_cached: bool
    parts: tuple[Part, ...]
    total_bytes: int
    cached_bytes: int

    @property
    def platform(self) -> str:
        """`linux/arm64/v8`, or "" where no index says it."""
        return str(self.descriptor.platform) if self.descriptor.platform is not None else ""

    @property
    def is_attestation(self) -> bool:
        """Whether it is what BuildKit says of another one, and no image."""
        return ATTESTED in self.descriptor.annotations

    @property
    def is_whole(self) -> bool:
        """Whether a node could pull it from here alone."""
        return self.is_known and self.is_cached and all(part.is_cached for part in self.parts)


@dataclass(frozen=True, slots=True)
class ReferrerSeen:
    """A manifest here that refers to the image. `artifact_type` may be "", then its media type says what it is."""

    descriptor: Descriptor
    artifact_type: str
    is_cached: bool
    #: Where it is kept under a tag of cosign's scheme: that tag.
    tag: str = ""


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """What is here of one image of one project."""

    holding: Holding
    descriptor: Descriptor
    is_cached: bool
    #: The tag that was asked about, as upstream last said; None when it was asked about by digest.
    tag: TagRecord | None
    #: All tags that lead to it here now.
    tags: tuple[str, ...]
    variants: tuple[Variant, ...]
    referrers: tuple[ReferrerSeen, ...]

    @property
    def is_index(self) -> bool:
        """Whether it names one manifest for each platform."""
        return is_index(self.descriptor.media_type)


class Catalogue:
    """Answers questions about what is cached. True for this process."""

    def __init__(self, records: Records, links: Links, capacity: Capacity, *, clock: Clock, owner: TaskOwner) -> None:
        self._records = records
        self._links = links
        self._capacity = capacity
        self._clock = clock
        self._reading: Flights[None, Sequence[Stored]] = Flights(owner, "read the catalogue")
        self._snapshot: tuple[float, Sequence[Stored]] | None = None

    # -- search -----------------------------------------------------------------------------------------------------

    async def search(self, words: str, *, project: str = "", limit: int = 50) -> tuple[list[Stored], bool]:
        """Repositories whose `host/repository:tag` contains every one of `words`, in order of name; whether there are
        more than `limit`. Raises Unavailable when the disk fails.
        """
        wanted = words.lower().split()
        found: list[Stored] = []
        for stored in await self._all():
            if project and stored.holding.project != project:
                continue
            if (narrowed := _narrowed(stored, wanted)) is None:
                continue
            if len(found) == limit:
                return found, True
            found.append(narrowed)
        return found, False

    async def _all(self) -> Sequence[Stored]:
        if self._snapshot is not None and self._clock.monotonic() - self._snapshot[0] < SNAPSHOT_S:
            return self._snapshot[1]
        return await self._reading.join(None, self._read)

    async def _read(self) -> Sequence[Stored]:
        found = []
        async for holding, tags, links in self._records.scan():
            if tags or links:
                found.append(self._stored(holding, tags, links))
        found.sort(key=lambda stored: (str(stored.holding), stored.holding.project))
        self._snapshot = (self._clock.monotonic(), found)
        return found

    def _stored(self, holding: Holding, tags: Sequence[TagRecord], links: Sequence[LinkRecord]) -> Stored:
        digests: set[Digest] = set()
        for link in links:
            digests.add(link.descriptor.digest)
            digests.update(named.digest for named in link.names)
        in_order = sorted(tags, key=lambda record: record.tag)
        n_manifests = sum(link.is_manifest for link in links)
        return Stored(holding, tuple(in_order), len(in_order), n_manifests, sum(map(self._cached_bytes, digests)))

    def forget(self) -> None:
        """Something was purged: the next search reads anew."""
        self._snapshot = None

    # -- one image --------------------------------------------------------------------------------------------------

    async def image(self, reference: Reference, projects: Iterable[str]) -> list[ImageSeen]:
        """What each of `projects` has of it; empty when none of them has. Raises Unavailable when the disk fails."""
        found = []
        for project in projects:
            holding = Holding(project, reference.host.value, reference.repository.value)
            seen = await self._image(holding, reference)
            if seen is not None:
                found.append(seen)
        return found

    async def _image(self, holding: Holding, reference: Reference) -> ImageSeen | None:
        index = await self._links.of(holding)
        record: TagRecord | None = None
        if isinstance(reference.target, Digest):
            descriptor = index.descriptor(reference.target)
        else:
            record = await self._records.tag(holding, reference.target)
            descriptor = record.descriptor if record is not None else None
        if descriptor is None:
            return None
        digest = descriptor.digest
        known = index.records.get(digest)
        return ImageSeen(
            holding,
            descriptor,
            self._is_cached(digest),
            record,
            await self._tags_of(holding, known),
            tuple(self._variants(index, descriptor, known)),
            (*self._referrers(index, digest), *await self._cosigned(holding, digest)),
        )

    async def _tags_of(self, holding: Holding, known: LinkRecord | None) -> tuple[str, ...]:
        """Those among the tags that led here once which still do."""
        found = []
        for name in known.tags if known is not None else ():
            record = await self._records.tag(holding, Tag(name))
            if record is not None and known is not None and record.descriptor.digest == known.descriptor.digest:
                found.append(name)
        return tuple(sorted(found)[:MAX_TAGS])

    def _variants(self, index: HoldingIndex, descriptor: Descriptor, known: LinkRecord | None) -> Iterator[Variant]:
        if known is None or not is_index(descriptor.media_type):
            yield self._variant(descriptor, known)
            return
        for child in known.names:
            yield self._variant(child, index.records.get(child.digest))

    def _variant(self, descriptor: Descriptor, known: LinkRecord | None) -> Variant:
        parts = tuple(
            Part(part, self._is_cached(part.digest))
            for part in (known.names if known is not None else ())
            if not is_index(descriptor.media_type)
        )
        sizes = {part.descriptor.digest: part for part in parts}
        return Variant(
            descriptor,
            known is not None,
            self._is_cached(descriptor.digest),
            parts,
            descriptor.size + sum(part.descriptor.size for part in sizes.values()),
            self._cached_bytes(descriptor.digest) + sum(self._cached_bytes(digest) for digest in sizes),
        )

    def _referrers(self, index: HoldingIndex, subject: Digest) -> Iterator[ReferrerSeen]:
        for link in index.referrers_of(subject):
            digest = link.descriptor.digest
            yield ReferrerSeen(link.descriptor, link.artifact_type, self._is_cached(digest))

    async def _cosigned(self, holding: Holding, digest: Digest) -> list[ReferrerSeen]:
        found = []
        for tag in cosign_tags(digest):
            record = await self._records.tag(holding, tag)
            if record is not None:
                is_cached = self._is_cached(record.descriptor.digest)
                found.append(ReferrerSeen(record.descriptor, "", is_cached, tag.value))
        return found

    # -- the ledger -------------------------------------------------------------------------------------------------

    def _is_cached(self, digest: Digest) -> bool:
        return digest in self._capacity.ledger

    def _cached_bytes(self, digest: Digest) -> int:
        return self._capacity.ledger.size_of(digest) or 0


def reference_or_none(text: str) -> Reference | None:
    """The reference that `text` spells, or None for what is none."""
    try:
        return Reference.parse(text.strip())
    except BreakwaterError:
        return None


def _narrowed(stored: Stored, words: Sequence[str]) -> Stored | None:
    """The repository with those of its tags that match; None when nothing of it does."""
    name = f"{stored.holding}".lower()
    missing = [word for word in words if word not in name]
    if not missing:
        return Stored(stored.holding, stored.tags[:MAX_TAGS], stored.n_tags, stored.n_manifests, stored.cached_bytes)
    tags = tuple(record for record in stored.tags if all(word in f"{name}:{record.tag}".lower() for word in words))[
        :MAX_TAGS
    ]
    return Stored(stored.holding, tags, stored.n_tags, stored.n_manifests, stored.cached_bytes) if tags else None
