"""rules/table.py: what the ledger and the accounts stand on, beside a dict and a list that do the same."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.rules.ledger import Ledger
from proxy.rules.quota import Account, Allowance
from proxy.rules.table import Ring, Table

MANY = 20_000


def digest(n: int) -> Digest:
    """Every third is a sha512; each of those begins like the sha256 next to it."""
    if n % 3:
        return Digest.of(b"%d" % n)
    return Digest("sha512", Digest.of(b"%d" % (n + 1)).hex + Digest.of(b"tail %d" % n).hex)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=600))
def test_a_table_agrees_with_a_dict(steps: list[tuple[bool, int]]) -> None:
    """For any order of additions and removals: every digest has one number, and the number that digest."""
    table, numbers = Table(), dict[Digest, int]()
    for is_added, n in steps:
        one = digest(n)
        if is_added:
            number = table.add(one)
            assert number == numbers.setdefault(one, number) != 0
        elif one in numbers:
            table.free(numbers.pop(one))
        assert table.find(one) == numbers.get(one, 0)
    assert len(table) == len(numbers)
    assert len(set(numbers.values())) == len(numbers)
    assert {one: table.find(one) for one in numbers} == numbers
    assert [table.digest(number) for number in numbers.values()] == list(numbers)


def test_a_table_of_thousands_finds_them_all() -> None:
    """Buckets are split one at a time, through several rounds, and lose nobody; freed numbers are used again."""
    table = Table()
    digests = [digest(n) for n in range(MANY)]
    numbers = [table.add(one) for one in digests]
    assert numbers == list(range(1, MANY + 1))
    for number in numbers[::2]:
        table.free(number)
    assert [table.find(one) for one in digests[::2]] == [0] * (MANY // 2)
    assert [table.find(one) for one in digests[1::2]] == numbers[1::2]
    again = [table.add(one) for one in digests[::2]]
    assert sorted(again) == numbers[::2]
    assert table.end == MANY + 1


def test_one_more_entry_moves_at_most_one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that copied all of itself to grow would hold the loop for as long as that takes."""
    moved: list[int] = []
    plain = Table._put

    def counted(self: Table, number: int, at: int) -> None:
        moved[-1] += 1
        plain(self, number, at)

    monkeypatch.setattr(Table, "_put", counted)
    table = Table()
    for n in range(MANY):
        moved.append(0)
        table.add(digest(n))
    assert max(moved) < 32


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=200))
def test_a_ring_agrees_with_a_list(steps: list[tuple[int, int]]) -> None:
    """Whatever is taken out and put behind whatever."""
    ring, order = Ring(), list[int]()
    for number, behind in steps:
        if number in order:
            ring.unlink(number)
            order.remove(number)
        if behind == 0 or behind in order:
            ring.link(number, behind)
            order.insert(order.index(behind) + 1 if behind else 0, number)
        found, at = [], ring.after[0]
        while at:
            found.append(at)
            at = ring.after[at]
        assert found == order
        assert ring.before[0] == (order[-1] if order else 0)


def in_ledger() -> Callable[[Digest], object]:
    ledger = Ledger(1 << 50)
    return lambda one: ledger.count(one, 10, 1.0)


def in_account() -> Callable[[Digest], object]:
    account = Account(Allowance())
    return lambda one: account.add(one, 10)


@pytest.mark.parametrize(("made", "most"), [(in_ledger, 90), (in_account, 70)], ids=["ledger", "account"])
def test_an_entry_costs_bytes_and_not_objects(made: Callable[[], Callable[[Digest], object]], most: int) -> None:
    """A million of each fit into 300 MiB beside everything else (performance.md P5)."""
    digests = [Digest.of(b"%d" % n) for n in range(MANY)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        put = made()
        for one in digests:
            put(one)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / MANY <= most
