"""Notes at rest: one small checksummed file each under notes/, written like a record (ports.Notes)."""

from __future__ import annotations

import hashlib
import re

from proxy.store.filesystem import FileSystem, is_ours, kind_of, made_folder, meaning, opened_folder
from proxy.store.layout import Folders, record_ingest_name
from proxy.store.quarantine import Quarantine
from proxy.store.workers import Workers

NOTES = "notes"
#: No note is longer: pins of some hundred thousand digests.
MAX_BYTES = 64 << 20

_NAME = re.compile(r"[a-z]{1,64}")
_HEADER = re.compile(rb"breakwater-note 1 sha256:([0-9a-f]{64})")


class DiskNotes:
    """Notes as files (ports.Notes)."""

    def __init__(
        self, fs: FileSystem, folders: Folders, workers: Workers, quarantine: Quarantine, unfinished: set[str]
    ) -> None:
        self._fs = fs
        self._folders = folders
        self._workers = workers
        self._quarantine = quarantine
        self._unfinished = unfinished
        self._settled: set[str] = set()

    async def get(self, name: str) -> bytes | None:
        """See ports.Notes."""
        return await self._workers.run("reads", self._get, _checked(name))

    async def put(self, name: str, body: bytes) -> None:
        """See ports.Notes."""
        if len(body) > MAX_BYTES:
            raise ValueError(f"a note of {len(body)} bytes")
        await self._workers.run("syncs", self._put, _checked(name), body)

    def _get(self, name: str) -> bytes | None:
        try:
            with opened_folder(self._fs, self._folders.root, (NOTES,), set_aside=self._quarantine.take) as at:
                try:
                    fd = self._fs.open_file(at, name)
                except FileNotFoundError:
                    return None
                try:
                    found = self._fs.stat(fd)
                    content = self._fs.read(fd, found.st_size, 0) if is_ours(found) else b""
                finally:
                    self._fs.close(fd)
                header, _, body = content.partition(b"\n")
                claim = _HEADER.fullmatch(header)
                if claim and claim[1].decode() == hashlib.sha256(body).hexdigest():
                    return body
                why = "is damaged" if is_ours(found) else f"is {kind_of(found)}"
                self._quarantine.take(at, name, f"the note {name} {why}")
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise meaning(error, f"cannot read the note {name}") from error

    def _put(self, name: str, body: bytes) -> None:
        content = b"breakwater-note 1 sha256:%s\n%s" % (hashlib.sha256(body).hexdigest().encode(), body)
        unfinished = record_ingest_name()
        self._unfinished.add(unfinished)
        try:
            fd = self._fs.create(self._folders.ingest, unfinished)
            try:
                self._fs.write(fd, content, 0)
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)
            with made_folder(
                self._fs, self._folders.root, (NOTES,), set_aside=self._quarantine.take, settled=self._settled
            ) as at:
                self._fs.rename(self._folders.ingest, unfinished, at, name)
                self._fs.fsync_folder(at)
        except OSError as error:
            self._discard(unfinished)
            raise meaning(error, f"cannot write the note {name}") from error
        finally:
            self._unfinished.discard(unfinished)

    def _discard(self, name: str) -> None:
        try:
            self._fs.unlink(self._folders.ingest, name)
        except OSError:
            pass  # the next start sweeps


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a note")
    return name
