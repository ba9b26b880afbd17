"""One server on a store at a time.

`flock`, because the kernel lets go of it however the process ends: there is no stale lock to reason about. The file
holds the process number of its holder only so that the sentence can name it.
"""

from __future__ import annotations

import errno
import fcntl
import os

from proxy.errors import Unavailable
from proxy.ports import Clock
from proxy.store.filesystem import FileSystem, is_ours, kind_of, meaning
from proxy.store.layout import LOCK_FILE, Folders
from proxy.store.workers import Workers

#: How long a new server waits for an old one that drains. systemd restarts well within it; an operator's typo ends
#: soon.
PATIENCE_S = 30.0
#: How often it looks again. A restart is noticed within this; the look is one system call.
_EVERY_S = 0.25

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StoreLock:
    """The lock, held. `release` it last, after everything else has let go of the store."""

    def __init__(self, fs: FileSystem, fd: int) -> None:
        self._fs = fs
        self._fd = fd

    def release(self) -> None:
        """Let the next one in. May be called more than once."""
        if self._fd >= 0:
            self._fs.close(self._fd)
            self._fd = -1


async def acquire(
    fs: FileSystem, folders: Folders, workers: Workers, *, clock: Clock, patience_s: float = PATIENCE_S
) -> StoreLock:
    """The lock of this store, waiting up to `patience_s` for whoever has it.

    Raises Unavailable with the holder's process number when it does not come free, or when the disk fails.
    """
    deadline = clock.monotonic() + patience_s
    fd = await workers.run("reads", _open, fs, folders)
    try:
        while not await workers.run("reads", _taken, fd):
            if clock.monotonic() >= deadline:
                holder = await workers.run("reads", _holder, fs, fd)
                raise Unavailable(
                    f"the store {folders.path} is in use by {holder}, still after {patience_s:g} s: "
                    "stop that server first, or give this one another store.path"
                )
            await clock.sleep(_EVERY_S)
        await workers.run("reads", _sign, fs, fd)
    except BaseException:
        fs.close(fd)
        raise
    return StoreLock(fs, fd)


def _open(fs: FileSystem, folders: Folders) -> int:
    path = folders.path / LOCK_FILE
    try:
        fd = _opened(fs, folders)
        try:
            found = fs.stat(fd)
        except BaseException:
            fs.close(fd)
            raise
    except OSError as error:
        raise meaning(error, f"cannot open the lock {path}") from error
    if is_ours(found):
        return fd
    fs.close(fd)
    # Not set aside: two servers that each moved the other's lock away would both run.
    raise Unavailable(f"the lock {path} is {kind_of(found)} where a file of ours should be: remove it")


def _opened(fs: FileSystem, folders: Folders) -> int:
    try:
        return os.open(LOCK_FILE, _OPEN, 0o600, dir_fd=folders.root)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return fs.open_file(folders.root, LOCK_FILE)  # a file system gone read-only still serves hits


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise meaning(error, "the store's file system has no locks") from error
    return True


def _holder(fs: FileSystem, fd: int) -> str:
    try:
        number = fs.read(fd, 20, 0).strip()
    except OSError:
        number = b""
    return f"process {number.decode()}" if number.isdigit() else "another process"


def _sign(fs: FileSystem, fd: int) -> None:
    try:
        fs.truncate(fd, 0)
        fs.write(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        pass  # only the sentence suffers
