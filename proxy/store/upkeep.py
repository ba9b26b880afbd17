"""What the store takes of the disk besides blobs: folders, records, journals, notes, facts, what is in quarantine.

The capacity is a promise about the whole folder (product.md, promise 5), so these bytes are counted like a blob's: as
the file system gives them away, and before they are written. Whoever is about to write claims the most it can come to;
the thread that wrote says what it came to. What may be claimed is granted by the engine, which makes room for it as it
does for transfers.

Blobs and blobs on their way are the ledger's. Folders are not: a shard of four thousand names takes 330 KB on ext4, and
never shrinks.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import ParamSpec, TypeVar

from proxy.store.filesystem import FileSystem, meaning
from proxy.store.layout import AUDIT, BLOBS, INGEST, Folders
from proxy.store.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")

#: Always granted beyond what is claimed: for what cannot wait for room, because room is made with it (the bound), or
#: because it happens to us (a damaged file is moved to quarantine while it is read).
MARGIN_BYTES = 256 << 10
#: What giving a file a name may take beyond the file: a block of the folder, two of its index, and folders made for it.
NAMING_BYTES = 16 << 10
#: What a new folder takes, and what a file is rounded up to, on the common file systems. Where blocks are larger the
#: margin is for the difference: what files take is looked at when they are there, and folders when all is counted.
BLOCK_BYTES = 4096
#: Entries looked at in one hop to a thread.
_STEP = 256


def taken_by(found: os.stat_result) -> int:
    """What a file or folder takes of the disk, in bytes."""
    return found.st_blocks * 512


async def _granted(_: int) -> None:
    """Nobody counts: a store without an engine."""


class Upkeep:
    """The count (ports.Upkeep). Until `measure` it is of what this process has added alone."""

    def __init__(self, fs: FileSystem, folders: Folders, workers: Workers) -> None:
        self._fs = fs
        self._folders = folders
        self._workers = workers
        #: Asked for room for so many bytes more, which it then grants. Raises OutOfSpace.
        self.more: Callable[[int], Awaitable[None]] = _granted
        #: What somebody else may write into the folder at most, all of it: the audit log.
        self.others = 0
        self._taken = self._grown = self._claimed = 0
        self._allowed: int | None = None
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes on disk, as far as they are known."""
        return self._taken + self.others

    @property
    def needed(self) -> int:
        """What must be granted now: what is there, what is being written, and the margin."""
        return self.taken + self._claimed + MARGIN_BYTES

    def grant(self, n_bytes: int) -> None:
        """So much may be taken in all."""
        self._allowed = n_bytes

    # -- for those who write ----------------------------------------------------------------------------------------

    async def claim(self, n_bytes: int) -> None:
        """Room for `n_bytes`, made where there is none. Ends with `give_back`. Raises OutOfSpace."""
        while self._allowed is not None and self.needed + n_bytes > self._allowed:
            await self.more(self.needed + n_bytes - self._allowed)
        with self._lock:
            self._claimed += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """What was claimed is written by now, and counted; or never will be. From any thread."""
        with self._lock:
            self._claimed -= n_bytes

    def ending(self, n_bytes: int, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, which gives back a claim at its end: in a thread, where nobody may wait for it any more."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            finally:
                self.give_back(n_bytes)

        return counted

    async def kept(self, n_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what writes at most `n_bytes` in a thread, once there is room for them. Raises OutOfSpace."""
        await self.claim(n_bytes)
        try:
            hop = self._workers.start("syncs", self.ending(n_bytes, function), *args, **kwargs)
        except BaseException:
            self.give_back(n_bytes)
            raise
        return await asyncio.shield(hop)

    def took(self, n_bytes: int) -> None:
        """So many bytes more are on disk, or fewer. From any thread."""
        with self._lock:
            self._taken += n_bytes
            self._grown += max(0, n_bytes)

    @contextmanager
    def naming(self, at: int, n_more: int = 0) -> Iterator[None]:
        """What is done in here gives the folder `at` a name, for `n_more` bytes; in a worker thread."""
        before = _size_of(self._fs, at)
        yield
        # Folders grow and do not shrink. Of two threads in the same one, both may see it grow.
        self.took(n_more + max(0, _size_of(self._fs, at) - before))

    def created(self, at: int, name: str) -> int:
        """The descriptor of a new file in the folder `at`; in a worker thread. Raises OSError, and leaves none open."""
        before = _size_of(self._fs, at)
        fd = self._fs.create(at, name)
        try:
            self.took(max(0, _size_of(self._fs, at) - before))
        except BaseException:
            self._fs.close(fd)
            raise
        return fd

    def making(self, at: int) -> AbstractContextManager[None]:
        """The same, for a folder."""
        return self.naming(at, BLOCK_BYTES)

    # -- all of it --------------------------------------------------------------------------------------------------

    async def measure(self) -> None:
        """Count what is there. What grows meanwhile may be counted twice. Raises Unavailable."""
        before = self._grown
        walk = _walk(self._fs, self._folders.root)
        n_bytes = 0
        while (some := await self._workers.run("reads", _summed, walk)) is not None:
            n_bytes += some
        with self._lock:
            self._taken = n_bytes + self._grown - before


def _size_of(fs: FileSystem, at: int) -> int:
    try:
        return taken_by(fs.stat(at))
    except OSError:
        return 0  # said by whatever is done next


def _summed(walk: Iterator[int]) -> int | None:
    """What the next entries take together, or None when there are no more."""
    try:
        some = list(islice(walk, _STEP))
        return sum(some) if some else None
    except OSError as error:
        raise meaning(error, "cannot count what the store takes of the disk") from error


def _walk(fs: FileSystem, root: int) -> Iterator[int]:
    """What each folder takes, and each file that is no blob, is on no way to be one, and is not the audit log's."""
    yield taken_by(fs.stat(root))
    for name in fs.names(root):
        try:
            found = fs.look(root, name)
        except FileNotFoundError:
            continue  # facts that were damaged have just been moved away
        if not stat.S_ISDIR(found.st_mode):
            yield taken_by(found)
        elif name != AUDIT:
            yield from _below(fs, root, name, has_files=name not in (BLOBS, INGEST))


def _below(fs: FileSystem, at: int, name: str, *, has_files: bool) -> Iterator[int]:
    try:
        here = fs.open_folder(at, name)
    except OSError:
        return  # gone, or planted: what is set aside is seen when it is there
    try:
        yield taken_by(fs.stat(here))
        for each in fs.names(here):
            try:
                found = fs.look(here, each)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(found.st_mode):
                yield from _below(fs, here, each, has_files=has_files)
            elif has_files:
                yield taken_by(found)
    finally:
        fs.close(here)
