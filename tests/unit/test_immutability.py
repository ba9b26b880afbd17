"""Immutable tags: once seen, a tag that matches keeps its digest here; a move upstream is told and not followed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.errors import UnknownManifest
from proxy.events import TagHeld, TagMoved
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.rules.gates.immutability import Immutable
from proxy.rules.routes import DEFAULT_PROJECT
from tests.support.engine import Engine, FakeUpstream, engine
from tests.support.images import image

FIRST, SECOND, THIRD = (image(n, (2000,)) for n in range(3))


@pytest.mark.parametrize(
    ("patterns", "tag", "is_fixed"),
    [
        (("v*",), "v1.2", True),
        (("v*",), "latest", False),
        ((), "v1", False),
        (("1.2.3", "rel-*"), "1.2.3", True),
        (("1.2.3",), "1.2.30", False),
        (("*",), "anything", True),
    ],
)
def test_patterns(patterns: tuple[str, ...], tag: str, is_fixed: bool) -> None:
    """Globs over tags, whole."""
    assert Immutable.of(patterns).covers(Tag(tag)) is is_fixed


async def pulled(running: Engine, tag: str = "v1") -> Digest:
    """What the tag means here now."""
    asked = ManifestGet(RepositoryPath(None, "library/alpine"), Tag(tag), None)
    return (await running.pull.manifest(asked)).held.descriptor.digest


def fix(running: Engine) -> None:
    """v* never move."""
    running.pull.plan = replace(running.pull.plan, immutable={DEFAULT_PROJECT: Immutable.of(("v*",))})


async def test_a_fixed_tag_keeps_its_digest_and_the_move_is_told_once() -> None:
    """Served as before, for any number of looks; a second move is told again, and so is a deletion."""
    upstream = FakeUpstream()
    first = upstream.put(FIRST, "v1", "latest")
    async with engine(upstream) as running:
        fix(running)
        assert await pulled(running) == await pulled(running, "latest") == first
        second = upstream.put(SECOND, "v1", "latest")
        for _ in range(3):
            await running.clock.advance(601)
            assert await pulled(running) == first
            assert await pulled(running, "latest") == second
        held = [event for event in running.events if isinstance(event, TagHeld)]
        assert [(one.tag, one.kept, one.now) for one in held] == [("v1", str(first), str(second))]
        assert [event.tag for event in running.events if isinstance(event, TagMoved)] == ["latest"]
        assert running.tags.refused_moves == {(DEFAULT_PROJECT, "docker.io/library/alpine:v1"): (first, second)}
        upstream.put(THIRD, "v1")
        await running.clock.advance(601)
        assert await pulled(running) == first
        upstream.remove("v1")
        await running.clock.advance(601)
        assert await pulled(running) == first
        told = [event.now for event in running.events if isinstance(event, TagHeld)]
        assert told == [str(second), THIRD.digest, ""]
        upstream.put(FIRST, "v1")
        await running.clock.advance(601)
        assert await pulled(running) == first and not running.tags.refused_moves


async def test_a_fixed_tag_is_fetched_again_by_its_digest_after_eviction() -> None:
    """What was evicted comes back as what it was, wherever the tag points by now."""
    upstream = FakeUpstream()
    first = upstream.put(FIRST, "v1")
    async with engine(upstream) as running:
        fix(running)
        await pulled(running)
        upstream.put(SECOND, "v1")
        await running.capacity.evict([first])
        running.manifests.forget(first)
        assert await pulled(running) == first
        await running.capacity.evict([first])
        running.manifests.forget(first)
        upstream.remove(str(first))
        with pytest.raises(UnknownManifest, match=r"keeps sha256:.* has been evicted"):
            await pulled(running)
