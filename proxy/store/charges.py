"""What projects pay for, at rest: one append-only file for each project, a checksum on every line.

    <crc of the rest> + sha256:<hex> <bytes>        pays from now on
    <crc of the rest> - sha256:<hex>                no longer

Appending costs one fsync for any number of changes; a small file for each charge, as for records, would cost three for
each. The last line about a digest counts. A line that is torn or damaged costs that line alone: what it said is found
out by the recount that follows every start (engine/charges.py). A whole file is replaced the way a record is
(checked_file.py).
"""

from __future__ import annotations

import stat
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence

from proxy.errors import InvalidDigest
from proxy.oci.digest import Digest
from proxy.store.checked_file import Draft, Ground, WholeFiles
from proxy.store.filesystem import is_ours, kind_of, meaning
from proxy.store.layout import NOT_OURS, is_project
from proxy.store.upkeep import NAMING_BYTES, taken_by

#: Bytes read in one step, some 180 lines: a millisecond or two in which the thread keeps the interpreter to itself.
_STEP = 16 << 10


class DiskCharges:
    """Journals as files below charges/ (ports.ChargeJournal)."""

    def __init__(self, ground: Ground) -> None:
        self._fs = ground.fs
        self._at = ground.folders.charges
        self._workers = ground.workers
        self._quarantine = ground.quarantine
        self._files = WholeFiles(ground, self._at)

    # what the port asks for

    async def changes(self) -> AsyncIterator[tuple[str, Sequence[tuple[Digest, int | None]]]]:
        """See ports.ChargeJournal. What cannot be a journal is quarantined."""
        for project in await self._workers.run("reads", self._projects):
            reading = _Reading()
            while changes := await self._workers.run("reads", self._some_of, project, reading):
                yield project, changes
            if reading.n_bad:
                self._quarantine.report(f"{reading.n_bad} damaged lines of charges/{project} were passed over")

    async def append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
        """See ports.ChargeJournal. What a failed write has left at the end of the file is passed over by readers."""
        lines = await self._workers.run("reads", _lines, changes)
        await self._files.kept(len(lines), 0, self._append, _checked(project), lines)

    async def rewrite(self, project: str, changes: Iterable[Sequence[tuple[Digest, int | None]]]) -> None:
        """See ports.ChargeJournal."""
        name = _checked(project)
        upkeep, n_claimed = self._files.upkeep, NAMING_BYTES
        await upkeep.claim(n_claimed)
        try:
            draft = await self._workers.run("syncs", self._begun, name)
            try:
                for some in changes:
                    lines = await self._workers.run("reads", _lines, some)
                    await upkeep.claim(len(lines))
                    n_claimed += len(lines)
                    await self._workers.run("syncs", self._written, draft, name, lines)
                await self._workers.run("syncs", self._published, draft, name)
            finally:
                await self._workers.ended("syncs", draft.close)
        finally:
            upkeep.give_back(n_claimed)

    # in a worker thread

    def _projects(self) -> list[str]:
        at, found = self._at, []
        try:
            for name in sorted(self._fs.names(at)):
                if name in NOT_OURS:
                    continue
                if is_project(name) and is_ours(self._fs.look(at, name)):
                    found.append(name)
                    continue
                what = kind_of(self._fs.look(at, name)) if is_project(name) else "no project's name"
                self._quarantine.take(at, name, f"charges had {what}, {name[:150]!r}")
        except OSError as error:
            raise meaning(error, "cannot read what projects pay for") from error
        return found

    def _some_of(self, project: str, reading: _Reading) -> list[tuple[Digest, int | None]]:
        """The next changes, or none at the end. Opened each time: a file that is written anew meanwhile is another."""
        try:
            fd = self._fs.open_file(self._at, project)
            try:
                while piece := self._fs.read(fd, _STEP, reading.n_bytes):
                    if changes := reading.take(piece):
                        return changes
                return reading.finish()
            finally:
                self._fs.close(fd)
        except OSError as error:
            raise meaning(error, "cannot read what projects pay for") from error

    def _append(self, project: str, lines: bytes) -> None:
        at = self._at
        try:
            try:
                self._make_way(project)
                fd, is_new = self._fs.open_file(at, project, is_writable=True), False
            except FileNotFoundError:
                fd, is_new = self._files.upkeep.created(at, project), True
            try:
                before = self._fs.stat(fd)
                size = before.st_size
                # A torn line before this one must not take it along.
                is_torn = size > 0 and self._fs.read(fd, 1, size - 1) != b"\n"
                try:
                    self._fs.write(fd, (b"\n" if is_torn else b"") + lines, size)
                    self._fs.fsync(fd)
                finally:
                    self._files.upkeep.took(taken_by(self._fs.stat(fd)) - taken_by(before))
            finally:
                self._fs.close(fd)
            if is_new:
                self._fs.fsync_folder(at)
        except OSError as error:
            raise _unwritten(error, project) from error

    def _begun(self, project: str) -> Draft:
        try:
            return self._files.begin()
        except OSError as error:
            raise _unwritten(error, project) from error

    def _written(self, draft: Draft, project: str, lines: bytes) -> None:
        try:
            draft.append(lines)
        except OSError as error:
            raise _unwritten(error, project) from error

    def _published(self, draft: Draft, project: str) -> None:
        try:
            self._make_way(project)
            draft.publish((), project)
        except OSError as error:
            raise _unwritten(error, project) from error

    def _make_way(self, project: str) -> None:
        """Anything but a plain file of ours is set aside. Raises FileNotFoundError when there is nothing."""
        try:
            found = self._fs.look(self._at, project)
        except FileNotFoundError:
            return
        if not is_ours(found) or not stat.S_ISREG(found.st_mode):
            self._quarantine.take(self._at, project, f"{kind_of(found)} was in the place of charges/{project}")


def _checked(project: str) -> str:
    """The last line in front of the file system; names were validated long before. Raises ValueError."""
    if not is_project(project):
        raise ValueError(f"{project[:150]!r} is not a project name")
    return project


def _lines(changes: Iterable[tuple[Digest, int | None]]) -> bytes:
    words = (f"- {digest}" if size is None else f"+ {digest} {size}" for digest, size in changes)
    return "".join(f"{zlib.crc32(said.encode()):08x} {said}\n" for said in words).encode()


def _unwritten(error: OSError, project: str) -> Exception:
    return meaning(error, f"cannot write what project {project!r} pays for")


class _Reading:
    """How far a journal was read: its bytes, the line that is not whole yet, and how many lines make no sense."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.n_bad = 0
        self._rest = b""

    def take(self, piece: bytes) -> list[tuple[Digest, int | None]]:
        """What the whole lines say, up to the end of `piece`."""
        self.n_bytes += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return self._changes(lines)

    def finish(self) -> list[tuple[Digest, int | None]]:
        """What a last line without an end says."""
        line, self._rest = self._rest, b""
        return self._changes([line])

    def _changes(self, lines: Iterable[bytes]) -> list[tuple[Digest, int | None]]:
        changes: list[tuple[Digest, int | None]] = []
        for line in filter(None, lines):
            change = _change(line)
            if change is None:
                self.n_bad += 1
            else:
                changes.append(change)
        return changes


def _change(line: bytes) -> tuple[Digest, int | None] | None:
    """What a line says, or None when it makes no sense."""
    crc, _, said = line.partition(b" ")
    try:
        if int(crc, 16) != zlib.crc32(said) or len(crc) != 8:
            return None
        sign, text, *size = said.decode("ascii").split(" ")
        if sign == "+" and len(size) == 1:
            return Digest.parse(text), int(size[0])
        return (Digest.parse(text), None) if sign == "-" and not size else None
    except (ValueError, InvalidDigest):
        return None
