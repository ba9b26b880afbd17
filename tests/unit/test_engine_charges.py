"""Quotas as pulls meet them: reserved before the fetch, judged for each project that joins, exact to the byte."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.rules.gates.access import ANONYMOUS
from proxy.rules.quota import Allowance, OnFull
from proxy.rules.routes import ProjectRoute
from proxy.store.memory import MemoryCharges, MemoryStore
from tests.support.engine import Engine, FakeUpstream, engine, whole
from tests.support.images import image

KIB = 1024
TEAM = (ProjectRoute("team"), ProjectRoute("other"))


def blobs_of(upstream: FakeUpstream, n: int, size: int, seed: int = 0) -> list[Digest]:
    """`n` blobs of `size` bytes each."""
    return [upstream.put_blob(bytes([seed, i % 256, i // 256]).ljust(size, b".")) for i in range(n)]


def charged(running: Engine, project: str = "team") -> int:
    """What a project pays, in bytes."""
    return running.charges.book.of(project).charged


@pytest.mark.parametrize("on_full", ["evict", "bypass", "deny"])
async def test_64_parallel_pulls_at_99_percent_do_not_overshoot_by_a_byte(on_full: OnFull) -> None:
    """Promise 5, watched at every turn of the loop: charged and reserved together stay within the quota."""
    upstream = FakeUpstream(piece_bytes=KIB)
    quota, size = 1000 * KIB, 10 * KIB
    first = blobs_of(upstream, 99, size)
    storm = blobs_of(upstream, 64, size, seed=1)
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(quota, on_full)}) as running:
        for digest in first:
            await running.read(digest, project="team")
        assert charged(running) == 99 * size
        account = running.charges.book.of("team")
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, account.used)
                await asyncio.sleep(0)

        watching = asyncio.get_running_loop().create_task(watch())
        answers = await asyncio.gather(
            *(running.read(digest, project="team") for digest in storm), return_exceptions=True
        )
        watching.cancel()
        await running.idle()
        await running.charges.sweep()
        assert peak <= quota
        n_denied = sum(isinstance(answer, Denied) for answer in answers)
        n_served = sum(isinstance(answer, bytes) and len(answer) == size for answer in answers)
        assert n_denied + n_served == 64
        stored = [digest for digest in (*first, *storm) if await running.stored(digest) is not None]
        assert len(stored) * size == charged(running) <= quota
        assert account.reserved == 0
        if on_full == "evict":
            assert n_denied == 0 and len(stored) == 100
        elif on_full == "bypass":
            assert n_denied == 0 and len(stored) == 100 and set(first) <= set(stored)
        else:
            assert n_denied == 63 and len(stored) == 100


async def test_a_shared_blob_is_stored_once_fetched_once_and_paid_by_both() -> None:
    """A project pays for what others brought, too, from its first read of it on."""
    upstream = FakeUpstream()
    (digest,) = blobs_of(upstream, 1, 10 * KIB)
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(20 * KIB)}) as running:
        await running.read(digest, project="other")
        assert (charged(running), charged(running, "other")) == (0, 10 * KIB)
        await running.read(digest, project="team")
        assert (charged(running), charged(running, "other")) == (10 * KIB, 10 * KIB)
        assert upstream.count("blob") == 1


async def test_evicting_among_ones_own_takes_nothing_from_others() -> None:
    """One project can never evict another's share: what somebody else pays for stays, only the charge goes."""
    upstream = FakeUpstream()
    shared, own, third = blobs_of(upstream, 3, 10 * KIB)
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(20 * KIB)}) as running:
        await running.read(shared, project="other")
        for digest in (shared, own, third):
            await running.read(digest, project="team")
        await running.idle()
        assert await running.stored(shared) is not None, "other pays for it"
        assert dict(running.charges.book.of("team")) == {own: 10 * KIB, third: 10 * KIB}
        (fourth,) = blobs_of(upstream, 1, 10 * KIB, seed=7)
        await running.read(fourth, project="team")
        await running.idle()
        await running.charges.sweep()
        assert await running.stored(own) is None, "nobody pays for it any more"


async def test_a_transfer_is_kept_if_one_joined_project_pays() -> None:
    """The others read without being charged (product.md)."""
    upstream = FakeUpstream()
    upstream.gate = asyncio.Event()
    (digest,) = blobs_of(upstream, 1, 10 * KIB)
    allowances = {"team": Allowance(1, "bypass"), "other": Allowance(20 * KIB, "bypass")}
    async with engine(upstream, projects=TEAM, allowances=allowances) as running:
        both = asyncio.gather(running.read(digest, project="team"), running.read(digest, project="other"))
        while upstream.count("blob head") < 2:
            await asyncio.sleep(0)
        upstream.gate.set()
        assert [len(body) for body in await both] == [10 * KIB, 10 * KIB]
        await running.idle()
        assert (charged(running), charged(running, "other")) == (0, 10 * KIB)
        assert await running.stored(digest) is not None


async def test_bypass_serves_and_keeps_nothing_and_the_store_is_not_degraded() -> None:
    """A spent quota is one project's business: /readyz has nothing to say about it, and one line tells the operator."""
    upstream = FakeUpstream()
    digests = blobs_of(upstream, 3, 10 * KIB)
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(5 * KIB, "bypass")}) as running:
        for digest in digests:
            assert len(await running.read(digest, project="team")) == 10 * KIB
        await running.idle()
        assert len(running.ledger) == 0 and running.capacity.degraded == ""
        assert sum("is full" in sentence for sentence in running.notices) == 1


def manifest_of(tag: str) -> ManifestGet:
    """A pull by tag through project team."""
    return ManifestGet(RepositoryPath("team", "library/alpine"), Tag(tag), None)


async def test_deny_is_decided_at_the_manifest_and_lets_no_layer_wait() -> None:
    """A manifest whose declared sizes do not fit is refused, cold and warm; the one that fits is served whole."""
    upstream = FakeUpstream()
    small, large = image(1, (10 * KIB,)), image(2, (400 * KIB,))
    upstream.put(small, "small")
    upstream.put(large, "large")
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(100 * KIB, "deny")}) as running:
        for _ in ("cold", "warm"):
            with pytest.raises(Denied, match="rule 'quota' of project 'team'"):
                await running.pull.manifest(manifest_of("large"), ANONYMOUS)
        assert upstream.count("blob") == 0
        await running.pull.manifest(manifest_of("small"), ANONYMOUS)
        for blob in small.all_blobs():
            assert await running.read(Digest.parse(blob.digest), project="team") == blob.content
        for blob in large.all_blobs()[1:]:
            with pytest.raises(Denied, match="quota"):
                await running.read(Digest.parse(blob.digest), project="team")


async def test_whoever_was_given_the_manifest_gets_its_blobs() -> None:
    """peers.md §5.3: some clients commit to a mirror with the manifest. What others spent since is not their fault."""
    upstream = FakeUpstream()
    one, other = image(1, (60 * KIB,)), image(2, (60 * KIB,))
    upstream.put(one, "one")
    upstream.put(other, "other")
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(100 * KIB, "deny")}) as running:
        await running.pull.manifest(manifest_of("one"), ANONYMOUS)
        await running.pull.manifest(manifest_of("other"), ANONYMOUS)
        for blob in (*one.all_blobs(), *other.all_blobs()):
            assert await running.read(Digest.parse(blob.digest), project="team") == blob.content
        assert charged(running) <= 100 * KIB


async def test_a_killed_process_knows_its_charges_again_and_repairs_what_differs() -> None:
    """The journal is written ahead; the recount drops what is paid and not there, and says so."""
    upstream, store = FakeUpstream(), MemoryStore()
    one, other = blobs_of(upstream, 2, 10 * KIB)
    allowances = {"team": Allowance(100 * KIB)}
    async with engine(upstream, store=store, projects=TEAM, allowances=allowances) as running:
        await running.read(one, project="team")
        await running.read(other, project="team")
        # killed here: nothing is written on the way out
    await store.blobs.delete([other])
    async with engine(upstream, store=store, projects=TEAM, allowances=allowances) as running:
        assert charged(running) == 20 * KIB
        (drift,) = await running.charges.recount()
        assert (drift.project, drift.n_gone, drift.n_bytes) == ("team", 1, 10 * KIB)
        assert charged(running) == 10 * KIB
        assert any("recount" in sentence for sentence in running.notices)
        assert await running.charges.recount() == ()
    await store.aclose()


async def test_a_transfer_that_fails_gives_its_promise_back() -> None:
    """Nothing stored, nothing paid, nothing left reserved."""
    upstream = FakeUpstream()
    (digest,) = blobs_of(upstream, 1, 10 * KIB)
    async with engine(upstream, projects=TEAM, allowances={"team": Allowance(10 * KIB)}) as running:
        opened = await running.open(digest, project="team")
        upstream.scripts[digest] = []
        assert await whole(opened)
        await running.idle()
        running.capacity.forget(digest)
        await running.store.blobs.delete([digest])
        assert running.charges.book.of("team").used == 0, "what is gone is not paid"
        upstream.remove(str(digest))
        with pytest.raises(Exception, match="has no blob"):
            await running.read(digest, project="team")
        await running.idle()
        assert running.charges.book.of("team").used == 0


async def test_a_charge_that_a_recount_found_to_be_for_nothing_is_judged_anew_when_the_blob_has_come() -> None:
    """Promise 5: it was reserved for nothing, because it was paid for; meanwhile another has taken the room."""
    upstream = FakeUpstream()
    gone, other = blobs_of(upstream, 2, 10 * KIB)
    store = MemoryStore()
    await store.charges.append("team", [(gone, 10 * KIB)])
    allowances = {"team": Allowance(15 * KIB, "bypass")}
    async with engine(upstream, store=store, projects=TEAM, allowances=allowances) as running:
        tab = running.charges.open(gone)
        tab.join("team", 10 * KIB)
        await tab.secure(10 * KIB)
        await running.charges.recount()
        await running.read(other, project="team")
        await running.idle()
        assert charged(running) == 10 * KIB
        tab.settle(10 * KIB)
        assert charged(running) == 10 * KIB
        tab.close()
    await store.aclose()


async def test_charges_are_written_one_after_the_other_whoever_leaves_meanwhile() -> None:
    """Two threads that append to one file would write over each other."""

    class Slow(MemoryCharges):
        n_at_once = most_at_once = 0

        async def append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
            await asyncio.shield(asyncio.ensure_future(self._in_its_thread(project, changes)))

        async def _in_its_thread(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
            self.n_at_once += 1
            self.most_at_once = max(self.most_at_once, self.n_at_once)
            for _ in range(5):
                await asyncio.sleep(0)
            await super().append(project, changes)
            self.n_at_once -= 1

    store = MemoryStore()
    store.charges = journal = Slow()
    async with engine(FakeUpstream(), store=store, projects=TEAM) as running:
        running.charges.charge("team", Digest.of(b"1"), 1)
        first = asyncio.create_task(running.charges.write())
        while not journal.n_at_once:
            await asyncio.sleep(0)
        first.cancel()
        running.charges.charge("team", Digest.of(b"2"), 2)
        await running.charges.write()
        with pytest.raises(asyncio.CancelledError):
            await first
        await running.charges.write()
        assert journal.most_at_once == 1
        written = {digest: size async for _, some in journal.changes() for digest, size in some}
        assert written == {Digest.of(b"1"): 1, Digest.of(b"2"): 2}
    await store.aclose()
