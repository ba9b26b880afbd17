"""engine/pull.py: every way to bytes passes the same gate, and a digest alone opens nothing (INV-8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import product
from typing import Literal

import pytest

from proxy.engine.blobs import let_go
from proxy.engine.explain import Explain
from proxy.errors import Denied, UnknownBlob, UnknownManifest, UnknownName, Unreachable
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, RepositoryPath, TagsList
from proxy.oci.names import Repository
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.rules.routes import ProjectRoute
from tests.support import images
from tests.support.appliance import HastyClock
from tests.support.engine import ALPINE, HOST, Engine, FakeUpstream, engine, tag, whole

IMAGE = images.image(3, (90_000,))
INDEX = images.index([IMAGE])
SIGNATURE = images.artifact(IMAGE, "application/vnd.test.signature", b"signed")
LAYER = IMAGE.blobs[-1].content
LAYER_DIGEST, CONFIG_DIGEST = Digest.of(LAYER), Digest.of(IMAGE.blobs[0].content)
IMAGE_DIGEST, INDEX_DIGEST = Digest.parse(IMAGE.digest), Digest.parse(INDEX.digest)
OTHER = Repository.parse("other/repository")

Way = Literal["tag", "digest", "blob", "HEAD blob", "referrers", "tags"]
WAYS: tuple[Way, ...] = ("tag", "digest", "blob", "HEAD blob", "referrers", "tags")


def path(repository: Repository = ALPINE, project: str | None = None) -> RepositoryPath:
    return RepositoryPath(project, repository.value)


async def ask(running: Engine, way: Way, at: RepositoryPath, digest: Digest = LAYER_DIGEST, name: str = "1") -> object:
    """Ask in one way, for the layer or the image."""
    pull = running.pull
    if way == "tag":
        return (await pull.manifest(ManifestGet(at, tag(name), None))).held.body
    if way == "digest":
        return (await pull.manifest(ManifestGet(at, IMAGE_DIGEST, None))).held.body
    if way == "blob":
        return await whole((await pull.blob(BlobGet(at, digest, None)))[1])
    if way == "HEAD blob":
        return (await pull.blob_size(BlobGet(at, digest, None)))[1]
    if way == "referrers":
        return (await pull.referrers(ReferrersList(at, IMAGE_DIGEST, "", None)))[1].descriptors
    return (await pull.tags(TagsList(at, None, None, None)))[1].tags


# -- policy on every route ---------------------------------------------------------------------------------------------

State = Literal["cold", "warm", "in flight"]


class Everything:
    """An upstream with the image, its index and its signature; bodies wait at a gate where one is set."""

    def __init__(self) -> None:
        self.upstream = FakeUpstream(piece_bytes=30_000)
        self.upstream.put(INDEX, "index")
        self.upstream.put(IMAGE, "1", "latest")
        self.upstream.put(SIGNATURE)


async def warmed(running: Engine, everything: Everything, state: State) -> Callable[[], Awaitable[None]]:
    """Bring the content into a state, through a project that may see it. Returns what ends that."""
    open_path = path(project="open")
    if state == "cold":
        return _nothing
    if state == "warm":
        await ask(running, "tag", open_path)
        await ask(running, "blob", open_path)
        await running.idle()
        return _nothing
    everything.upstream.gate = asyncio.Event()
    waiting = [asyncio.create_task(ask(running, way, open_path)) for way in ("tag", "digest", "blob")]
    for _ in range(50):
        await asyncio.sleep(0)

    async def end() -> None:
        assert everything.upstream.gate is not None
        everything.upstream.gate.set()
        await asyncio.gather(*waiting)

    return end


async def _nothing() -> None:
    pass


DENIALS = {
    "the repository": Rules("default", deny=(Glob.parse("docker.io/library/*"),)),
    "by the policy of all": Rules("default", policy_deny=(Glob.parse("docker.io/**"),)),
    "by an allow list that covers another": Rules("default", allow=(Glob.parse("quay.io/**"),)),
    "what belongs to no project": Rules("default", closed=True),
}


@pytest.mark.parametrize("state", ["cold", "warm", "in flight"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rules", DENIALS.values(), ids=DENIALS.keys())
async def test_a_denial_holds_on_every_route(rules: Rules, way: Way, state: State) -> None:
    """INV-8: by tag, by digest, blob, HEAD, referrers, lists; on the first pull, on a cached one, and beside a transfer
    that somebody else has running. Upstream is not asked for it."""
    everything = Everything()
    projects = (ProjectRoute("open"),)
    async with engine(everything.upstream, clock=HastyClock(), rules=[rules], projects=projects) as running:
        end = await warmed(running, everything, state)
        n_asked = len(everything.upstream.asked)
        with pytest.raises(Denied) as refused:
            await ask(running, way, path())
        assert refused.value.project == "default"
        assert len(everything.upstream.asked) == n_asked
        await end()


#: What is denied, and the ways in which that shows; the digest to ask for is the denied one.
CONTENT: list[tuple[str, Digest, tuple[Way, ...]]] = [
    ("a layer", LAYER_DIGEST, ("tag", "digest", "blob", "HEAD blob")),
    ("a config", CONFIG_DIGEST, ("tag", "digest", "blob", "HEAD blob")),
    ("an image", IMAGE_DIGEST, ("tag", "digest", "referrers")),
]


@pytest.mark.parametrize("state", ["cold", "warm", "in flight"])
@pytest.mark.parametrize(
    ("denied", "way"),
    [pytest.param(denied, way, id=f"{what} denied, by {way}") for what, denied, ways in CONTENT for way in ways],
)
async def test_a_denied_digest_is_denied_under_every_name(denied: Digest, way: Way, state: State) -> None:
    """INV-8: and a manifest whose config or layers are denied is denied itself, because a client that was given it may
    have nowhere else to go for the rest."""
    everything = Everything()
    rules = Rules("default", deny=(Glob.parse(str(denied)),))
    async with engine(
        everything.upstream, clock=HastyClock(), rules=[rules], projects=(ProjectRoute("open"),)
    ) as running:
        end = await warmed(running, everything, state)
        if state == "in flight":
            await end()
        with pytest.raises(Denied) as refused:
            await ask(running, way, path(), denied)
        assert refused.value.rule == str(denied)


async def test_the_children_of_an_index_are_refused_one_by_one() -> None:
    """An index whose one child is denied is served, byte for byte: indexes are never trimmed."""
    everything = Everything()
    rules = Rules("default", deny=(Glob.parse(IMAGE.digest),))
    async with engine(everything.upstream, rules=[rules]) as running:
        assert await ask(running, "tag", path(), name="index") == INDEX.body
        with pytest.raises(Denied):
            await ask(running, "digest", path())


async def test_an_allowed_tag_allows_what_it_resolved_to_and_nothing_else() -> None:
    """product.md, Rules on tags: kubelets fetch by digest. Until the tag was pulled its digests are refused; then they
    and all that they name are allowed, and another tag still is not."""
    everything = Everything()
    rules = Rules("default", allow=(Glob.parse("docker.io/library/alpine:ind*"),))
    everything.upstream.put(other := images.image(9, (10,)), "9")
    async with engine(everything.upstream, clock=HastyClock(), rules=[rules]) as running:
        for way in ("digest", "blob", "HEAD blob"):
            with pytest.raises(Denied):
                await ask(running, way, path())
        with pytest.raises(Denied):
            await ask(running, "tag", path())
        assert everything.upstream.asked == []
        await ask(running, "tag", path(), name="index")
        assert await ask(running, "digest", path()) == IMAGE.body
        assert await ask(running, "blob", path()) == LAYER
        assert await ask(running, "blob", path(), CONFIG_DIGEST)
        with pytest.raises(Denied):
            await running.pull.manifest(ManifestGet(path(), Digest.parse(other.digest), None))
        assert await ask(running, "tags", path()) == ("index",)


async def test_denying_a_tag_denies_the_name_only() -> None:
    """The same content by its digest, or under another tag, is let through."""
    everything = Everything()
    rules = Rules("default", deny=(Glob.parse("**:latest"),))
    async with engine(everything.upstream, clock=HastyClock(), rules=[rules]) as running:
        with pytest.raises(Denied):
            await ask(running, "tag", path(), name="latest")
        assert await ask(running, "tag", path(), name="1") == IMAGE.body
        assert await ask(running, "digest", path()) == IMAGE.body
        assert await ask(running, "tags", path()) == ("1", "index")


async def test_an_unknown_name_is_never_dialled() -> None:
    """product.md, Routing: 404, and nobody is asked."""
    everything = Everything()
    async with engine(everything.upstream) as running:
        with pytest.raises(UnknownName):
            await running.pull.manifest(ManifestGet(path(), tag("1"), "evil.test"))
        assert everything.upstream.asked == []


# -- links: a digest alone opens nothing -------------------------------------------------------------------------------


@pytest.fixture
async def known() -> AsyncIterator[Engine]:
    """An engine that has the image and its layer from one repository; `other/repository` has none of it upstream."""
    everything = Everything()
    everything.upstream.put(images.image(8, (10,)), "1", repository=OTHER)
    async with engine(everything.upstream, clock=HastyClock(), projects=(ProjectRoute("team"),)) as running:
        await ask(running, "tag", path())
        await ask(running, "blob", path())
        await running.idle()
        everything.upstream.asked.clear()
        yield running


def asked(running: Engine) -> FakeUpstream:
    upstream = running.upstreams[HOST]
    assert isinstance(upstream, FakeUpstream)
    return upstream


@pytest.mark.parametrize("way", ["digest", "blob", "HEAD blob"])
async def test_a_digest_known_from_elsewhere_opens_nothing(known: Engine, way: Way) -> None:
    """INV-8: bytes are shared, permission is not: upstream decides for the very repository that is asked for."""
    with pytest.raises((UnknownBlob, UnknownManifest)):
        await ask(known, way, path(OTHER))


@pytest.mark.parametrize(("way", "is_cached"), list(product(["digest", "blob", "HEAD blob"], [True, False])))
async def test_what_a_stranger_costs_upstream_does_not_tell_what_is_cached(
    known: Engine, way: Way, is_cached: bool
) -> None:
    """INV-8: a refusal is the same question upstream for what is here and for what is not."""
    digest = LAYER_DIGEST if is_cached else Digest.of(b"nobody has this")
    wanted = IMAGE_DIGEST if is_cached else digest
    with pytest.raises((UnknownBlob, UnknownManifest)):
        if way == "digest":
            await known.pull.manifest(ManifestGet(path(OTHER), wanted, None))
        else:
            await ask(known, way, path(OTHER), digest)
    assert asked(known).kinds() == ["manifest" if way == "digest" else "blob head"]


@pytest.mark.parametrize("way", ["digest", "blob", "HEAD blob"])
async def test_unlinked_while_upstream_is_down_is_upstreams_failure(known: Engine, way: Way) -> None:
    """house.md §6.4: 502, never the bytes and never a false 404. What is linked is served meanwhile."""
    asked(known).failure = Unreachable("down", upstream=HOST)
    with pytest.raises(Unreachable):
        await ask(known, way, path(OTHER))
    assert await ask(known, way, path()) is not None


async def test_one_project_does_not_read_what_was_cached_for_another(known: Engine) -> None:
    """Promise 7: the same repository through another project is asked for again."""
    asked(known).remove(str(LAYER_DIGEST))
    with pytest.raises(UnknownBlob):
        await ask(known, "blob", path(project="team"))
    assert await ask(known, "blob", path()) == LAYER


async def test_upstreams_word_is_a_link(known: Engine) -> None:
    """A blob that upstream confirms for this repository is served from the store, and is linked from then on."""
    asked(known).put_blob(LAYER, repository=OTHER)
    assert await ask(known, "blob", path(OTHER)) == LAYER
    assert asked(known).kinds() == ["blob head"]
    assert await ask(known, "blob", path(OTHER)) == LAYER
    assert asked(known).kinds() == ["blob head"]


async def test_an_unlinked_manifest_is_fetched_for_the_repository_and_linked(known: Engine) -> None:
    """The fetch is the proof that it may be seen; the bytes are shared."""
    asked(known).put(IMAGE, repository=OTHER)
    assert await ask(known, "digest", path(OTHER)) == IMAGE.body
    assert await ask(known, "digest", path(OTHER)) == IMAGE.body
    assert await ask(known, "blob", path(OTHER)) == LAYER
    assert asked(known).kinds() == ["manifest"]


async def test_a_child_of_a_linked_index_is_linked() -> None:
    """What a linked manifest names is visible, and a child's own children once it was served from the store."""
    everything = Everything()
    everything.upstream.put(INDEX, "index", repository=OTHER)
    async with engine(everything.upstream, clock=HastyClock()) as running:
        await ask(running, "tag", path())
        await ask(running, "tag", path(OTHER), name="index")
        everything.upstream.asked.clear()
        assert await ask(running, "digest", path(OTHER)) == IMAGE.body
        assert everything.upstream.asked == [], "its bytes are here, and the index names it"
        _, opened = await running.pull.blob(BlobGet(path(OTHER), LAYER_DIGEST, None))
        let_go(opened.source)
        assert everything.upstream.kinds() == ["blob"], "and it names the layer"
        await running.idle()


async def test_a_referrer_is_judged_by_the_type_under_which_it_is_listed() -> None:
    """distribution-spec, Listing Referrers: without an artifactType that is its config's. Pull, the referrers list and
    explain must mean the same by it."""
    signature = images.manifest(
        images.Blob(b"{}", "application/vnd.test.config"),
        [images.Blob(b"signed", "application/vnd.test.layer")],
        extra={"subject": IMAGE.descriptor},
    )
    upstream = FakeUpstream()
    upstream.put(IMAGE, "1")
    digest = upstream.put(signature, "signature")
    types = ("application/vnd.test.config", "application/vnd.test.layer")
    lists = Rules("default", allow=tuple(Glob.parse(f"media-type:{each}") for each in types))
    async with engine(upstream, rules=[lists]) as running:
        asked = ManifestGet(path(), digest, None)
        assert (await running.pull.manifest(asked)).held.body == signature.body
        explain = Explain(lambda: running.pull.plan, running.links, running.store.records, running.charges)
        assert (await explain.of(f"{HOST}/{ALPINE}@{digest}", ""))["verdict"] == "allow"
        # The other way round: what is listed under a denied type is not to be had.
        denied = Rules("default", deny=(Glob.parse(f"media-type:{types[0]}"),))
        running.pull.plan = replace(running.pull.plan, rules={"default": denied})
        with pytest.raises(Denied):
            await running.pull.manifest(asked)
        assert (await explain.of(f"{HOST}/{ALPINE}@{digest}", ""))["verdict"] == "deny"
