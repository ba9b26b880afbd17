"""rules/quota.py and its gate: what projects pay for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Denied
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.rules.gates import quota as gate
from proxy.rules.quota import Allowance, Book, Drift, OnFull

DIGESTS = tuple(Digest.of(bytes([n])) for n in range(8))
A, B, C, D, *_ = DIGESTS


def book(quota: int | None = 100, on_full: OnFull = "evict", **others: Allowance) -> Book:
    """A book in which "team" has this allowance."""
    return Book({"team": Allowance(quota, on_full), **others})


def pays(book: Book, project: str, digest: Digest, size: int) -> None:
    """Reserve and settle, as a transfer does."""
    assert book.reserve(project, size, ()) is not None
    book.settle(project, digest, size)


def test_a_blob_is_paid_in_full_and_once() -> None:
    """A project pays the full size, once, for every stored blob requested through it."""
    one = book()
    pays(one, "team", A, 40)
    pays(one, "team", A, 40)
    assert one.of("team").charged == 40 and one.of("team").reserved == 0


def test_each_project_pays_for_shared_bytes() -> None:
    """Bytes are stored once and paid for by everybody who asked for them (harbor.md §3)."""
    one = book()
    pays(one, "team", A, 40)
    pays(one, "other", A, 40)
    assert (one.of("team").charged, one.of("other").charged) == (40, 40)
    one.drop("team", A)
    assert one.is_paid(A)
    one.drop("other", A)
    assert not one.is_paid(A)


@pytest.mark.parametrize("size", [61, 100, 101])
@pytest.mark.parametrize("on_full", ["bypass", "deny"])
def test_what_does_not_fit_is_not_promised_and_changes_nothing(on_full: OnFull, size: int) -> None:
    """Promise 5: a quota is exact to the byte, reservations included."""
    one = book(100, on_full)
    pays(one, "team", A, 20)
    one.reserve("team", 20, ())
    assert one.reserve("team", size, ()) is None
    assert one.reserve("team", 60, ()) == []
    assert one.of("team").used == 100


def test_evict_drops_the_projects_own_coldest_as_far_as_needed() -> None:
    """`on_full = "evict"`: the project's own least recently used go first, what was touched stays."""
    one = book(100)
    for digest in (A, B, C):
        pays(one, "team", digest, 30)
    pays(one, "other", D, 1000)
    one.of("team").touch(A)
    assert one.reserve("team", 20, ()) == [B]
    assert one.of("team").used == 80 and D in one.of("other")


def test_what_is_being_read_is_not_dropped() -> None:
    """Victims are chosen among what nobody reads; where that is not enough nothing is dropped at all."""
    one = book(100)
    for digest in (A, B, C):
        pays(one, "team", digest, 30)
    assert one.reserve("team", 20, {A}) == [B]
    assert one.reserve("team", 100, {A}) is None
    assert C in one.of("team")


def test_more_than_the_whole_quota_evicts_nothing() -> None:
    """A blob that can never fit does not empty the project for nothing."""
    one = book(100)
    pays(one, "team", A, 90)
    assert one.reserve("team", 101, ()) is None
    assert A in one.of("team")


def test_a_lowered_quota_lets_go_of_the_coldest() -> None:
    """A reload that lowers a quota makes it hold at once."""
    one = book(None)
    for digest in (A, B, C):
        pays(one, "team", digest, 30)
    one.allow({"team": Allowance(50)})
    assert one.over("team", ()) == [A, B]
    assert one.of("team").charged == 30


def test_a_recount_repairs_and_says_what_it_did() -> None:
    """Charges for what is gone or has another size are drift; what agrees is left alone."""
    one = book(None)
    for digest in (A, B, C):
        pays(one, "team", digest, 30)
    assert one.recount("team", [(A, 30), (B, None), (C, 35), (D, None)]) == Drift("team", 1, 1, 35)
    assert dict(one.of("team")) == {A: 30, C: 35}


def test_an_account_is_looked_through_in_batches_while_it_changes() -> None:
    """A recount of a million charges holds nobody; what stays is seen, once."""
    one = book(None)
    for digest in DIGESTS:
        pays(one, "team", digest, 10)
    batches = one.of("team").batches(3)
    seen = next(batches)
    one.drop("team", seen[0][0])
    one.drop("team", DIGESTS[5])
    pays(one, "team", Digest.of(b"new"), 10)
    seen += [each for batch in batches for each in batch]
    assert len(seen) == len(set(seen))
    assert {(digest, 10) for digest in DIGESTS if digest != DIGESTS[5]} <= set(seen)


def test_releasing_more_than_was_reserved_is_a_bug() -> None:
    """The ledger does not repair its callers."""
    with pytest.raises(RuntimeError, match="released more"):
        book().release("team", 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "settle", "release", "gone", "drop", "touch"]),
            st.sampled_from(["team", "other", "free"]),
            st.integers(0, 7),
        ),
        max_size=200,
    ),
    st.sets(st.sampled_from(DIGESTS), max_size=3),
)
def test_a_book_agrees_with_a_model_and_never_exceeds_a_quota(
    steps: list[tuple[str, str, int]], kept: set[Digest]
) -> None:
    """Promise 5, for any order of operations: charged + reserved <= quota, and every sum is the sum of its parts."""
    one = Book({"team": Allowance(100, "evict"), "other": Allowance(90, "bypass")})
    sizes = {digest: 5 + 7 * n for n, digest in enumerate(DIGESTS)}
    charged: dict[str, dict[Digest, int]] = {"team": {}, "other": {}, "free": {}}
    promised: dict[str, list[Digest]] = {"team": [], "other": [], "free": []}
    for step, project, number in steps:
        digest = DIGESTS[number]
        if step == "reserve":
            dropped = one.reserve(project, sizes[digest], kept)
            if dropped is not None:
                promised[project].append(digest)
                assert not kept.intersection(dropped)
                for gone in dropped:
                    del charged[project][gone]
        elif step == "settle" and promised[project]:
            settled = promised[project].pop()
            one.settle(project, settled, sizes[settled])
            charged[project][settled] = sizes[settled]
        elif step == "release" and promised[project]:
            one.release(project, sizes[promised[project].pop()])
        elif step == "gone":
            assert sorted(one.gone(digest)) == sorted(name for name, paid in charged.items() if paid.pop(digest, 0))
        elif step == "drop":
            assert one.drop(project, digest) == (charged[project].pop(digest, None) is not None)
        elif step == "touch":
            assert one.of(project).touch(digest) == (digest in charged[project])
        for name, account in one:
            assert dict(account) == charged[name]
            assert account.charged == sum(charged[name].values())
            assert account.reserved == sum(sizes[each] for each in promised[name])
            assert account.allowance.quota is None or account.used <= account.allowance.quota
        assert {each for each in DIGESTS if one.is_paid(each)} == {each for paid in charged.values() for each in paid}


# -- the gate ----------------------------------------------------------------------------------------------------------


def parts(*sizes: int) -> list[Descriptor]:
    """Descriptors of these sizes."""
    return [Descriptor("application/octet-stream", digest, size) for digest, size in zip(DIGESTS, sizes, strict=False)]


def test_deny_says_how_much_is_used_of_what() -> None:
    """The sentence of a 403 has the rule, the project, and the numbers."""
    one = book(100, "deny")
    pays(one, "team", D, 50)
    with pytest.raises(
        Denied, match=r"rule 'quota' of project 'team': it needs 60 bytes more, and 50 bytes of 100"
    ) as e:
        gate.check_manifest(one.of("team"), "team", "docker.io/x", parts(10, 20, 30))
    assert (e.value.rule, e.value.project) == ("quota", "team")


def test_what_is_paid_and_what_is_named_twice_costs_nothing_more() -> None:
    """A project pays once: an image that shares its layers with what is here needs only the rest."""
    one = book(100, "deny")
    pays(one, "team", A, 90)
    small = Descriptor("x", B, 10)
    gate.check_manifest(one.of("team"), "team", "x", [Descriptor("x", A, 90), small, small])


@pytest.mark.parametrize("on_full", ["evict", "bypass"])
def test_only_deny_refuses(on_full: OnFull) -> None:
    """The other two serve, whatever it takes."""
    gate.check_manifest(book(1, on_full).of("team"), "team", "x", parts(1000))
