# ruff: noqa: E501
"""Planted bugs: each is put into a copy of the tree, and some test must catch it.

python -m tests.support.planted        prints which test caught which; exit code 1 when one lives
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: what, file, the line as it is, the line with the bug, the tests that should see it
# fmt: off
BUGS: tuple[tuple[str, str, str, str, str], ...] = (
    ("skip the fsync of a file", "proxy/store/disk.py", "            self.fs.fsync(fd)\n", "", "tests/fault/test_store_faults.py"),
    ("skip the fsync of a folder", "proxy/store/disk.py", "            self.fs.fsync_folder(at)\n", "            pass\n", "tests/fault/test_store_faults.py"),
    ("skip the verify", "proxy/store/disk.py", "if not self._verifier.agrees():", "if False:", "tests/contract/test_blob_store.py"),
    ("believe the first read", "proxy/engine/verification.py", "if verifier.n_bytes != blob.size or not verifier.agrees():", "if False:", "tests/unit/test_verification.py"),
    ("forget a reservation", "proxy/engine/capacity.py", "            self.ledger.reserve(n_bytes)\n", "            pass\n", "tests/unit/test_capacity.py"),
    ("never give a promise back", "proxy/engine/capacity.py", "        self._capacity.ledger.release(self.n_bytes)\n", "", "tests/unit/test_capacity.py"),
    ("evict what is pinned or read", "proxy/rules/ledger.py", "        if any(self._digest(each) in kept for each in image):\n", "        if False:\n", "tests/unit/test_ledger_images.py"),
    ("evict a layer that others need", "proxy/rules/ledger.py", "if all(namer in image for namer", "if any(namer in image for namer", "tests/unit/test_ledger_images.py"),
    ("count the bound for nothing", "proxy/rules/ledger.py", "self.capacity - self.committed - self.uncounted - self.reserved", "self.capacity - self.committed - self.reserved", "tests/unit/test_ledger_images.py"),
    ("trust a bound without a step", "proxy/engine/capacity.py", "                await self._cover(self._bound, n_bytes)\n", "                pass\n", "tests/unit/test_engine_capacity.py"),
    ("count what is written twice", "proxy/engine/capacity.py", "return self.n_bytes - self._n_written", "return self.n_bytes", "tests/unit/test_engine_capacity.py"),
    ("lose count on a cancelled eviction", "proxy/engine/capacity.py", "self._owner.uninterrupted(self._delete(victims), \"evict\")", "self._blobs.delete(victims); self._drop(victims)", "tests/unit/test_engine_capacity.py"),
    ("blame upstream for rotten remains", "proxy/engine/pump.py", "            if self._n_resumed:\n", "            if False:\n", "tests/unit/test_remains.py"),
    ("keep remains uncounted", "proxy/engine/capacity.py", "        self.ledger.reserve(taken)\n", "        pass\n", "tests/unit/test_remains.py"),
)
# fmt: on


def caught_by(file: str, old: str, new: str, tests: str) -> str:
    """The first test that fails with the bug in, or "". Raises ValueError when the line is not there (any more)."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder)
        for part in ("proxy", "tests", "pyproject.toml"):
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, tree / part)
        text = (tree / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has this {text.count(old)} times: {old.strip()}")
        (tree / file).write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=60", "-p", "no:cacheprovider", tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "quick"},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    """All of them, or those whose name has a word of the command line in it."""
    alive = 0
    for what, *planted in BUGS:
        if sys.argv[1:] and not any(word in what for word in sys.argv[1:]):
            continue
        try:
            test = caught_by(*planted)
        except ValueError as error:
            test, what = "", f"{what} (cannot be planted: {error})"
        alive += not test
        print(f"{'caught' if test else 'ALIVE '}  {what}  {test}", flush=True)
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
