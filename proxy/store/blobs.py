"""Blobs on disk.

Keeps INV-1 (a name under blobs/ is a promise: its bytes hash to it, were synced, never change) and INV-2 (unfinished
bytes live only under ingest/). The order of a commit is verify, fsync the file, rename, fsync the folder; each step's
absence was seen to lose or garble a blob in a power cut (reliability.md §3, and tests/fault/test_store_faults.py shows
it again).

Decides nothing: what to keep, what to delete and when is the engine's.

Rejected: `posix_fallocate` at the start of an ingest. A reservation of real blocks would avoid ENOSPC half-way, but the
ledger already reserves, lengths are often unknown, ext4 pays again when it converts the unwritten extents, and file
systems without the call (NFS, overlay on some) get it emulated by writing every block. ENOSPC half-way is handled
anyway, because fsync and rename can say it too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import ParamSpec, TypeVar

from proxy.errors import Corrupt, OutOfSpace, Overloaded, StoreError
from proxy.oci.digest import ALGORITHMS, Digest, Verifier
from proxy.ports import FileIdentity, KeptIngest, Space, StoredBlob
from proxy.store.checked_file import Ground
from proxy.store.filesystem import is_ours, kind_of, made_folder, meaning, opened_folder
from proxy.store.layout import (
    NOT_OURS,
    ingest_name,
    is_shard,
    maybe_digest,
    maybe_ingest_digest,
    shard,
)
from proxy.store.quarantine import opened_file
from proxy.store.upkeep import NAMING_BYTES
from proxy.store.workers import Pool

P = ParamSpec("P")
T = TypeVar("T")

#: Names handled in one hop to a thread: about 5 ms of work, so that an abandoned scan or delete ends soon.
_BATCH = 512
#: Bytes read in one step while a kept ingest is hashed again.
_STEP = 1 << 20
#: An ingest is synced behind its writer in steps of this. What is left for the commit then takes 20 ms and not 90 (ext4,
#: a layer of 50 MiB), and it is at the commit that readers wait for the last byte.
_SYNC_STEP = 16 << 20
#: Closing the last descriptor of a deleted file drops its pages and extents: some 50 ms for each GiB, not on the loop.
_SLOW_TO_DROP = 8 << 20


# -- one blob, open ---------------------------------------------------------------------------------------------------


class DiskBlob:
    """An open blob (ports.OpenBlob)."""

    __slots__ = ("_blobs", "_is_open", "fd", "identity", "size")

    def __init__(self, fd: int, identity: FileIdentity, blobs: DiskBlobs) -> None:
        self.fd = fd
        self.size = identity.size
        self.identity = identity
        self._blobs = blobs
        self._is_open = True

    async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
        """See ports.OpenBlob."""
        return await self._blobs.workers.run("reads", self._read, offset, limit, verifier)

    def _read(self, offset: int, limit: int, verifier: Verifier | None) -> bytes:
        try:
            piece = self._blobs.fs.read(self.fd, limit, offset)
        except OSError as error:
            raise meaning(error, "cannot read a stored blob") from error
        if verifier is not None:
            verifier.feed(piece)
        return piece

    def close(self) -> None:
        """Give the descriptor back. May be called more than once."""
        if self._is_open:
            self._is_open = False
            self._blobs.drop(self.fd)


class DiskIngest:
    """An unfinished blob (ports.Ingest).

    Its hops follow each other, also when a caller was cancelled in the middle of one. A long one is synced in steps
    beside them; a step that fails is a write that failed, because the kernel says so only once.
    """

    def __init__(self, blobs: DiskBlobs, digest: Digest, verifier: Verifier, name: str, fd: int, n_bytes: int) -> None:
        self.fd = fd
        self.n_bytes = n_bytes
        self._blobs = blobs
        self._digest = digest
        self._verifier = verifier
        self.name = name
        self._hop: asyncio.Future[None] | None = None
        self._sync: asyncio.Future[None] | None = None
        self._n_synced = n_bytes
        self._failure: StoreError | Overloaded | None = None
        self._has_ended = False
        self._is_open = True

    async def write(self, *pieces: bytes | bytearray | memoryview) -> None:
        """See ports.Ingest.

        After a failed write the file has a hole: later pieces are hashed, and the failure repeated.
        """
        await self._in_turn("writes", self._append, pieces)
        is_syncing = self._sync is not None and not self._sync.done()
        if self.n_bytes - self._n_synced >= _SYNC_STEP and not is_syncing:
            self._n_synced = self.n_bytes
            self._sync = self._blobs.workers.start("syncs", self._sync_so_far)

    async def commit(self) -> None:
        """See ports.Ingest. Replaces what had the name: these bytes were verified just now, those may have rotted."""
        await self._last_step()
        upkeep = self._blobs.upkeep
        try:
            await upkeep.claim(NAMING_BYTES)
        except OutOfSpace:
            await self._in_turn("syncs", self._give_up, False)
            raise
        before = self._hop
        try:
            await self._in_turn("syncs", upkeep.ending(NAMING_BYTES, self._publish))
        except BaseException:
            if self._hop is before:  # it was never begun
                upkeep.give_back(NAMING_BYTES)
            raise

    async def abort(self, *, keep: bool = False) -> None:
        """See ports.Ingest. After a commit this does nothing."""
        await self._last_step()
        try:
            await self._in_turn("syncs", self._give_up, keep)
        except StoreError:
            pass  # the store is closed; the next start sweeps

    def close(self) -> None:
        """Close `fd`. Waits for threads that still run, because they write to or sync this very number.

        What was neither committed nor aborted by then, also what came when nobody waited for it any more, is nobody's, and
        the next sweep removes it.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._let_go()

    def _let_go(self, _: object = None) -> None:
        for running in (self._hop, self._sync):
            if running is not None and not running.done():
                running.add_done_callback(self._let_go)
                return
        self._blobs.unfinished.discard(self.name)
        self._blobs.drop(self.fd)

    async def _last_step(self) -> None:
        """Wait for a step of syncing that still runs."""
        if self._sync is not None and not self._sync.done():
            await asyncio.wait([self._sync])

    async def _in_turn(self, pool: Pool, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        while self._hop is not None and not self._hop.done():
            await asyncio.wait([self._hop])
        self._hop = self._blobs.workers.start(pool, function, *args, **kwargs)
        await asyncio.shield(self._hop)

    def _append(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        if self._has_ended or not self._is_open:
            raise ValueError("the ingest has ended")
        for piece in pieces:
            self._verifier.feed(piece)
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        n_bytes = self.n_bytes
        try:
            for piece in pieces:
                self._blobs.fs.write(self.fd, piece, n_bytes)
                n_bytes += len(piece)
        except OSError as error:
            self._failure = meaning(error, f"cannot write {self._digest}")
            raise self._failure from error
        self.n_bytes = n_bytes

    def _sync_so_far(self) -> None:
        try:
            self._blobs.fs.fsync(self.fd)
        except OSError as error:
            self._failure = meaning(error, f"cannot write {self._digest}")

    def _publish(self) -> None:
        if self._has_ended:
            raise ValueError("the ingest has ended")
        try:
            self._check()
            self._blobs.publish(self._digest, self.name, self.fd)
        except BaseException:
            self._give_up(False)
            raise
        self._has_ended = True
        self._blobs.unfinished.discard(self.name)

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        if not self._verifier.agrees():
            raise Corrupt(f"what arrived for {self._digest} does not hash to it ({self._verifier.n_bytes} bytes)")
        try:
            size = self._blobs.fs.stat(self.fd).st_size
        except OSError as error:
            raise meaning(error, f"cannot commit {self._digest}") from error
        if not size == self.n_bytes == self._verifier.n_bytes:
            raise Corrupt(f"the file for {self._digest} has {size} bytes where {self._verifier.n_bytes} were hashed")

    def _give_up(self, keep: bool) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._blobs.unfinished.discard(self.name)
        if not keep or self.n_bytes == 0:
            self._blobs.discard(self.name)


# -- all blobs --------------------------------------------------------------------------------------------------------


class DiskBlobs:
    """Blobs as files named after their digests (ports.BlobStore)."""

    def __init__(self, ground: Ground) -> None:
        self.fs = ground.fs
        self.workers = ground.workers
        self.unfinished = ground.unfinished
        self._folders = ground.folders
        self._quarantine = ground.quarantine
        self.upkeep = ground.upkeep
        self._settled: set[str] = set()

    # what the port asks for

    async def open(self, digest: Digest) -> DiskBlob | None:
        """See ports.BlobStore."""
        return await self.workers.opened("reads", self._open, digest)

    async def ingest(self, digest: Digest, verifier: Verifier) -> DiskIngest:
        """See ports.BlobStore."""
        return await self.workers.opened("writes", self._begin, digest, verifier)

    async def delete(self, digests: Sequence[Digest]) -> None:
        """See ports.BlobStore. Not synced: a blob that comes back after a power cut is still what its name says."""
        for start in range(0, len(digests), _BATCH):
            await self.workers.run("syncs", self._delete, digests[start : start + _BATCH])

    async def quarantine(self, digest: Digest, why: str, inode: int | None = None) -> bool:
        """See ports.BlobStore."""
        try:
            return await self.workers.run("syncs", self._set_aside, digest, why, inode)
        except (StoreError, Overloaded) as error:
            self.workers.tell(str(error))
            return False

    async def scan(self) -> AsyncIterator[Sequence[StoredBlob]]:
        """See ports.BlobStore.

        Raises Unavailable when a folder cannot be read: a count that misses blobs would be a lie.
        """
        for algorithm in await self.workers.run("reads", self._algorithms):
            for name in await self.workers.run("reads", self._shards, algorithm):
                digests = await self.workers.run("reads", self._digests, algorithm, name)
                for start in range(0, len(digests), _BATCH):
                    some = digests[start : start + _BATCH]
                    batch = await self.workers.run("reads", self._looked, (algorithm, name), some)
                    if batch:
                        yield batch

    async def space(self) -> Space:
        """See ports.BlobStore. File systems without a fixed number of inodes say 0 of 0."""
        return await self.workers.run("reads", self._space)

    # what is left from before

    async def kept_ingests(self) -> list[KeptIngest]:
        """Unfinished blobs that no running transfer owns, longest first. Raises Unavailable."""
        return await self.workers.run("reads", self._kept)

    async def resume_ingest(self, digest: Digest, verifier: Verifier) -> DiskIngest | None:
        """Go on with the longest unfinished file of this digest, or None when there is none.

        Its bytes are fed to `verifier` first, in a thread, at the speed of the disk. They prove nothing until the whole
        agrees: when it does not, that is no fault of upstream's. Raises Unavailable or Overloaded.
        """
        for kept in await self.kept_ingests():
            if kept.digest == digest and kept.name not in self.unfinished:
                return await self.workers.opened("writes", self._resume, kept, verifier)
        return None

    async def sweep_ingest(self, keep: Collection[str] = ()) -> int:
        """Remove what is under ingest/ except the names in `keep` and running transfers; the bytes that this freed.

        Anything but plain files is quarantined. Raises Unavailable.
        """
        return await self.workers.run("syncs", self._sweep, frozenset(keep))

    # for DiskIngest, in a worker thread

    def publish(self, digest: Digest, name: str, fd: int) -> None:
        """Give a verified file under ingest/ its name under blobs/. Raises OutOfSpace or Unavailable."""
        try:
            self.fs.protect(fd)
            self.fs.fsync(fd)
            with made_folder(
                self.fs,
                self._folders.blobs,
                shard(digest),
                set_aside=self._quarantine.take,
                settled=self._settled,
                making=self.upkeep.making,
            ) as at:
                self._name_it(digest, name, at)
        except OSError as error:
            raise meaning(error, f"cannot commit {digest}") from error

    def discard(self, name: str) -> None:
        """Remove a name under ingest/. Never raises: the next start sweeps what stays."""
        try:
            self.fs.unlink(self._folders.ingest, name)
        except OSError:
            pass

    def drop(self, fd: int) -> None:
        """Close a descriptor; on the loop where that is quick, in a thread where it is not."""
        is_slow = False
        try:
            found = self.fs.stat(fd)
            is_slow = found.st_nlink == 0 and found.st_size >= _SLOW_TO_DROP
        except OSError:
            pass
        finally:
            if is_slow and not self.workers.is_closed:
                self.workers.start("syncs", self.fs.close, fd)
            else:
                self.fs.close(fd)

    # in a worker thread

    def _name_it(self, digest: Digest, name: str, at: int) -> None:
        is_replaced = self._make_way(at, digest)
        with self.upkeep.naming(at):
            self.fs.rename(self._folders.ingest, name, at, digest.hex)
        try:
            self.fs.fsync_folder(at)
        except OSError:
            # The name may not last, so it must not be seen. One that replaced another stays: its bytes are synced and
            # right, and an earlier commit of the same digest was promised to last.
            if not is_replaced:
                self._unname(at, digest)
            raise

    def _unname(self, at: int, digest: Digest) -> None:
        try:
            self.fs.unlink(at, digest.hex)
        except OSError:
            pass  # it stays, and is right: its bytes were verified and synced before it got the name

    def _make_way(self, at: int, digest: Digest) -> bool:
        """Whether a plain file has the name already. Anything else that does is set aside."""
        try:
            found = self.fs.look(at, digest.hex)
        except FileNotFoundError:
            return False
        if is_ours(found):
            return True
        self._quarantine.take(at, digest.hex, f"{kind_of(found)} was in the place of {digest}")
        return False

    def _open(self, digest: Digest) -> DiskBlob | None:
        try:
            with opened_folder(self.fs, self._folders.blobs, shard(digest), set_aside=self._quarantine.take) as at:
                return self._open_in(at, digest)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise meaning(error, f"cannot open {digest}") from error

    def _open_in(self, at: int, digest: Digest) -> DiskBlob | None:
        opened = opened_file(self.fs, self._quarantine, at, digest.hex, str(digest))
        if opened is None:
            return None
        fd, found = opened
        return DiskBlob(fd, FileIdentity(found.st_ino, found.st_size, found.st_ctime_ns), self)

    def _begin(self, digest: Digest, verifier: Verifier) -> DiskIngest:
        name = ingest_name(digest)
        self.unfinished.add(name)
        try:
            fd = self.upkeep.created(self._folders.ingest, name)
        except OSError as error:
            self.unfinished.discard(name)
            raise meaning(error, f"cannot begin {digest}") from error
        return DiskIngest(self, digest, verifier, name, fd, 0)

    def _resume(self, kept: KeptIngest, verifier: Verifier) -> DiskIngest | None:
        self.unfinished.add(kept.name)
        ingest = None
        try:
            ingest = self._resumed(kept, verifier)
        except OSError as error:
            raise meaning(error, f"cannot resume {kept.digest}") from error
        finally:
            if ingest is None:
                self.unfinished.discard(kept.name)
        return ingest

    def _resumed(self, kept: KeptIngest, verifier: Verifier) -> DiskIngest | None:
        at, what = self._folders.ingest, f"the unfinished {kept.digest}"
        opened = opened_file(self.fs, self._quarantine, at, kept.name, what, is_writable=True)
        if opened is None:
            return None
        fd, _ = opened
        try:
            n_bytes = self._hash_again(fd, verifier)
        except BaseException:
            self.fs.close(fd)
            raise
        return DiskIngest(self, kept.digest, verifier, kept.name, fd, n_bytes)

    def _hash_again(self, fd: int, verifier: Verifier) -> int:
        n_bytes = 0
        while piece := self.fs.read(fd, _STEP, n_bytes):
            verifier.feed(piece)
            n_bytes += len(piece)
        return n_bytes

    def _delete(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            try:
                with opened_folder(self.fs, self._folders.blobs, shard(digest), set_aside=self._quarantine.take) as at:
                    self._delete_in(at, digest)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise meaning(error, f"cannot delete {digest}") from error

    def _delete_in(self, at: int, digest: Digest) -> None:
        try:
            self.fs.unlink(at, digest.hex)
        except IsADirectoryError:
            self._quarantine.take(at, digest.hex, f"a folder was in the place of {digest}")

    def _set_aside(self, digest: Digest, why: str, inode: int | None) -> bool:
        try:
            with opened_folder(self.fs, self._folders.blobs, shard(digest), set_aside=self._quarantine.take) as at:
                if inode not in (None, self.fs.look(at, digest.hex).st_ino):
                    return False
                return self._quarantine.take(at, digest.hex, f"{digest}: {why}")
        except FileNotFoundError:
            return True
        except OSError as error:
            raise meaning(error, f"cannot quarantine {digest} ({why})") from error

    # in a worker thread: scan, space, leftovers

    def _algorithms(self) -> list[str]:
        return self._known(self._folders.blobs, "blobs", ALGORITHMS.__contains__)

    def _shards(self, algorithm: str) -> list[str]:
        return self._listed((algorithm,), is_shard)

    def _digests(self, algorithm: str, name: str) -> list[Digest]:
        def is_blob(found: str) -> bool:
            return found.startswith(name) and maybe_digest(algorithm, found) is not None

        return [Digest(algorithm, found) for found in self._listed((algorithm, name), is_blob)]

    def _listed(self, parts: tuple[str, ...], is_known: Callable[[str], bool]) -> list[str]:
        where = "/".join(("blobs", *parts))
        try:
            with opened_folder(self.fs, self._folders.blobs, parts, set_aside=self._quarantine.take) as at:
                return self._known(at, where, is_known)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise meaning(error, f"cannot list {where}") from error

    def _known(self, at: int, where: str, is_known: Callable[[str], bool]) -> list[str]:
        try:
            names = sorted(self.fs.names(at))
        except OSError as error:
            raise meaning(error, f"cannot list {where}") from error
        for name in names:
            if not is_known(name) and name not in NOT_OURS:
                self._quarantine.take(at, name, f"{where} had {name[:150]!r}, which is not of this store")
        return [name for name in names if is_known(name)]

    def _looked(self, parts: tuple[str, str], digests: Sequence[Digest]) -> list[StoredBlob]:
        try:
            with opened_folder(self.fs, self._folders.blobs, parts, set_aside=self._quarantine.take) as at:
                blobs = [self._looked_at(at, digest) for digest in digests]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise meaning(error, f"cannot list blobs/{'/'.join(parts)}") from error
        return [blob for blob in blobs if blob is not None]

    def _looked_at(self, at: int, digest: Digest) -> StoredBlob | None:
        try:
            found = self.fs.look(at, digest.hex)
        except FileNotFoundError:
            return None  # deleted since it was listed
        if not is_ours(found):
            self._quarantine.take(at, digest.hex, f"{kind_of(found)} was in the place of {digest}")
            return None
        return StoredBlob(digest, found.st_size, found.st_mtime)

    def _space(self) -> Space:
        try:
            found = self.fs.space(self._folders.blobs)
        except OSError as error:
            raise meaning(error, "cannot ask the file system for its free space") from error
        unit = found.f_frsize or found.f_bsize
        # f_bavail and f_favail leave out what is reserved for root: we are not to eat into that.
        return Space(found.f_blocks * unit, found.f_bavail * unit, found.f_files, found.f_favail, unit)

    def _leftovers(self) -> list[tuple[str, os.stat_result]]:
        """Plain files under ingest/ that no transfer of this process owns; the rest is quarantined."""
        at, left = self._folders.ingest, []
        try:
            for name in self.fs.names(at):
                if name in self.unfinished or name in NOT_OURS:
                    continue
                try:
                    found = self.fs.look(at, name)
                except FileNotFoundError:
                    continue
                if is_ours(found):
                    left.append((name, found))
                else:
                    self._quarantine.take(at, name, f"ingest had {kind_of(found)}, {name[:150]!r}")
        except OSError as error:
            raise meaning(error, "cannot list ingest") from error
        return left

    def _kept(self) -> list[KeptIngest]:
        kept = [
            KeptIngest(digest, found.st_size, name)
            for name, found in self._leftovers()
            if (digest := maybe_ingest_digest(name)) is not None
        ]
        return sorted(kept, key=lambda each: each.n_bytes, reverse=True)

    def _sweep(self, keep: frozenset[str]) -> int:
        n_bytes = 0
        for name, found in self._leftovers():
            if name in keep or name in self.unfinished:
                continue
            try:
                self.fs.unlink(self._folders.ingest, name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise meaning(error, f"cannot sweep ingest/{name}") from error
            n_bytes += found.st_blocks * 512
        return n_bytes
