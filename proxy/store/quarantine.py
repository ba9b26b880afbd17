"""Where things go that must not be used and must not be lost: rot, damaged records, whatever was planted.

Moving is a rename within our own folder: a symbolic link, a fifo or a second name of somebody's file is moved itself,
and what it points to is untouched.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable

from proxy.store.filesystem import FileSystem, is_ours, kind_of

#: Plain files kept for inspection. They count against the capacity like everything else, and should be few beside it.
MAX_FILES = 64
MAX_BYTES = 1 << 30


class Quarantine:
    """The folder `quarantine/`. Its methods are synchronous, belong in a worker thread, and never raise."""

    def __init__(
        self, fs: FileSystem, at: int, report: Callable[[str], None], took: Callable[[int], None] = lambda _: None
    ) -> None:
        """`took` is told of bytes on disk that are here now, or no longer."""
        self._fs = fs
        self._at = at
        self.report = report
        #: What is kept here at most, in bytes; less on a small store.
        self.max_bytes = MAX_BYTES
        self._took = took

    def take(self, at: int, name: str, why: str) -> bool:
        """Move `name` out of the folder `at`, and report it: whether nothing is there now. What cannot be moved stays, and
        is reported too."""
        kept_as = f"{name[:200]}.{secrets.token_hex(4)}"
        try:
            n_bytes = self._fs.look(at, name).st_blocks * 512
            self._fs.rename(at, name, self._at, kept_as)
        except FileNotFoundError:
            return True
        except OSError as error:
            self.report(f"{why}; it could not be moved to quarantine: {error.strerror}")
            return False
        # A record or a note is counted twice from here on, until the next start: rather that than asking where it was.
        self._took(n_bytes)
        self.report(f"{why}; it is now quarantine/{kept_as}")
        self._trim()
        return True

    def _trim(self) -> None:
        """Remove the oldest plain files beyond the limits.

        Folders stay: removing a hostile tree is not worth its risks.
        """
        try:
            files = sorted(self._files(), key=lambda entry: entry[1].st_ctime_ns, reverse=True)
            n_bytes = 0
            for n, (name, found) in enumerate(files, start=1):
                n_bytes += found.st_blocks * 512
                if n > MAX_FILES or n_bytes > self.max_bytes:
                    self._fs.unlink(self._at, name)
                    self._took(-found.st_blocks * 512)
        except OSError as error:
            self.report(f"the quarantine could not be trimmed: {error.strerror}")

    def _files(self) -> list[tuple[str, os.stat_result]]:
        looked = [(name, self._fs.look(self._at, name)) for name in self._fs.names(self._at)]
        return [(name, found) for name, found in looked if stat.S_ISREG(found.st_mode)]


def opened_file(
    fs: FileSystem, quarantine: Quarantine, at: int, name: str, what: str, *, is_writable: bool = False
) -> tuple[int, os.stat_result] | None:
    """The descriptor of a plain file of ours and what it is; None when nothing is there, or something else was.

    Whatever else has the name is set aside, and the sentence says that it was in the place of `what`. Raises OSError
    when the disk fails.
    """
    try:
        fd = fs.open_file(at, name, is_writable=is_writable)
    except FileNotFoundError:
        return None
    except OSError:
        # A symbolic link (ELOOP), a socket (ENXIO), a folder to be written (EISDIR) – or the disk, which then is said.
        found = fs.look(at, name)
        if stat.S_ISREG(found.st_mode):
            raise
        quarantine.take(at, name, f"{kind_of(found)} was in the place of {what}")
        return None
    try:
        found = fs.stat(fd)
    except BaseException:
        fs.close(fd)
        raise
    if is_ours(found):
        return fd, found
    fs.close(fd)
    quarantine.take(at, name, f"{kind_of(found)} was in the place of {what}")
    return None
