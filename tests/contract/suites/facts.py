"""What every ports.Facts promises. A class of tests; `tests/contract/test_facts.py` says over which."""

from __future__ import annotations

import pytest

from proxy.oci.digest import Digest
from proxy.ports import Facts, Use


def use(n: int, counter: int | None = None, algorithm: str = "sha256") -> Use:
    """The use of a blob that is known by a number."""
    return Use(Digest.of(b"%d" % n, algorithm), n, n if counter is None else counter)


async def all_uses(facts: Facts) -> list[Use]:
    """Everything remembered, in order."""
    return [found async for batch in facts.uses() for found in batch]


class FactsSuite:
    """Needs a fixture `facts`."""

    async def test_nothing_is_remembered_at_first(self, facts: Facts) -> None:
        """Absent is empty and None, not an error."""
        assert await all_uses(facts) == []
        assert await facts.get("upper bound") is None

    async def test_uses_come_least_recent_first(self, facts: Facts) -> None:
        """By the counter, whatever the order in which they were told, across algorithms."""
        await facts.remember([use(3), use(1)], [])
        await facts.remember([use(2, algorithm="sha512"), use(0)], [])
        assert await all_uses(facts) == [use(0), use(1), use(2, algorithm="sha512"), use(3)]

    async def test_a_later_use_counts(self, facts: Facts) -> None:
        """One use for each digest: the latest that was told, with its size."""
        await facts.remember([use(1), use(2)], [])
        await facts.remember([use(1, counter=9)], [])
        await facts.remember([], [])
        assert await all_uses(facts) == [use(2), use(1, counter=9)]

    async def test_the_forgotten_is_gone_until_it_is_used_again(self, facts: Facts) -> None:
        """Forgetting what was never known is fine."""
        await facts.remember([use(1), use(2)], [])
        await facts.remember([use(3)], [use(1).digest, use(7).digest])
        assert await all_uses(facts) == [use(2), use(3)]
        await facts.remember([use(1, counter=5)], [])
        assert await all_uses(facts) == [use(2), use(3), use(1, counter=5)]

    async def test_order_holds_over_many(self, facts: Facts) -> None:
        """Past every batch and merge: as a dictionary would have it."""
        model: dict[Digest, Use] = {}
        counter = 0
        for step in range(12):
            some = []
            for n in range(step * 1500, step * 1500 + 4000):
                counter += 1
                some.append(use(n % 9000, counter))
            gone = [use(n).digest for n in range(step, 9000, 97)]
            await facts.remember(some, gone)
            model |= {each.digest: each for each in some}
            for digest in gone:
                model.pop(digest, None)
        assert await all_uses(facts) == sorted(model.values(), key=lambda each: each.counter)

    async def test_what_is_remembered_while_reading_does_no_harm(self, facts: Facts) -> None:
        """A start reads while hits are remembered; what was there before is read exactly once."""
        before = [use(n) for n in range(20_000)]
        await facts.remember(before, [])
        found: list[Use] = []
        async for batch in facts.uses():
            found += batch
            await facts.remember([use(n, counter=1_000_000 + n) for n in range(30_000, 50_000)], [])
        assert [each for each in found if each.counter < 20_000] == before

    @pytest.mark.parametrize("value", [b"x", bytes(range(256)) * 256], ids=["one byte", "64 KiB"])
    async def test_a_named_fact_is_had_back(self, facts: Facts, value: bytes) -> None:
        """Bytes as they were; the latest counts; empty forgets."""
        await facts.put("upper bound", b"older")
        await facts.put("upper bound", value)
        await facts.put("another", b"other")
        assert await facts.get("upper bound") == value
        await facts.put("upper bound", b"")
        assert await facts.get("upper bound") is None
        assert await facts.get("another") == b"other"

    async def test_after_the_end_nothing_is_said(self, facts: Facts) -> None:
        """Never raises, and may be closed more than once."""
        await facts.put("a", b"b")
        await facts.aclose()
        await facts.aclose()
