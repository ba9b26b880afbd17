"""rules/ledger.py: promises, order, and which images go (INV-5)."""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest

from proxy.oci.digest import Digest
from proxy.rules.ledger import BLOCK_BYTES, Ledger, on_disk, slack_of

KIB = 1024


def d(name: str) -> Digest:
    return Digest.of(name.encode())


def stocked(*names: str, capacity: int = 100 * BLOCK_BYTES) -> Ledger:
    """Each a block in size, used in this order."""
    ledger = Ledger(capacity)
    for name in names:
        ledger.adopt(d(name), BLOCK_BYTES)
    return ledger


def going(ledger: Ledger, n_blobs: int, kept: Iterable[str] = ()) -> str:
    """What goes for room for so many blobs beyond what is free, by name, each a letter."""
    by_digest = {d(letter): letter for letter in "abcdefghijklmnopqrstuvwxyzMNIJ"}
    held: Container[Digest] = {d(name) for name in kept}
    return "".join(by_digest[v] for v in ledger.victims(ledger.free + n_blobs * BLOCK_BYTES, kept=held))


@pytest.mark.parametrize(
    ("size", "taken"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)], ids=["none", "a byte", "a block", "one more"]
)
def test_sizes_are_rounded_to_blocks(size: int, taken: int) -> None:
    """What the disk gives away is blocks."""
    assert on_disk(size) == taken


def test_what_is_not_counted_yet_takes_room() -> None:
    """Promise 5 after a start: the bound stands for everything until it is counted, and goes down with counting."""
    ledger = Ledger(10 * BLOCK_BYTES, uncounted=8 * BLOCK_BYTES)
    assert ledger.free == 2 * BLOCK_BYTES
    ledger.count(d("a"), 3 * BLOCK_BYTES)
    assert (ledger.committed, ledger.uncounted, ledger.free) == (3 * BLOCK_BYTES, 5 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert not ledger.count(d("a"), 3 * BLOCK_BYTES), "counted once"


def test_a_promise_beyond_capacity_is_a_bug() -> None:
    """INV-5: nobody reserves what does not fit."""
    ledger = Ledger(BLOCK_BYTES)
    with pytest.raises(RuntimeError):
        ledger.reserve(BLOCK_BYTES + 1)
    with pytest.raises(RuntimeError):
        ledger.release(1)


def test_order_of_an_earlier_life_is_kept_behind_what_is_used_now() -> None:
    """Unknown first, by age; then as it was written down; then what was used since the start."""
    ledger = Ledger(100 * BLOCK_BYTES)
    for name, age in (("c", 5.0), ("a", 3.0), ("b", 4.0), ("x", 1.0), ("y", 2.0), ("n", 9.0)):
        ledger.count(d(name), BLOCK_BYTES, age)
    ledger.touch(d("n"))
    for name in ("y", "n", "x"):
        ledger.order(d(name))
    for _ in ledger.order_by_age():
        pass
    assert going(ledger, 9) == "abcyxn"


def test_iteration_survives_what_happens_meanwhile() -> None:
    """A recount looks at a batch at a time while requests go on."""
    ledger = stocked(*"abcdef")
    batches = ledger.batches(2)
    assert [digest for digest, _ in next(batches)] == [d("a"), d("b")]
    ledger.drop(d("b"))
    ledger.touch(d("c"))
    assert [digest for digest, _ in next(batches)] == [d("d"), d("e")]


# -- images ------------------------------------------------------------------------------------------------------------


def test_least_recently_used_goes_first() -> None:
    """By the order of use."""
    ledger = stocked(*"abc")
    ledger.touch(d("a"))
    assert going(ledger, 1) == "b"


def test_an_image_goes_whole_and_manifest_first() -> None:
    """Evicting an image frees what only it used."""
    ledger = stocked("M", *"abc")
    ledger.names(d("M"), [d("a"), d("b")])
    assert going(ledger, 1) in ("Mab", "Mba")


def test_a_layer_that_another_image_names_stays() -> None:
    """It goes with the last image that names it."""
    ledger = stocked("M", *"ab", "N", "c")
    ledger.names(d("M"), [d("a"), d("b")])
    ledger.names(d("N"), [d("b"), d("c")])
    assert going(ledger, 1) == "Ma"


def test_a_cold_layer_of_a_warm_image_stays() -> None:
    """A manifest that stays keeps what it names: nodes that have the layers ask for the manifest alone."""
    ledger = stocked(*"ab", "M", "c")
    ledger.names(d("M"), [d("a"), d("b")])
    ledger.touch(d("M"))
    assert going(ledger, 1) == "c"


def test_a_warm_layer_keeps_its_image() -> None:
    """Who reads what only one image names uses that image."""
    ledger = stocked("M", *"ab", "c")
    ledger.names(d("M"), [d("a"), d("b")])
    ledger.touch(d("b"))
    assert going(ledger, 1) == "c"


def test_a_warm_shared_layer_does_not_keep_a_cold_image() -> None:
    """A base layer says nothing about any of the images on top of it."""
    ledger = stocked("M", "a", "N", "b", "s")
    ledger.names(d("M"), [d("a"), d("s")])
    ledger.names(d("N"), [d("b"), d("s")])
    ledger.touch(d("N"))
    ledger.touch(d("s"))
    assert going(ledger, 1) == "Ma"


@pytest.mark.parametrize("kept", ["M", "a"], ids=["the manifest", "a layer"])
def test_what_is_kept_keeps_its_image(kept: str) -> None:
    """A pinned manifest holds its layers; and who reads a layer is about to want the others."""
    ledger = stocked("M", *"ab", "c")
    ledger.names(d("M"), [d("a"), d("b")])
    assert going(ledger, 9, kept=kept) == "c"


def test_an_index_goes_with_its_children_outermost_first() -> None:
    """No name leads to what is not there, at any moment."""
    ledger = stocked("a", "M", "I", "z")
    ledger.names(d("M"), [d("a")])
    ledger.names(d("I"), [d("M"), d("N")])  # N was never fetched
    assert going(ledger, 1) == "IMa"


def test_what_went_may_come_back() -> None:
    """Entries of what is neither stored nor named are used again."""
    ledger = stocked("M", "a")
    ledger.names(d("M"), [d("a"), d("b")])
    for name in "Ma":
        ledger.drop(d(name))
    assert (len(ledger), ledger.committed) == (0, 0)
    ledger.adopt(d("b"), 1)
    ledger.adopt(d("a"), 1)
    assert going(ledger, 2) == "ba"


def test_records_that_name_each_other_end() -> None:
    """No hash can, but a record on disk could say so."""
    ledger = stocked("M", "N")
    ledger.names(d("M"), [d("N"), d("M")])
    ledger.names(d("N"), [d("M")])
    assert sorted(going(ledger, 1)) == ["M", "N"]


def test_namers_are_told_outermost_first() -> None:
    """For whoever deletes a blob by itself."""
    ledger = stocked("a", "M", "I")
    ledger.names(d("I"), [d("M")])
    ledger.names(d("M"), [d("a")])
    assert ledger.namers(d("a")) == [d("I"), d("M")]


@pytest.mark.parametrize(
    ("capacity", "slack"),
    [(1 << 30, 0), (8 << 30, 256 << 20), (1 << 40, 1 << 30)],
    ids=["small: none", "1/32", "at most 1 GiB"],
)
def test_low_mark(capacity: int, slack: int) -> None:
    """How far eviction goes once it has begun."""
    assert slack_of(capacity) == slack


def test_thousands_that_are_kept_end_the_search() -> None:
    """A look is bounded, goes on where the last one ended, and says in the end that nothing may go."""
    names = [str(n) for n in range(5_000)]
    ledger = stocked(*names, capacity=5_000 * BLOCK_BYTES)
    assert ledger.victims(BLOCK_BYTES, kept={d(name) for name in names}) == []
    assert ledger.victims(BLOCK_BYTES, kept={d(name) for name in names if name != "4000"}) == [d("4000")]
