"""INV-5 as a machine: the ledger beside a list that does the same in the plainest way, under any order of calls."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.oci.digest import Digest
from proxy.rules.ledger import BLOCK_BYTES, Ledger, on_disk

DIGESTS = [Digest.of(b"%d" % n) for n in range(12)]
digests = st.sampled_from(DIGESTS)
sizes = st.integers(0, 5 * BLOCK_BYTES)


class LedgerBesideAList(RuleBasedStateMachine):
    """The list holds (digest, size), oldest first; promises are a list of amounts."""

    @initialize(n_blocks=st.integers(4, 40))
    def start(self, n_blocks: int) -> None:
        self.capacity = n_blocks * BLOCK_BYTES
        self.ledger = Ledger(self.capacity)
        self.blobs: list[tuple[Digest, int]] = []
        self.promises: list[int] = []

    @rule(size=sizes, kept=st.sets(digests, max_size=6))
    def reserve(self, size: int, kept: set[Digest]) -> None:
        """As engine/capacity does: evict what must go, then promise; or find that no room can be made."""
        n_bytes = on_disk(size)
        while not self.ledger.fits(n_bytes):
            victims = self.ledger.victims(n_bytes, kept=kept, most=2)
            evictable = [digest for digest, _ in self.blobs if digest not in kept]
            assert victims == evictable[: len(victims)], "the oldest that may go, in order"
            if not victims:
                assert not evictable, "an empty list means that no room can be made"
                return
            for digest in victims:
                self.ledger.drop(digest)
            self.blobs = [blob for blob in self.blobs if blob[0] not in victims]
        self.ledger.reserve(n_bytes)
        self.promises.append(n_bytes)

    @precondition(lambda self: self.promises)
    @rule(data=st.data(), digest=digests)
    def settle(self, data: st.DataObject, digest: Digest) -> None:
        """A transfer is kept: its size is at most what was promised."""
        promised = self.promises.pop(data.draw(st.integers(0, len(self.promises) - 1)))
        size = data.draw(st.integers(max(0, promised - BLOCK_BYTES + 1), promised))
        known = [blob for blob in self.blobs if blob[0] == digest]
        self.ledger.settle(digest, size, promised)
        self.blobs = [blob for blob in self.blobs if blob[0] != digest] + (known or [(digest, size)])

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A transfer fails."""
        self.ledger.release(self.promises.pop(data.draw(st.integers(0, len(self.promises) - 1))))

    @rule(digest=digests)
    def touch(self, digest: Digest) -> None:
        """A hit."""
        known = [blob for blob in self.blobs if blob[0] == digest]
        assert self.ledger.touch(digest) == bool(known)
        self.blobs = [blob for blob in self.blobs if blob[0] != digest] + known

    @rule(digest=digests)
    def drop(self, digest: Digest) -> None:
        """A purge, or a quarantine."""
        self.ledger.drop(digest)
        self.blobs = [blob for blob in self.blobs if blob[0] != digest]

    @invariant()
    def never_beyond_capacity(self) -> None:
        """INV-5: committed + reserved <= capacity, and both are what the list says."""
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.committed + self.ledger.reserved <= self.capacity
        assert self.ledger.committed == sum(on_disk(size) for _, size in self.blobs)
        assert self.ledger.reserved == sum(self.promises)
        assert list(self.ledger) == self.blobs


TestLedgerBesideAList = LedgerBesideAList.TestCase
