"""The table of running transfers: join, tail, leave (INV-3, INV-4).

A transfer is registered before its first await, so that every later asker joins it. It belongs to the engine and not to
a reader: readers come and go, and what happens when the last one has gone is a setting. The file is the buffer: readers
get a descriptor and a frontier, nobody holds chunks; only where there is no file (disk full or failing) do bytes wait
in a bounded ring.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from proxy.errors import BreakwaterError, Overloaded
from proxy.oci.digest import Digest
from proxy.rules.transfer import ENDED, State, frontier, step

#: What a transfer without a file keeps for its slowest reader.
RING_BYTES = 8 << 20

#: What happens to a transfer when its last reader leaves; see `keeps_going`.
OnLastReaderGone = Literal["finish", "finish_when_near", "abort"]

#: With "finish_when_near": finish when no more than this is missing, or no more than a twentieth (Squid's quick_abort).
NEAR_BYTES = 16 << 20


def keeps_going(policy: OnLastReaderGone, *, received: int, size: int | None) -> bool:
    """Whether a transfer that nobody reads any more goes on for the store's sake."""
    if policy == "finish":
        return True
    if policy == "abort" or size is None:
        return False
    missing = size - received
    return missing <= NEAR_BYTES or missing * 20 <= size


class Doorbell:
    """Wakes everyone who waits for the next change. A waiter that is cancelled takes only itself away."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Return at the next `ring`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def ring(self) -> None:
        """Wake everyone who waits now."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class File(Protocol):
    """Whatever holds the bytes a tail sends from."""

    fd: int

    def close(self) -> None: ...


class Ring:
    """The bytes of a transfer that have no file: a bounded window that moves with the fill."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.end = start
        self._pieces: deque[tuple[int, bytes]] = deque()

    def append(self, piece: bytes) -> None:
        """Take the next bytes, letting go of the oldest beyond the bound."""
        self._pieces.append((self.end, piece))
        self.end += len(piece)
        while self._pieces and self.end - self.start > RING_BYTES and len(self._pieces) > 1:
            offset, oldest = self._pieces.popleft()
            self.start = offset + len(oldest)

    def piece(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes at `offset`. Raises Overloaded when they are gone."""
        if offset < self.start:
            raise Overloaded("this reader fell behind a transfer that is not kept on disk; ask again")
        for at, piece in reversed(self._pieces):
            if at <= offset:
                return piece[offset - at : offset - at + limit]
        return b""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a transfer's bytes come from, as words for status and logs."""

    upstream: str
    repository: str


class Transfer:
    """One body on its way, shared by its readers. Driven by a pump; looked at by readers.

    The same shape serves a download and the first hashing of a stored file: both fill up to a frontier.
    """

    def __init__(
        self, digest: Digest, source: Source, *, started_at: float, policy: OnLastReaderGone, expected: int | None
    ) -> None:
        """`started_at` is monotonic; `expected` the size in bytes where a manifest or a HEAD has said it."""
        self.digest = digest
        self.source = source
        self.started_at = started_at
        self.state = State.REQUESTED
        self.size = expected
        self.is_size_confirmed = False
        self.received = 0
        self.in_file = 0
        self.file: File | None = None
        self.ring: Ring | None = None
        self.failure: BreakwaterError | None = None
        self.n_readers = 0
        #: Deserted and being cancelled: nobody can join, and whoever comes waits for its end.
        self.is_given_up = False
        self.policy = policy
        self.changed = Doorbell()
        #: Rung when a reader has moved or left: a fill without a file waits for that.
        self.moved = Doorbell()
        self.offsets: dict[Reader, int] = {}
        self.on_ended: Callable[[Transfer], None] = lambda _: None
        self.on_deserted: Callable[[Transfer], None] = lambda _: None
        self.on_closed: Callable[[Transfer], None] = lambda _: None
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<Transfer {self.digest} {self.state.value} {self.received}/{self.size} readers={self.n_readers}"
            f"{' ring' if self.ring else ''}>"
        )

    # -- what readers see -------------------------------------------------------------------------------------------

    @property
    def frontier(self) -> int:
        """How many bytes may leave (INV-3)."""
        return frontier(received=self.received, size=self.size, is_verified=self.state is State.COMMITTED)

    @property
    def is_joinable(self) -> bool:
        """Whether a new reader can have the whole body: not once a transfer without a file has let go of its start."""
        has_start = self.ring is None or self.ring.start <= self.in_file
        return has_start and not self.is_given_up and self.state not in ENDED

    def join(self, project: str = "") -> Reader:
        """Become a reader, for a project."""
        self.n_readers += 1
        reader = Reader(self, project)
        self.offsets[reader] = 0
        return reader

    def projects(self) -> set[str]:
        """Those whose readers are here now."""
        return {reader.project for reader in self.offsets}

    async def confirmed_size(self) -> int:
        """Wait for the size of the whole body in bytes. Raises the transfer's failure.

        An empty body has no last byte to hold back: its size is not told before the digest agreed (INV-3).
        """
        while not self.is_size_confirmed or (self.size == 0 and self.state not in ENDED):
            self._raise_failure()
            await self.changed.wait()
        if self.size == 0:
            self._raise_failure()
        assert self.size is not None
        return self.size

    async def agreed(self) -> None:
        """Wait until all of the body was found to be what its digest says. Raises the transfer's failure."""
        while self.state not in ENDED:
            await self.changed.wait()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    # -- what the pump does -----------------------------------------------------------------------------------------

    def goes(self, to: State) -> None:
        """Take a step of the table in rules/transfer.py and tell the readers."""
        self.state = step(self.state, to)
        self.changed.ring()
        if self.state in ENDED:
            self.on_ended(self)
            self._close_if_done()

    def confirm_size(self, size: int) -> None:
        """Upstream, or the end of the body, has said how long it is."""
        self.size = size
        self.is_size_confirmed = True
        self.changed.ring()

    def fail(self, failure: BreakwaterError) -> None:
        """End it: every reader ends short."""
        self.failure = failure
        self.goes(State.FAILED)

    def left(self, reader: Reader) -> None:
        """A reader is done."""
        self.n_readers -= 1
        self.offsets.pop(reader, None)
        self.moved.ring()
        if self.n_readers == 0 and self.state not in ENDED:
            self.on_deserted(self)
        self._close_if_done()

    def oldest_wanted(self) -> int | None:
        """The smallest offset of a reader whose next bytes are still to be had; None when nobody is there.

        For a transfer without a file: those whose bytes have been let go of are lost, and not to be waited for.
        """
        assert self.ring is not None
        start = self.ring.start
        return min((at for offset in self.offsets.values() if (at := max(offset, self.in_file)) >= start), default=None)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED

    def left_by_filler(self) -> None:
        """Whoever fills the transfer, and was counted as a reader for it, is done."""
        self.n_readers -= 1
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self.n_readers == 0 and self.state in ENDED and not self._closed:
            self._closed = True
            if self.file is not None:
                self.file.close()
            self.on_closed(self)


class Reader:
    """One client's view of a transfer: a `ports.Tail`."""

    def __init__(self, transfer: Transfer, project: str = "") -> None:
        self._transfer = transfer
        self.project = project
        self._gone = False

    @property
    def size(self) -> int:
        """The whole body in bytes; only after `confirmed_size`."""
        assert self._transfer.size is not None
        return self._transfer.size

    @property
    def fd(self) -> int:
        """The file being filled, or -1."""
        return self._transfer.file.fd if self._transfer.file is not None else -1

    @property
    def in_file(self) -> int:
        """Bytes that are in the file."""
        return self._transfer.in_file

    async def confirmed_size(self) -> int:
        """Wait until `size` is known; raises the transfer's failure."""
        return await self._transfer.confirmed_size()

    async def agreed(self) -> None:
        """Wait until the digest agreed; raises the transfer's failure."""
        await self._transfer.agreed()

    async def beyond(self, offset: int) -> int:
        """See ports.Tail."""
        transfer = self._transfer
        transfer.offsets[self] = offset
        transfer.moved.ring()
        while (reached := transfer.frontier) <= offset:
            if transfer.failure is not None:
                raise transfer.failure.with_traceback(None)  # one for all readers: see flights.landing
            if transfer.state in ENDED:
                raise Overloaded(f"{transfer.digest}: the transfer ended at {transfer.received} bytes; ask again")
            await transfer.changed.wait()
        return reached

    def piece(self, offset: int, limit: int) -> bytes:
        """See ports.Tail."""
        assert self._transfer.ring is not None
        return self._transfer.ring.piece(offset, limit)

    def leave(self) -> None:
        """See ports.Tail."""
        if not self._gone:
            self._gone = True
            self._transfer.left(self)
