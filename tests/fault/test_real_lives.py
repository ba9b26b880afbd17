"""Lives of the real process that end without warning (reliability.md T38, T39): a few here, a thousand in `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.lives import run_cuts, run_kills


@pytest.mark.timeout(300)
async def test_killed_at_any_moment_it_starts_again_with_nothing_wrong(tmp_path: Path) -> None:
    """INV-1, INV-2, INV-5, promise 8: kill -9 at random moments and at exact system calls, under load."""
    counts = await run_kills(tmp_path, seed=38, n_random=2, n_exact=2)
    assert counts.is_clean, counts
    assert (counts.kills, counts.exact) == (2, 2) and counts.bodies


@pytest.mark.timeout(300)
async def test_the_power_goes_and_no_name_lies(tmp_path: Path) -> None:
    """Promise 8: ext4 is shut down under load without its journal, and mounted again."""
    counts = await run_cuts(tmp_path, seed=39, n_cuts=2)
    assert counts.is_clean, counts
    assert counts.cuts == 2


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_a_thousand_kills_and_three_hundred_power_cuts(tmp_path: Path) -> None:
    """The same, as often as the issue asks."""
    (tmp_path / "kills").mkdir()
    counts = await run_kills(tmp_path / "kills", seed=1, n_random=500, n_exact=500)
    assert counts.is_clean, counts
    (tmp_path / "cuts").mkdir()
    counts = await run_cuts(tmp_path / "cuts", seed=2, n_cuts=300)
    assert counts.is_clean, counts
