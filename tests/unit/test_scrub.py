"""engine/scrub.py: rot is found, taken out of reach and, where wanted, fetched again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.engine.scrub import CURSOR, OPENING_BYTES, Scrub
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.ports import Holding, LocalFile
from proxy.store.disk import DiskStore
from tests.support import images
from tests.support.appliance import HastyClock
from tests.support.engine import ALPINE, Engine, FakeUpstream, engine, route, tag

IMAGE = images.image(3, (30_000, 40_000))
LAYERS = [Digest.parse(blob.digest) for blob in IMAGE.blobs]
MANIFEST = Digest.parse(IMAGE.digest)


def path_of(root: Path, digest: Digest) -> Path:
    return root / "breakwater" / "blobs" / digest.algorithm / digest.hex[:2] / digest.hex


def rot(root: Path, digest: Digest, at: int = 5) -> None:
    """One bit, with nothing else changed that anybody looks at."""
    path = path_of(root, digest)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)


def scrub_of(running: Engine) -> Scrub:
    async def refetch(holding: Holding, digest: Digest, is_manifest: bool) -> None:
        path = RepositoryPath(None, holding.repository)
        if is_manifest:
            await running.pull.manifest(ManifestGet(path, digest, None))
            return
        _, opened = await running.pull.blob(BlobGet(path, digest, None))
        assert not isinstance(opened.source, LocalFile)
        await opened.source.beyond(opened.size - 1)
        opened.source.leave()

    return Scrub(
        running.store.blobs,
        running.store.records,
        running.store.facts,
        running.verification,
        running.ledger.size_of,
        refetch,
        clock=running.clock,
        owner=running.owner,
        observe=running.events.append,
    )


@asynccontextmanager
async def filled(root: Path) -> AsyncIterator[tuple[Engine, DiskStore, FakeUpstream]]:
    """An engine that has pulled the image into a store on disk, in a hurry."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, "1")
    store = await DiskStore.open(root, clock=HastyClock(), report=print)
    async with engine(upstream, store=store, clock=HastyClock()) as running:
        await running.tags.resolve(route(), running.origin(), tag("1"))
        for digest in LAYERS:
            await running.read(digest)
        await running.idle()
        yield running, store, upstream
    await store.aclose()


@pytest.mark.parametrize("is_repaired", [False, True], ids=["found", "repaired"])
async def test_rot_is_quarantined_and_with_a_repair_fetched_again(tmp_path: Path, is_repaired: bool) -> None:
    """Every file is hashed, the manifest's too; what is right stays as it is."""
    async with filled(tmp_path) as (running, _, _):
        rot(tmp_path, LAYERS[0])
        rot(tmp_path, MANIFEST)
        running.manifests.forget(MANIFEST)
        steps: list[Any] = []
        report = await scrub_of(running).verify(steps.append, repair=is_repaired)
        assert set(report["rotten"]) == {str(LAYERS[0]), str(MANIFEST)}
        assert set(report["rotten"].values()) == ({"repaired"} if is_repaired else {""})
        assert report["is_well"] == is_repaired
        assert [step["what"] for step in steps] == ["rotten", "rotten"]
        await running.idle()
        again = await scrub_of(running).verify(steps.append)
        assert again["is_well"] and again["blobs"] == len(LAYERS) + 1 - (0 if is_repaired else 2)
        assert len(os.listdir(tmp_path / "breakwater" / "quarantine")) == 2


async def test_what_the_ledger_does_not_know_is_told(tmp_path: Path) -> None:
    """The count equals a recount, or somebody hears of it."""
    async with filled(tmp_path) as (running, _, _):
        running.ledger.drop(LAYERS[0])
        report = await scrub_of(running).verify(lambda _: None)
        assert report["miscounted"] == [str(LAYERS[0])] and not report["is_well"]


async def test_the_background_pass_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    """At a rate, which a file's opening counts against as well, in the order of the folders; a cursor that makes no sense
    begins anew."""
    async with filled(tmp_path) as (running, store, _):
        all_of_them = sorted([*LAYERS, MANIFEST])
        rot(tmp_path, all_of_them[-1])
        await store.facts.put(CURSOR, str(all_of_them[0]).encode())
        before = running.clock.monotonic()
        found = await scrub_of(running).scrub(1 << 20)
        assert found.n_blobs == len(all_of_them) - 1 and list(found.rotten) == [all_of_them[-1]]
        n_bytes = found.n_bytes + found.n_blobs * OPENING_BYTES
        assert running.clock.monotonic() - before == pytest.approx(n_bytes / (1 << 20))
        await store.facts.put(CURSOR, b"\xff")
        assert (await scrub_of(running).scrub(1 << 30)).n_blobs == len(all_of_them) - 1


async def test_what_is_fetched_again_and_not_kept_is_not_repaired(tmp_path: Path) -> None:
    """Repaired is what is in the store again; a transfer may have passed through it."""
    async with filled(tmp_path) as (running, _, _):
        rot(tmp_path, LAYERS[0])
        running.ledger.capacity = running.ledger.committed - 30_000
        running.capacity.pinned = {*LAYERS, MANIFEST}
        report = await scrub_of(running).verify(lambda _: None, repair=True)
        assert report["rotten"] == {str(LAYERS[0]): "it was fetched again and could not be kept"}
        assert not report["is_well"]


async def test_what_somebody_else_has_put_away_meanwhile_is_no_finding(tmp_path: Path) -> None:
    """Whoever found it has told of it, and it is out of reach: `verify` speaks of what is stored."""
    async with filled(tmp_path) as (running, store, _):
        rot(tmp_path, LAYERS[0])
        looked = store.blobs.open

        async def found_by_a_reader(digest: Digest) -> Any:
            if digest == LAYERS[0]:
                await running.verification.condemn(digest, "rotten")
            return await looked(digest)

        store.blobs.open = found_by_a_reader  # type: ignore[method-assign]
        report = await scrub_of(running).verify(lambda _: None)
        assert (report["rotten"], report["blobs"], report["is_well"]) == ({}, len(LAYERS), True)


async def test_a_right_file_that_came_while_the_rotten_one_was_read_stays(tmp_path: Path) -> None:
    """The scrub is slow: a reader finds the rot before it, and what is fetched then is not put away for the old file."""
    async with filled(tmp_path) as (running, store, upstream):
        rot(tmp_path, LAYERS[0])
        slow = scrub_of(running)
        looked = store.blobs.open
        read: list[Digest] = []
        condemned: list[Digest] = []

        async def noted(digest: Digest) -> Any:
            read.append(digest)
            return await looked(digest)

        async def meanwhile(seconds: float) -> None:
            if read[-1:] == [LAYERS[0]] and seconds < OPENING_BYTES / (1 << 20) and not condemned:
                condemned.append(LAYERS[0])
                await running.verification.condemn(LAYERS[0], "rotten, says a reader")
                await running.read(LAYERS[0])
                await running.idle()

        store.blobs.open = noted  # type: ignore[method-assign]
        running.clock.sleep = meanwhile  # type: ignore[method-assign]
        assert list((await slow.scrub(1 << 20)).rotten) == [LAYERS[0]]
        assert LAYERS[0] in running.ledger
        assert await running.stored(LAYERS[0]) == upstream._blobs[ALPINE.value, LAYERS[0]]
