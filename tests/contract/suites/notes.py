"""What every ports.Notes promises. A class of tests; `tests/contract/test_notes.py` says over which."""

from __future__ import annotations

import pytest

from proxy.ports import Notes


class NotesSuite:
    """Needs a fixture `notes`."""

    async def test_what_was_never_written_is_none(self, notes: Notes) -> None:
        """Absent is None, not an error."""
        assert await notes.get("pins") is None

    @pytest.mark.parametrize("body", [b"", b"{}", b"\n\x00\xff" * 100_000], ids=["empty", "small", "any bytes"])
    async def test_a_note_is_had_back_whole(self, notes: Notes, body: bytes) -> None:
        """Byte for byte."""
        await notes.put("pins", body)
        assert await notes.get("pins") == body
        assert await notes.get("seal") is None

    async def test_a_later_note_replaces_the_earlier(self, notes: Notes) -> None:
        """One note for each name."""
        await notes.put("pins", b"first and longer")
        await notes.put("pins", b"second")
        assert await notes.get("pins") == b"second"
