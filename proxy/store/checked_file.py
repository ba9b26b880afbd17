"""Small files that are whole or absent: written under ingest/, synced, renamed, their folder synced (INV-2).

Records, notes and what projects pay for are such files. A checked one also says for itself that it is undamaged: its
first line is `breakwater-<kind> 1 sha256:<hex of the rest>`. One that does not agree goes to quarantine and is absent;
nothing reads what is in it.

Never pickle, whatever a file says it is: what comes out of here are bytes whose checksum agreed.
"""

from __future__ import annotations

import hashlib
import re
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from proxy.store.filesystem import FileSystem, made_folder, opened_folder
from proxy.store.layout import Folders, record_ingest_name
from proxy.store.quarantine import Quarantine, opened_file
from proxy.store.upkeep import BLOCK_BYTES, NAMING_BYTES, Upkeep, taken_by
from proxy.store.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ground:
    """What every part of an open store stands on."""

    fs: FileSystem
    folders: Folders
    workers: Workers
    quarantine: Quarantine
    upkeep: Upkeep
    #: Names under ingest/ that this process is at work on, blobs and others: what a sweep leaves alone.
    unfinished: set[str] = field(default_factory=set)


class WholeFiles:
    """The small files below one open folder `base`. Synchronous: everything here belongs in a worker thread."""

    def __init__(self, ground: Ground, base: int) -> None:
        self.fs = ground.fs
        self.ingest = ground.folders.ingest
        self.unfinished = ground.unfinished
        self._quarantine = ground.quarantine
        self.upkeep = ground.upkeep
        self._base = base
        #: Folders whose names are known to last (filesystem.made_folder).
        self._settled: set[str] = set()

    def opened(self, parts: Sequence[str]) -> AbstractContextManager[int]:
        """The folder at `parts`. Raises FileNotFoundError when a part is missing, OSError when the disk fails."""
        return opened_folder(self.fs, self._base, parts, set_aside=self._quarantine.take)

    def write(self, parts: Sequence[str], name: str, content: bytes) -> None:
        """Put a file there, in the place of what has the name. Durable and whole when it returns.

        Raises OSError; then the name has the file it had before, or this one.
        """
        draft = self.begin()
        try:
            draft.append(content)
            draft.publish(parts, name)
        finally:
            draft.close()

    async def kept(self, n_bytes: int, depth: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what writes one file of `n_bytes`, `depth` folders down, in a thread, once there is room for it.

        Raises OutOfSpace, and what `function` raises.
        """
        most = n_bytes + BLOCK_BYTES + NAMING_BYTES + depth * BLOCK_BYTES
        return await self.upkeep.kept(most, function, *args, **kwargs)

    def begin(self) -> Draft:
        """A file that is written piece by piece. Raises OSError."""
        return Draft(self)

    def name_it(self, unfinished: str, parts: Sequence[str], name: str) -> None:
        """For Draft: give a synced file its name. Raises OSError."""
        with made_folder(
            self.fs,
            self._base,
            parts,
            set_aside=self._quarantine.take,
            settled=self._settled,
            making=self.upkeep.making,
        ) as at:
            self._make_way(at, name)
            more = self._taken(self.ingest, unfinished) - self._taken(at, name)
            with self.upkeep.naming(at, more):
                self.fs.rename(self.ingest, unfinished, at, name)
            self.fs.fsync_folder(at)

    def _taken(self, at: int, name: str) -> int:
        try:
            return taken_by(self.fs.look(at, name))
        except FileNotFoundError:
            return 0

    def _make_way(self, at: int, name: str) -> None:
        """A rename replaces everything but a folder."""
        try:
            if stat.S_ISDIR(self.fs.look(at, name).st_mode):
                self._quarantine.take(at, name, f"a folder was in the place of the file {name}")
        except FileNotFoundError:
            pass


class Draft:
    """A whole file that has no name yet. Every draft ends with `close`, from any thread, and more than once if need be:
    what was not published by then is gone."""

    def __init__(self, files: WholeFiles) -> None:
        self._files = files
        self._fs, self._at, self._unfinished = files.fs, files.ingest, files.unfinished
        self._name = record_ingest_name()
        self._n_bytes = 0
        self._is_published = False
        #: Whoever gives up does so beside a thread that still writes.
        self._in_turn = threading.Lock()
        self._unfinished.add(self._name)
        try:
            self._fd = files.upkeep.created(self._at, self._name)
        except OSError:
            self._fd = -1
            self.close()
            raise

    def append(self, piece: bytes) -> None:
        """The next bytes. Raises OSError, also when it was closed."""
        with self._in_turn:
            self._fs.write(self._fd, piece, self._n_bytes)
            self._n_bytes += len(piece)

    def publish(self, parts: Sequence[str], name: str) -> None:
        """Durable under its name when it returns. Raises OSError."""
        with self._in_turn:
            self._fs.fsync(self._fd)
            self._files.name_it(self._name, parts, name)
            self._is_published = True

    def close(self) -> None:
        """Let go of it. Never raises: what cannot be removed the next start sweeps."""
        with self._in_turn:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                self._fs.close(fd)
            if not self._is_published and self._name in self._unfinished:
                try:
                    self._fs.unlink(self._at, self._name)
                except OSError:
                    pass  # it has its name, or the next start sweeps it
            self._unfinished.discard(self._name)


class CheckedFiles(WholeFiles):
    """Whole files with a checksum of their own."""

    def __init__(self, ground: Ground, base: int, kind: str, max_bytes: int) -> None:
        """`kind` is a word of their first line; none of them is longer than `max_bytes`."""
        super().__init__(ground, base)
        self._kind = kind
        self._max_bytes = max_bytes
        self._header = re.compile(rb"breakwater-%s 1 sha256:([0-9a-f]{64})" % kind.encode())

    def read(self, at: int, name: str, what: str) -> bytes | None:
        """The payload of a file whose checksum agrees; None where there is none.

        What is damaged, too long or no plain file of ours is set aside, with a sentence that begins with `what`. Raises
        OSError.
        """
        opened = opened_file(self.fs, self._quarantine, at, name, what)
        if opened is None:
            return None
        fd, found = opened
        try:
            if found.st_size > self._max_bytes:
                why = f"has {found.st_size} bytes"
            else:
                header, _, payload = self.fs.read(fd, found.st_size, 0).partition(b"\n")
                claim = self._header.fullmatch(header)
                if claim and claim[1].decode() == hashlib.sha256(payload).hexdigest():
                    return payload
                why = "is damaged"
        finally:
            self.fs.close(fd)
        self._quarantine.take(at, name, f"{what} {why}")
        return None

    def put(self, parts: Sequence[str], name: str, payload: bytes) -> None:
        """Write a payload under its checksum. Raises OSError, as `write`."""
        checksum = hashlib.sha256(payload).hexdigest()
        self.write(parts, name, f"breakwater-{self._kind} 1 sha256:{checksum}\n".encode() + payload)
