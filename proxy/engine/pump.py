"""Drives one transfer: upstream's pieces into the ingest, in one hop each, until the digest agrees (INV-1, INV-3).

Two coroutines share a small buffer: one reads upstream as fast as it comes, one hashes and writes what has gathered,
off the loop. While a hop runs the next piece fills. A broken body is resumed where it stopped, a bounded number of
times without progress. When the disk cannot take the bytes they go to the readers all the same, through a ring.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proxy.engine.capacity import Capacity, Reservation, TooLarge
from proxy.engine.charges import Charges, Tab
from proxy.engine.remains import Remains
from proxy.engine.tasks import TaskOwner
from proxy.engine.transfers import RING_BYTES, Ring, Transfer
from proxy.errors import BreakwaterError, Corrupt, Misbehaved, OverQuota, StoreError, Timeout, Unreachable
from proxy.events import Event, Noticed
from proxy.oci.digest import Verifier
from proxy.oci.names import Repository
from proxy.ports import BlobBody, BlobStore, Clock, Ingest, Upstream
from proxy.rules.backoff import MAX_RESUMES_WITHOUT_PROGRESS, PROGRESS_BYTES, resume_delay
from proxy.rules.transfer import State

#: Upstream is read ahead of the disk by at most this much, and a hop to the worker takes at most this much.
PIECE_BYTES = 1 << 20
#: How long a fill without a file waits for its slowest reader before it cuts that one short.
LAGGARD_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Work:
    """The parts every pump needs."""

    blobs: BlobStore
    capacity: Capacity
    clock: Clock
    chance: Callable[[], float]
    observe: Callable[[Event], None]
    charges: Charges
    remains: Remains | None = None


class Pump:
    """One transfer's driver. `run` never raises: what goes wrong ends the transfer."""

    def __init__(
        self, transfer: Transfer, upstream: Upstream, repository: Repository, work: Work, owner: TaskOwner, tab: Tab
    ) -> None:
        self._transfer = transfer
        self._tab = tab
        self._owner = owner
        self._upstream = upstream
        self._repository = repository
        self._work = work
        self._verifier = Verifier(transfer.digest)
        self._ingest: Ingest | None = None
        self._reservation: Reservation | None = None
        #: Bytes taken from upstream; the verifier's own count moves in a worker thread and lags behind.
        self._n_taken = 0
        #: How many of them were left by an earlier transfer.
        self._n_resumed = 0
        self._gathered: list[bytes] = []
        self._n_gathered = 0
        self._is_complete = False
        self._is_kept = False
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        """Fetch, verify, commit. On cancellation the transfer is abandoned and nothing is kept."""
        transfer = self._transfer
        try:
            await self._resume()
            body = await self._open(self._n_taken)
            await self._begin_file(body)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._fill(body))
                both.create_task(self._drain())
            await self._finish()
        except BaseExceptionGroup as group:
            self._end(_first(group))
        except BreakwaterError as failure:
            self._end(failure)
        except asyncio.CancelledError:
            self._end(Unreachable("the transfer was given up", upstream=transfer.source.upstream))
            raise
        finally:
            try:
                if self._ingest is not None and not self._is_kept:
                    await self._owner.uninterrupted(self._leave(self._ingest), "abort an ingest")
            finally:
                if self._reservation is not None:
                    self._reservation.release()  # not before the file is gone (INV-5)

    async def _resume(self) -> None:
        """Go on where an earlier transfer of the same digest ended, if one left enough."""
        transfer, remains = self._transfer, self._work.remains
        if remains is None:
            return
        found = await remains.resume(transfer.digest, self._verifier, transfer.size)
        if found is None:
            self._verifier = Verifier(transfer.digest)
            return
        self._ingest, self._reservation = found
        self._n_taken = self._n_resumed = self._ingest.n_bytes
        self._reservation.wrote(self._n_taken)
        transfer.file = self._ingest
        # Before anything can refuse to keep it: a ring begins behind what is in the file.
        transfer.in_file = transfer.received = self._n_taken

    async def _leave(self, ingest: Ingest) -> None:
        """Nothing gets a name: the file goes, or stays for the next transfer where nothing is wrong with it."""
        remains, reservation = self._work.remains, self._reservation
        is_sound = self._transfer.ring is None and isinstance(self._transfer.failure, Unreachable | Timeout)
        if remains is None or reservation is None or not is_sound or not remains.is_worth(ingest.n_bytes):
            await ingest.abort()
            return
        await ingest.abort(keep=True)
        self._reservation = None
        remains.keep(self._transfer.digest, ingest.n_bytes, reservation)

    def _end(self, failure: BaseException) -> None:
        if isinstance(failure, BreakwaterError):
            self._transfer.fail(failure)
            return
        # A bug of ours: the readers must not hang on it, and the owner of this task must report it.
        self._transfer.fail(
            Unreachable("the transfer broke inside Breakwater", upstream=self._transfer.source.upstream)
        )
        raise failure

    # -- from upstream ----------------------------------------------------------------------------------------------

    async def _open(self, offset: int) -> BlobBody:
        """Ask upstream for the body from `offset` on, and learn the size."""
        transfer = self._transfer
        body = await self._upstream.blob(self._repository, transfer.digest, offset=offset)
        size = body.size if body.size is not None else transfer.size
        if transfer.is_size_confirmed and size != transfer.size:
            await body.close()
            raise self._lie(f"first said {transfer.size} bytes and now {size}")
        if transfer.state is State.REQUESTED:
            transfer.goes(State.STREAMING)
        if size is not None:
            transfer.confirm_size(size)
        return body

    async def _fill(self, body: BlobBody) -> None:
        """Read until the whole body is here, resuming where it breaks."""
        n_stuck, reached = 0, 0
        maybe_body: BlobBody | None = body
        while True:
            try:
                if maybe_body is None:
                    maybe_body = await self._open(self._n_taken)
                await self._read_all(maybe_body)
                break
            except (Unreachable, Timeout) as failure:
                if self._n_taken - reached >= PROGRESS_BYTES:
                    n_stuck, reached = 0, self._n_taken
                n_stuck += 1
                if n_stuck > MAX_RESUMES_WITHOUT_PROGRESS:
                    if maybe_body is not None and isinstance(failure, Unreachable):
                        # It answers, and breaks off at the same byte each time: not an outage, but a bad body.
                        raise self._lie(f"breaks off at byte {self._n_taken} each time ({failure})") from failure
                    raise
            finally:
                if maybe_body is not None:
                    await maybe_body.close()
            maybe_body = None
            await self._work.clock.sleep(resume_delay(n_stuck, self._work.chance()))
        self._is_complete = True
        self._changed.set()

    async def _read_all(self, body: BlobBody) -> None:
        """Take what comes; what comes twice, where upstream ignored the range, is thrown away."""
        to_skip = self._n_taken - body.offset
        while piece := await body.read():
            n_skipped = min(to_skip, len(piece))
            to_skip -= n_skipped
            if n_skipped < len(piece):
                await self._take(piece[n_skipped:])
        if to_skip:
            raise self._lie(f"was shorter the second time: {self._n_taken - to_skip} bytes")
        size = self._transfer.size
        if self._transfer.is_size_confirmed and self._n_taken < (size or 0):
            raise self._lie(f"ended after {self._n_taken} of {size} bytes")

    async def _take(self, piece: bytes) -> None:
        self._n_taken += len(piece)
        if self._transfer.is_size_confirmed and self._n_taken > (self._transfer.size or 0):
            raise self._lie(f"went on beyond its {self._transfer.size} bytes")
        self._gathered.append(piece)
        self._n_gathered += len(piece)
        self._changed.set()
        while self._n_gathered >= PIECE_BYTES:
            await self._buffer_moves()

    async def _buffer_moves(self) -> None:
        self._drained.clear()
        await self._drained.wait()

    def _lie(self, what: str) -> Misbehaved:
        source = self._transfer.source
        return Misbehaved(
            f"{source.upstream}: the body of {self._transfer.digest} in {source.repository} {what}",
            upstream=source.upstream,
        )

    # -- to the disk and the readers --------------------------------------------------------------------------------

    async def _begin_file(self, body: BlobBody) -> None:
        """Reserve, then open an ingest; where either cannot be had, go on without a file."""
        transfer = self._transfer
        size = transfer.size if transfer.is_size_confirmed else None
        try:
            await self._tab.secure(size)
            if self._ingest is not None:
                return
            self._reservation = await self._work.capacity.reserve(size, transfer.digest)
            self._ingest = await self._work.blobs.ingest(transfer.digest, self._verifier)
            transfer.file = self._ingest
            transfer.changed.ring()
        except BaseException as error:
            if isinstance(error, StoreError):
                self._go_without_file(error)
                return
            await body.close()
            raise

    async def _drain(self) -> None:
        """Hash and write what has gathered, a hop at a time."""
        while True:
            while not self._gathered and not self._is_complete:
                self._changed.clear()
                await self._changed.wait()
            if not self._gathered:
                return
            pieces, self._gathered = self._gathered, []
            n_bytes = sum(map(len, pieces))
            await self._store(pieces, n_bytes)
            self._n_gathered -= n_bytes
            self._drained.set()

    async def _store(self, pieces: Sequence[bytes], n_bytes: int) -> None:
        """In one hop, and not joined for it: a copy of every byte costs more than a few calls."""
        transfer = self._transfer
        if transfer.ring is None:
            assert self._ingest is not None and self._reservation is not None
            try:
                await self._reservation.cover(self._verifier.n_bytes + n_bytes)
                await self._owner.uninterrupted(self._ingest.write(*pieces), "write a piece")
                self._reservation.wrote(self._ingest.n_bytes)
                transfer.in_file = self._ingest.n_bytes
                transfer.received = self._ingest.n_bytes
            except StoreError as error:
                n_before = self._verifier.n_bytes
                self._go_without_file(error)
                if n_before == transfer.received:  # no room: they were not even hashed yet
                    await asyncio.to_thread(self._hash, pieces)
                self._into_ring(pieces)
        else:
            await asyncio.to_thread(self._hash, pieces)
            await self._wait_for_laggards(n_bytes)
            self._into_ring(pieces)
        transfer.changed.ring()

    def _hash(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            self._verifier.feed(piece)

    def _go_without_file(self, error: StoreError) -> None:
        """INV-4 without a file: what is in the file stays readable, the rest passes through a ring."""
        transfer = self._transfer
        transfer.ring = Ring(transfer.in_file)
        self._tab.give_up()
        if isinstance(error, OverQuota):
            return  # one project's business, and said when its quota was spent
        if isinstance(error, TooLarge):
            self._work.observe(Noticed("warning", f"{transfer.digest} is passed through and not kept: {error}"))
            return  # the store is well
        capacity = self._work.capacity
        capacity.degraded = str(error)
        self._work.observe(Noticed("warning", f"{transfer.digest} is passed through and not kept: {error}"))

    def _into_ring(self, pieces: Sequence[bytes]) -> None:
        assert self._transfer.ring is not None
        for piece in pieces:
            self._transfer.ring.append(piece)
        self._transfer.received = self._verifier.n_bytes

    async def _wait_for_laggards(self, n_bytes: int) -> None:
        """Give the slowest reader a little time before its bytes are let go."""
        transfer, ring = self._transfer, self._transfer.ring
        assert ring is not None
        would_start_at = ring.end + n_bytes - RING_BYTES
        if would_start_at <= ring.start:
            return
        try:
            async with self._owner.deadline(self._work.clock, LAGGARD_PATIENCE_S):
                while (oldest := transfer.oldest_wanted()) is not None and would_start_at > oldest:
                    await transfer.moved.wait()
        except TimeoutError:
            return

    async def _finish(self) -> None:
        """All bytes are here: agree, name, tell."""
        transfer = self._transfer
        transfer.goes(State.VERIFYING)
        if not self._verifier.agrees():
            if self._n_resumed:
                raise Corrupt(f"{transfer.digest} does not hash to its digest with what was left of it; it starts over")
            raise self._lie("does not hash to its digest")
        if not transfer.is_size_confirmed:
            transfer.confirm_size(self._verifier.n_bytes)
        if transfer.ring is None:
            await self._owner.uninterrupted(self._commit(), "commit")
        if self._is_kept:
            self._work.capacity.degraded = ""
        transfer.goes(State.COMMITTED)

    async def _commit(self) -> None:
        """A body that is right reaches its readers even when the disk fails at the last step."""
        assert self._ingest is not None and self._reservation is not None
        try:
            await self._tab.record()
            await self._ingest.commit()
        except Corrupt as error:
            raise self._lie(f"does not hash to its digest ({error})") from error
        except StoreError as error:
            self._work.capacity.degraded = str(error)
            self._work.observe(Noticed("error", f"{self._transfer.digest} could not be kept: {error}"))
            return
        self._is_kept = True
        self._reservation.settle(self._transfer.digest, self._verifier.n_bytes)
        self._tab.settle(self._verifier.n_bytes)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the pair; the other half was cancelled for it."""
    for error in group.exceptions:
        if not isinstance(error, asyncio.CancelledError):
            return _first(error) if isinstance(error, BaseExceptionGroup) else error
    return group
