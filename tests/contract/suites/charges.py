"""What every ports.ChargeJournal does."""

from __future__ import annotations

from proxy.oci.digest import Digest
from proxy.ports import ChargeJournal

ONE, OTHER, THIRD = (Digest.of(bytes([n])) for n in range(3))


class ChargeJournalSuite:
    """Needs a fixture `journal`, empty."""

    async def test_a_new_journal_has_nothing(self, journal: ChargeJournal) -> None:
        """A store that nobody pulled through has no charges."""
        assert await journal.load() == {}

    async def test_the_last_change_of_a_digest_counts(self, journal: ChargeJournal) -> None:
        """Changes are appended; later ones stand over earlier ones, in other calls as in the same."""
        await journal.append("team", [(ONE, 10), (OTHER, 20), (ONE, None)])
        await journal.append("team", [(THIRD, 5), (OTHER, 21)])
        assert dict((await journal.load())["team"]) == {OTHER: 21, THIRD: 5}

    async def test_projects_do_not_see_each_other(self, journal: ChargeJournal) -> None:
        """A charge belongs to the project that pays it."""
        await journal.append("team", [(ONE, 10)])
        await journal.append("other", [(ONE, 10), (OTHER, 1)])
        await journal.append("other", [(ONE, None)])
        loaded = await journal.load()
        assert {project: dict(charges) for project, charges in loaded.items()} == {
            "team": {ONE: 10},
            "other": {OTHER: 1},
        }

    async def test_a_rewrite_replaces_everything_and_can_be_appended_to(self, journal: ChargeJournal) -> None:
        """A journal that has grown long is written anew, and goes on."""
        await journal.append("team", [(ONE, 10), (OTHER, 20)])
        await journal.rewrite("team", [(THIRD, 7)])
        await journal.append("team", [(ONE, 11)])
        assert dict((await journal.load())["team"]) == {THIRD: 7, ONE: 11}

    async def test_both_algorithms_are_kept(self, journal: ChargeJournal) -> None:
        """image-spec § Digests: sha512 is registered, too."""
        digest = Digest.of(b"x", "sha512")
        await journal.append("team", [(digest, 0)])
        assert dict((await journal.load())["team"]) == {digest: 0}
