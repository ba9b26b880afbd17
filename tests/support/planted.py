"""Planted bugs: each is put into a copy of the tree as a patch, and some test must catch it.

    python -m tests.support.planted                 a line for each: which test caught it; exit code 1 when one lives
    python -m tests.support.planted fsync lose      those with one of these words in their name
    python -m tests.support.planted --table         as the table of docs/reliability.md

A patch is a place of a file as it is, and as it is with the bug. One that no longer fits the file counts as alive.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Bug:
    """One mistake that somebody could make, and the tests that are there for it."""

    what: str
    file: str
    right: str
    wrong: str
    #: What pytest is told to run; the whole of a long file would take its time before it comes to the point.
    tests: str


_FAULTS = (
    "tests/fault/test_store_faults.py -k cut_breaks_a_promise or failed_fsync or failed_write or behind_the_writer"
)
_HOSTILE = "tests/fault/test_store_hostile.py -k set_aside or damaged or place"
_LIVES = "tests/fault/test_store_lives.py"
_BLOBS = "tests/contract/test_blob_store.py"
_CAPACITY = "tests/unit/test_capacity.py"
_ENGINE_CAPACITY = "tests/unit/test_engine_capacity.py"
_LEDGER_IMAGES = "tests/unit/test_ledger_images.py"
_REMAINS = "tests/unit/test_remains.py"

BUGS: tuple[Bug, ...] = (
    # -- the order of a commit
    Bug("skip the fsync of a file", "proxy/store/blobs.py", "            self.fs.fsync(fd)\n", "", _FAULTS),
    Bug(
        "skip the fsync of a folder",
        "proxy/store/blobs.py",
        "            self.fs.fsync_folder(at)\n",
        "            pass\n",
        _FAULTS,
    ),
    Bug(
        "rename before fsync",
        "proxy/store/blobs.py",
        """            self.fs.fsync(fd)
            with made_folder(
                self.fs,
                self._folders.blobs,
                shard(digest),
                set_aside=self._quarantine.take,
                settled=self._settled,
                making=self.upkeep.making,
            ) as at:
                self._name_it(digest, name, at)
""",
        """            with made_folder(
                self.fs,
                self._folders.blobs,
                shard(digest),
                set_aside=self._quarantine.take,
                settled=self._settled,
                making=self.upkeep.making,
            ) as at:
                self._name_it(digest, name, at)
            self.fs.fsync(fd)
""",
        _FAULTS,
    ),
    Bug(
        "trust a second fsync after one that failed",
        "proxy/store/blobs.py",
        """            self._blobs.fs.fsync(self.fd)
        except OSError as error:
            self._failure = meaning(error, f"cannot write {self._digest}")
""",
        """            self._blobs.fs.fsync(self.fd)
        except OSError:
            pass
""",
        _FAULTS,
    ),
    Bug(
        "commit a file with a hole",
        "proxy/store/blobs.py",
        """            self._failure = meaning(error, f"cannot write {self._digest}")
            raise self._failure from error
""",
        """            raise meaning(error, f"cannot write {self._digest}") from error
""",
        _FAULTS,
    ),
    Bug(
        "forget to sync a small file",
        "proxy/store/filesystem.py",
        "        fs.write(fd, content, 0)\n        fs.fsync(fd)\n",
        "        fs.write(fd, content, 0)\n",
        _FAULTS,
    ),
    # -- what may be believed
    Bug("skip the verify", "proxy/store/blobs.py", "if not self._verifier.agrees():", "if False:", _BLOBS),
    Bug(
        "believe the first read",
        "proxy/engine/verification.py",
        "if verifier.n_bytes != blob.size or not verifier.agrees():",
        "if False:",
        "tests/unit/test_verification.py",
    ),
    Bug(
        "believe a file that has changed",
        "proxy/engine/verification.py",
        "return self._verified.get(digest) == identity",
        "return digest in self._verified",
        "tests/unit/test_verification.py",
    ),
    Bug(
        "let the last bytes go before the digest agrees",
        "proxy/engine/transfers.py",
        "is_verified=self.state is State.COMMITTED)",
        "is_verified=True)",
        "tests/fault/test_pull_faults.py",
    ),
    Bug(
        "believe a damaged record",
        "proxy/store/checked_file.py",
        "if claim and claim[1].decode() == hashlib.sha256(payload).hexdigest():",
        "if claim:",
        _HOSTILE,
    ),
    Bug(
        "follow a symbolic link",
        "proxy/store/filesystem.py",
        "_READ = os.O_RDONLY | os.O_NOFOLLOW | ",
        "_READ = os.O_RDONLY | ",
        _HOSTILE,
    ),
    Bug("take a second name for ours", "proxy/store/filesystem.py", "and found.st_nlink == 1 and", "and", _HOSTILE),
    Bug(
        "blame upstream for rotten remains",
        "proxy/engine/pump.py",
        "            if self._n_resumed:\n",
        "            if False:\n",
        _REMAINS,
    ),
    # -- promises of space
    Bug(
        "forget a reservation",
        "proxy/engine/capacity.py",
        "            self.ledger.reserve(n_bytes)\n",
        "            pass\n",
        _CAPACITY,
    ),
    Bug(
        "never give a promise back",
        "proxy/engine/capacity.py",
        "        self._capacity.ledger.release(self.n_bytes)\n",
        "",
        _CAPACITY,
    ),
    Bug(
        "count the bound for nothing",
        "proxy/rules/ledger.py",
        "self.capacity - self.committed - self.uncounted - self.reserved",
        "self.capacity - self.committed - self.reserved",
        _LEDGER_IMAGES,
    ),
    Bug(
        "trust a bound without a step",
        "proxy/engine/capacity.py",
        "                await self._cover(self._bound, n_bytes)\n",
        "                pass\n",
        _ENGINE_CAPACITY,
    ),
    Bug(
        "count what is written twice",
        "proxy/engine/capacity.py",
        "return self.n_bytes - self._n_written",
        "return self.n_bytes",
        _ENGINE_CAPACITY,
    ),
    Bug(
        "keep remains uncounted",
        "proxy/engine/capacity.py",
        "        self.ledger.reserve(taken)\n",
        "        pass\n",
        _REMAINS,
    ),
    # -- eviction
    Bug(
        "evict what is pinned or read",
        "proxy/rules/ledger.py",
        "        if any(self._digest(each) in kept for each in image):\n",
        "        if False:\n",
        _LEDGER_IMAGES,
    ),
    Bug(
        "evict a layer that others need",
        "proxy/rules/ledger.py",
        "if all(namer in image for namer",
        "if any(namer in image for namer",
        _LEDGER_IMAGES,
    ),
    Bug(
        "lose count on a cancelled eviction",
        "proxy/engine/capacity.py",
        'self._owner.uninterrupted(self._delete(victims), "evict")',
        "self._blobs.delete(victims); self._drop(victims)",
        _ENGINE_CAPACITY,
    ),
    # -- leaks, and those who leave
    Bug(
        "leak a descriptor that came too late",
        "proxy/store/workers.py",
        "            hop.add_done_callback(_close_what_came)\n",
        "            pass\n",
        _LIVES,
    ),
    Bug(
        "leak the descriptor of what was planted",
        "proxy/store/quarantine.py",
        "    fs.close(fd)\n    quarantine.take(at, name, ",
        "    quarantine.take(at, name, ",
        _HOSTILE,
    ),
    Bug(
        "close a file beneath a thread that writes to it",
        "proxy/store/blobs.py",
        "            if running is not None and not running.done():\n",
        "            if False:\n",
        _LIVES,
    ),
    Bug(
        "lose the other waiters when one is cancelled",
        "proxy/engine/flights.py",
        "    await asyncio.wait([flight])  # not",
        "    await flight  # not",
        "tests/unit/test_flights.py",
    ),
    Bug(
        "lose a waiter who comes after one that was cancelled",
        "proxy/engine/transfers.py",
        "            if not waiter.done():\n                waiter.set_result(None)\n",
        "            if waiter.done():\n                break\n            waiter.set_result(None)\n",
        "tests/unit/test_doorbell.py",
    ),
)


def caught_by(bug: Bug) -> str:
    """The first test that fails with the bug in, or "". Raises ValueError when the place is not there (any more)."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder)
        for part in ("proxy", "tests", "pyproject.toml"):
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, tree / part)
        text = (tree / bug.file).read_text()
        if text.count(bug.right) != 1:
            raise ValueError(f"{bug.file} has this {text.count(bug.right)} times: {bug.right.strip()}")
        (tree / bug.file).write_text(text.replace(bug.right, bug.wrong))
        file, _, words = bug.tests.partition(" -k ")
        selected = [file, "-k", words] if words else [file]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=300", "-p", "no:cacheprovider", *selected],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "quick"},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    """All of them, or those whose name has a word of the command line in it."""
    is_table = "--table" in sys.argv
    words = [word for word in sys.argv[1:] if word != "--table"]
    n_alive = n_planted = 0
    if is_table:
        print("| planted | in | caught by |\n|---|---|---|")
    for bug in BUGS:
        if words and not any(word in bug.what for word in words):
            continue
        n_planted += 1
        try:
            test, why = caught_by(bug), "**nothing**"
        except ValueError as error:
            test, why = "", f"cannot be planted: {error}"
        n_alive += not test
        if is_table:
            print(f"| {bug.what} | `{bug.file}` | {f'`{test}`' if test else why} |", flush=True)
        else:
            print(f"{'caught' if test else 'ALIVE '}  {bug.what}  {test or why}", flush=True)
    print(f"\n{n_planted - n_alive} of {n_planted} caught")
    sys.exit(bool(n_alive))


if __name__ == "__main__":
    main()
