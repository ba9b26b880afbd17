"""ports.Notes: every implementation passes the suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.ports import Notes
from proxy.store.disk import DiskStore
from tests.contract.conftest import Store
from tests.contract.suites.notes import NotesSuite
from tests.support.clock import ManualClock


@pytest.fixture
def notes(store: Store) -> Notes:
    """One implementation."""
    return store.notes


class TestNotes(NotesSuite):
    """Over memory and disk."""


async def test_a_note_outlives_the_process(tmp_path: Path) -> None:
    """Pins that are forgotten by a restart are no pins."""
    for n in range(3):
        store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
        assert await store.notes.get("pins") == (b"%d" % (n - 1) if n else None)
        await store.notes.put("pins", b"%d" % n)
        await store.aclose()


async def test_a_damaged_note_is_put_aside_and_told(tmp_path: Path) -> None:
    """The checksum decides before anybody reads it."""
    told: list[str] = []
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=told.append)
    await store.notes.put("pins", b"body")
    path = tmp_path / "breakwater" / "notes" / "pins"
    path.write_bytes(path.read_bytes().replace(b"body", b"boda"))
    assert await store.notes.get("pins") is None
    await store.aclose()
    assert not path.exists()
    assert "damaged" in told[0]


@pytest.mark.parametrize("name", ["", "..", "a/b", "Pins", "a.b"])
async def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    """The last line in front of the file system."""
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
    with pytest.raises(ValueError, match="name of a note"):
        await store.notes.put(name, b"")
    await store.aclose()


async def test_a_folder_in_the_place_of_a_note_is_put_aside_by_the_next_write(tmp_path: Path) -> None:
    """Pins can be written whatever was planted there."""
    told: list[str] = []
    (planted := tmp_path / "breakwater" / "notes" / "pins").mkdir(parents=True)
    (tmp_path / "breakwater").chmod(0o700)
    (planted / "inside").touch()
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=told.append)
    await store.notes.put("pins", b"body")
    assert await store.notes.get("pins") == b"body"
    await store.aclose()
    assert "quarantine/" in told[0]
