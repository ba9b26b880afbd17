"""Notes at rest: one small checksummed file each under notes/, written like a record (ports.Notes)."""

from __future__ import annotations

import re

from proxy.store.checked_file import CheckedFiles, Ground
from proxy.store.filesystem import meaning

NOTES = "notes"
#: No note is longer: pins of some hundred thousand digests.
MAX_BYTES = 64 << 20
#: What is no longer takes the place of one just as long, and no room is made for it: the bound is such a note, and is
#: written while room is made.
SMALL_BYTES = 2048

_NAME = re.compile(r"[a-z]{1,64}")


class DiskNotes:
    """Notes as files (ports.Notes)."""

    def __init__(self, ground: Ground) -> None:
        self._workers = ground.workers
        self._files = CheckedFiles(ground, ground.folders.root, "note", MAX_BYTES)

    async def get(self, name: str) -> bytes | None:
        """See ports.Notes."""
        return await self._workers.run("reads", self._get, _checked(name))

    async def put(self, name: str, body: bytes) -> None:
        """See ports.Notes."""
        if len(body) > MAX_BYTES:
            raise ValueError(f"a note of {len(body)} bytes")
        if len(body) <= SMALL_BYTES:
            await self._workers.run("syncs", self._put, _checked(name), body)
        else:
            await self._files.kept(len(body), 1, self._put, _checked(name), body)

    def _get(self, name: str) -> bytes | None:
        try:
            with self._files.opened((NOTES,)) as at:
                return self._files.read(at, name, f"the note {name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise meaning(error, f"cannot read the note {name}") from error

    def _put(self, name: str, body: bytes) -> None:
        try:
            self._files.put((NOTES,), name, body)
        except OSError as error:
            raise meaning(error, f"cannot write the note {name}") from error


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a note")
    return name
