"""Ledger and evictor against a simple model, in any order of events (INV-5, and images go whole)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.oci.digest import Digest
from proxy.rules.ledger import BLOCK_BYTES, Ledger, on_disk

CAPACITY = 40 * BLOCK_BYTES
BLOBS = [Digest.of(b"blob %d" % n) for n in range(12)]
#: Manifest n names these, manifests among them: what an upstream may send.
MANIFESTS = {
    Digest.of(b"manifest 0"): BLOBS[0:3],
    Digest.of(b"manifest 1"): BLOBS[2:5],
    Digest.of(b"manifest 2"): BLOBS[4:8],
    Digest.of(b"manifest 3"): [BLOBS[0], BLOBS[11]],
}
INDEX = Digest.of(b"index")
NAMES = {**MANIFESTS, INDEX: list(MANIFESTS)[:2]}
EVERYTHING = [*BLOBS, *NAMES]
digests = st.sampled_from(EVERYTHING)


class ImagesMachine(RuleBasedStateMachine):
    """The model: a dict of sizes, a list of promises, a set of what is kept."""

    @initialize(uncounted=st.integers(0, 10), on_disk_before=st.lists(digests, unique=True, max_size=6))
    def start(self, uncounted: int, on_disk_before: list[Digest]) -> None:
        blocks = len(on_disk_before) + uncounted
        self.ledger = Ledger(CAPACITY, uncounted=blocks * BLOCK_BYTES)
        self.stored: dict[Digest, int] = {}
        self.promises: list[int] = []
        self.kept: set[Digest] = set()
        self.upkeep = 0
        for n, digest in enumerate(on_disk_before):
            self.ledger.count(digest, 5, float(n))
            self.stored[digest] = 5
            self._map(digest)
        assert self.ledger.uncounted == uncounted * BLOCK_BYTES
        self.ledger.uncounted = 0

    def _map(self, digest: Digest) -> None:
        if digest in NAMES:
            self.ledger.names(digest, NAMES[digest])

    @rule(n_blocks=st.integers(0, 10))
    def set_aside(self, n_blocks: int) -> None:
        """More or less is needed for what is no blob; more of it is made room for like anything else."""
        n_bytes = n_blocks * BLOCK_BYTES
        while not self.ledger.fits(n_bytes - self.upkeep):
            if not self._evict(n_bytes - self.upkeep):
                return
        self.ledger.upkeep = self.upkeep = n_bytes

    @rule(n_blocks=st.integers(1, 12))
    def reserve(self, n_blocks: int) -> None:
        n_bytes = n_blocks * BLOCK_BYTES
        while not self.ledger.fits(n_bytes):
            if not self._evict(n_bytes):
                return
        self.ledger.reserve(n_bytes)
        self.promises.append(n_bytes)

    def _evict(self, n_bytes: int) -> bool:
        before = [digest for digest, _ in self.ledger]
        assert sorted(before) == sorted(self.stored)
        found = self.ledger.coldest(n_bytes, kept=self.kept, most=3)
        assert len(set(found.digests)) == len(found.digests)
        if not found.digests:
            assert found.is_all
            assert self.kept or not self.stored, "something could have gone"
            named = {part for m, parts in NAMES.items() if m in self.stored for part in parts}
            alone = {digest for digest in self.stored if digest not in named and digest not in NAMES}
            assert alone <= self.kept, "something that belongs to no image could have gone"
            return False
        for digest in found.digests:
            assert digest in self.stored and digest not in self.kept
            above = [m for m, parts in NAMES.items() if digest in parts and m in self.stored]
            assert not above, f"{digest} goes while {above} names it"
            self.ledger.drop(digest)
            del self.stored[digest]
        return True

    @rule(digest=digests, share=st.integers(0, 12))
    def settle(self, digest: Digest, share: int) -> None:
        if not self.promises:
            return
        promised = self.promises.pop()
        size = min(promised, share * BLOCK_BYTES - (share % 3))
        size = max(size, 0)
        self.ledger.settle(digest, size, promised)
        self.stored.setdefault(digest, size)
        self._map(digest)

    @rule()
    def release(self) -> None:
        if self.promises:
            self.ledger.release(self.promises.pop())

    @rule(digest=digests)
    def touch(self, digest: Digest) -> None:
        assert self.ledger.touch(digest) == (digest in self.stored)
        if digest in self.stored:
            assert [each for each, _ in self.ledger][-1] == digest

    @rule(digest=digests)
    def lose(self, digest: Digest) -> None:
        """Quarantined, or purged."""
        assert self.ledger.drop(digest) == self.stored.pop(digest, 0)

    @rule(digest=digests)
    def keep(self, digest: Digest) -> None:
        self.kept.add(digest)

    @rule(digest=digests)
    def let_go(self, digest: Digest) -> None:
        self.kept.discard(digest)

    @invariant()
    def balances(self) -> None:
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        assert ledger.committed == sum(map(on_disk, self.stored.values()))
        assert ledger.reserved == sum(self.promises)
        assert ledger.held == ledger.committed + ledger.reserved + self.upkeep <= CAPACITY
        assert ledger.for_blobs == CAPACITY - self.upkeep
        assert len(ledger) == len(self.stored)
        assert dict(ledger) == self.stored
        assert all(ledger.size_of(digest) == self.stored.get(digest) for digest in EVERYTHING)


ImagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestImages = ImagesMachine.TestCase
