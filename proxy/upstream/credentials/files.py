"""Secrets in files: read when they are needed, and again once they have changed.

Files that a kubelet or systemd puts there are replaced, not rewritten: the name is opened anew each time, and what it
is now is compared by inode, size and time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from proxy.errors import Unauthorised
from proxy.upstream.credentials import Login

#: No secret is longer; a path that was mixed up is not read into memory.
MAX_BYTES = 1 << 20


class WatchedFile:
    """One file's text. `read` raises Unauthorised, with the path and never the contents, when it cannot be read."""

    def __init__(self, path: str, *, upstream: str) -> None:
        self._path = Path(path)
        self._upstream = upstream
        self._mark: tuple[int, int, int] | None = None
        self._text = ""

    async def read(self) -> str:
        """What the file holds now. One look at the file system, in a thread; read again only when it has changed."""
        try:
            return await asyncio.to_thread(self._read)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise Unauthorised(
                f"upstream {self._upstream}: no login, cannot read {self._path}: {why}", upstream=self._upstream
            ) from None

    def _read(self) -> str:
        found = self._path.stat()
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        if mark != self._mark:
            with self._path.open("rb") as file:
                self._text = file.read(MAX_BYTES).decode("utf-8")
            self._mark = mark
        return self._text


class FileCredentials:
    """A user name, and a secret in a file. Passes the `Credentials` port."""

    def __init__(self, username: str, path: str, *, upstream: str) -> None:
        self._username = username
        self._file = WatchedFile(path, upstream=upstream)

    @property
    def identity(self) -> str:
        """The user name, as for a secret that does not change."""
        return f"static:{self._username}"

    async def login(self) -> Login:
        """The user name with what the file holds now, without the white space around it."""
        return Login(self._username, (await self._file.read()).strip())

    def __repr__(self) -> str:
        return f"FileCredentials({self._username!r})"
