"""store/filesystem.py: what a folder holds is seen whole, whoever else looks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proxy.store.filesystem import FileSystem


def test_two_threads_that_list_one_folder_both_see_all_of_it(tmp_path: Path) -> None:
    """The offset of a descriptor is shared: a count that misses names would be a lie."""
    names = {f"name-{n}" for n in range(500)}
    for name in names:
        (tmp_path / name).touch()
    at = os.open(tmp_path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(4) as threads:
            seen = list(threads.map(lambda _: set(FileSystem().names(at)), range(400)))
    finally:
        os.close(at)
    assert all(each == names for each in seen)
