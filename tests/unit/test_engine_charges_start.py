"""A start beside journals that take long to read: hits and free projects notice nothing, and no quota is overshot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from proxy.engine.charges import LOAD_PATIENCE_S, MIN_LINES, START_PATIENCE_S
from proxy.errors import OverQuota, Unavailable
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.rules.gates.access import ANONYMOUS
from proxy.rules.quota import Allowance
from proxy.rules.routes import ProjectRoute
from proxy.store.memory import MemoryCharges, MemoryStore
from tests.contract.suites.charges import charges_in
from tests.support.engine import Engine, FakeUpstream, engine
from tests.support.images import image
from tests.support.left_behind import SlowScan, put

KIB = 1024
PROJECTS = (ProjectRoute("team"), ProjectRoute("free"))
TEAM = {"team": Allowance(100 * KIB)}


class SlowJournal(MemoryCharges):
    """Read only once somebody lets it; or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.is_broken = False

    async def changes(self) -> AsyncIterator[tuple[str, Sequence[tuple[Digest, int | None]]]]:
        found = [each async for each in super().changes()]
        await self.gate.wait()
        if self.is_broken:
            raise Unavailable("Input/output error")
        for each in found:
            yield each


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    made = MemoryStore()
    made.charges = SlowJournal()
    yield made
    await made.aclose()


def journal(store: MemoryStore) -> SlowJournal:
    assert isinstance(store.charges, SlowJournal)
    return store.charges


async def begun(running: Engine) -> None:
    """As a start does it."""
    beginning = asyncio.create_task(running.charges.begin())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await running.clock.advance(START_PATIENCE_S)
    await beginning


async def read_after_patience(running: Engine, digest: Digest, project: str) -> bytes:
    reading = asyncio.create_task(running.read(digest, project=project))
    while not running.clock.sleepers:
        await asyncio.sleep(0)
    assert not reading.done()
    await running.clock.advance(LOAD_PATIENCE_S)
    return await reading


async def test_a_start_waits_a_moment_for_the_journals_and_no_longer(store: MemoryStore) -> None:
    """What nobody bounded is fetched, kept and paid for while they are read."""
    upstream = FakeUpstream()
    digest = upstream.put_blob(b"new")
    async with engine(upstream, store=store, projects=PROJECTS, allowances=TEAM, is_loaded=False) as running:
        await begun(running)
        assert not running.charges.is_loaded
        assert await running.read(digest, project="free") == b"new"
        await running.idle()
        assert dict(running.charges.book.of("free")) == {digest: 3}
        journal(store).gate.set()


async def test_a_small_journal_is_read_when_the_start_goes_on(store: MemoryStore) -> None:
    """Nobody need know that there was a moment without."""
    await store.charges.append("team", [(Digest.of(b"old"), 3)])
    journal(store).gate.set()
    async with engine(store=store, ports={"docker.io": FakeUpstream()}, projects=PROJECTS, is_loaded=False) as running:
        await running.charges.begin()
        assert running.charges.is_loaded
        assert running.charges.book.of("team").charged == 3


async def test_nothing_is_kept_on_a_quota_of_which_nothing_is_known(store: MemoryStore) -> None:
    """Promise 5: what the journals would have said might have been all of it. Served all the same, and kept later."""
    upstream = FakeUpstream()
    first, second = upstream.put_blob(b"first"), upstream.put_blob(b"second")
    async with engine(upstream, store=store, projects=PROJECTS, allowances=TEAM, is_loaded=False) as running:
        await begun(running)
        assert await read_after_patience(running, first, "team") == b"first"
        await running.idle()
        assert len(running.ledger) == 0 and running.charges.book.of("team").used == 0
        assert running.capacity.degraded == ""
        journal(store).gate.set()
        assert await running.read(second, project="team") == b"second"
        await running.idle()
        assert second in running.ledger and running.charges.book.of("team").charged == len(b"second")


async def test_journals_that_cannot_be_read_are_no_reason_not_to_start(store: MemoryStore) -> None:
    """Projects without a quota are kept for; an operator reads why the others are not."""
    upstream = FakeUpstream()
    digest = upstream.put_blob(b"new")
    journal(store).is_broken = True
    journal(store).gate.set()
    async with engine(upstream, store=store, projects=PROJECTS, allowances=TEAM, is_loaded=False) as running:
        await running.charges.begin()
        assert await running.read(digest, project="team") == b"new"
        await running.idle()
        assert len(running.ledger) == 0
        assert any("Input/output error" in sentence for sentence in running.notices)
        await running.charges.read()
        running.charges.check_room("free", 1 << 40, "an import")
        with pytest.raises(OverQuota, match=r"an import needs room in the quota of project 'team', .* cannot be read"):
            running.charges.check_room("team", 1, "an import")
        assert await running.read(digest, project="free") == b"new"
        await running.idle()
        assert digest in running.ledger


async def test_what_happens_while_they_are_read_stands(store: MemoryStore) -> None:
    """The journals are older than what this life has charged, and than what it has lost."""
    upstream = FakeUpstream()
    paid, gone, old = upstream.put_blob(b"paid"), Digest.of(b"gone"), Digest.of(b"old")
    await store.charges.append("free", [(paid, 1), (paid, None), (gone, 4), (old, 3)])
    async with engine(upstream, store=store, projects=PROJECTS, is_loaded=False) as running:
        await begun(running)
        await running.read(paid, project="free")
        await running.idle()
        running.capacity.forget(gone)
        journal(store).gate.set()
        while not running.charges.is_loaded:
            await asyncio.sleep(0)
        assert dict(running.charges.book.of("free")) == {paid: 4, old: 3}
        await running.charges.write()
        assert await charges_in(store.charges) == {"free": {paid: 4, old: 3}}


async def test_a_project_that_refuses_when_full_refuses_nothing_before_it_is_known(store: MemoryStore) -> None:
    """A pod must not fail to start because we did. Nothing is kept for it meanwhile."""
    upstream = FakeUpstream()
    big = image(1, (400 * KIB,))
    upstream.put(big, "big")
    allowances = {"team": Allowance(100 * KIB, "deny")}
    async with engine(upstream, store=store, projects=PROJECTS, allowances=allowances, is_loaded=False) as running:
        await begun(running)
        await running.clock.advance(LOAD_PATIENCE_S)
        got = await running.pull.manifest(
            ManifestGet(RepositoryPath("team", "library/alpine"), Tag("big"), None), ANONYMOUS
        )
        assert got.held.body == big.body
        await running.idle()
        assert running.charges.book.of("team").used == 0
        journal(store).gate.set()


async def test_a_journal_grown_long_is_written_anew_with_all_that_is_paid(store: MemoryStore) -> None:
    """Charges of the book, of what is about to go and of what is about to come, and those that change meanwhile."""
    journal(store).gate.set()
    async with engine(store=store, ports={"docker.io": FakeUpstream()}, projects=PROJECTS) as running:
        charges = running.charges
        kept = [Digest.of(b"kept %d" % n) for n in range(3_000)]
        for digest in kept:
            charges.charge("team", digest, 10)
        for n in range(MIN_LINES // 1000 + 1):
            for m in range(1000):
                charges.note("team", Digest.of(b"%d %d" % (n, m)), 1)
                charges.note_unpaid("team", Digest.of(b"%d %d" % (n, m)))
            await charges.write()
        charges.note("team", Digest.of(b"about to come"), 7)
        writing = asyncio.create_task(charges.write())
        await asyncio.sleep(0)
        charges.charge("team", Digest.of(b"meanwhile"), 5)
        await writing
        await charges.write()
        expected = dict.fromkeys(kept, 10) | {Digest.of(b"about to come"): 7, Digest.of(b"meanwhile"): 5}
        assert (await charges_in(store.charges))["team"] == expected
        assert charges._n_lines["team"] < MIN_LINES


@pytest.mark.parametrize("first", ["the count", "the journals"])
async def test_what_is_read_before_anybody_knows_is_paid_for_once_it_is_known(store: MemoryStore, first: str) -> None:
    """Promise 5: a project pays for every stored blob requested through it, in the first moments of a start, too; what
    has no room is not, and nobody was refused."""
    paid, large = b"paid", bytes(101 * KIB)
    store.blobs = slow = SlowScan()
    for body in (paid, large):
        await put(store, body)
    upstream = FakeUpstream()
    digests = [upstream.put_blob(body) for body in (paid, large)]
    allowances = {"team": Allowance(100 * KIB, "deny")}
    options: dict[str, Any] = {"is_loaded": False, "is_counted": False}
    async with engine(upstream, store=store, projects=PROJECTS, allowances=allowances, **options) as running:
        running.capacity.start()
        await begun(running)
        running.charges.start()
        gates = [slow.gate, journal(store).gate]
        for gate in gates if first == "the count" else reversed(gates):
            for digest, body in zip(digests, (paid, large), strict=True):
                assert await running.read(digest, project="team") == body
            gate.set()
            for _ in range(50):
                await asyncio.sleep(0)
        assert dict(running.charges.book.of("team")) == {digests[0]: len(paid)}
