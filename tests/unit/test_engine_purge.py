"""Taking things out by hand, and looking at what is in: by behaviour, over a store in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from proxy.engine.catalogue import SNAPSHOT_S, Catalogue
from proxy.engine.purge import Purge, Purged
from proxy.errors import BadRequest
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.oci.names import Reference, Repository, Tag, parse_tag_or_digest
from proxy.rules.routes import ProjectRoute
from tests.support.engine import Engine, FakeUpstream, engine, whole
from tests.support.images import Blob, Image, artifact, image, index, manifest

KIB = 1024
ALPINE = "library/alpine"


@dataclass(slots=True)
class Bench:
    """An engine with something in it, and the two under test."""

    engine: Engine
    upstream: FakeUpstream
    purge: Purge
    catalogue: Catalogue

    async def pull(self, repository: str, target: str, *, project: str | None = None, whole_of: bool = True) -> None:
        """As a client does: the manifest, then all that it names."""
        path = RepositoryPath(project, repository)
        held = (await self.engine.pull.manifest(ManifestGet(path, parse_tag_or_digest(target), None))).held
        for child in held.manifest.children:
            await self.pull(repository, str(child.digest), project=project)
        for part in (held.manifest.config, *held.manifest.layers):
            if part is not None and whole_of:
                _, opened = await self.engine.pull.blob(BlobGet(path, part.digest, None))
                await whole(opened)
        await self.engine.idle()

    async def has(self, *digests: str) -> list[bool]:
        """Whether these are in the store."""
        return [await self.engine.stored(Digest.parse(digest)) is not None for digest in digests]

    async def take_out(self, what: str, **words: object) -> Purged:
        """Purge, and hold it to the truth: what it says it freed is what is gone."""
        before = self.engine.ledger.committed
        purged = await self.purge.run(what, **words)  # type: ignore[arg-type]
        assert (self.engine.ledger.committed < before) == (purged.is_done and purged.n_blobs > 0)
        return purged


@asynccontextmanager
async def bench(**pushed: Image) -> AsyncIterator[Bench]:
    """An upstream with `library/alpine` at these tags, and an engine that has pulled nothing yet."""
    upstream = FakeUpstream()
    for tag, one in pushed.items():
        upstream.put(one, tag)
    async with engine(upstream, projects=(ProjectRoute("other"),)) as running:
        catalogue = Catalogue(
            running.store.records, running.links, running.capacity, clock=running.clock, owner=running.owner
        )
        purge = Purge(running.store.records, running.links, running.tags, running.manifests, running.capacity)
        yield Bench(running, upstream, purge, catalogue)


def blobs_of(one: Image) -> list[str]:
    return [one.digest, *(blob.digest for blob in one.all_blobs())]


async def test_a_purged_tag_takes_its_manifest_and_its_blobs_along() -> None:
    """Issue 7: the name, the right and the bytes; whoever asks again has it fetched anew."""
    one = image(1, (9 * KIB,))
    async with bench(one=one) as b:
        await b.pull(ALPINE, "one")
        purged = await b.take_out("alpine:one")
        assert purged.tags == ("docker.io/library/alpine:one",)
        assert (purged.n_manifests, purged.n_blobs) == (1, 3)
        assert not any(await b.has(*blobs_of(one)))
        n_before = b.upstream.count("manifest")
        await b.pull(ALPINE, "one")
        assert b.upstream.count("manifest") == n_before + 1
        assert all(await b.has(*blobs_of(one)))


async def test_a_dry_run_counts_and_changes_nothing() -> None:
    """What the dashboard shows before somebody presses the button."""
    one = image(1, (9 * KIB,))
    async with bench(one=one) as b:
        await b.pull(ALPINE, "one")
        said = await b.take_out("alpine:one", dry_run=True)
        assert all(await b.has(*blobs_of(one)))
        done = await b.take_out("alpine:one")
        assert (said.tags, said.n_manifests, said.n_blobs, said.n_bytes) == (
            done.tags,
            done.n_manifests,
            done.n_blobs,
            done.n_bytes,
        )
        assert not said.is_done and done.is_done


async def test_what_another_image_names_stays() -> None:
    """Bytes are shared: a layer goes with the last image that needs it."""
    layer = Blob(b"shared" * KIB)
    one, two = manifest(Blob(b"{}"), [layer]), manifest(Blob(b'{"a":1}'), [layer])
    async with bench(one=one, two=two) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "two")
        await b.take_out("alpine:one")
        assert await b.has(one.digest, layer.digest, two.digest) == [False, True, True]
        await b.take_out("alpine:two")
        assert await b.has(layer.digest, two.digest) == [False, False]


async def test_what_another_project_has_stays_and_it_keeps_its_right() -> None:
    """Conviction 9: bytes are shared, permission is not; a purge in one project is no purge in another."""
    one = image(1, (9 * KIB,))
    async with bench(one=one) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "one", project="other")
        purged = await b.purge.run("alpine:one", project="other")
        assert (purged.n_manifests, purged.n_blobs) == (1, 0)
        assert all(await b.has(*blobs_of(one)))
        assert (await b.catalogue.image(Reference.parse("alpine:one"), ["default", "other"]))[
            0
        ].holding.project == "default"


async def test_an_index_goes_with_its_children_and_what_refers_to_it() -> None:
    """Signatures and SBOMs of what is not here any more are of no use."""
    both = index([image(1, (4 * KIB,)), image(2, (4 * KIB,), architecture="arm64")])
    sbom = artifact(both, "application/spdx+json", b"what is in it")
    signature = manifest(Blob(b"{}"), [Blob(b"signed")])
    async with bench(one=both, **{f"sha256-{both.digest[7:]}.sig": signature}) as b:
        b.upstream.put(sbom)
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, sbom.digest)
        await b.pull(ALPINE, f"sha256-{both.digest[7:]}.sig")
        (seen,) = await b.catalogue.image(Reference.parse("alpine:one"), ["default"])
        assert [variant.platform for variant in seen.variants] == ["linux/amd64", "linux/arm64"]
        assert {(r.artifact_type, bool(r.tag)) for r in seen.referrers} == {
            ("application/spdx+json", False),
            ("", True),
        }
        purged = await b.take_out("alpine:one")
        assert purged.n_manifests == 5
        assert len(b.engine.ledger) == 0


async def test_a_child_that_has_a_tag_of_its_own_stays() -> None:
    """A name that was not meant still leads to all of it."""
    amd = image(1, (4 * KIB,))
    both = index([amd, image(2, (4 * KIB,), architecture="arm64")])
    async with bench(one=both, amd=amd) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "amd")
        await b.take_out("alpine:one")
        assert all(await b.has(*blobs_of(amd)))
        assert await b.has(both.digest) == [False]


async def test_two_tags_of_one_image_are_two_names() -> None:
    """Purging one name takes the name; the image goes with the last."""
    one = image(1, (4 * KIB,))
    async with bench(one=one, same=one) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "same")
        assert (await b.purge.run("alpine:one")).n_manifests == 0
        assert all(await b.has(*blobs_of(one)))
        assert (await b.take_out("alpine:same")).n_manifests == 1


async def test_older_images_of_a_moving_tag_go_with_it() -> None:
    """Nothing but that name ever led to them."""
    old, new = image(1, (4 * KIB,)), image(2, (4 * KIB,))
    async with bench(one=old) as b:
        await b.pull(ALPINE, "one")
        b.upstream.put(new, "one")
        await b.engine.clock.advance(3600)
        await b.pull(ALPINE, "one")
        await b.take_out("alpine:one")
        assert len(b.engine.ledger) == 0


async def test_a_digest_means_those_bytes_wherever_they_are() -> None:
    """An operator who has a bad layer wants it gone, though images name it; the next reader has it fetched."""
    one = image(1, (4 * KIB,))
    layer = one.all_blobs()[-1].digest
    async with bench(one=one) as b:
        await b.pull(ALPINE, "one")
        purged = await b.take_out(layer)
        assert (purged.tags, purged.n_manifests, purged.n_blobs) == ((), 0, 1)
        assert await b.has(layer, one.digest) == [False, True]
        await b.pull(ALPINE, "one")
        assert await b.has(layer) == [True]


async def test_a_manifest_by_digest_goes_with_the_tags_that_lead_to_it() -> None:
    """No name may lead to what was taken out."""
    one = image(1, (4 * KIB,))
    async with bench(one=one, same=one) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "same")
        purged = await b.take_out(one.digest)
        assert len(purged.tags) == 2
        assert len(b.engine.ledger) == 0


async def test_a_pattern_takes_whole_repositories() -> None:
    """With manifests that no tag leads to."""
    one, two = image(1, (4 * KIB,)), image(2, (4 * KIB,))
    async with bench(one=one) as b:
        b.upstream.put(two, repository=Repository.parse("team/app"))
        await b.pull(ALPINE, "one")
        await b.pull("team/app", two.digest)
        await b.take_out("docker.io/team/**")
        assert await b.has(one.digest, two.digest) == [True, False]


async def test_a_pinned_image_stays_whole() -> None:
    """A pin is a promise; whoever wants it gone lets go of the pin first."""
    one, two = image(1, (4 * KIB,)), image(2, (4 * KIB,))
    async with bench(one=one, two=two) as b:
        await b.pull(ALPINE, "one")
        await b.pull(ALPINE, "two")
        b.engine.capacity.pinned = frozenset(map(Digest.parse, blobs_of(one)))
        purged = await b.take_out("docker.io/library/alpine")
        assert (purged.n_pinned, purged.tags) == (1, ("docker.io/library/alpine:two",))
        assert all(await b.has(*blobs_of(one)))
        assert not any(await b.has(*blobs_of(two)))


async def test_what_is_being_read_is_left_to_eviction() -> None:
    """A reader keeps its bytes; the name is gone at once."""
    one = image(1, (4 * KIB,))
    layer = one.all_blobs()[-1].digest
    async with bench(one=one) as b:
        await b.pull(ALPINE, "one")
        opened = await b.engine.open(Digest.parse(layer))
        purged = await b.purge.run("alpine:one")
        assert (purged.n_busy, purged.n_blobs) == (1, 2)
        assert await whole(opened) == one.all_blobs()[-1].content
        assert await b.catalogue.image(Reference.parse("alpine:one"), ["default"]) == []


async def test_what_is_not_here_is_not_found() -> None:
    """Nothing happens, and the answer says so."""
    async with bench(one=image(1, (4 * KIB,))) as b:
        assert not (await b.purge.run("alpine:absent")).found_anything
        assert not (await b.purge.run("sha256:" + "0" * 64)).found_anything
        with pytest.raises(BadRequest):
            await b.purge.run("no such:thing")


# -- looking -----------------------------------------------------------------------------------------------------------


async def test_a_search_finds_words_in_names_and_tags() -> None:
    """All words must be there, in any order; capitals do not matter."""
    async with bench(one=image(1, (4 * KIB,)), two=image(2, (4 * KIB,))) as b:
        b.upstream.put(image(3, (4 * KIB,)), "v1", repository=Repository.parse("team/app"))
        for repository, tag in ((ALPINE, "one"), (ALPINE, "two"), ("team/app", "v1")):
            await b.pull(repository, tag)

        async def tags(words: str) -> list[str]:
            found, _ = await b.catalogue.search(words)
            return [f"{one.holding.repository}:{record.tag}" for one in found for record in one.tags]

        assert await tags("") == ["library/alpine:one", "library/alpine:two", "team/app:v1"]
        assert await tags("ALPINE") == ["library/alpine:one", "library/alpine:two"]
        assert await tags("alpine two") == ["library/alpine:two"]
        assert await tags("alpine:two") == ["library/alpine:two"]
        assert await tags("app docker.io") == ["team/app:v1"]
        assert await tags("nothing") == []
        assert (await b.catalogue.search("", limit=1))[1]


async def test_a_search_reads_the_records_again_after_a_while() -> None:
    """Somebody who types does not read the disk for each letter; somebody who waits sees what is new."""
    async with bench(one=image(1, (4 * KIB,)), two=image(2, (4 * KIB,))) as b:
        await b.pull(ALPINE, "one")
        assert (await b.catalogue.search("alpine"))[0][0].n_tags == 1
        await b.pull(ALPINE, "two")
        assert (await b.catalogue.search("alpine"))[0][0].n_tags == 1
        await b.engine.clock.advance(SNAPSHOT_S + 1)
        assert (await b.catalogue.search("alpine"))[0][0].n_tags == 2


async def test_an_image_shows_what_of_it_is_here() -> None:
    """Platforms, layers and sizes; and looking is not using, so that eviction goes on as if nobody had looked."""
    amd = image(1, (4 * KIB, 9 * KIB))
    both = index([amd, image(2, (4 * KIB,), architecture="arm64")])
    async with bench(one=both) as b:
        await b.engine.pull.manifest(ManifestGet(RepositoryPath(None, ALPINE), Tag("one"), None))
        await b.pull(ALPINE, amd.digest, whole_of=False)
        _, opened = await b.engine.pull.blob(
            BlobGet(RepositoryPath(None, ALPINE), Digest.parse(amd.all_blobs()[0].digest), None)
        )
        await whole(opened)
        await b.engine.idle()
        order = list(b.engine.ledger)
        (seen,) = await b.catalogue.image(Reference.parse("alpine:one"), ["default"])
        assert list(b.engine.ledger) == order
        known, unknown = seen.variants
        assert (known.is_known, known.is_cached, known.is_whole) == (True, True, False)
        assert [part.is_cached for part in known.parts] == [True, False, False]
        assert known.total_bytes == len(amd.body) + sum(len(blob.content) for blob in amd.all_blobs())
        assert (unknown.is_known, unknown.cached_bytes, unknown.parts) == (False, 0, ())
        assert seen.tags == ("one",)
