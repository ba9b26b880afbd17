"""ports.ChargeJournal: every implementation passes the suite; on disk, damage costs a line and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.ports import ChargeJournal
from proxy.store.disk import DiskStore
from tests.contract.conftest import Store
from tests.contract.suites.charges import ONE, OTHER, THIRD, ChargeJournalSuite, charges_in
from tests.support.clock import ManualClock


@pytest.fixture
def journal(store: Store) -> ChargeJournal:
    """One implementation."""
    return store.charges


class TestCharges(ChargeJournalSuite):
    """Over memory and disk."""


async def reopened(tmp_path: Path, reports: list[str]) -> dict[str, dict[Digest, int]]:
    """What a store at this path says after a start."""
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=reports.append)
    try:
        return await charges_in(store.charges)
    finally:
        await store.aclose()


@pytest.fixture
async def written(tmp_path: Path) -> Path:
    """The file of a journal with two charges, its store closed again."""
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=lambda _: None)
    await store.charges.append("team", [(ONE, 10)])
    await store.charges.append("team", [(OTHER, 20)])
    await store.aclose()
    return tmp_path / "breakwater" / "charges" / "team"


async def test_charges_outlive_the_process(tmp_path: Path, written: Path) -> None:
    """Promise 8: what was durable is there after a start."""
    assert await reopened(tmp_path, []) == {"team": {ONE: 10, OTHER: 20}}


@pytest.mark.parametrize("n_lost", range(1, 40, 6))
async def test_a_torn_last_line_costs_that_line_alone_and_can_be_appended_to(
    tmp_path: Path, written: Path, n_lost: int
) -> None:
    """A power cut may leave any part of the last append; what is appended next is not taken along."""
    content = written.read_bytes()
    written.write_bytes(content[:-n_lost])
    is_whole = n_lost == 1  # only the line end is missing
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=lambda _: None)
    await store.charges.append("team", [(THIRD, 30)])
    await store.aclose()
    assert await reopened(tmp_path, []) == {"team": {ONE: 10, THIRD: 30} | ({OTHER: 20} if is_whole else {})}


@pytest.mark.parametrize("at", range(0, 90, 7))
async def test_a_flipped_bit_costs_its_line_alone_and_is_reported(tmp_path: Path, written: Path, at: int) -> None:
    """Every line has its own checksum."""
    content = bytearray(written.read_bytes())
    content[at] ^= 1
    written.write_bytes(content)
    reports: list[str] = []
    assert (await reopened(tmp_path, reports))["team"] in ({OTHER: 20}, {}), "never a charge that nobody made"
    assert len(reports) == 1 and "charges/team" in reports[0]


async def test_what_was_planted_in_its_place_is_set_aside(tmp_path: Path, written: Path) -> None:
    """A symbolic link is not followed, for reading or writing."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    written.unlink()
    written.symlink_to(victim)
    reports: list[str] = []
    assert await reopened(tmp_path, reports) == {}
    store = await DiskStore.open(tmp_path, clock=ManualClock(), report=reports.append)
    await store.charges.append("team", [(ONE, 10)])
    await store.aclose()
    assert victim.read_bytes() == b"precious"
    assert "symbolic link" in reports[0]
