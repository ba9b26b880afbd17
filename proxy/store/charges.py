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
from collections.abc import Iterable, Mapping, Sequence

from proxy.errors import InvalidDigest
from proxy.oci.digest import Digest
from proxy.store.checked_file import Ground, WholeFiles
from proxy.store.filesystem import is_ours, kind_of, meaning
from proxy.store.layout import NOT_OURS, is_project

#: What is read in one step.
_STEP = 1 << 20


class DiskCharges:
    """Journals as files below charges/ (ports.ChargeJournal)."""

    def __init__(self, ground: Ground) -> None:
        self._fs = ground.fs
        self._at = ground.folders.charges
        self._workers = ground.workers
        self._quarantine = ground.quarantine
        self._files = WholeFiles(ground, self._at)

    # what the port asks for

    async def load(self) -> Mapping[str, Sequence[tuple[Digest, int]]]:
        """See ports.ChargeJournal. What cannot be a journal is quarantined."""
        return await self._workers.run("reads", self._load)

    async def append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
        """See ports.ChargeJournal. What a failed write has left at the end of the file is passed over by readers."""
        await self._workers.run("syncs", self._append, _checked(project), changes)

    async def rewrite(self, project: str, charges: Sequence[tuple[Digest, int]]) -> None:
        """See ports.ChargeJournal."""
        await self._workers.run("syncs", self._rewrite, _checked(project), charges)

    # in a worker thread

    def _load(self) -> dict[str, list[tuple[Digest, int]]]:
        at, found = self._at, {}
        try:
            for name in sorted(self._fs.names(at)):
                if name in NOT_OURS:
                    continue
                if not is_project(name) or not is_ours(self._fs.look(at, name)):
                    what = kind_of(self._fs.look(at, name)) if is_project(name) else "no project's name"
                    self._quarantine.take(at, name, f"charges had {what}, {name[:150]!r}")
                    continue
                charges, n_bad = _read(self._content(at, name))
                found[name] = list(charges.items())
                if n_bad:
                    self._quarantine.report(f"{n_bad} damaged lines of charges/{name} were passed over")
        except OSError as error:
            raise meaning(error, "cannot read what projects pay for") from error
        return found

    def _content(self, at: int, name: str) -> bytes:
        fd = self._fs.open_file(at, name)
        try:
            content = bytearray()
            while piece := self._fs.read(fd, _STEP, len(content)):
                content += piece
            return bytes(content)
        finally:
            self._fs.close(fd)

    def _append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
        at = self._at
        try:
            try:
                self._make_way(project)
                fd, is_new = self._fs.open_file(at, project, is_writable=True), False
            except FileNotFoundError:
                fd, is_new = self._fs.create(at, project), True
            try:
                size = self._fs.stat(fd).st_size
                # A torn line before this one must not take it along.
                is_torn = size > 0 and self._fs.read(fd, 1, size - 1) != b"\n"
                self._fs.write(fd, (b"\n" if is_torn else b"") + _lines(changes), size)
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)
            if is_new:
                self._fs.fsync_folder(at)
        except OSError as error:
            raise meaning(error, f"cannot write what project {project!r} pays for") from error

    def _rewrite(self, project: str, charges: Sequence[tuple[Digest, int]]) -> None:
        try:
            self._make_way(project)
            self._files.write((), project, _lines(charges))
        except OSError as error:
            raise meaning(error, f"cannot write what project {project!r} pays for") from error

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


def _read(content: bytes) -> tuple[dict[Digest, int], int]:
    """What the lines come to, and how many of them make no sense."""
    charges: dict[Digest, int] = {}
    n_bad = 0
    for line in content.split(b"\n"):
        if not line:
            continue
        crc, _, said = line.partition(b" ")
        try:
            if int(crc, 16) != zlib.crc32(said) or len(crc) != 8:
                raise ValueError("damaged")
            sign, text, *size = said.decode("ascii").split(" ")
            digest = Digest.parse(text)
            if sign == "+" and len(size) == 1:
                charges[digest] = int(size[0])
            elif sign == "-" and not size:
                charges.pop(digest, None)
            else:
                raise ValueError("neither + nor -")
        except (ValueError, InvalidDigest):
            n_bad += 1
    return charges, n_bad
