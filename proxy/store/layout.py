"""Where everything is, below the path that the settings name.

    <store.path>/                       may belong to anybody, and be open to all (volumes often are)
      breakwater/                       ours alone: 0700, checked at every start; nothing of ours is outside
        layout.json                     {"layout": 1, …}; a newer number is refused
        lock                            flock: one server at a time; holds its process number
        blobs/
          <algorithm>/
            <first two hex>/
              <hex>                     INV-1: bytes hash to the name, were synced, never change (0444)
        ingest/                         INV-2: everything unfinished, and nothing else
          <algorithm>-<hex>.<mark>      a blob on its way; may be resumed after a restart
          record.<mark>                 a record on its way
        records/
          <project>/
            <host>/                     as in URLs: a colon is %3A
              <repository>/…            one folder for each path element; none of them starts with "_"
                _tags/<tag>
                _manifests/<algorithm>/<hex>
                _blobs/<algorithm>/<hex>
        charges/
          <project>                     what it pays for: appended lines, each with a checksum (charges.py)
        notes/
          <name>                        a few documents of the store: pins, what a seal was made of (notes.py)
        quarantine/
          <name>.<mark>                 what must not be used: rot, damaged records, whatever was planted
        audit/audit.jsonl               refusals and changes; turned over by size (telemetry/audit.py)
        facts/                          diskcache: order of use and the like; may be deleted at any time

A record is one line, `breakwater-record 1 sha256:<hex of the rest>`, and then JSON.

Changing anything here that an older or newer Breakwater would misread raises `LAYOUT` and needs a migration with a
test.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from proxy import __version__
from proxy.errors import InvalidDigest, InvalidName, Unavailable
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, SourceHost
from proxy.ports import Holding
from proxy.store.filesystem import FileSystem, kind_of, meaning, write_synced
from proxy.store.quarantine import Quarantine, opened_file

#: The number of the drawing above.
LAYOUT = 1

OURS = "breakwater"
BLOBS, INGEST, RECORDS, QUARANTINE, FACTS = "blobs", "ingest", "records", "quarantine", "facts"
CHARGES, AUDIT = "charges", "audit"
TAGS, MANIFESTS, SINGLE_BLOBS = "_tags", "_manifests", "_blobs"
LAYOUT_FILE, LOCK_FILE = "layout.json", "lock"
#: What a file system puts into the root of a volume by itself.
NOT_OURS = frozenset({"lost+found"})

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_INGEST = re.compile(r"(sha256|sha512)-([0-9a-f]+)\.[0-9a-f]{8}")
_SHARD = re.compile(r"[0-9a-f]{2}")


# -- names ------------------------------------------------------------------------------------------------------------


def shard(digest: Digest) -> tuple[str, str]:
    """The folder of a blob below blobs/. 256 per algorithm: a million blobs make four thousand names in each."""
    return digest.algorithm, digest.hex[:2]


def is_shard(name: str) -> bool:
    """Whether this can be the name of a folder below blobs/<algorithm>/."""
    return _SHARD.fullmatch(name) is not None


def maybe_digest(algorithm: str, name: str) -> Digest | None:
    """The digest that a file below <algorithm>/ is named after, or None for a name that is not one."""
    try:
        return Digest.parse(f"{algorithm}:{name}")
    except InvalidDigest:
        return None


def ingest_name(digest: Digest) -> str:
    """A new name under ingest/ for a blob on its way."""
    return f"{digest.algorithm}-{digest.hex}.{_mark()}"


def maybe_ingest_digest(name: str) -> Digest | None:
    """What a name under ingest/ was going to be, or None for anything but a blob."""
    found = _INGEST.fullmatch(name)
    return maybe_digest(found[1], found[2]) if found else None


def record_ingest_name() -> str:
    """A new name under ingest/ for a record on its way."""
    return f"record.{_mark()}"


def is_project(name: str) -> bool:
    """Whether this can be a project's name, and so a file's below charges/."""
    return _PROJECT.fullmatch(name) is not None


def holding_folder(holding: Holding) -> tuple[str, ...]:
    """The folder of a holding below records/.

    Raises InvalidName for words that cannot be a project, host or repository.

    They were validated long before; this is the last line in front of the file system (CVE-2024-3727).
    """
    if not _PROJECT.fullmatch(holding.project):
        raise InvalidName(f"{holding.project[:150]!r} is not a project name")
    host = SourceHost.parse(holding.host).value
    repository = Repository.parse(holding.repository).value
    return holding.project, quote(host, safe=""), *repository.split("/")


def maybe_holding(parts: Sequence[str]) -> Holding | None:
    """The holding whose folder this is, or None."""
    if len(parts) < 3:
        return None
    holding = Holding(parts[0], unquote(parts[1]), "/".join(parts[2:]))
    try:
        return holding if holding_folder(holding) == tuple(parts) else None
    except InvalidName:
        return None


def _mark() -> str:
    return secrets.token_hex(4)


# -- folders ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Folders:
    """The open folders of a store. Everything else is looked up from these, whoever renames what above them."""

    path: Path
    root: int
    blobs: int = -1
    ingest: int = -1
    records: int = -1
    quarantine: int = -1
    charges: int = -1

    def close(self, fs: FileSystem) -> None:
        """Give the descriptors back."""
        for fd in (self.root, self.blobs, self.ingest, self.records, self.quarantine, self.charges):
            if fd >= 0:
                fs.close(fd)
        self.root = self.blobs = self.ingest = self.records = self.quarantine = self.charges = -1


def open_root(fs: FileSystem, store_path: Path) -> Folders:
    """Our own folder below the store's path, made where missing and found to be ours alone.

    Raises Unavailable, with a sentence, when it is a symbolic link, somebody else's, or open to others.
    """
    path = store_path / OURS
    try:
        os.makedirs(store_path, mode=0o700, exist_ok=True)
        above = os.open(store_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise meaning(error, f"cannot use the store path {store_path}") from error
    try:
        root = _made(fs, above, OURS, path)
    finally:
        fs.close(above)
    try:
        _check_owner(fs, root, path)
    except BaseException:
        fs.close(root)
        raise
    return Folders(path=path, root=root)


def _check_owner(fs: FileSystem, root: int, path: Path) -> None:
    try:
        found = fs.stat(root)
    except OSError as error:
        raise meaning(error, f"cannot use {path}") from error
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid() and not mode & 0o077:
        return
    what = "belongs to somebody else" if found.st_uid != os.geteuid() else f"is open to others (mode {mode:o})"
    raise Unavailable(f"{path} {what}, so what is in it cannot be trusted: it must be ours with mode 700, or absent")


def open_folders(fs: FileSystem, folders: Folders, report: Callable[[str], None]) -> None:
    """Check the layout's number and open what is below the root. To be called with the lock held.

    Raises Unavailable for a newer layout, or when the disk fails. A damaged layout.json is put aside and written anew.
    """
    folders.quarantine = _made(fs, folders.root, QUARANTINE, folders.path / QUARANTINE)
    quarantine = Quarantine(fs, folders.quarantine, report)
    found = _read_layout(fs, folders, quarantine)
    if found is not None and found > LAYOUT:
        raise Unavailable(
            f"the store {folders.path} has layout {found}, and this Breakwater knows layouts up to {LAYOUT}: "
            "run the newer version, or give this one another store.path"
        )
    for name in (BLOBS, INGEST, RECORDS, CHARGES, FACTS):
        try:
            fd = _made(fs, folders.root, name, folders.path / name)
        except Unavailable:
            quarantine.take(folders.root, name, f"{name} in the store should be a folder")
            fd = _made(fs, folders.root, name, folders.path / name)
        if name == FACTS:
            fs.close(fd)  # diskcache goes by path
        else:
            setattr(folders, name, fd)
    if found is None:
        _write_layout(fs, folders)


def _made(fs: FileSystem, at: int, name: str, path: Path) -> int:
    try:
        try:
            return fs.open_folder(at, name)
        except FileNotFoundError:
            pass
        try:
            fs.make_folder(at, name)
        except FileExistsError:
            pass  # a second server starts at the same moment
        fs.fsync_folder(at)
        return fs.open_folder(at, name)
    except NotADirectoryError:
        raise Unavailable(f"{path} is {_what(fs, at, name)} where a folder of ours should be: remove it") from None
    except OSError as error:
        raise meaning(error, f"cannot open the folder {path}") from error


def _what(fs: FileSystem, at: int, name: str) -> str:
    try:
        found = fs.look(at, name)
        return "a plain file" if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 else kind_of(found)
    except OSError:
        return "something"


def _read_layout(fs: FileSystem, folders: Folders, quarantine: Quarantine) -> int | None:
    try:
        opened = opened_file(fs, quarantine, folders.root, LAYOUT_FILE, LAYOUT_FILE)
        if opened is None:
            return None
        fd, _ = opened
        try:
            text = fs.read(fd, 1 << 16, 0)
        finally:
            fs.close(fd)
    except OSError as error:
        raise meaning(error, f"cannot read {folders.path / LAYOUT_FILE}") from error
    try:
        number = json.loads(text)["layout"]
        if isinstance(number, int) and number >= 1:
            return number
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    quarantine.take(folders.root, LAYOUT_FILE, "layout.json cannot be read")
    return None


def _write_layout(fs: FileSystem, folders: Folders) -> None:
    text = json.dumps({"layout": LAYOUT, "made_by": f"breakwater {__version__}"}) + "\n"
    name = record_ingest_name()
    try:
        write_synced(fs, folders.ingest, name, text.encode())
        fs.rename(folders.ingest, name, folders.root, LAYOUT_FILE)
        fs.fsync_folder(folders.root)
    except OSError as error:
        raise meaning(error, f"cannot write {folders.path / LAYOUT_FILE}") from error
