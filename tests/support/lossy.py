"""File systems that fail (house.md appendix C): behind proxy/store/filesystem.py, over real files.

`Faulty` fails the n-th call with an errno, once or from then on. `Lossy` cuts the power before the n-th call: nothing
more happens, and what was not synced is gone. What the platter then holds is written out by `after_cut`, as a new
folder that a fresh store can open. The model is harsher than ext4: folders are independent of each other, and a name
that was not synced may be there or not, with its file whole, empty, or zeros of the right length.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from proxy.store.filesystem import FileSystem

#: Calls that can fail. `close` cannot be told about it, and is left out.
CALLS = tuple(name for name in vars(FileSystem) if not name.startswith("_") and name != "close")

#: What may be on the platter in the place of what was not synced.
World = Literal["names lost", "names kept, files empty", "names kept, files zeroed", "everything kept"]
WORLDS: tuple[World, ...] = (
    "names lost",
    "names kept, files empty",
    "names kept, files zeroed",
    "everything kept",
)


class PowerCut(BaseException):
    """The machine is off. Not an Exception: no product code may live on after it."""


class Counting(FileSystem):
    """Calls `before` with the number (from 1) and name of every call, on the real file system beneath."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.is_counting = True

    def before(self, n: int, name: str) -> None:
        """Raise here to make the call fail without having happened."""


def _counted(name: str) -> Callable[..., Any]:
    real = getattr(FileSystem, name)

    def call(self: Counting, *args: Any, **kwargs: Any) -> Any:
        if self.is_counting:
            self.n_calls += 1
            self.before(self.n_calls, name)
        # Syncing for real would prove nothing here, and take most of the time.
        result = None if name in ("fsync", "fsync_folder") else real(self, *args, **kwargs)
        after = getattr(self, f"_after_{name}", None)
        if after is not None:
            after(result, *args, **kwargs)
        return result

    return call


for _name in CALLS:
    setattr(Counting, _name, _counted(_name))


class Faulty(Counting):
    """Fails call number `n` with `code`; with `is_lasting`, every call from there on that can say such a thing."""

    def __init__(self, n: int, code: int, *, is_lasting: bool, only: frozenset[str] = frozenset(CALLS)) -> None:
        super().__init__()
        self.has_fired = False
        self._n, self._code, self._is_lasting, self._only = n, code, is_lasting, only
        self._n_seen = 0

    def before(self, n: int, name: str) -> None:
        """Fail when it is time."""
        if name not in self._only:
            return
        self._n_seen += 1
        if self._n_seen == self._n or (self._is_lasting and self._n_seen > self._n):
            self.has_fired = True
            raise OSError(self._code, os.strerror(self._code))


@dataclass(slots=True)
class _Inode:
    """A file or folder as it surely is on the platter."""

    is_folder: bool
    content: bytes = b""
    names: dict[str, int] = field(default_factory=dict)


class Lossy(Counting):
    """Cuts the power before call number `n` (never, for None), and knows what then is left of `root`."""

    def __init__(self, root: Path, n: int | None, *, forgets: str = "") -> None:
        """`forgets` names a call that is not honoured, "fsync" or "fsync_folder": a bug for the tests to find."""
        super().__init__()
        self.is_cut = False
        self._forgets = forgets
        self._root = root
        self._n = n
        self._ids = count()
        self._id_of: dict[tuple[int, int], int] = {}
        self._platter: dict[int, _Inode] = {}
        # What is there already has been there for long.
        self._root_id = self._settle(root)

    def before(self, n: int, name: str) -> None:
        """Nothing happens any more once the power is cut."""
        if self.is_cut or (self._n is not None and n >= self._n):
            self.is_cut = True
            raise PowerCut

    def close(self, fd: int) -> None:
        """Descriptors are given back even without power: they belong to this process."""
        super().close(fd)

    def after_cut(self, to: Path, world: World) -> Path:
        """Write out what is left, in a folder of its own."""
        self._write_out(self._root_id, self._root, to, world)
        return to

    # what is on the platter

    def _after_create(self, fd: int, *_: Any, **__: Any) -> None:
        self._new(os.fstat(fd), is_folder=False)

    def _after_make_folder(self, _: None, at: int, name: str) -> None:
        self._new(os.stat(name, dir_fd=at), is_folder=True)

    def _after_fsync(self, _: None, fd: int) -> None:
        if self._forgets == "fsync":
            return
        found = os.fstat(fd)
        self._platter[self._known(found)].content = os.pread(fd, found.st_size, 0)

    def _after_fsync_folder(self, _: None, at: int) -> None:
        if self._forgets == "fsync_folder":
            return
        names = {name: os.stat(name, dir_fd=at, follow_symlinks=False) for name in os.listdir(at)}
        self._platter[self._known(os.fstat(at))].names = {
            name: self._known(found)
            for name, found in names.items()
            if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
        }

    def _new(self, found: os.stat_result, *, is_folder: bool) -> int:
        number = next(self._ids)
        self._id_of[found.st_dev, found.st_ino] = number
        self._platter[number] = _Inode(is_folder)
        return number

    def _known(self, found: os.stat_result) -> int:
        number = self._id_of.get((found.st_dev, found.st_ino))
        if number is None:  # made past the facade (the lock): its name may last, its content does not
            number = self._new(found, is_folder=stat.S_ISDIR(found.st_mode))
        return number

    def _settle(self, path: Path) -> int:
        number = self._new(path.lstat(), is_folder=path.is_dir())
        if path.is_dir():
            self._platter[number].names = {child.name: self._settle(child) for child in path.iterdir()}
        else:
            self._platter[number].content = path.read_bytes()
        return number

    def _write_out(self, number: int, live: Path | None, to: Path, world: World) -> None:
        inode = self._platter[number]
        if not inode.is_folder:
            to.write_bytes(inode.content)
            return
        to.mkdir(mode=0o700)
        for name, child in inode.names.items():
            self._write_out(child, self._live_path(live, name, child), to / name, world)
        if world == "names lost" or live is None or not live.is_dir():
            return
        for path in live.iterdir():
            if path.name not in inode.names and not path.is_symlink():
                self._write_unsynced(path, to / path.name, world)

    def _live_path(self, live: Path | None, name: str, child: int) -> Path | None:
        path = live / name if live is not None else None
        return path if path is not None and path.exists() and self._known(path.lstat()) == child else None

    def _write_unsynced(self, path: Path, to: Path, world: World) -> None:
        """A name that was not synced, in a world in which it lasts all the same."""
        number = self._known(path.lstat())
        if self._platter[number].is_folder:
            self._write_out(number, path, to, world)
            return
        synced, live = self._platter[number].content, path.read_bytes()
        if world == "names kept, files zeroed":
            to.write_bytes(synced + bytes(max(0, len(live) - len(synced))))
        else:
            to.write_bytes(live if world == "everything kept" else synced)


@contextmanager
def not_counting(fs: Counting) -> Iterator[None]:
    """Let the calls in here happen, uncounted and unharmed."""
    before, fs.is_counting = fs.is_counting, False
    try:
        yield
    finally:
        fs.is_counting = before
