"""The operating-system calls that the store makes, as one small facade (SQLite's VFS idea): where faults enter.

Every call is synchronous and belongs in a worker thread (`workers.py`). Nothing here decides anything: calls raise
plain OSError, and `meaning` is the one table from errno to the errors of the house.

Names are always looked up relative to an open folder, never through a symbolic link: our folder is 0700, but its parent
may be anybody's, and a volume may come from somewhere else (reliability.md §2.7).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, MutableSet, Sequence
from contextlib import AbstractContextManager, contextmanager

from proxy.errors import BreakwaterError, OutOfSpace, Overloaded, StoreError, Unavailable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: O_NONBLOCK so that a fifo in place of a file opens at once, and is then seen for what it is. No effect on plain
#: files.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: What an errno means. Whatever is not named here is `Unavailable`: EIO, EROFS, EACCES, EPERM, ESTALE, ENOTDIR …
_MEANINGS: dict[int, type[OutOfSpace | Overloaded]] = {
    errno.ENOSPC: OutOfSpace,
    errno.EDQUOT: OutOfSpace,
    errno.EFBIG: OutOfSpace,
    errno.EMFILE: Overloaded,
    errno.ENFILE: Overloaded,
    errno.ENOMEM: Overloaded,
}

#: What stands where a folder should be: a plain file or a fifo (ENOTDIR), a symbolic link (ELOOP, or ENOTDIR on Linux).
_NOT_A_FOLDER = (errno.ENOTDIR, errno.ELOOP)


def meaning(error: OSError, sentence: str) -> StoreError | Overloaded:
    """The error of the house for an errno; `sentence` says what was being done ("cannot write …")."""
    kind: type[BreakwaterError] = _MEANINGS.get(error.errno or 0, Unavailable)
    found = kind(f"{sentence}: {error.strerror or error}")
    assert isinstance(found, StoreError | Overloaded)
    return found


class FileSystem:
    """The real calls. `at` is the descriptor of an open folder; `fd` of an open file."""

    def open_folder(self, at: int | None, name: str) -> int:
        """Open a folder; `at` None means by path. Raises NotADirectoryError or ELOOP for anything else."""
        return os.open(name, _FOLDER, dir_fd=at)

    def make_folder(self, at: int, name: str) -> None:
        """Make a folder that only we may enter."""
        os.mkdir(name, 0o700, dir_fd=at)

    def names(self, at: int) -> list[str]:
        """Every name in a folder, in no order; also while another thread lists it."""
        # Not of `at` itself: whoever lists a descriptor moves its offset, which is shared with all who have it, and two
        # threads would each see a part.
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        try:
            return os.listdir(own)
        finally:
            os.close(own)

    def create(self, at: int, name: str) -> int:
        """Make a file that was not there, 0600, open for reading and writing."""
        return os.open(name, _CREATE, 0o600, dir_fd=at)

    def open_file(self, at: int, name: str, *, is_writable: bool = False) -> int:
        """Open a file that is there, without waiting for anybody. Raises ELOOP for a symbolic link."""
        return os.open(name, (_READ & ~os.O_RDONLY) | (os.O_RDWR if is_writable else os.O_RDONLY), dir_fd=at)

    def look(self, at: int, name: str) -> os.stat_result:
        """What the name is, symbolic links not followed."""
        return os.stat(name, dir_fd=at, follow_symlinks=False)

    def stat(self, fd: int) -> os.stat_result:
        """What the descriptor is."""
        return os.fstat(fd)

    def read(self, fd: int, n_bytes: int, offset: int) -> bytes:
        """At most `n_bytes` from `offset`; b"" at the end."""
        return os.pread(fd, n_bytes, offset)

    def write(self, fd: int, piece: bytes | bytearray | memoryview, offset: int) -> None:
        """All of `piece` at `offset`."""
        rest = memoryview(piece)
        while rest:
            n_written = os.pwrite(fd, rest, offset)
            rest, offset = rest[n_written:], offset + n_written

    def truncate(self, fd: int, n_bytes: int) -> None:
        """Cut the file to this length."""
        os.ftruncate(fd, n_bytes)

    def protect(self, fd: int) -> None:
        """Take the right to write away, from ourselves too: what is committed never changes."""
        os.fchmod(fd, 0o444)

    def fsync(self, fd: int) -> None:
        """Bring the file's bytes to the platter. After an error the bytes are lost, whatever a second call says."""
        os.fsync(fd)

    def fsync_folder(self, at: int) -> None:
        """Bring the folder's names to the platter."""
        os.fsync(at)

    def rename(self, from_at: int, from_name: str, to_at: int, to_name: str) -> None:
        """Give a file another name, replacing what had it."""
        os.rename(from_name, to_name, src_dir_fd=from_at, dst_dir_fd=to_at)

    def unlink(self, at: int, name: str) -> None:
        """Take a name away."""
        os.unlink(name, dir_fd=at)

    def space(self, at: int) -> os.statvfs_result:
        """What the file system beneath says of itself."""
        return os.fstatvfs(at)

    def close(self, fd: int) -> None:
        """Give a descriptor back. Never raises: what counts was synced before, and nothing can be done about it now."""
        try:
            os.close(fd)
        except OSError:
            pass  # EIO from a close says that unsynced bytes were lost; Linux has freed the descriptor all the same


def write_synced(fs: FileSystem, at: int, name: str, content: bytes) -> None:
    """Make a file with these bytes and bring them to the platter; its name is not there yet. Raises OSError."""
    fd = fs.create(at, name)
    try:
        fs.write(fd, content, 0)
        fs.fsync(fd)
    finally:
        fs.close(fd)


def is_ours(found: os.stat_result) -> bool:
    """Whether this is a plain file with one name that belongs to us, and not something planted in its place."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()


def kind_of(found: os.stat_result) -> str:
    """A word for what was found where a plain file of ours should be, for the sentence that reports it."""
    mode = found.st_mode
    for is_kind, word in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a fifo"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return word
    if not stat.S_ISREG(mode):
        return "a device"
    return "a file with a second name" if found.st_nlink != 1 else "a file of somebody else"


@contextmanager
def opened_folder(
    fs: FileSystem, at: int, parts: Sequence[str], *, set_aside: Callable[[int, str, str], object]
) -> Iterator[int]:
    """The folder at `parts` below `at`. Raises FileNotFoundError when a part is missing.

    What stands in the place of a folder is handed to `set_aside(at, name, why)`, and is then missing.
    """
    with _walked(fs, at, parts, set_aside, settled=None) as fd:
        yield fd


@contextmanager
def made_folder(
    fs: FileSystem,
    at: int,
    parts: Sequence[str],
    *,
    set_aside: Callable[[int, str, str], object],
    settled: MutableSet[str],
    making: Callable[[int], AbstractContextManager[None]],
) -> Iterator[int]:
    """The folder at `parts` below `at`, made where missing, its name durable.

    `settled` remembers which folders have been synced into their parents by this process. "It was there already" proves
    nothing: an earlier process may have been killed between making a folder and syncing it. Each is made inside of
    `making(at)`, which counts what that takes of the disk.
    """
    with _walked(fs, at, parts, set_aside, settled, making) as fd:
        yield fd


@contextmanager
def _walked(
    fs: FileSystem,
    at: int,
    parts: Sequence[str],
    set_aside: Callable[[int, str, str], object],
    settled: MutableSet[str] | None,
    making: Callable[[int], AbstractContextManager[None]] | None = None,
) -> Iterator[int]:
    here = at
    try:
        for depth, part in enumerate(parts, start=1):
            below = _stepped(fs, here, part, set_aside, making)
            path = "/".join(parts[:depth])
            if settled is not None and path not in settled:
                try:
                    fs.fsync_folder(here)
                except BaseException:
                    fs.close(below)
                    raise
                settled.add(path)
            if here != at:
                fs.close(here)
            here = below
        yield here
    finally:
        if here != at:
            fs.close(here)


def _stepped(
    fs: FileSystem,
    at: int,
    name: str,
    set_aside: Callable[[int, str, str], object],
    making: Callable[[int], AbstractContextManager[None]] | None,
) -> int:
    try:
        return fs.open_folder(at, name)
    except FileNotFoundError:
        if making is None:
            raise
    except OSError as error:
        if error.errno not in _NOT_A_FOLDER:
            raise
        set_aside(at, name, f"{name} should be a folder")
        if making is None:
            raise FileNotFoundError(errno.ENOENT, "set aside", name) from None
    try:
        with making(at):
            fs.make_folder(at, name)
    except FileExistsError:
        pass  # another thread was first
    return fs.open_folder(at, name)
