"""engine/links.py: who may see which digest (INV-8, house.md conviction 9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from proxy.engine import links as module
from proxy.engine.links import HoldingIndex, Links
from proxy.engine.tasks import TaskOwner
from proxy.errors import Unavailable
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord
from proxy.store.memory import MemoryRecords
from tests.support import images

HERE = Holding("default", "docker.io", "library/alpine")
ELSEWHERE = Holding("team", "docker.io", "library/alpine")
IMAGE = images.image(4, (10,))
INDEX = images.index([IMAGE])
LAYER, CONFIG = Digest.parse(IMAGE.blobs[-1].digest), Digest.parse(IMAGE.blobs[0].digest)


def described(image: images.Image) -> tuple[Descriptor, Manifest]:
    manifest = Manifest.parse(image.body, image.media_type)
    return Descriptor(image.media_type, Digest.parse(image.digest), len(image.body)), manifest


class CountingRecords(MemoryRecords):
    """Counts look-ups and writes; may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.n_loads = 0
        self.n_puts = 0
        self.is_broken = False

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        self.n_loads += 1
        return await super().links(holding)

    async def put_link(self, holding: Holding, record: LinkRecord) -> None:
        if self.is_broken:
            raise Unavailable("Read-only file system")
        self.n_puts += 1
        await super().put_link(holding, record)


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    made = TaskOwner(print)
    yield made
    await made.aclose()


@pytest.fixture
def records() -> CountingRecords:
    return CountingRecords()


async def test_a_manifest_links_what_it_names_here_and_nowhere_else(owner: TaskOwner, records: CountingRecords) -> None:
    """Bytes are shared, permission is not: another project's holding knows nothing of it."""
    links = Links(records, owner)
    await links.put_manifest(HERE, *described(IMAGE), Tag("1"))
    index = await links.of(HERE)
    assert LAYER in index and CONFIG in index and Digest.parse(IMAGE.digest) in index
    assert index.descriptor(LAYER).size == len(IMAGE.blobs[-1].content)  # type: ignore[union-attr]
    assert LAYER not in await links.of(ELSEWHERE)


async def test_a_signature_without_a_type_of_its_own_is_listed_under_its_configs(
    owner: TaskOwner, records: CountingRecords
) -> None:
    """distribution-spec § Listing Referrers: without artifactType it is the config's media type, offline as well."""
    descriptor, manifest = described(IMAGE)
    attached = replace(manifest, subject=Descriptor(manifest.media_type, Digest.parse(INDEX.digest), 1))
    links = Links(records, owner)
    await links.put_manifest(HERE, descriptor, attached, None)
    (record,) = (await links.of(HERE)).referrers_of(Digest.parse(INDEX.digest))
    assert manifest.config is not None
    assert record.artifact_type == manifest.config.media_type


async def test_links_are_read_back_after_a_start(owner: TaskOwner, records: CountingRecords) -> None:
    """The records are the truth; an index is loaded once however many ask."""
    await Links(records, owner).put_manifest(HERE, *described(INDEX), Tag("1"))
    records.n_loads = 0
    links = Links(records, owner)
    found = await asyncio.gather(*(links.of(HERE) for _ in range(50)))
    assert records.n_loads == 1
    assert all(Digest.parse(IMAGE.digest) in index for index in found)
    assert links.at_hand(HERE) is found[0] and links.at_hand(ELSEWHERE) is None


async def test_tags_are_found_from_whatever_they_lead_to(owner: TaskOwner, records: CountingRecords) -> None:
    """A rule that allows a tag allows the layers of the images of its index."""
    links = Links(records, owner)
    await links.put_manifest(HERE, *described(INDEX), Tag("multi"))
    await links.put_manifest(HERE, *described(IMAGE), None)
    index = await links.of(HERE)
    assert list(index.tags_of(LAYER)) == list(index.tags_of(Digest.parse(INDEX.digest))) == ["multi"]
    await links.put_tag(HERE, Digest.parse(IMAGE.digest), Tag("single"))
    assert set((await links.of(HERE)).tags_of(LAYER)) == {"multi", "single"}
    assert list(index.tags_of(Digest.of(b"unknown"))) == []


async def test_what_is_known_is_not_written_again(owner: TaskOwner, records: CountingRecords) -> None:
    """A warm pull costs no fsync."""
    links = Links(records, owner)
    for _ in range(3):
        await links.put_manifest(HERE, *described(IMAGE), Tag("1"))
        await links.put_manifest(HERE, *described(IMAGE), None)
        await links.put_tag(HERE, Digest.parse(IMAGE.digest), Tag("1"))
        await links.put_blob(HERE, Descriptor("x/y", LAYER, 10))
    assert records.n_puts == 1


async def test_what_refers_to_a_digest_is_found(owner: TaskOwner, records: CountingRecords) -> None:
    """For the referrers API when upstream has none, or is down."""
    links = Links(records, owner)
    signature = images.artifact(IMAGE, "application/vnd.test.signature", b"s")
    await links.put_manifest(HERE, *described(signature), None)
    found = (await links.of(HERE)).referrers_of(Digest.parse(IMAGE.digest))
    assert [record.artifact_type for record in found] == ["application/vnd.test.signature"]


async def test_a_disk_that_fails_does_not_take_the_right_away(owner: TaskOwner, records: CountingRecords) -> None:
    """The request that brought the manifest has shown the right; only its durability is lost, and said to be."""
    links = Links(records, owner)
    records.is_broken = True
    with pytest.raises(Unavailable):
        await links.put_manifest(HERE, *described(IMAGE), Tag("1"))
    assert LAYER in await links.of(HERE)


async def test_a_right_that_is_dropped_takes_what_only_it_named(owner: TaskOwner, records: CountingRecords) -> None:
    """What another manifest names as well stays; here and on disk."""
    links = Links(records, owner)
    other = images.manifest(images.Blob(b"{}"), [images.Blob(IMAGE.blobs[-1].content)])
    await links.put_manifest(HERE, *described(IMAGE), None)
    await links.put_manifest(HERE, *described(other), None)
    await links.drop(HERE, Digest.parse(IMAGE.digest))
    for index in (await links.of(HERE), await Links(records, owner).of(HERE)):
        assert Digest.parse(IMAGE.digest) not in index and CONFIG not in index
        assert LAYER in index


async def test_memory_is_bounded_and_a_holding_too_large_for_it_still_works(
    owner: TaskOwner, records: CountingRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently asked holding is dropped and loaded again when asked for."""
    monkeypatch.setattr(module, "MAX_INDEXED_DIGESTS", 8)
    links = Links(records, owner)
    holdings = [Holding("default", "docker.io", f"r{n}") for n in range(4)]
    for holding in holdings:
        await links.put_manifest(holding, *described(IMAGE), None)
    assert sum(links.at_hand(holding) is not None for holding in holdings) == 2
    for holding in holdings:
        assert LAYER in await links.of(holding)
    large = images.image(9, tuple(range(20)))
    await links.put_manifest(HERE, *described(large), None)
    assert Digest.parse(large.blobs[3].digest) in await links.of(HERE)


def test_an_index_of_nothing_opens_nothing() -> None:
    """The empty holding."""
    index = HoldingIndex()
    assert LAYER not in index and index.descriptor(LAYER) is None and index.referrers_of(LAYER) == []
    index.drop(LAYER)


class Slow(MemoryRecords):
    """The first of two writes of a link takes longer; a look-up waits for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.n_begun = 0
        self.gate: asyncio.Event | None = None

    async def put_link(self, holding: Holding, record: LinkRecord) -> None:
        self.n_begun += 1
        for _ in range(10 // self.n_begun):
            await asyncio.sleep(0)
        await super().put_link(holding, record)

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        if self.gate is not None:
            await self.gate.wait()
        return await super().links(holding)


async def test_two_tags_of_one_manifest_that_are_pulled_at_once_are_both_written_down(owner: TaskOwner) -> None:
    """A rule that allows either tag allows the digest after a restart, too."""
    records = Slow()
    links = Links(records, owner)
    await links.of(HERE)
    await asyncio.gather(*(links.put_manifest(HERE, *described(IMAGE), Tag(tag)) for tag in ("3", "latest")))
    (written,) = await records.links(HERE)
    assert written.tags == ("3", "latest")


async def test_a_right_that_is_taken_while_it_is_written_stays_taken(owner: TaskOwner) -> None:
    """A purge is not undone by a write that had begun before it."""
    records = Slow()
    links = Links(records, owner)
    await links.of(HERE)
    writing = asyncio.create_task(links.put_manifest(HERE, *described(IMAGE), None))
    while not records.n_begun:
        await asyncio.sleep(0)
    await links.drop(HERE, Digest.parse(IMAGE.digest))
    await writing
    assert await records.links(HERE) == []


async def test_an_answer_that_is_vouched_for_while_links_are_read_does_not_outlive_the_right(owner: TaskOwner) -> None:
    """INV-8: the count moves when the right is gone, and not while a purge still waits for the disk."""
    records = Slow()
    await Links(records, owner).put_manifest(HERE, *described(IMAGE), None)
    links = Links(records, owner)
    records.gate = asyncio.Event()
    dropping = asyncio.create_task(links.drop(HERE, Digest.parse(IMAGE.digest)))
    await asyncio.sleep(0)
    n_dropped = links.n_dropped  # what an answer is vouched for with
    records.gate.set()
    await dropping
    assert links.n_dropped > n_dropped
