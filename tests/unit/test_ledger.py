"""rules/ledger.py: capacity arithmetic (INV-5). The stateful test is tests/property/test_ledger.py."""

from __future__ import annotations

import pytest

from proxy.oci.digest import Digest
from proxy.rules.ledger import BLOCK_BYTES, Ledger, block_of, on_disk

A, B, C = (Digest.of(name) for name in (b"a", b"b", b"c"))
BLOCK = BLOCK_BYTES


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, BLOCK), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK)])
def test_a_file_takes_whole_blocks(size: int, taken: int) -> None:
    """What counts is what the disk gives away."""
    assert on_disk(size) == taken


def test_a_promise_becomes_use() -> None:
    """reserve, settle: the blob counts with its own size, not with what was promised for it."""
    ledger = Ledger(10 * BLOCK)
    ledger.reserve(4 * BLOCK)
    assert (ledger.reserved, ledger.committed, ledger.free) == (4 * BLOCK, 0, 6 * BLOCK)
    ledger.settle(A, 100, 4 * BLOCK)
    assert (ledger.reserved, ledger.committed, ledger.size_of(A)) == (0, BLOCK, 100)
    assert repr(ledger) == f"<Ledger {BLOCK} committed + 0 reserved of {10 * BLOCK}, 1 blobs>"


def test_what_does_not_fit_is_not_promised() -> None:
    """INV-5: committed + reserved never exceed the capacity; asking first is the caller's duty."""
    ledger = Ledger(BLOCK)
    assert ledger.fits(BLOCK)
    ledger.reserve(BLOCK)
    assert not ledger.fits(1)
    with pytest.raises(RuntimeError):
        ledger.reserve(1)
    ledger.release(BLOCK)
    with pytest.raises(RuntimeError):
        ledger.release(1)


def test_counting_one_blob_twice_counts_it_once() -> None:
    """Two transfers of one digest may settle one after the other."""
    ledger = Ledger(10 * BLOCK)
    for _ in range(2):
        ledger.reserve(BLOCK)
        ledger.settle(A, 10, BLOCK)
    assert (len(ledger), ledger.committed) == (1, BLOCK)
    assert ledger.drop(A) == 10
    assert ledger.drop(A) == 0
    assert ledger.committed == 0


def test_the_least_recently_used_go_first_and_only_as_many_as_must() -> None:
    """Order is the order of touching, never a clock."""
    ledger = Ledger(3 * BLOCK)
    for digest in (A, B, C):
        ledger.adopt(digest, BLOCK)
    assert ledger.touch(A)
    assert [digest for digest, _ in ledger] == [B, C, A]
    assert ledger.victims(1, kept=()) == [B]
    assert ledger.victims(2 * BLOCK, kept=()) == [B, C]
    assert ledger.victims(0, kept=()) == []
    assert not ledger.touch(Digest.of(b"unknown"))


def test_what_is_kept_is_passed_over() -> None:
    """A blob that is being read stays; if nothing else is there, no room can be made."""
    ledger = Ledger(2 * BLOCK)
    ledger.adopt(A, BLOCK)
    ledger.adopt(B, BLOCK)
    assert ledger.victims(BLOCK, kept={A}) == [B]
    assert ledger.victims(BLOCK, kept={A, B}) == []


def test_victims_come_in_bounded_batches() -> None:
    """The loop is not held for a hundred thousand small blobs; a full batch may not be enough."""
    ledger = Ledger(1000 * BLOCK)
    for n in range(1000):
        ledger.adopt(Digest.of(b"%d" % n), BLOCK)
    assert len(ledger.victims(500 * BLOCK, kept=(), most=64)) == 64


def test_a_store_over_its_capacity_has_victims_for_nothing() -> None:
    """A capacity that was lowered between two runs: what is too much goes without anything being asked for."""
    ledger = Ledger(BLOCK)
    ledger.adopt(A, BLOCK)
    ledger.adopt(B, BLOCK)
    assert ledger.victims(0, kept=()) == [A]


@pytest.mark.parametrize(("said", "block"), [(512, 4096), (4096, 4096), (65536, 65536), (1 << 20, 65536)])
def test_a_file_takes_blocks_as_large_as_the_file_systems(said: int, block: int) -> None:
    """INV-5: XFS and ext4 may have blocks of 64 KiB; what a network file system says is no block."""
    ledger = Ledger(1 << 30, uncounted=2 * block, block_bytes=block_of(said))
    assert (ledger.on_disk(1), ledger.on_disk(block + 1)) == (block, 2 * block)
    one, two = Digest.of(b"1"), Digest.of(b"2")
    ledger.count(one, 1)
    ledger.reserve(block)
    ledger.settle(two, 1, block)
    assert (ledger.committed, ledger.uncounted) == (2 * block, block)
    assert ledger.victims(ledger.free + block, kept=()) == [one]
    ledger.drop(two)
    assert ledger.committed == block
