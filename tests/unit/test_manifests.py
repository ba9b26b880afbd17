"""engine/manifests.py by behaviour: whole, verified, byte for byte (INV-9). Rot is tests/unit/test_verification.py's."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from proxy.errors import InvalidManifest, Misbehaved, UnknownManifest, Unreachable
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.rules.backoff import BAD_FOR_S
from proxy.store.memory import MemoryBlobs, MemoryStore
from tests.support import images
from tests.support.engine import HOST, Engine, FakeUpstream, engine, route, tag
from tests.support.slow_commits import slow_commits

#: Bytes that any re-serialisation would change: order, spaces, escapes, unknown keys, numbers.
GOLDEN = (
    b'{ "layers" :[],\n\t"schemaVersion": 2,   "config":{"size":2, "digest":"sha256:'
    b"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    b'", "mediaType":"application/vnd.oci.empty.v1+json"},"x-unknown": {"\\u00e9": 1.50, "big": 12345678901234567890},'
    b'"mediaType":"application/vnd.oci.image.manifest.v1+json"\r\n}  \n'
)
IMAGE = images.Image(GOLDEN, images.OCI_MANIFEST)
DIGEST = Digest.of(GOLDEN)


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream()
    found.put(IMAGE, "1")
    return found


@pytest.fixture
async def running(upstream: FakeUpstream) -> AsyncIterator[Engine]:
    async with engine(upstream) as made:
        yield made


@pytest.mark.parametrize("target", [Tag("1"), DIGEST], ids=["by tag", "by digest"])
async def test_a_manifest_stays_what_it_is_on_every_way(upstream: FakeUpstream, target: Tag | Digest) -> None:
    """INV-9: from upstream, from memory, and from the store of another process: the same bytes, and they hash right."""
    store = MemoryStore()
    async with engine(upstream, store=store) as running:
        held, outcome = await running.manifests.fetch(route(), running.origin(), target)
        assert (held.body, held.descriptor.digest, outcome) == (GOLDEN, DIGEST, "miss")
        held, outcome = await running.manifests.get(route(), running.origin(), DIGEST)
        assert (held.body, outcome) == (GOLDEN, "hit")
        assert await running.stored(DIGEST) == GOLDEN
    async with engine(upstream, store=store) as running:
        held, outcome = await running.manifests.get(route(), running.origin(), DIGEST)
        assert (held.body, held.descriptor.media_type, outcome) == (GOLDEN, images.OCI_MANIFEST, "hit")
        assert json.loads(held.body)["x-unknown"]
    assert upstream.count("manifest") == 1
    await store.aclose()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_a_manifest_is_kept_under_the_algorithm_it_was_asked_by(algorithm: str) -> None:
    """image-spec § Registered algorithms: sha512 is as good a name."""
    upstream = FakeUpstream()
    digest = Digest.of(GOLDEN, algorithm)
    upstream._manifests["library/alpine", str(digest)] = IMAGE
    async with engine(upstream) as running:
        held, _ = await running.manifests.get(route(), running.origin(), digest)
        assert held.descriptor.digest == digest
        assert await running.stored(digest) == GOLDEN


LIES: dict[str, tuple[Tag | Digest, images.Image]] = {
    "another document by digest": (DIGEST, images.image(1, (10,))),
    "a web page by tag": (Tag("1"), images.Image(b"<html>", images.OCI_MANIFEST)),
    "half a document by tag": (Tag("1"), images.Image(GOLDEN[:50], images.OCI_MANIFEST)),
}


@pytest.mark.parametrize(("target", "lie"), LIES.values(), ids=LIES.keys())
async def test_a_manifest_that_is_none_is_bad_for_half_a_minute(target: Tag | Digest, lie: images.Image) -> None:
    """As a blob: clients that come back at once get the same answer, and cost upstream nothing."""
    upstream = FakeUpstream()
    upstream._manifests["library/alpine", str(target)] = lie
    async with engine(upstream) as running:
        with pytest.raises((Misbehaved, InvalidManifest)) as first:
            await running.manifests.fetch(route(), running.origin(), target)
        upstream.put(IMAGE, "1")
        for _ in range(10):
            with pytest.raises(type(first.value), match="not asked again for 30 s"):
                await running.manifests.fetch(route(), running.origin(), target)
        assert upstream.count("manifest") == 1
        other, _ = await running.manifests.fetch(route(), running.origin(), DIGEST if target != DIGEST else Tag("1"))
        assert other.body == GOLDEN
        await running.clock.advance(BAD_FOR_S)
        held, _ = await running.manifests.fetch(route(), running.origin(), target)
        assert held.body == GOLDEN


async def test_askers_of_one_digest_ask_upstream_once(running: Engine, upstream: FakeUpstream) -> None:
    """One flight for a repository and a target."""
    found = await asyncio.gather(*(running.manifests.get(route(), running.origin(), DIGEST) for _ in range(50)))
    assert Counter(outcome for _, outcome in found) == {"miss": 1, "coalesced": 49}
    assert upstream.count("manifest") == 1


@pytest.mark.parametrize(
    ("body", "media_type", "by", "error"),
    [
        pytest.param(b"<html>", images.OCI_MANIFEST, "tag", InvalidManifest, id="no JSON"),
        pytest.param(b'{"schemaVersion":1}', images.OCI_MANIFEST, "tag", InvalidManifest, id="schema 1"),
        pytest.param(GOLDEN, images.OCI_INDEX, "tag", InvalidManifest, id="called an index"),
        pytest.param(b" " * (4 << 20) + GOLDEN, images.OCI_MANIFEST, "tag", InvalidManifest, id="over 4 MiB"),
        pytest.param(GOLDEN + b" ", images.OCI_MANIFEST, "digest", Misbehaved, id="other bytes than the digest's"),
    ],
)
async def test_what_is_not_a_manifest_is_neither_served_nor_kept(
    running: Engine, upstream: FakeUpstream, body: bytes, media_type: str, by: str, error: type[Exception]
) -> None:
    """INV-1, INV-9: nothing unverified gets a name, and nothing ambiguous is handed on (CVE-2021-41190)."""
    wanted = images.Image(body, media_type)
    target = tag("bad") if by == "tag" else DIGEST
    upstream._manifests["library/alpine", str(target)] = wanted
    with pytest.raises(error):
        await running.manifests.fetch(route(), running.origin(), target)
    assert await running.stored(Digest.of(body)) is None
    assert len(running.ledger) == 0


async def test_a_digest_header_that_lies_is_believed_to_lie(running: Engine, upstream: FakeUpstream) -> None:
    """Docker-Content-Digest proves nothing, and one that disagrees with the bytes shows that something is wrong."""

    class Liar(FakeUpstream):
        async def manifest(self, repository, target):  # type: ignore[no-untyped-def]
            answer = await super().manifest(repository, target)
            return type(answer)(answer.body, answer.media_type, Digest.of(b"another"), answer.source)

    liar = Liar("quay.io")
    liar.put(IMAGE, "1")
    async with engine(liar) as other:
        with pytest.raises(Misbehaved):
            await other.manifests.fetch(route(host="quay.io"), other.origin("quay.io"), tag("1"))
        held, _ = await other.manifests.fetch(route(host="quay.io"), other.origin("quay.io"), DIGEST)
        assert held.body == GOLDEN, "by digest the bytes speak for themselves"


async def test_absence_is_remembered_by_repository_and_target(running: Engine, upstream: FakeUpstream) -> None:
    """A negative answer for one name is no answer for another, and ends."""
    missing = Digest.of(b"missing")
    for _ in range(3):
        with pytest.raises(UnknownManifest):
            await running.manifests.get(route(), running.origin(), missing)
    assert upstream.count("manifest") == 1
    with pytest.raises(UnknownManifest):
        await running.manifests.fetch(route(), running.origin(), tag("missing"))
    assert upstream.count("manifest") == 2
    await running.clock.advance(running.origin().negative_ttl_s)
    with pytest.raises(UnknownManifest):
        await running.manifests.get(route(), running.origin(), missing)
    assert upstream.count("manifest") == 3


async def test_a_failure_is_not_remembered(running: Engine, upstream: FakeUpstream) -> None:
    """ "Could not find out" is asked again the next time."""
    upstream.failure = Unreachable("down", upstream=HOST)
    with pytest.raises(Unreachable):
        await running.manifests.get(route(), running.origin(), DIGEST)
    upstream.failure = None
    assert (await running.manifests.get(route(), running.origin(), DIGEST))[0].body == GOLDEN


async def test_without_room_a_manifest_is_served_and_not_kept(upstream: FakeUpstream) -> None:
    """Promise 5: the store never exceeds its capacity; who asks gets the bytes all the same."""
    async with engine(upstream, capacity=0) as running:
        held, _ = await running.manifests.get(route(), running.origin(), DIGEST)
        assert held.body == GOLDEN
        assert await running.stored(DIGEST) is None
        assert running.capacity.degraded


async def test_a_blob_that_was_linked_as_a_blob_is_not_served_as_a_manifest(
    running: Engine, upstream: FakeUpstream
) -> None:
    """Bytes that are no manifest are asked for upstream, which knows what they are there."""
    layer = upstream.put_blob(b"not a manifest")
    await running.read(layer)
    await running.idle()
    with pytest.raises(UnknownManifest):
        await running.manifests.get(route(), running.origin(), layer)


async def test_a_manifest_that_has_its_name_is_counted_though_the_process_is_about_to_end(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: the bound that the next life starts from would allow too much."""
    async with engine(upstream) as running:
        blobs = running.store.blobs
        assert isinstance(blobs, MemoryBlobs)
        begun = slow_commits(blobs, monkeypatch, 5)
        held = await running.manifests._verified(route(), running.origin(), Tag("1"))
        keeping = asyncio.create_task(running.manifests.keep(held, "default"))
        await begun.wait()
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        digest = held.descriptor.digest
        assert await running.stored(digest) == held.body
        assert digest in running.ledger
        assert digest in running.charges.book.of("default")
