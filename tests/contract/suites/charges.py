"""What every ports.ChargeJournal does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.oci.digest import Digest
from proxy.ports import ChargeJournal

ONE, OTHER, THIRD = (Digest.of(bytes([n])) for n in range(3))


async def charges_in(journal: ChargeJournal) -> dict[str, dict[Digest, int]]:
    """What all the changes come to."""
    found: dict[str, dict[Digest, int]] = {}
    async for project, changes in journal.changes():
        for digest, size in changes:
            found.setdefault(project, {}).pop(digest, None)
            if size is not None:
                found[project][digest] = size
    return found


class ChargeJournalSuite:
    """Needs a fixture `journal`, empty."""

    async def test_a_new_journal_has_nothing(self, journal: ChargeJournal) -> None:
        """A store that nobody pulled through has no charges."""
        assert await charges_in(journal) == {}

    async def test_the_last_change_of_a_digest_counts(self, journal: ChargeJournal) -> None:
        """Changes are appended; later ones stand over earlier ones, in other calls as in the same."""
        await journal.append("team", [(ONE, 10), (OTHER, 20), (ONE, None)])
        await journal.append("team", [(THIRD, 5), (OTHER, 21)])
        assert (await charges_in(journal))["team"] == {OTHER: 21, THIRD: 5}

    async def test_projects_do_not_see_each_other(self, journal: ChargeJournal) -> None:
        """A charge belongs to the project that pays it."""
        await journal.append("team", [(ONE, 10)])
        await journal.append("other", [(ONE, 10), (OTHER, 1)])
        await journal.append("other", [(ONE, None)])
        assert await charges_in(journal) == {"team": {ONE: 10}, "other": {OTHER: 1}}

    async def test_a_rewrite_replaces_everything_and_can_be_appended_to(self, journal: ChargeJournal) -> None:
        """A journal that has grown long is written anew, and goes on."""
        await journal.append("team", [(ONE, 10), (OTHER, 20)])
        anew: list[list[tuple[Digest, int | None]]] = [[(THIRD, 7), (OTHER, 1)], [], [(OTHER, None)]]
        await journal.rewrite("team", iter(anew))
        await journal.append("team", [(ONE, 11)])
        assert (await charges_in(journal))["team"] == {THIRD: 7, ONE: 11}

    async def test_both_algorithms_are_kept(self, journal: ChargeJournal) -> None:
        """image-spec § Digests: sha512 is registered, too."""
        digest = Digest.of(b"x", "sha512")
        await journal.append("team", [(digest, 0)])
        assert (await charges_in(journal))["team"] == {digest: 0}

    async def test_a_rewrite_that_breaks_off_leaves_the_old_list(self, journal: ChargeJournal) -> None:
        """Half a list would be a licence for the other half."""
        await journal.append("team", [(ONE, 10), (OTHER, 20)])

        def broken() -> Iterator[list[tuple[Digest, int | None]]]:
            yield [(THIRD, 7)]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await journal.rewrite("team", broken())
        assert await charges_in(journal) == {"team": {ONE: 10, OTHER: 20}}

    async def test_thousands_of_changes_come_in_their_order(self, journal: ChargeJournal) -> None:
        """Some at a time, none lost where one batch ends and the next begins."""
        digests = [Digest.of(b"%d" % n) for n in range(3_000)]
        await journal.append("team", [(digest, n) for n, digest in enumerate(digests)])
        await journal.append("team", [(digest, None) for digest in digests[::2]])
        assert (await charges_in(journal))["team"] == {digest: n for n, digest in enumerate(digests) if n % 2}
