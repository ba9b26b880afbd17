"""Small mutable facts that can be rebuilt from the files: the order of use, and a few named bytes.

diskcache, and the only file that knows it. What it must not do is taken from it (reliability.md §0.1–0.2):

- it holds no body: a power cut turned every one of 2,445 files it had written into zero bytes, without an exception;
- it never unpickles, and never follows a file name out of a row (CVE-2025-69872, `../../../etc/hostname`):
  `_PlainDisk`;
- whatever it stumbles over moves the whole folder to quarantine, and it starts over empty. Nothing here ever raises.

The order of use is not one row per blob. diskcache needs some 50 µs for each row, a minute for a million. It is kept as
*segments*: rows that hold thousands of fixed-size records. `remember` appends a segment to the *tail*; when the tail
has grown to an eighth of the whole it is merged into the *base*, which is sorted and has each digest once. Reading
streams the base beside the sorted tail, so a million uses need the memory of the tail and of one segment, and a record
is rewritten some nine times for each time it changes.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import re
import secrets
import shutil
import sqlite3
import stat
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from proxy.errors import StoreError
from proxy.oci.digest import ALGORITHMS, Digest
from proxy.ports import Use
from proxy.store.layout import FACTS, QUARANTINE
from proxy.store.upkeep import Upkeep

T = TypeVar("T")

#: What the rows mean. Another number, newer or older, starts over: nothing is lost that the files cannot give back.
SCHEMA = b"1"
MAX_FACT_BYTES = 64 << 10
#: Records in one row: about 200 KB, some 4 ms to decode.
_SEGMENT = 4096
#: The tail is merged when it has more records than this, and more than an eighth of the base.
_MIN_TAIL = 16384
#: Folders of facts kept in quarantine.
_MAX_ASIDE = 3

_PREFIX = struct.Struct(">QQ")
#: The size that says "forgotten". No blob is that long.
_GONE = (1 << 64) - 1

_SEGMENT_KEY = re.compile(r"(base|tail)/([0-9]{16})/([a-z0-9]+)/([0-9]{1,9})")
_NO_USES: list[Use] = []
_FACT = "fact/"
_SCHEMA_KEY = "schema"

#: SQLite's primary result codes for what passes by itself: busy, locked, out of memory, read-only, interrupted, I/O
#: error, full, cannot open. The database is kept. Everything else is the database's fault.
_PASSING = frozenset({5, 6, 7, 8, 9, 10, 13, 14})

_SETTINGS = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "none",
    "cull_limit": 0,
    "sqlite_auto_vacuum": 0,  # free pages are used again by the next merge
    "sqlite_cache_size": 512,  # pages; rows are read once, in order, so that more would only be memory
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # an I/O error in a mapped file is SIGBUS, and the process is gone
    "sqlite_synchronous": 2,  # FULL: what `remember` and `put` return from is durable; they are few
}
#: Settings that diskcache writes by itself, and that change nothing that we use while they are numbers.
_HARMLESS = (diskcache.core.DEFAULT_SETTINGS.keys() | diskcache.core.METADATA.keys()) - _SETTINGS.keys()


class _RefusedRow(Exception):
    """A row that this program did not write. Not an OSError: diskcache takes those for a missing key."""


class _PlainDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Text keys, bytes values, both in the row. Everything else, in either direction, is refused.

    Overriding only some of these is not enough: the row chooses how it is read (JSONDisk still unpickles), and `remove`
    deletes whatever file a row names.
    """

    def __init__(self, directory: str, **_: Any) -> None:  # a planted settings row must not choose our arguments
        super().__init__(directory)

    def put(self, key: object) -> tuple[str, bool]:
        if type(key) is not str:
            raise _RefusedRow(f"a key of type {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if type(key) is not str or raw != 1:
            raise _RefusedRow("a key that is not plain text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, memoryview]:
        if type(value) is not bytes or read:
            raise _RefusedRow(f"a value of type {type(value).__name__}")
        return 0, diskcache.core.MODE_RAW, None, memoryview(value)

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> bytes:
        if mode != diskcache.core.MODE_RAW or filename is not None or type(value) is not bytes or read:
            raise _RefusedRow(f"a value of mode {mode!r}")
        return value

    def filename(self, key: object = None, value: object = None) -> tuple[str, str]:
        raise _RefusedRow("a value in a file")

    def remove(self, file_path: object) -> None:
        raise _RefusedRow("a row that names a file")


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: str
    number: int
    algorithm: str
    n_records: int

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.number:016d}/{self.algorithm}/{self.n_records}"


class DiskFacts:
    """Facts in diskcache (ports.Facts), with a thread of their own. Opened by the first use of them."""

    def __init__(self, store_path: Path, report: Callable[[str], None], upkeep: Upkeep) -> None:
        self._path = store_path / FACTS
        self._aside = store_path / QUARANTINE
        self._report = report
        self._upkeep = upkeep
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-facts")
        self._is_closed = False
        # The rest belongs to the thread.
        self._cache: Any = None
        self._segments: list[_Segment] = []
        self._next_number = 0
        self._n_readings = 0
        self._is_troubled = False
        #: What the folder took of the disk when it was last looked at; None before it was opened.
        self._n_taken: int | None = None

    # what the port asks for

    async def uses(self) -> AsyncIterator[Sequence[Use]]:
        """See ports.Facts. What is remembered while this runs may be missing from it."""
        reading = await self._run(self._begin_reading, None)
        if reading is None:
            return
        try:
            while batch := await self._run(lambda: list(islice(reading, _SEGMENT)), _NO_USES):
                yield batch
        finally:
            await self._run(self._end_reading, None)

    async def remember(self, uses: Sequence[Use], forgotten: Sequence[Digest]) -> None:
        """See ports.Facts. Durable when it returns, where the disk is well."""
        n_records = len(uses) + len(forgotten)
        if not n_records:
            return
        await self._written(_cost_of(n_records), lambda: self._remember(uses, forgotten))
        if n_merged := await self._run(self._n_to_merge, 0):
            await self._written(_cost_of(n_merged), self._merge)

    async def get(self, key: str) -> bytes | None:
        """See ports.Facts."""
        return await self._run(lambda: _opened_row(self._opened().get(_FACT + key)), None)

    async def put(self, key: str, value: bytes) -> None:
        """See ports.Facts.

        Durable when it returns, where the disk is well. Longer values are not kept, and reported.
        """
        if len(value) > MAX_FACT_BYTES:
            self._tell(f"a fact of {len(value)} bytes was not kept: {key[:80]}")
            return
        await self._written(_cost_of(0) + len(value), lambda: self._put(_FACT + key, value))

    async def aclose(self) -> None:
        """See ports.Facts. May be called more than once."""
        if not self._is_closed:
            await self._run(self._close, None)
            self._is_closed = True
            self._thread.shutdown(wait=False)  # idle, it ends by itself; waiting for that would block the loop

    # from the loop into the thread

    async def _written(self, n_bytes: int, function: Callable[[], None]) -> None:
        """Run what writes, where there is room for it: a fact that is lost is a fact rebuilt."""
        try:
            await self._upkeep.claim(n_bytes)
        except StoreError as error:
            if not self._is_troubled:
                self._is_troubled = True
                self._tell(f"the order of use is not being kept: {error}")
            return

        def counted() -> None:
            try:
                function()
            finally:
                self._count()

        try:
            await self._run(counted, None)
        finally:
            self._upkeep.give_back(n_bytes)

    async def _run(self, function: Callable[[], T], default: T) -> T:
        if self._is_closed:
            return default
        future = self._loop.run_in_executor(self._thread, self._guarded, function, default)
        return await asyncio.shield(future)

    def _guarded(self, function: Callable[[], T], default: T) -> T:
        """The result of `function`; after starting over, if that is what it takes; or `default`."""
        for _ in range(2):
            try:
                result = function()
            # Facts never raise, and what a damaged or planted file makes of diskcache is anybody's guess.
            except Exception as error:  # noqa: BLE001
                if _is_passing(error):
                    self._note(error)
                    return default
                self._start_over(error)
            else:
                self._is_troubled = False
                return result
        return default

    def _note(self, error: Exception) -> None:
        self._close()
        if not self._is_troubled:
            self._is_troubled = True
            self._tell(f"the order of use is not being kept: {error}")

    def _tell(self, sentence: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._report, sentence)
        except RuntimeError:
            pass  # the loop is closed, and nobody is left to listen

    # in the thread: opening and starting over

    def _opened(self) -> Any:
        if self._cache is None:
            if self._n_taken is None:  # an earlier life's, and no growth of ours
                self._n_taken = _taken_below(self._path)
            _check_files(self._path)
            _check_database(self._path / diskcache.core.DBNAME)
            cache = diskcache.Cache(str(self._path), timeout=1, disk=_PlainDisk, **_SETTINGS)
            try:
                self._segments = _known_segments(cache)
            except BaseException:
                cache.close()
                raise
            self._next_number = max((segment.number for segment in self._segments), default=-1) + 1
            self._cache = cache
        return self._cache

    def _close(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            try:
                cache.close()
            except sqlite3.Error:
                pass  # a database that cannot even be closed is about to be opened anew, or put aside

    def _start_over(self, error: Exception) -> None:
        self._close()
        kept_as = self._aside / f"{FACTS}.{secrets.token_hex(4)}"
        try:
            os.rename(self._path, kept_as)
        except FileNotFoundError:
            pass
        except OSError as failure:
            self._tell(f"{self._path} is damaged ({error}) and cannot be moved away: {failure.strerror}")
            return
        self._tell(
            f"{self._path} could not be read ({error}); it is now {kept_as}, and the order of use is learnt anew"
        )
        self._n_taken = 0  # what was moved away is counted still
        try:
            os.mkdir(self._path, 0o700)
            self._trim_aside()
        except OSError:
            pass  # said by whoever opens it next

    def _trim_aside(self) -> None:
        ours = [self._aside / name for name in os.listdir(self._aside) if name.startswith(f"{FACTS}.")]
        ours.sort(key=lambda path: os.lstat(path).st_ctime_ns, reverse=True)
        for path in ours[_MAX_ASIDE:]:
            n_bytes = _taken_below(path)
            shutil.rmtree(path, ignore_errors=True)  # follows no links
            self._upkeep.took(-n_bytes)

    # in the thread: what it takes of the disk

    def _count(self) -> None:
        """Tell how much the folder has grown since the last look, or shrunk."""
        before = 0 if self._n_taken is None else self._n_taken
        self._n_taken = _taken_below(self._path)
        self._upkeep.took(self._n_taken - before)

    # in the thread: named facts

    def _put(self, key: str, value: bytes) -> None:
        cache = self._opened()
        if value:
            cache.set(key, _closed_row(value))
        else:
            cache.delete(key)

    # in the thread: the order of use

    def _begin_reading(self) -> Iterator[Use]:
        self._opened()
        self._n_readings += 1
        segments = list(self._segments)
        merged = heapq.merge(
            *(self._in_order(segments, algorithm) for algorithm in ALGORITHMS), key=lambda found: found[1]
        )
        return (_use(algorithm, record) for algorithm, record in merged)

    def _end_reading(self) -> None:
        self._n_readings -= 1

    def _in_order(self, segments: Sequence[_Segment], algorithm: str) -> Iterator[tuple[str, bytes]]:
        """Every record of what is remembered and not forgotten, by its counter, each digest once."""
        newest: dict[bytes, bytes] = {}
        base: list[_Segment] = []
        for segment in segments:
            if segment.algorithm != algorithm:
                continue
            if segment.kind == "base":
                base.append(segment)
                continue
            for record in self._records(segment):
                newest[record[_PREFIX.size :]] = record
        tail = sorted(record for record in newest.values() if _PREFIX.unpack_from(record)[1] != _GONE)
        unchanged = (
            record for segment in base for record in self._records(segment) if record[_PREFIX.size :] not in newest
        )
        return ((algorithm, record) for record in heapq.merge(unchanged, tail))

    def _records(self, segment: _Segment) -> Iterator[bytes]:
        """The records of a segment; none when its row is gone or damaged."""
        row = _opened_row(self._opened().get(segment.key))
        width = _width(segment.algorithm)
        if row is None or len(row) != segment.n_records * width:
            return
        for start in range(0, len(row), width):
            yield row[start : start + width]

    def _remember(self, uses: Sequence[Use], forgotten: Sequence[Digest]) -> None:
        records: dict[str, list[bytes]] = {}
        for use in uses:
            records.setdefault(use.digest.algorithm, []).append(_record(use.digest, use.counter, use.size))
        for digest in forgotten:
            records.setdefault(digest.algorithm, []).append(_record(digest, 0, _GONE))
        cache = self._opened()
        with cache.transact():
            added = [
                segment
                for algorithm, some in records.items()
                for segment in self._append(cache, "tail", algorithm, some)
            ]
        self._segments += added

    def _append(self, cache: Any, kind: str, algorithm: str, records: Iterable[bytes]) -> Iterator[_Segment]:
        remaining = iter(records)
        while some := list(islice(remaining, _SEGMENT)):
            segment = _Segment(kind, self._next_number, algorithm, len(some))
            self._next_number += 1
            cache.set(segment.key, _closed_row(b"".join(some)))
            yield segment

    def _n_to_merge(self) -> int:
        """How many records there are to be merged, or 0 while the tail is short or somebody reads."""
        n_tail = sum(segment.n_records for segment in self._segments if segment.kind == "tail")
        n_base = sum(segment.n_records for segment in self._segments if segment.kind == "base")
        is_due = n_tail > max(_MIN_TAIL, n_base // 8) and not self._n_readings
        return n_tail + n_base if is_due else 0

    def _merge(self) -> None:
        """Make one sorted base of everything, in one transaction."""
        cache = self._opened()
        old = self._segments
        with cache.transact():
            new = [
                segment
                for algorithm in ALGORITHMS
                for segment in self._append(
                    cache, "base", algorithm, (record for _, record in self._in_order(old, algorithm))
                )
            ]
            for segment in old:
                cache.delete(segment.key)
        self._segments = new


# -- rows -------------------------------------------------------------------------------------------------------------


def _cost_of(n_records: int) -> int:
    """What writing so many records takes of the disk at most, in bytes: in the log ahead of the database, in the
    database, and in pages that are free only after it."""
    return 3 * (n_records * _width("sha512") + n_records // _SEGMENT * 4096) + (256 << 10)


def _taken_below(path: Path) -> int:
    """What a folder of plain files takes of the disk, itself included; 0 where it cannot be said."""
    try:
        with os.scandir(path) as found:
            return os.lstat(path).st_blocks * 512 + sum(
                entry.stat(follow_symlinks=False).st_blocks * 512 for entry in found
            )
    except OSError:
        return 0


def _closed_row(value: bytes) -> bytes:
    """SQLite does not notice a flipped bit inside a value; this does."""
    return zlib.crc32(value).to_bytes(4, "big") + value


def _opened_row(row: bytes | None) -> bytes | None:
    """What `_closed_row` was given, or None when there is no row or it is damaged."""
    if row is None or len(row) < 4 or zlib.crc32(row[4:]) != int.from_bytes(row[:4], "big"):
        return None
    return row[4:]


def _width(algorithm: str) -> int:
    return _PREFIX.size + ALGORITHMS[algorithm] // 2


def _record(digest: Digest, counter: int, size: int) -> bytes:
    """Counter, size, digest. Bytes in this order sort by the counter."""
    return _PREFIX.pack(counter, size) + bytes.fromhex(digest.hex)


def _use(algorithm: str, record: bytes) -> Use:
    counter, size = _PREFIX.unpack_from(record)
    return Use(Digest(algorithm, record[_PREFIX.size :].hex()), size, counter)


# -- trust ------------------------------------------------------------------------------------------------------------


def _check_files(path: Path) -> None:
    """Refuse a folder, or a file in it, that SQLite would follow, wait for, or share.

    Makes the folder where missing.
    """
    os.makedirs(path, 0o700, exist_ok=True)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise _RefusedRow("it is a symbolic link")
    for name in os.listdir(path):
        found = os.lstat(path / name)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise _RefusedRow(f"{name[:80]!r} in it is not a plain file of ours")


def _check_database(path: Path) -> None:
    """Refuse a database that is damaged, or whose settings would make diskcache do something else.

    Its rows are few, so that looking at all of them costs only the reading. diskcache takes every row of its settings
    table for an attribute or a pragma: one that sets `query_only` would leave us with a database that never keeps
    anything.
    """
    if not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=1)) as connection:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != ("ok",):
            raise _RefusedRow(f"SQLite says {found[0] if found else None!r}")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'Settings'").fetchone():
            return
        for key, value in connection.execute("SELECT key, value FROM Settings"):
            if key not in _SETTINGS and (key not in _HARMLESS or type(value) is not int):
                raise _RefusedRow(f"an unknown setting {str(key)[:80]!r}")


def _known_segments(cache: Any) -> list[_Segment]:
    """Every segment, in the order in which they were written. Raises _RefusedRow for a database that is not ours."""
    schema = cache.get(_SCHEMA_KEY)
    segments: list[_Segment] = []
    before = ""
    for key in cache.iterkeys():
        if key <= before:  # a damaged index can lead diskcache round in circles
            raise _RefusedRow("keys out of order")
        before = key
        found = _SEGMENT_KEY.fullmatch(key)
        if found and found[3] in ALGORITHMS:
            segments.append(_Segment(found[1], int(found[2]), found[3], int(found[4])))
        elif not key.startswith(_FACT) and key != _SCHEMA_KEY:
            raise _RefusedRow(f"an unknown key {key[:80]!r}")
    if schema is None and not before:
        cache.set(_SCHEMA_KEY, SCHEMA)
    elif schema != SCHEMA:
        raise _RefusedRow(f"its rows are of version {schema!r}, and this Breakwater knows {SCHEMA!r}")
    return sorted(segments, key=lambda segment: segment.number)


def _is_passing(error: Exception) -> bool:
    """Whether the fault is the disk's and not the database's, so that the database is kept."""
    if isinstance(error, OSError | diskcache.Timeout | MemoryError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.OperationalError) and code is not None and code & 0xFF in _PASSING
