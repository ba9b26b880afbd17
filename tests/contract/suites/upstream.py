"""What every ports.Upstream promises. A class of tests; `tests/contract/test_upstream.py` says over which."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from proxy.errors import UnknownBlob, UnknownManifest, UnknownName
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, Tag
from proxy.ports import BlobBody, Upstream
from tests.support import images

REPOSITORY = Repository.parse("library/alpine")
NOWHERE = Repository.parse("library/nowhere")
IMAGE = images.image(1, (3 * images.MIB, 0))
SIGNATURE = images.artifact(IMAGE, "application/vnd.test.signature", b"signed")
TAGS = ("1", "2", "latest")
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
ABSENT = Digest.of(b"nobody has this")


@dataclass(frozen=True, slots=True)
class World:
    """An upstream that has `IMAGE` under `TAGS` and `SIGNATURE` in `REPOSITORY`, and what `have` adds: blobs."""

    upstream: Upstream
    have: Callable[[bytes, str], object]


async def whole(body: BlobBody) -> bytes:
    """All of a body, which is closed."""
    pieces = []
    while piece := await body.read():
        pieces.append(piece)
    await body.close()
    return b"".join(pieces)


class UpstreamSuite:
    """Takes the fixture `world`."""

    @pytest.mark.parametrize("target", [Tag("latest"), Digest.parse(IMAGE.digest)], ids=["by tag", "by digest"])
    async def test_manifest_comes_byte_for_byte(self, world: World, target: Tag | Digest) -> None:
        """INV-9 begins here: the bytes, their type and what upstream calls their digest."""
        found = await world.upstream.manifest(REPOSITORY, target)
        assert (found.body, found.media_type, str(found.digest)) == (IMAGE.body, IMAGE.media_type, IMAGE.digest)
        assert found.source

    async def test_manifest_head_tells_digest_type_and_size(self, world: World) -> None:
        """What a revalidation needs, without the body."""
        head = await world.upstream.manifest_head(REPOSITORY, Tag("latest"))
        assert (str(head.digest), head.media_type, head.size) == (IMAGE.digest, IMAGE.media_type, len(IMAGE.body))

    @pytest.mark.parametrize("target", [Tag("absent"), ABSENT], ids=["by tag", "by digest"])
    async def test_absent_manifest_is_unknown(self, world: World, target: Tag | Digest) -> None:
        """Absent for certain is a NotFound, never an UpstreamError."""
        with pytest.raises(UnknownManifest):
            await world.upstream.manifest(REPOSITORY, target)
        with pytest.raises(UnknownManifest):
            await world.upstream.manifest_head(REPOSITORY, target)

    async def test_blob_comes_whole_with_its_size(self, world: World) -> None:
        """From the first byte to a clean end, in pieces of at most a MiB."""
        body = await world.upstream.blob(REPOSITORY, Digest.of(LAYER))
        assert (body.size, body.offset) == (len(LAYER), 0)
        pieces = []
        while piece := await body.read():
            assert len(piece) <= 1 << 20
            pieces.append(piece)
        assert b"".join(pieces) == LAYER
        assert await body.read() == b""
        await body.close()
        await body.close()

    @pytest.mark.parametrize("offset", [1, len(LAYER) // 2, len(LAYER) - 1])
    async def test_blob_goes_on_from_an_offset(self, world: World, offset: int) -> None:
        """`size` stays that of the whole blob; `offset` says where the body begins."""
        body = await world.upstream.blob(REPOSITORY, Digest.of(LAYER), offset=offset)
        assert (body.size, body.offset) == (len(LAYER), offset)
        assert await whole(body) == LAYER[offset:]

    async def test_empty_blob_is_a_blob(self, world: World) -> None:
        """No bytes are content too."""
        world.have(b"", "sha256")
        body = await world.upstream.blob(REPOSITORY, Digest.of(b""))
        assert (body.size, await whole(body)) == (0, b"")
        assert await world.upstream.blob_size(REPOSITORY, Digest.of(b"")) == 0

    async def test_blob_by_sha512_is_had_alike(self, world: World) -> None:
        """image-spec § Registered algorithms."""
        world.have(b"long", "sha512")
        digest = Digest.of(b"long", "sha512")
        assert await whole(await world.upstream.blob(REPOSITORY, digest)) == b"long"

    async def test_blob_size_is_had_without_the_blob(self, world: World) -> None:
        """For a HEAD of a blob that is not here yet."""
        assert await world.upstream.blob_size(REPOSITORY, Digest.of(LAYER)) == len(LAYER)

    async def test_absent_blob_is_unknown(self, world: World) -> None:
        """As for manifests, and for HEAD and resuming alike."""
        with pytest.raises(UnknownBlob):
            await world.upstream.blob(REPOSITORY, ABSENT)
        with pytest.raises(UnknownBlob):
            await world.upstream.blob(REPOSITORY, ABSENT, offset=7)
        with pytest.raises(UnknownBlob):
            await world.upstream.blob_size(REPOSITORY, ABSENT)

    async def test_body_may_be_left_at_any_time(self, world: World) -> None:
        """Whoever leaves closes, and what was left behind does not disturb the next."""
        for _ in range(3):
            body = await world.upstream.blob(REPOSITORY, Digest.of(LAYER))
            await body.read()
            await body.close()
        assert await whole(await world.upstream.blob(REPOSITORY, Digest.of(LAYER))) == LAYER

    async def test_tags_come_in_upstreams_order(self, world: World) -> None:
        """distribution-spec § Listing Tags."""
        page = await world.upstream.tags(REPOSITORY, n=None, last=None)
        assert (page.tags, page.last) == (TAGS, None)

    async def test_tags_come_page_by_page(self, world: World) -> None:
        """`last` is what to ask for next, and None at the end."""
        found: list[str] = []
        last: str | None = None
        for _ in range(len(TAGS)):
            page = await world.upstream.tags(REPOSITORY, n=2, last=last)
            found += page.tags
            last = page.last
            if last is None:
                break
        assert (tuple(found), last) == (TAGS, None)

    async def test_tags_of_an_absent_repository_are_unknown(self, world: World) -> None:
        """The name is what is unknown then."""
        with pytest.raises(UnknownName):
            await world.upstream.tags(NOWHERE, n=None, last=None)

    @pytest.mark.parametrize(
        ("artifact_type", "n_found"), [("", 1), ("application/vnd.test.signature", 1), ("application/vnd.test.sbom", 0)]
    )
    async def test_referrers_come_as_an_index(self, world: World, artifact_type: str, n_found: int) -> None:
        """distribution-spec § Listing Referrers: an empty index, not a 404, where nothing refers."""
        body = await world.upstream.referrers(REPOSITORY, Digest.parse(IMAGE.digest), artifact_type=artifact_type)
        assert body is not None
        assert len(json.loads(body)["manifests"]) == n_found
