"""Corruptions of files and of facts (reliability.md T08, T40): some here, five hundred of each in `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rot import HARMS_OF_FACTS, MOMENTS, harm_facts, harm_files


@pytest.mark.timeout(300)
async def test_rot_never_ends_cleanly_and_is_fetched_again_once(tmp_path: Path) -> None:
    """Promises 2 and 8: found at the first read after a start, by a changed inode, by the scrub or by `verify`."""
    counts = await harm_files(tmp_path, seed=8, n=15 * len(MOMENTS), per_batch=15)
    assert counts.is_clean, counts
    assert counts.corruptions.total() >= 15 * len(MOMENTS)


async def test_whatever_becomes_of_the_facts_every_blob_tag_and_link_stays(tmp_path: Path) -> None:
    """What diskcache holds can be rebuilt from the files: nothing is lost with it, and upstream is not asked."""
    counts = await harm_facts(tmp_path, seed=40, n=len(HARMS_OF_FACTS))
    assert counts.is_clean, counts
    assert len(counts.corruptions) == len(HARMS_OF_FACTS)


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_five_hundred_of_each(tmp_path: Path) -> None:
    """The same, as often as the issue asks."""
    (tmp_path / "files").mkdir()
    counts = await harm_files(tmp_path / "files", seed=1, n=500)
    assert counts.is_clean, counts
    (tmp_path / "facts").mkdir()
    counts = await harm_facts(tmp_path / "facts", seed=2, n=500)
    assert counts.is_clean, counts
