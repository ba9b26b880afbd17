"""The audit log: what was refused and what was changed, one JSON object a line, only ever appended to.

Its own file, so that it outlives the log's retention; turned over by size, the oldest thrown away. Written by a thread
of its own: a slow disk must not hold the loop. What cannot be written, or not in time, is counted, and the count is
written.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from proxy.events import Answered, Changed, Event
from proxy.telemetry.log import MAX_CLIENT_CHARS, LineWriter

#: A file is turned over at this size, and so many old ones are kept: 128 MiB in all, a million refusals.
MAX_BYTES, N_OLD = 16 << 20, 7
#: What a folder and the ends of its files may take of the disk beyond the files' lengths.
_ROUNDING_BYTES = (N_OLD + 2) * 4096


def file_bytes(n_bytes: int) -> int:
    """How long each file may be, for all of them together to take at most `n_bytes` of the disk."""
    return max(0, n_bytes - _ROUNDING_BYTES) // (N_OLD + 1)


class TurningFile:
    """A text file to append to that is turned over: `audit.jsonl`, `audit.jsonl.1`, … Written by one thread alone.

    What a disk takes in part is taken back: there is never half a line, and after a failure it goes on by itself.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, n_old: int = N_OLD) -> None:
        """Raises OSError when the file cannot be opened."""
        self._path = path
        self._max_bytes = max_bytes
        self._n_old = n_old
        self._fd = -1
        self._n_bytes = 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._trim()
        self._open()

    def write(self, text: str) -> int:
        """Append ASCII lines; one that is longer than a whole file may be is left out. Raises OSError."""
        if self._fd < 0:
            self._open()  # an earlier turn failed half-way
        if self._n_bytes + len(text) <= self._max_bytes:
            return self._append(text)
        return sum(map(self._write_line, text.splitlines(keepends=True)))

    def _write_line(self, line: str) -> int:
        if len(line) > self._max_bytes:
            return 0
        if self._n_bytes + len(line) > self._max_bytes:
            self._turn()
        return self._append(line)

    def _append(self, text: str) -> int:
        n = os.write(self._fd, text.encode("ascii"))
        if n < len(text):
            os.ftruncate(self._fd, self._n_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._n_bytes += n
        return n

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """No more lines. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _turn(self) -> None:
        self.close()
        for number in range(self._n_old, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            try:
                os.replace(newer, older)
            except FileNotFoundError:
                continue
        self._open()

    def _trim(self) -> None:
        """An earlier life may have kept more: what would have been turned over by now goes, the oldest first."""
        n_bytes = 0
        for number in range(self._n_old + 1):
            path = self._path.with_name(f"{self._path.name}.{number}") if number else self._path
            try:
                n_bytes += os.lstat(path).st_size
                if n_bytes > self._max_bytes * (self._n_old + 1):
                    os.unlink(path)
            except FileNotFoundError:
                continue

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._n_bytes = os.fstat(self._fd).st_size


class Audit:
    """Turns refusals and changes into lines."""

    def __init__(self, writer: LineWriter, wall: Callable[[], float]) -> None:
        """`wall` gives seconds since 1970."""
        self._writer = writer
        self._wall = wall
        writer.of_dropped = lambda n: self._written("dropped", lines=n)

    def observe(self, event: Event) -> None:
        """Write the event, if it belongs here."""
        if isinstance(event, Answered) and event.status in (401, 403) and event.kind != "version":
            self._line(
                "denied",
                request=event.request_id,
                remote=event.remote,
                caller=event.caller,
                method=event.method[:32],
                path=event.path[:MAX_CLIENT_CHARS],
                status=event.status,
                project=event.project,
                rule=event.rule,
                why=event.error[:MAX_CLIENT_CHARS],
            )
        elif isinstance(event, Changed):
            self._line("changed", what=event.what, name=event.name, how=event.how)

    def _line(self, kind: str, **words: str | int) -> None:
        self._writer.line(self._written(kind, **words))

    def _written(self, kind: str, **words: str | int) -> str:
        now = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "event": kind} | {key: word for key, word in words.items() if word})
