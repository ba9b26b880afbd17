"""A disk that cannot read its records: what is not known is asked upstream, and nothing becomes a false answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from proxy.errors import NotFound, Unavailable, UnknownBlob, UnknownManifest, Unreachable, UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, TagRecord
from proxy.rules.gates.immutability import Immutable
from proxy.rules.routes import DEFAULT_PROJECT
from proxy.store.memory import MemoryRecords, MemoryStore
from tests.support import images
from tests.support.engine import HOST, Engine, FakeUpstream, engine, route

IMAGE = images.image(1, (2000,))
LAYER = Digest.parse(IMAGE.blobs[1].digest)
MANIFEST = Digest.parse(IMAGE.digest)
PATH = RepositoryPath(None, "library/alpine")
GONE = [Unreachable("no connection", upstream=HOST), UnknownManifest("sealed"), UnknownBlob("sealed")]


class SickRecords(MemoryRecords):
    """Records that cannot be read while `is_sick`."""

    is_sick = False

    async def tag(self, holding: Holding, tag: Tag) -> TagRecord | None:
        if self.is_sick:
            raise Unavailable("cannot read the records: Input/output error")
        return await super().tag(holding, tag)

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        if self.is_sick:
            raise Unavailable("cannot read the records: Input/output error")
        return await super().links(holding)


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    """In which an earlier life has left the image, and whose records cannot be read since."""
    made = MemoryStore()
    made.records = SickRecords()
    upstream = FakeUpstream()
    upstream.put(IMAGE, "v1")
    async with engine(upstream, store=made) as running:
        await pulled(running, Tag("v1"))
        await running.read(LAYER)
        await running.idle()
    made.records.is_sick = True
    yield made
    await made.aclose()


async def pulled(running: Engine, target: Tag | Digest) -> bytes:
    """A manifest, as a client gets it."""
    return (await running.pull.manifest(ManifestGet(PATH, target, None))).held.body


async def test_everything_streams_through(store: MemoryStore) -> None:
    """reliability.md §3: EIO on any call; what is here is asked upstream as if it were not linked, and is right."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, "v1")
    async with engine(upstream, store=store) as running:
        assert await pulled(running, Tag("v1")) == IMAGE.body
        assert await pulled(running, MANIFEST) == IMAGE.body
        assert await running.read(LAYER) == IMAGE.blobs[1].content
        assert (await running.blobs.size(route(), running.origin(), LAYER))[0] == len(IMAGE.blobs[1].content)
        assert upstream.count("blob") == 0, "the bytes were here, and only the right to them was asked for"
        assert any("asking upstream" in notice for notice in running.notices)


@pytest.mark.parametrize("failure", GONE, ids=lambda error: f"{type(error).__name__}")
async def test_the_disk_is_the_answer_where_upstream_is_none(
    store: MemoryStore, failure: NotFound | UpstreamError
) -> None:
    """Promise 3: never a false 404. A sealed upstream would say it of what is here and cannot be read."""
    upstream = FakeUpstream()
    upstream.failure = failure
    async with engine(upstream, store=store) as running:
        for target in (Tag("v1"), MANIFEST):
            with pytest.raises(Unavailable, match="Input/output error"):
                await pulled(running, target)
        with pytest.raises(Unavailable, match="Input/output error"):
            await running.pull.blob(BlobGet(PATH, LAYER, None))
        with pytest.raises(Unavailable, match="Input/output error"):
            await running.pull.blob_size(BlobGet(PATH, LAYER, None))


async def test_a_fixed_tag_does_not_move_because_it_cannot_be_read(store: MemoryStore) -> None:
    """`immutable_tags`: what it keeps is not known now, and upstream's word does not replace it."""
    upstream = FakeUpstream()
    upstream.put(images.image(2, (10,)), "v1")
    async with engine(upstream, store=store) as running:
        running.pull.plan = replace(running.pull.plan, immutable={DEFAULT_PROJECT: Immutable.of(("v*",))})
        with pytest.raises(Unavailable):
            await pulled(running, Tag("v1"))
    assert upstream.kinds() == []


async def test_what_was_learned_of_a_sick_disk_is_forgotten_when_it_is_well(store: MemoryStore) -> None:
    """Without a restart: the records are read again, and hits are hits."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, "v1")
    assert isinstance(store.records, SickRecords)
    async with engine(upstream, store=store) as running:
        await running.read(LAYER)
        store.records.is_sick = False
        upstream.failure = Unreachable("no connection", upstream=HOST)
        assert await pulled(running, MANIFEST) == IMAGE.body
        assert await running.read(LAYER) == IMAGE.blobs[1].content
