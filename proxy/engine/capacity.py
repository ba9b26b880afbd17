"""The disk's owner: promises space, evicts what was used least recently, remembers the order of use.

Every byte that a transfer writes was reserved here first (INV-5). What is being read is never evicted. Hits do not wait
for any of it: they touch the ledger in memory and go on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Container, Iterable

from proxy.engine.tasks import TaskOwner
from proxy.errors import OutOfSpace, StoreError, Unavailable
from proxy.events import Event, Evicted, Noticed
from proxy.oci.digest import Digest
from proxy.ports import BlobStore, Clock, Facts, Use
from proxy.rules.ledger import Ledger, on_disk

#: How much a transfer of unknown length reserves at a time.
STEP_BYTES = 64 << 20
#: How often the order of use is written down. Losing that much of it costs nothing but a slightly older order.
REMEMBER_EVERY_S = 5.0
#: For how long after a start misses wait for the store to be counted, before they go on without keeping anything.
COUNT_PATIENCE_S = 10.0


class Reservation:
    """Space promised to one transfer. Ends with `settle` or `release`, exactly once; `release` may come again."""

    def __init__(self, capacity: Capacity, n_bytes: int) -> None:
        self._capacity = capacity
        self.n_bytes = n_bytes

    async def cover(self, n_bytes: int) -> None:
        """Grow, in steps, until the promise covers a file of `n_bytes`. Raises OutOfSpace."""
        needed = on_disk(n_bytes)
        if needed > self.n_bytes:
            grown = max(needed, self.n_bytes + STEP_BYTES)
            await self._capacity.make_room(grown - self.n_bytes)
            self.n_bytes = grown

    def settle(self, digest: Digest, size: int) -> None:
        """The file of `size` bytes has its name now."""
        self._capacity.settle(digest, size, self.n_bytes)
        self.n_bytes = 0

    def release(self) -> None:
        """Nothing was kept."""
        self._capacity.ledger.release(self.n_bytes)
        self.n_bytes = 0


class Capacity:
    """Owns the ledger. True for this process, which holds the store's lock."""

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        facts: Facts,
        *,
        min_free_bytes: Callable[[int], int],
        min_free_inodes: Callable[[int], int],
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        """`min_free_bytes` and `min_free_inodes` turn the file system's total into what must stay free of it."""
        self.ledger = ledger
        self.evicted_bytes = 0
        #: Why nothing new is kept at the moment, or "".
        self.degraded = ""
        self._blobs = blobs
        self._facts = facts
        self._min_free_bytes = min_free_bytes
        self._min_free_inodes = min_free_inodes
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._reading: Counter[Digest] = Counter()
        #: Told of blobs that are no longer stored, however they went: who paid for them stops paying.
        self.on_gone: Callable[[Iterable[Digest]], None] = lambda _: None
        #: What may not be evicted besides what is being read: pins, and everything while sealed.
        self.pinned: Container[Digest] = frozenset()
        self._kept = _Kept(self)
        self._making_room = asyncio.Lock()
        self._counted = asyncio.Event()
        self._count_until = clock.monotonic() + COUNT_PATIENCE_S
        self._why_uncounted = "the store is still being counted after the start; nothing new is kept yet"
        self._counter = 0
        self._dirty: dict[Digest, int] = {}
        self._forgotten: set[Digest] = set()

    # -- what hits do -----------------------------------------------------------------------------------------------

    def touch(self, digest: Digest) -> None:
        """It was used just now."""
        if self.ledger.touch(digest):
            self._note_use(digest)

    def hold(self, digest: Digest) -> None:
        """A reader has it open: not to be evicted until `unhold`."""
        self._reading[digest] += 1

    def unhold(self, digest: Digest) -> None:
        """That reader is done."""
        if self._reading[digest] <= 1:
            del self._reading[digest]
        else:
            self._reading[digest] -= 1

    @property
    def kept(self) -> Container[Digest]:
        """What may not be evicted at this moment: what is being read, and what is pinned."""
        return self._kept

    def may_go(self, digest: Digest) -> bool:
        """Whether it may be evicted now: neither being read nor pinned."""
        return digest not in self._reading and digest not in self.pinned

    # -- what transfers do ------------------------------------------------------------------------------------------

    async def reserve(self, size: int | None) -> Reservation:
        """Promise room for `size` bytes (None: unknown, in steps), evicting where needed. Raises OutOfSpace."""
        n_bytes = STEP_BYTES if size is None else on_disk(size)
        await self.make_room(n_bytes)
        return Reservation(self, n_bytes)

    async def make_room(self, n_bytes: int) -> None:
        """Reserve `n_bytes` on disk, evicting where needed. Raises OutOfSpace when that cannot be done."""
        await self._wait_until_counted()
        if n_bytes > self.ledger.capacity:
            raise OutOfSpace(f"{n_bytes} bytes are more than the whole capacity of the store ({self.ledger.capacity})")
        async with self._making_room:
            await self._keep_min_free(n_bytes)
            while not self.ledger.fits(n_bytes):
                victims = self.ledger.victims(n_bytes, kept=self._kept)
                if not victims:
                    raise OutOfSpace(
                        f"no room for {n_bytes} bytes: {self.ledger.committed} committed and {self.ledger.reserved} "
                        f"reserved of {self.ledger.capacity}, and what is left is being read"
                    )
                await self.evict(victims)
            self.ledger.reserve(n_bytes)

    def settle(self, digest: Digest, size: int, n_reserved: int) -> None:
        """A reserved file has its name."""
        self.ledger.settle(digest, size, n_reserved)
        self._note_use(digest)

    async def evict(self, victims: list[Digest]) -> None:
        """Delete these and stop counting them. Raises OutOfSpace when the disk does not let go of them."""
        sizes = [self.ledger.size_of(digest) or 0 for digest in victims]
        try:
            await self._blobs.delete(victims)
        except StoreError as error:
            raise OutOfSpace(f"could not evict: {error}") from error
        for digest in victims:
            self.ledger.drop(digest)
            self._dirty.pop(digest, None)
            self._forgotten.add(digest)
        self.on_gone(victims)
        self.evicted_bytes += sum(sizes)
        self._observe(Evicted(len(victims), sum(sizes)))

    def forget(self, digest: Digest) -> None:
        """The blob is gone for another reason (quarantined, purged)."""
        self.ledger.drop(digest)
        self.on_gone((digest,))
        self._dirty.pop(digest, None)
        self._forgotten.add(digest)

    async def _keep_min_free(self, n_bytes: int) -> None:
        """Evict until writing `n_bytes` leaves `min_free` of the file system, whoever filled it. Raises OutOfSpace."""
        while True:
            try:
                space = await self._blobs.space()
            except Unavailable as error:
                raise OutOfSpace(f"cannot tell how much of the disk is free: {error}") from error
            promised = self.ledger.reserved + n_bytes
            short = self._min_free_bytes(space.total_bytes) + promised - space.free_bytes
            if short <= 0 and space.free_inodes >= self._min_free_inodes(space.total_inodes):
                return
            victims = self.ledger.victims(self.ledger.free + max(short, 1), kept=self._kept)
            if not victims:
                raise OutOfSpace(
                    f"the file system has {space.free_bytes} of {space.total_bytes} bytes and {space.free_inodes} of "
                    f"{space.total_inodes} inodes free; min_free leaves no room for {n_bytes} more"
                )
            await self.evict(victims)

    # -- counting and remembering -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Count the store and keep the order of use written down, in the background."""
        self._owner.spawn_background(self._count(), "count the store")
        self._owner.spawn_background(self._remember_forever(), "remember the order of use")

    @property
    def is_counted(self) -> bool:
        """Whether the ledger knows the whole store."""
        return self._counted.is_set()

    async def counted(self) -> None:
        """Return when the ledger knows the whole store, however long that takes."""
        await self._counted.wait()

    async def _wait_until_counted(self) -> None:
        if self._counted.is_set():
            return
        patience_s = self._count_until - self._clock.monotonic()
        if patience_s > 0:
            try:
                async with self._owner.deadline(self._clock, patience_s):
                    await self._counted.wait()
                    return
            except TimeoutError:
                pass
        raise OutOfSpace(self._why_uncounted)

    async def _count(self) -> None:
        """Files are the truth; the remembered order only sorts them. What it does not know comes first, by its age."""
        on_disk_now: dict[Digest, tuple[float, int]] = {}
        try:
            async for batch in self._blobs.scan():
                for blob in batch:
                    on_disk_now[blob.digest] = (blob.written_at, blob.size)
            remembered: list[Use] = []
            async for uses in self._facts.uses():
                remembered.extend(use for use in uses if use.digest in on_disk_now)
        except StoreError as error:
            self._count_until = self._clock.monotonic()  # waiting would not help
            self._why_uncounted = f"cannot count the store, nothing new is kept: {error}"
            self._observe(Noticed("error", self._why_uncounted))
            return
        for digest in self._forgotten:  # it went while we looked
            on_disk_now.pop(digest, None)
        known = {use.digest for use in remembered}
        fresh = set(self._dirty)  # used or committed while we counted: already at the young end
        for digest, (_, size) in sorted(on_disk_now.items(), key=lambda item: item[1][0]):
            if digest not in known and digest not in fresh:
                self.ledger.adopt(digest, size)
        for use in remembered:
            if use.digest not in fresh and use.digest in on_disk_now:
                self.ledger.adopt(use.digest, on_disk_now[use.digest][1])
        self._counter = max([self._counter, *(use.counter for use in remembered[-1:])])
        for digest in fresh:
            self.ledger.touch(digest)
        self._counted.set()
        await self._shrink_to_capacity()

    async def _shrink_to_capacity(self) -> None:
        """A capacity that was lowered between two runs holds from the start."""
        try:
            async with self._making_room:
                while not self.ledger.fits(0) and (victims := self.ledger.victims(0, kept=self._kept)):
                    await self.evict(victims)
        except OutOfSpace as error:
            self._observe(Noticed("error", str(error)))

    def _note_use(self, digest: Digest) -> None:
        self._counter += 1
        self._dirty[digest] = self._counter
        self._forgotten.discard(digest)

    async def _remember_forever(self) -> None:
        while True:
            await self._clock.sleep(REMEMBER_EVERY_S)
            await self.remember()

    async def remember(self) -> None:
        """Write down the uses since the last time."""
        if not (self._dirty or self._forgotten):
            return
        dirty, self._dirty = self._dirty, {}
        forgotten, self._forgotten = self._forgotten, set()
        uses = [Use(d, size, n) for d, n in dirty.items() if (size := self.ledger.size_of(d)) is not None]
        await self._facts.remember(uses, list(forgotten))


class _Kept:
    """What eviction passes over, as `Ledger.victims` asks for it."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, Digest) and not self._capacity.may_go(digest)
