"""The planted bugs of docs/reliability.md still fit the code that they are planted in."""

from __future__ import annotations

import pytest

from tests.support.planted import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_fits_its_file(bug: Bug) -> None:
    """One that no longer fits is planted nowhere, and nobody hears of it before the long run."""
    assert (ROOT / bug.file).read_text().count(bug.right) == 1
