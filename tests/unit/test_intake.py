"""Imports are judged before they write: capacity, quotas and pins, whatever order an archive has.

Bundles are made by the export of one engine and taken by another; what the second one's store is asked to write is
counted where it is written.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from proxy.engine.bundle import Parts
from proxy.engine.export import Export
from proxy.engine.intake import LOOKED_AT_ONCE, MAX_WAITING_BYTES, Import, Terms, _Taking
from proxy.engine.pins import Pins
from proxy.engine.prefetch import Prefetch
from proxy.engine.walk import Scope
from proxy.errors import BadArchive, OutOfSpace, OverQuota, StoreError
from proxy.oci import layout
from proxy.oci.digest import Digest, Verifier
from proxy.oci.layout import CONTENTS_FILE, INDEX_FILE, LAYOUT_FILE, maybe_blob
from proxy.oci.manifest import MAX_MANIFEST_BYTES
from proxy.oci.names import Reference, Repository, Tag
from proxy.ports import Member
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.rules.ledger import on_disk
from proxy.rules.quota import Allowance
from proxy.rules.routes import ProjectRoute
from proxy.store.memory import MemoryBlobs, MemoryIngest, MemoryStore
from tests.support.engine import HOST, Engine, FakeUpstream, engine
from tests.support.images import Blob, Image, image, manifest, multi_arch
from tests.support.slow_commits import slow_commits

KIB = 1024
APP = Reference.parse(f"{HOST}/library/alpine:1")
TEAM = Reference.parse(f"{HOST}/team/app:1")
TEAM_PROJECT = ProjectRoute("team", match=(Glob.parse(f"{HOST}/team/**"),))

_SEED = count(64_000)

#: An archive: names and bodies in their order.
Archive = list[tuple[str, bytes]]


class Writes(MemoryBlobs):
    """A store that counts what it is asked to write and to delete."""

    def __init__(self) -> None:
        super().__init__()
        self.n_ingests = self.n_deletes = 0

    async def ingest(self, digest: Digest, verifier: Verifier) -> MemoryIngest:
        """See ports.BlobStore."""
        self.n_ingests += 1
        return await super().ingest(digest, verifier)

    async def delete(self, digests: Any) -> None:
        """See ports.BlobStore."""
        self.n_deletes += 1
        await super().delete(digests)


@asynccontextmanager
async def far(
    *, capacity: int = 1 << 40, allowances: Mapping[str, Allowance] | None = None, sealed: bool = False
) -> AsyncIterator[tuple[Engine, Parts, Writes]]:
    """The side that imports: upstream has nothing. Project `team` has the repositories below team/."""
    store, writes = MemoryStore(), Writes()
    store.blobs = writes
    upstream = FakeUpstream()
    async with engine(
        upstream, store=store, capacity=capacity, allowances=allowances, projects=(TEAM_PROJECT,)
    ) as there:
        parts = parts_of(there, keeps_all=sealed)
        yield there, parts, writes
    await store.aclose()


def parts_of(one: Engine, *, keeps_all: bool = False) -> Parts:
    pins = Pins(one.store.notes, one.capacity.ledger, one.owner, keeps_all=keeps_all)
    one.capacity.pinned = pins
    return Parts(
        pull=one.pull,
        blobs=one.store.blobs,
        records=one.store.records,
        links=one.links,
        manifests=one.manifests,
        verification=one.verification,
        tags=one.tags,
        capacity=one.capacity,
        charges=one.charges,
        pins=pins,
        clock=one.clock,
        owner=one.owner,
    )


async def carried(*wanted: tuple[Reference, Image]) -> Archive:
    """A bundle of ours."""
    upstream = FakeUpstream()
    for reference, each in wanted:
        assert isinstance(reference.target, Tag)
        upstream.put(each, reference.target.value, repository=Repository.parse(reference.repository.value))
    async with engine(upstream) as near:
        parts = parts_of(near)
        fill = Prefetch(near.pull, near.capacity, near.charges, parts.pins, clock=near.clock)
        references = [reference for reference, _ in wanted]
        assert not any(one.missing for one in await fill.run(references, Scope()))
        export = Export(parts)
        plan = await export.plan(references, Scope())
        return [(one.name, await body_of(one)) async for one in export.members(plan, lambda _: None)]


async def body_of(member: Member) -> bytes:
    return b"".join([piece async for piece in member.pieces])


async def members(archive: Archive) -> AsyncIterator[Member]:
    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        yield body

    for name, body in archive:
        yield Member(name, len(body), pieces(body))


async def taken(parts: Parts, archive: Archive, terms: Terms | None = None) -> dict[str, Any]:
    return await Import(parts).run(members(archive), terms or Terms(), lambda _: None)


def ours(archive: Archive) -> Archive:
    return archive


def without_contents(archive: Archive) -> Archive:
    """As skopeo writes it: blobs in the order of their names, index.json behind them."""
    blobs = sorted((name, body) for name, body in archive if maybe_blob(name) is not None)
    return [*blobs, *((name, body) for name, body in archive if name in (INDEX_FILE, LAYOUT_FILE))]


def index_first(archive: Archive) -> Archive:
    """As somebody's script writes it: documents first, and then blobs in the order of their names."""
    return [*without_contents(archive)[-2:], *without_contents(archive)[:-2]]


def nothing_kept(there: Engine) -> None:
    """No byte is stored or promised, no project pays."""
    assert (there.ledger.committed, there.ledger.reserved) == (0, 0)
    assert all(account.used == 0 for _, account in there.charges.book)


# -- quotas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["evict", "bypass", "deny"])
@pytest.mark.parametrize("order", [ours, without_contents, index_first])
async def test_what_a_quota_has_no_room_for_is_never_written(on_full: Any, order: Any) -> None:
    """Issue 8: an import that cannot fit fails before it writes; the sentence has project, need and quota."""
    for _ in range(4):  # blobs come in the order of their names, which is another one for each
        archive = order(await carried((TEAM, multi_arch(next(_SEED), (40 * KIB,)))))
        async with far(allowances={"team": Allowance(50 * KIB, on_full)}) as (there, parts, writes):
            with pytest.raises(OverQuota, match=r"quota of project 'team', and 0 bytes of 50\.0 KiB"):
                await taken(parts, archive)
            assert writes.n_ingests == 0
            nothing_kept(there)


@pytest.mark.parametrize("order", [without_contents, index_first])
async def test_an_archive_too_large_to_wait_is_judged_when_its_manifests_have_come(order: Any) -> None:
    """A stream with its manifests last: what was written by then goes again, and the refusal is the same."""
    big = image(next(_SEED), (MAX_WAITING_BYTES // 8 + KIB, 5 * KIB))
    archive = order(await carried((TEAM, big)))
    archive.sort(key=lambda member: -len(member[1]))
    async with far(allowances={"team": Allowance(50 * KIB, "bypass")}) as (there, parts, writes):
        with pytest.raises(OverQuota):
            await taken(parts, archive)
        assert writes.n_ingests > 0
        nothing_kept(there)


async def test_one_project_without_room_refuses_the_whole_import_and_costs_the_others_nothing() -> None:
    """All projects are judged before any makes room among what it has."""
    old = image(next(_SEED), (30 * KIB,))
    archive = await carried((APP, image(next(_SEED), (40 * KIB,))), (TEAM, image(next(_SEED), (40 * KIB,))))
    allowances = {"default": Allowance(60 * KIB, "evict"), "team": Allowance(10 * KIB, "evict")}
    async with far(allowances=allowances) as (there, parts, writes):
        assert (await taken(parts, await carried((APP, old))))["images"][0]["missing"] == {}
        used, n_ingests = there.charges.book.of("default").used, writes.n_ingests
        with pytest.raises(OverQuota, match="'team'"):
            await taken(parts, archive)
        assert there.charges.book.of("default").used == used
        assert writes.n_ingests == n_ingests
        assert writes.n_deletes == 0


async def test_a_project_that_evicts_makes_room_for_an_import() -> None:
    """on_full = "evict": its own cold images go, as they would for a pull."""
    first, second = image(next(_SEED), (40 * KIB,)), image(next(_SEED), (40 * KIB,))
    async with far(allowances={"default": Allowance(60 * KIB, "evict")}) as (there, parts, _):
        await taken(parts, await carried((APP, first)))
        report = await taken(parts, await carried((replace(APP, target=Tag("2")), second)))
        assert report["images"][0]["missing"] == {}
        await there.charges.sweep()
        assert await there.stored(Digest.parse(second.blobs[1].digest)) is not None
        assert await there.stored(Digest.parse(first.blobs[1].digest)) is None
        assert there.charges.book.of("default").used <= 60 * KIB


async def test_a_sealed_project_evicts_nothing_for_an_import() -> None:
    """Sealed: nothing is evicted, so what has no room beside what is there is refused, unwritten."""
    async with far(allowances={"default": Allowance(60 * KIB, "evict")}, sealed=True) as (there, parts, writes):
        await taken(parts, await carried((APP, image(next(_SEED), (40 * KIB,)))))
        used, n_ingests = there.charges.book.of("default").used, writes.n_ingests
        with pytest.raises(OverQuota):
            await taken(parts, await carried((replace(APP, target=Tag("2")), image(next(_SEED), (40 * KIB,)))))
        assert (there.charges.book.of("default").used, writes.n_ingests) == (used, n_ingests)


async def test_what_was_found_for_an_import_cannot_be_taken_by_a_pull_meanwhile() -> None:
    """Quotas are promised before the first byte is kept: a node's pull in between goes without."""
    wanted, other = image(next(_SEED), (40 * KIB,)), image(next(_SEED), (40 * KIB,))
    archive = await carried((APP, wanted))
    async with far(allowances={"default": Allowance(60 * KIB, "bypass")}) as (there, parts, _):
        upstream = there.upstreams[HOST]
        assert isinstance(upstream, FakeUpstream)
        upstream.put(other, "2")
        is_judged = False

        async def interrupted() -> AsyncIterator[Member]:
            nonlocal is_judged
            async for member in members(archive):
                if len(wanted.blobs[1].content) == member.size:
                    is_judged = there.charges.book.of("default").reserved > 40 * KIB
                    await there.read(Digest.parse(other.blobs[1].digest))
                    await there.idle()
                yield member

        report = await Import(parts).run(interrupted(), Terms(), lambda _: None)
        assert is_judged
        assert report["images"][0]["missing"] == {}
        assert await there.stored(Digest.parse(other.blobs[1].digest)) is None
        assert there.charges.book.of("default").reserved == 0


async def test_what_is_paid_for_already_costs_nothing_again() -> None:
    """The same bundle twice fits where it fits once."""
    archive = await carried((APP, image(next(_SEED), (40 * KIB,))))
    async with far(allowances={"default": Allowance(50 * KIB, "deny")}) as (_, parts, writes):
        for _ in range(2):
            assert (await taken(parts, archive))["images"][0]["missing"] == {}
        assert writes.n_ingests == 3


async def test_an_image_that_is_not_whole_does_not_count() -> None:
    """What will not be linked is not paid for: the other image of the archive is taken."""
    broken, small = image(next(_SEED), (40 * KIB,)), image(next(_SEED), (10 * KIB,))
    archive = [
        member
        for member in await carried((APP, broken), (TEAM, small))
        if member[0] != layout.blob_name(Digest.parse(broken.blobs[1].digest)) and member[0] != CONTENTS_FILE
    ]
    async with far(allowances={"default": Allowance(KIB, "deny")}) as (_, parts, _):
        report = await taken(parts, archive)
        by_name = {each["reference"]: each["missing"] for each in report["images"]}
        assert by_name[str(TEAM)] == {}
        assert by_name[str(APP)]


async def test_where_nobody_says_what_comes_all_that_is_named_counts_once_it_cannot_wait() -> None:
    """The layers are too large to wait for, so the quota is judged by the manifests, and before the first is written."""
    large = image(next(_SEED), (MAX_MANIFEST_BYTES + KIB, MAX_MANIFEST_BYTES + 2 * KIB))
    archive = index_first(await carried((TEAM, large)))
    archive.sort(key=lambda member: len(member[1]))
    for whole in (archive, archive[:-1]):
        async with far(allowances={"team": Allowance(MAX_MANIFEST_BYTES, "evict")}) as (there, parts, writes):
            with pytest.raises(OverQuota):
                await taken(parts, whole)
            assert writes.n_ingests == 0
            nothing_kept(there)


# -- policy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "rule"),
    [
        pytest.param(
            {"deny": (Glob.parse("media-type:application/vnd.oci.image.layer.*"),)}, "media-type", id="a type"
        ),
        pytest.param({"max_blob": 20 * KIB}, "max_blob", id="a size"),
        pytest.param({"deny": (Glob.parse(f"{HOST}/team/**"),)}, "team/**", id="a repository"),
        pytest.param({"allow": (Glob.parse(f"{HOST}/team/app:2"),)}, "allow", id="a tag"),
    ],
)
async def test_what_may_not_be_pulled_is_neither_imported_nor_exported(lists: dict[str, Any], rule: str) -> None:
    """Promise 6: the same rules on every route to the bytes, whatever they look at; other projects lose nothing."""
    other = image(next(_SEED), (10 * KIB,))
    archive = await carried((TEAM, image(next(_SEED), (40 * KIB,))), (APP, other))
    async with far() as (there, parts, _):
        open_plan = there.pull.plan
        strict = replace(open_plan, rules={**open_plan.rules, "team": Rules("team", **lists)})
        there.pull.plan = strict
        report = {each["reference"]: each["missing"] for each in (await taken(parts, archive))["images"]}
        assert rule in next(iter(report[str(TEAM)].values()))
        assert report[str(APP)] == {}
        assert there.charges.book.of("team").used == 0
        kept = {digest for digest, _ in there.ledger}
        assert kept == {Digest.parse(text) for text in (other.digest, *(blob.digest for blob in other.blobs))}

        there.pull.plan = open_plan
        assert (await taken(parts, archive))["images"][0]["missing"] == {}
        there.pull.plan = strict
        plan = await Export(parts).plan([TEAM, APP], Scope())
        missing = {image["reference"]: image["missing"] for image in plan.images}
        assert rule in next(iter(missing[str(TEAM)].values()))
        assert missing[str(APP)] == {}


# -- capacity and pins -------------------------------------------------------------------------------------------------


async def test_what_the_capacity_has_no_room_for_is_never_written() -> None:
    """Judged by the contents alone, and nothing was evicted for it."""
    async with far(capacity=400 * KIB) as (there, parts, writes):
        await taken(parts, await carried((APP, image(next(_SEED), (40 * KIB,)))))
        n_ingests = writes.n_ingests
        with pytest.raises(OutOfSpace, match=r"raise store\.capacity; nothing was written"):
            await taken(parts, await carried((TEAM, image(next(_SEED), (900 * KIB,)))))
        assert (writes.n_ingests, writes.n_deletes) == (n_ingests, 0)
        assert there.ledger.reserved == 0


async def test_a_pinned_import_keeps_what_it_brought() -> None:
    """--pin: every digest of the image, by its reference and project."""
    wanted = image(next(_SEED), (40 * KIB,))
    async with far() as (_, parts, _):
        await taken(parts, await carried((TEAM, wanted)), Terms(pin=True))
        assert [(pin.project, pin.reference) for pin in parts.pins.all()] == [("", str(TEAM))]
        assert all(Digest.parse(blob.digest) in parts.pins for blob in wanted.blobs)


async def test_pins_of_an_import_beyond_the_capacity_are_refused_before_it_writes() -> None:
    """What is here unpinned may be evicted, and what is pinned may not: beside it there is no room."""
    first = image(next(_SEED), (100 * KIB,))
    capacity = 3 * sum(on_disk(len(body)) for name, body in await carried((APP, first)) if maybe_blob(name)) // 2
    async with far(capacity=capacity) as (_, parts, writes):
        await taken(parts, await carried((APP, first)), Terms(pin=True))
        n_ingests = writes.n_ingests
        with pytest.raises(OutOfSpace):
            await taken(parts, await carried((TEAM, image(next(_SEED), (100 * KIB,)))), Terms(pin=True))
        assert writes.n_ingests == n_ingests
        assert len(parts.pins) == 1


# -- the waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [ours, without_contents, index_first])
async def test_every_order_ends_in_the_same_image(order: Any) -> None:
    """Waiting changes when things are written, never what."""
    wanted = multi_arch(next(_SEED), (40 * KIB,))
    archive = order(await carried((APP, wanted)))
    async with far() as (there, parts, _):
        report = await taken(parts, archive)
        assert [(each["digest"], each["missing"]) for each in report["images"]] == [(wanted.digest, {})]
        assert all([await there.stored(Digest.parse(one.digest)) == one.body for one in wanted.manifests()])


@pytest.mark.parametrize("n", range(4), ids=["a child", "another", "the index", "a config"])
async def test_a_wrong_hash_among_what_waits_is_refused_unwritten(n: int) -> None:
    """Every digest is verified before it is believed, in memory as on disk."""
    archive = await carried((APP, multi_arch(next(_SEED), (50 * KIB,))))
    blobs = [at for at, (name, _) in enumerate(archive) if maybe_blob(name) is not None]
    name, body = archive[blobs[n]]
    archive[blobs[n]] = (name, bytes([body[0] ^ 1]) + body[1:])
    async with far() as (there, parts, writes):
        with pytest.raises(BadArchive, match="does not hash to its name"):
            await taken(parts, archive)
        assert writes.n_ingests == 0 or n == 3
        nothing_kept(there)


async def test_waiting_is_bounded() -> None:
    """A million small members are no way to fill the memory: beyond the bound they are written, as they come."""
    filler = [bytes([n]) * (3 << 20) for n in range(13)]
    names = [(layout.blob_name(Digest.of(body)), body) for body in filler]
    archive = [*names, *without_contents(await carried((APP, image(next(_SEED), (KIB,)))))]
    async with far() as (there, parts, writes):
        report = await taken(parts, archive)
        assert report["images"][0]["missing"] == {}
        assert writes.n_ingests == len(archive) - 2
        assert all([await there.stored(Digest.of(body)) is None for body in filler]), "nothing links to these"


# -- ends before its end, and what is promised -------------------------------------------------------------------------


async def until_paused(parts: Parts, archive: Archive, n_members: int) -> asyncio.Task[dict[str, Any]]:
    """An import that has taken so many members, and waits for the next."""
    reached = asyncio.Event()

    async def some() -> AsyncIterator[Member]:
        n = 0
        async for member in members(archive):
            if n == n_members:
                reached.set()
                await asyncio.Event().wait()
            n += 1
            yield member

    task = asyncio.create_task(Import(parts).run(some(), Terms(), lambda _: None))
    await reached.wait()
    return task


@pytest.mark.parametrize("order", [ours, without_contents])
@pytest.mark.parametrize("n_turns", range(4))
async def test_a_blob_that_has_its_name_is_counted_though_the_import_is_cancelled(
    order: Any, n_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: a client that goes away in the middle of a commit leaves nothing on disk that nobody knows of."""
    archive = order(await carried((APP, image(next(_SEED), (40 * KIB,)))))
    async with far() as (there, parts, writes):
        begun = slow_commits(writes, monkeypatch, 3)
        taking = asyncio.create_task(taken(parts, archive))
        await begun.wait()
        for _ in range(n_turns):
            await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        stored = {blob.digest: blob.size async for batch in writes.scan() for blob in batch}
        assert stored and dict(there.ledger) == stored
        assert there.ledger.reserved == 0


async def test_what_is_promised_to_an_import_is_kept_free_of_others() -> None:
    """Promise 5, min_free: a pull that begins while an import runs counts what that is still to write."""
    archive = await carried((APP, image(next(_SEED), (40 * KIB,))))
    async with far() as (there, parts, _):
        members_of_it = sum(maybe_blob(name) is not None for name, _ in archive)
        task = await until_paused(parts, archive, len(archive) - members_of_it + 1)
        promised = sum(each.unwritten for each in there.capacity._open)
        assert promised == there.ledger.reserved > 40 * KIB
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert there.ledger.reserved == 0


async def test_what_is_put_away_while_it_is_imported_again_is_written_again() -> None:
    """It was here when the room was promised, and then a reader found it to be rotten."""
    archive = await carried((APP, image(next(_SEED), (40 * KIB,))))
    layer = max((name for name, _ in archive if maybe_blob(name)), key=lambda name: len(dict(archive)[name]))
    digest = maybe_blob(layer)
    assert digest is not None
    async with far() as (there, parts, _):
        await taken(parts, archive)

        async def meanwhile() -> AsyncIterator[Member]:
            async for member in members(archive):
                if member.name == layer:
                    await there.verification.condemn(digest, "rotten")
                yield member

        report = await Import(parts).run(meanwhile(), Terms(), lambda _: None)
        assert report["images"][0]["missing"] == {}
        assert digest in there.ledger
        assert there.ledger.reserved == 0


async def test_to_see_what_room_there_could_be_holds_nobody_up() -> None:
    """A store of many blobs is looked at in parts, and only as far as it takes."""
    async with far(capacity=8_000 * 4096) as (there, parts, _):
        for n in range(8_000):
            there.ledger.adopt(Digest.of(b"%d" % n), 1)
        taking = _Taking(parts, Terms(), lambda _: None)
        looked: list[Digest] = []
        gives = True

        def may_go(digest: Digest) -> bool:
            looked.append(digest)
            return gives

        there.capacity.may_go = may_go  # type: ignore[method-assign]
        await taking._check_room(4096)
        assert len(looked) == LOOKED_AT_ONCE
        gives = False
        looked.clear()
        asking = asyncio.create_task(taking._check_room(4096))
        while not asking.done():
            n_before = len(looked)
            await asyncio.sleep(0)
            assert len(looked) - n_before <= LOOKED_AT_ONCE
        with pytest.raises(OutOfSpace):
            await asking
        for n in range(8_000):
            there.ledger.drop(Digest.of(b"%d" % n))


async def test_a_refused_import_that_is_cancelled_in_its_end_counts_what_it_took_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INV-5: what was deleted is no longer counted, whether or not somebody still waits."""
    archive = await carried((APP, image(next(_SEED), (40 * KIB,))))
    async with far() as (there, parts, writes):
        delete, begun = writes.delete, asyncio.Event()

        async def slow(digests: Any) -> None:
            begun.set()
            for _ in range(3):
                await asyncio.sleep(0)
            await delete(digests)

        monkeypatch.setattr(writes, "delete", slow)
        taking = asyncio.create_task(taken(parts, archive[:-1]))
        await begun.wait()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        nothing_kept(there)
        assert [blob async for batch in writes.scan() for blob in batch] == []


async def test_room_in_a_quota_is_not_found_among_what_the_image_itself_has_here() -> None:
    """An archive without a note of its contents: a layer that is here already, and comes late, is not evicted for it."""
    mib = 1 << 20
    config, shared, new = Blob(b"{}"), Blob(bytes(6 * mib)), Blob(bytes(5 * mib))
    first, second = manifest(config, [shared]), manifest(config, [shared, new])
    async with far(allowances={"default": Allowance(7 * mib, "evict")}) as (_, parts, writes):
        await taken(parts, await carried((APP, first)))
        n_ingests = writes.n_ingests
        archive = index_first(await carried((replace(APP, target=Tag("2")), second)))
        late = ["blobs", *(each.digest.partition(":")[2] for each in (new, shared))]
        archive.sort(key=lambda member: next(n for n in (2, 1, 0) if late[n] in member[0] or n == 0))
        with pytest.raises(OverQuota):
            await taken(parts, archive)
        assert writes.n_ingests == n_ingests


async def test_an_export_that_finds_another_size_lets_go_of_the_file() -> None:
    """No descriptor is left open by an export that cannot go on."""
    upstream = FakeUpstream()
    upstream.put(image(next(_SEED), (40 * KIB,)), "1")
    async with engine(upstream) as near:
        parts = parts_of(near)
        fill = Prefetch(near.pull, near.capacity, near.charges, parts.pins, clock=near.clock)
        await fill.run([APP], Scope())
        export = Export(parts)
        plan = await export.plan([APP], Scope())
        for digest, size in plan.contents.members.items():
            n_open = len(os.listdir("/proc/self/fd"))
            with pytest.raises(StoreError, match="went away"):
                _ = [piece async for piece in export._pieces(digest, size + 1)]
            assert len(os.listdir("/proc/self/fd")) == n_open
