"""tests/conftest.py: a skip is a failure, so that no run passes by leaving something out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SKIPS = {
    "a mark": "import pytest\n@pytest.mark.skipif(True, reason='no root')\ndef test_it(): pass\n",
    "a call": "import pytest\ndef test_it(): pytest.skip('no loop devices')\n",
    "a whole file": "import pytest\npytest.importorskip('nothing_of_this_name')\ndef test_it(): pass\n",
}


def test_a_skip_fails_the_run(tmp_path: Path) -> None:
    """What was not tried was not shown, in which words ever it is left out."""
    for n, text in enumerate(SKIPS.values()):
        (tmp_path / f"test_left_out_{n}.py").write_text(text)
    # No summary, which repeats the sentences where $CI is set, and no capture, whose files would look left behind.
    options = ["-q", "-rN", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert done.stdout.count("skipped, which nothing here may be") == len(SKIPS), done.stdout
