"""The disk's owner: promises space, evicts the images that were used least recently, remembers the order of use.

Every byte that a transfer writes was reserved here first (INV-5). What is being read is never evicted. Hits do not wait
for any of it: they touch the ledger in memory and go on.

After a start the ledger is empty and the store is not. Until the files have been counted in the background, a durable
upper bound (engine/bound.py) stands for all of them; what does not fit beside it is passed through and not kept.

The capacity is a promise about the whole folder, so what is there besides blobs has its share set aside: what it takes,
as the store counts it, and a step ahead, so that a record is hardly ever waited for. It grows and shrinks with the need.

One lock is the evictor: whoever needs room takes it, makes just enough in small batches, and leaves the rest, down to
the low mark, to a task of ours. A watcher does the same when others fill the disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable

from proxy.engine.bound import Bound
from proxy.engine.tasks import TaskOwner
from proxy.errors import OutOfSpace, StoreError, Unavailable
from proxy.events import Event, Evicted, Noticed
from proxy.oci.digest import Digest
from proxy.ports import BlobStore, Clock, Facts, Notes, Records, Space, Upkeep, Use
from proxy.rules.ledger import Ledger, slack_of

#: How much a transfer of unknown length reserves at a time.
STEP_BYTES = 64 << 20
#: Uses taken up in one turn of the loop after a start.
USES_STEP = 500
#: How often the order of use is written down. Losing that much of it costs nothing but a slightly older order.
REMEMBER_EVERY_S = 5.0
#: How often the file system is asked whether others have filled it: well within the 10 s in which cold blobs must go.
WATCH_EVERY_S = 2.5
#: What is set aside ahead of the need for what is no blob: a share of the capacity, within these bounds.
UPKEEP_SHARE, MIN_UPKEEP_STEP, MAX_UPKEEP_STEP = 256, 128 << 10, 8 << 20
#: For how long after a start what does not fit waits for the store to be counted, before it is passed through: a small
#: store is counted sooner, and for a big one nobody should wait.
COUNT_PATIENCE_S = 2.0


class TooLarge(OutOfSpace):
    """It could never be kept here. The store is well."""


class Reservation:
    """Space promised to one transfer. Ends with `settle` or `release`, exactly once; `release` may come again."""

    def __init__(self, capacity: Capacity, n_bytes: int) -> None:
        self._capacity = capacity
        self._n_written = 0
        self.n_bytes = n_bytes
        capacity.opened(self)

    @property
    def unwritten(self) -> int:
        """What the promise still will take of the disk, in bytes."""
        return self.n_bytes - self._n_written

    def part(self, n_bytes: int) -> Reservation:
        """So much of a promise of which nothing is written yet, as one of its own."""
        self.n_bytes -= n_bytes
        return Reservation(self._capacity, n_bytes)

    async def cover(self, n_bytes: int) -> None:
        """Grow, in steps, until the promise covers a file of `n_bytes`. Raises OutOfSpace."""
        needed = self._capacity.ledger.on_disk(n_bytes)
        if needed > self.n_bytes:
            grown = max(needed, self.n_bytes + STEP_BYTES)
            try:
                await self._capacity.make_room(grown - self.n_bytes)
            except OutOfSpace:
                if grown == needed:
                    raise
                grown = needed  # a whole step does not fit, but what is here does
                await self._capacity.make_room(grown - self.n_bytes)
            self.n_bytes = grown

    def wrote(self, n_bytes: int) -> None:
        """The file has `n_bytes` now: they are no longer to come."""
        self._n_written = min(n_bytes, self.n_bytes)

    def settle(self, digest: Digest, size: int) -> None:
        """The file of `size` bytes has its name now."""
        self._capacity.settle(digest, size, self.n_bytes)
        self._end()

    def shrink(self, n_bytes: int) -> None:
        """The file stays as it is, with `n_bytes`: give back what it will not take."""
        beyond = self.n_bytes - self._capacity.ledger.on_disk(n_bytes)
        if beyond > 0:
            self._capacity.ledger.release(beyond)
            self.n_bytes -= beyond
        self.wrote(self.n_bytes)

    def release(self) -> None:
        """Nothing was kept."""
        self._capacity.ledger.release(self.n_bytes)
        self._end()

    def _end(self) -> None:
        self.n_bytes = self._n_written = 0
        self._capacity.closed(self)


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
        notes: Notes | None = None,
        records: Records | None = None,
        upkeep: Upkeep | None = None,
    ) -> None:
        """`min_free_bytes` and `min_free_inodes` turn the file system's total into what must stay free of it.

        Without `notes` nothing is kept before the store is counted; without `records` only those images are known whole
        that are fetched or read in this life; without `upkeep` only blobs count.
        """
        self.ledger = ledger
        self.evicted_bytes = 0
        #: Why nothing new is kept at the moment, or "".
        self.degraded = ""
        #: Told of blobs that are no longer stored, however they went: who paid for them stops paying.
        self.on_gone: Callable[[Iterable[Digest]], None] = lambda _: None
        #: Told of the same: whoever has them in memory lets them go.
        self.on_forgotten: Callable[[Iterable[Digest]], None] = lambda _: None
        #: Asked before anything is evicted for want of room: what is kept of no digest may go first.
        self.on_tight: Callable[[], Awaitable[None]] = _nothing
        #: Asked before the bound makes way for the count: what is on disk and no blob is counted here.
        self.on_counting: Callable[[], Awaitable[None]] = _nothing
        #: What may not be evicted besides what is being read: pins, and everything while sealed.
        self.pinned: Container[Digest] = frozenset()
        self._blobs = blobs
        self._facts = facts
        self._records = records
        self._upkeep = upkeep
        if upkeep is not None:
            upkeep.more = self._set_aside
        self._upkeep_step = min(max(ledger.capacity // UPKEEP_SHARE, MIN_UPKEEP_STEP), MAX_UPKEEP_STEP)
        self._bound = Bound(notes, ledger.capacity, owner) if notes is not None else None
        self._is_bounded = False
        self._min_free_bytes = min_free_bytes
        self._min_free_inodes = min_free_inodes
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._reading: Counter[Digest] = Counter()
        self._kept = _Kept(self)
        self._making_room = asyncio.Lock()
        self._open: set[Reservation] = set()
        #: Being deleted at this moment, and the bell for their end.
        self._going: Counter[Digest] = Counter()
        self._gone = asyncio.Event()
        self._counted = asyncio.Event()
        self._count_ended = asyncio.Event()
        #: What every manifest names is known, so that images can be evicted whole.
        self._mapped = asyncio.Event()
        #: Deleted while the store is being counted.
        self._deleted: set[Digest] = set()
        self._count_until = clock.monotonic() + COUNT_PATIENCE_S
        self._why_uncounted = "the store is still being counted after the start; what does not fit is not kept yet"
        self._is_tidying = False
        self._wanted = 0
        self._counter = 0
        self._dirty: dict[Digest, int] = {}
        self._forgotten: set[Digest] = set()

    # -- what hits do -----------------------------------------------------------------------------------------------

    def touch(self, digest: Digest) -> None:
        """It was used just now."""
        if self.ledger.touch(digest) or not self.is_counted:
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

    def names(self, manifest: Digest, parts: Iterable[Digest]) -> None:
        """A stored manifest names these: they are evicted together (rules/ledger.py)."""
        self.ledger.names(manifest, parts)

    # -- what transfers do ------------------------------------------------------------------------------------------

    async def reserve(self, size: int | None, digest: Digest | None = None) -> Reservation:
        """Promise room for `size` bytes (None: unknown, in steps), evicting where needed. Raises OutOfSpace.

        Returns when no deletion of `digest` is under way. Whoever is going to commit it holds it before, so that none
        begins.
        """
        while digest is not None and digest in self._going:
            self._gone.clear()
            await self._gone.wait()
        if size is not None:
            n_bytes = self.ledger.on_disk(size)
            await self.make_room(n_bytes)
            return Reservation(self, n_bytes)
        n_bytes = min(STEP_BYTES, max(self.ledger.block_bytes, self.ledger.capacity // 8))
        await self.make_room(n_bytes)
        return Reservation(self, n_bytes)

    async def make_room(self, n_bytes: int) -> None:
        """Reserve `n_bytes` on disk, evicting where needed. Raises OutOfSpace when that cannot be done."""
        if n_bytes > self.ledger.for_blobs:
            raise TooLarge(f"{n_bytes} bytes are more than the whole capacity of the store ({self.ledger.for_blobs})")
        if not self._is_bounded or not self.ledger.fits(n_bytes):
            await self._patiently(self._counted)
        try:
            await self._make_room(n_bytes)
        except OutOfSpace:
            self._wanted = n_bytes
            raise

    def reserve_what_is_there(self, n_bytes: int) -> Reservation | None:
        """Count a file of `n_bytes` that an earlier life left and that is no blob; None when there is no room for it."""
        taken = self.ledger.on_disk(n_bytes)
        self.ledger.uncounted = max(0, self.ledger.uncounted - taken)
        if not self.ledger.fits(taken):
            return None
        self.ledger.reserve(taken)
        reservation = Reservation(self, taken)
        reservation.wrote(taken)
        return reservation

    async def _make_room(self, n_bytes: int) -> None:
        is_short = False
        async with self._making_room:
            await self._keep_min_free(n_bytes)
            if not self.ledger.fits(n_bytes):
                is_short = True
                await self.on_tight()
            while not self.ledger.fits(n_bytes):
                await self._patiently(self._mapped)
                await self._evict_some(n_bytes)
            if self._bound is not None:
                await self._cover(self._bound, n_bytes)
            self.ledger.reserve(n_bytes)
        if is_short:
            self._tidy_soon()

    async def _cover(self, bound: Bound, n_bytes: int) -> None:
        try:
            await bound.cover(self.ledger.held + n_bytes)
        except Unavailable as error:
            raise OutOfSpace(f"cannot write down how much the store may hold: {error}") from error

    def opened(self, reservation: Reservation) -> None:
        """For Reservation."""
        self._open.add(reservation)

    def closed(self, reservation: Reservation) -> None:
        """For Reservation."""
        self._open.discard(reservation)

    def settle(self, digest: Digest, size: int, n_reserved: int) -> None:
        """A reserved file has its name."""
        self.ledger.settle(digest, size, n_reserved)
        self._deleted.discard(digest)
        self._note_use(digest)

    # -- what is no blob --------------------------------------------------------------------------------------------

    async def _set_aside(self, n_bytes: int) -> None:
        """Room for `n_bytes` more of what is no blob, and a step ahead where there is room for it. Raises OutOfSpace."""
        try:
            await self.make_room(n_bytes + self._upkeep_step)
            n_bytes += self._upkeep_step
        except OutOfSpace:
            await self.make_room(n_bytes)
        self.ledger.release(n_bytes)
        self._grant(self.ledger.upkeep + n_bytes)

    def _grant(self, n_bytes: int) -> None:
        if self._upkeep is not None:
            self.ledger.upkeep = n_bytes
            self._upkeep.grant(n_bytes)

    def _follow_upkeep(self) -> None:
        """What is on disk counts, asked for or not: a blob that went to quarantine, what was found at the start. What is
        needed no more is given back."""
        if self._upkeep is None:
            return
        needed, step = self._upkeep.needed, self._upkeep_step
        if not needed <= self.ledger.upkeep <= needed + 2 * step:
            room = self.ledger.free + self.ledger.upkeep - needed
            self._grant(needed + max(0, min(step, room)))

    # -- who goes ---------------------------------------------------------------------------------------------------

    async def evict(self, victims: list[Digest]) -> None:
        """Delete these and stop counting them. Raises OutOfSpace when the disk does not let go of them."""
        sizes = [self.ledger.size_of(digest) or 0 for digest in victims]
        self._going.update(victims)
        try:
            await self._owner.uninterrupted(self._delete(victims), "evict")
        except StoreError as error:
            raise OutOfSpace(f"could not evict: {error}") from error
        finally:
            self._going -= Counter(victims)
            self._gone.set()
        self.evicted_bytes += sum(sizes)
        self._observe(Evicted(len(victims), sum(sizes)))

    async def _delete(self, victims: list[Digest]) -> None:
        await self._blobs.delete(victims)
        self._drop(victims)

    def forget(self, digest: Digest) -> None:
        """The blob is gone for another reason (quarantined, purged)."""
        self._drop([digest])
        self._follow_upkeep()

    def _drop(self, digests: list[Digest]) -> None:
        for digest in digests:
            self.ledger.drop(digest)
            self._dirty.pop(digest, None)
            self._forgotten.add(digest)
        if not self.is_counted:
            self._deleted.update(digests)
        self.on_gone(digests)
        self.on_forgotten(digests)

    async def _evict_some(self, n_bytes: int) -> None:
        """One batch towards room for `n_bytes`. Raises OutOfSpace when nothing may go."""
        found = self.ledger.coldest(n_bytes, kept=self._kept)
        if found.digests:
            await self.evict(found.digests)
        elif found.is_all:
            raise OutOfSpace(
                f"no room for {n_bytes} bytes: {self.ledger.committed} committed and {self.ledger.reserved} "
                f"reserved of {self.ledger.for_blobs}, and what is left is being read or pinned"
            )
        else:
            await asyncio.sleep(0)

    def _tidy_soon(self) -> None:
        """Eviction has begun: go on to the low mark, so that the next transfers need not wait for it."""
        if not self._is_tidying and self.ledger.free < slack_of(self.ledger.capacity):
            self._is_tidying = True
            self._owner.spawn_background(self._tidy(), "evict to the low mark")

    async def _tidy(self) -> None:
        try:
            slack = slack_of(self.ledger.capacity)
            while not self.ledger.fits(slack):
                async with self._making_room:
                    await self._evict_some(slack)
                await asyncio.sleep(0)
        except OutOfSpace:
            pass  # what is left is in use; whoever needs the room says so
        finally:
            self._is_tidying = False

    async def _keep_min_free(self, n_bytes: int) -> None:
        """Evict until writing `n_bytes` leaves `min_free` of the file system, whoever filled it. Raises OutOfSpace."""
        while True:
            try:
                space = await self._blobs.space()
            except Unavailable as error:
                raise OutOfSpace(f"cannot tell how much of the disk is free: {error}") from error
            if not (short := self._short_of(space, n_bytes)):
                return
            found = self.ledger.coldest(self.ledger.free + short, kept=self._kept) if self.is_counted else None
            if found is not None and found.digests:
                await self.evict(found.digests)
            elif found is None or found.is_all:
                raise OutOfSpace(
                    f"the file system has {space.free_bytes} of {space.total_bytes} bytes and {space.free_inodes} of "
                    f"{space.total_inodes} inodes free; min_free leaves no room for {n_bytes} more"
                )
            else:
                await asyncio.sleep(0)

    def _short_of(self, space: Space, n_bytes: int) -> int:
        """Bytes to be evicted for the file system to have `min_free` once all is written; each inode counts a block.

        What open transfers have written is missing from `free_bytes` already, and is not counted twice.
        """
        promised = sum(each.unwritten for each in self._open) + n_bytes
        short = max(0, self._min_free_bytes(space.total_bytes) + promised - space.free_bytes)
        if space.total_inodes:  # some file systems have no fixed number, and say 0
            files = sum(each.unwritten == each.n_bytes for each in self._open) + bool(n_bytes)
            missing = self._min_free_inodes(space.total_inodes) + files - space.free_inodes
            short = max(short, missing * self.ledger.block_bytes)
        return short

    # -- watching ---------------------------------------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        await self._counted.wait()
        while True:
            await self._clock.sleep(WATCH_EVERY_S)
            await self.watch()

    async def watch(self) -> None:
        """Restore `min_free` when others have filled the disk, and find out whether a degraded store is well again."""
        self._follow_upkeep()
        try:
            async with self._making_room:
                await self._keep_min_free(0)
                if self.degraded:
                    await self._prove_well()
        except OutOfSpace as error:
            if not self.degraded:
                self._observe(Noticed("warning", str(error)))
            self.degraded = str(error)

    async def _prove_well(self) -> None:
        """Clears `degraded` once the disk takes what is written and what was wanted would fit. Raises OutOfSpace."""
        if self._bound is not None:
            try:
                await self._bound.write(self._bound.n_bytes)
            except Unavailable as error:
                raise OutOfSpace(str(error)) from error
        wanted = min(self._wanted, self.ledger.capacity)
        if not self.ledger.fits(wanted):
            found = self.ledger.coldest(wanted, kept=self._kept)
            if not found.digests:
                return
        self.degraded = ""
        self._observe(Noticed("info", "the store keeps what is new again"))

    # -- counting and remembering -----------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Take up the bound that stands for what is not counted yet. Before `start`. Raises Unavailable."""
        if self._bound is not None:
            self.ledger.uncounted = await self._bound.load(self._blobs)
            self._is_bounded = True
            await self._begin_upkeep(self._bound)

    async def _begin_upkeep(self, bound: Bound) -> None:
        """What is there is within the bound already; a step for what this life adds, where there is room beside it."""
        self._grant(0)
        if self._upkeep is None:
            return
        n_bytes = self._upkeep.needed + self._upkeep_step
        if self.ledger.fits(n_bytes):
            try:
                await self._cover(bound, n_bytes)
            except OutOfSpace:
                return  # nothing is kept on such a disk; whoever wants to write hears why
            self._grant(n_bytes)

    def start(self) -> None:
        """Count the store and keep the order of use written down, in the background."""
        self._owner.spawn_background(self._count(), "count the store")
        self._owner.spawn_background(self._remember_forever(), "remember the order of use")
        self._owner.spawn_background(self._watch_forever(), "watch the file system")

    @property
    def is_counted(self) -> bool:
        """Whether the ledger knows the whole store."""
        return self._counted.is_set()

    async def counted(self) -> None:
        """Return when the ledger knows the whole store, however long that takes. Raises Unavailable when it cannot."""
        await self._count_ended.wait()
        if not self.is_counted:
            raise Unavailable(self._why_uncounted)

    async def mapped(self) -> None:
        """Return when it is known as well what every manifest names."""
        await self._mapped.wait()

    async def _patiently(self, known: asyncio.Event) -> None:
        """Wait for what is found out after a start, until that has had its time. Raises OutOfSpace."""
        if known.is_set():
            return
        patience_s = self._count_until - self._clock.monotonic()
        if patience_s > 0:
            try:
                async with self._owner.deadline(self._clock, patience_s):
                    await known.wait()
                    return
            except TimeoutError:
                pass
        raise OutOfSpace(self._why_uncounted)

    async def _count(self) -> None:
        """Files are the truth; the remembered order only sorts them. What it does not know comes first, by its age."""
        try:
            async for batch in self._blobs.scan():
                for blob in batch:
                    if blob.digest not in self._deleted:
                        self.ledger.count(blob.digest, blob.size, blob.written_at)
            newest = 0
            async for uses in self._facts.uses():
                for n, use in enumerate(uses, start=1):
                    self.ledger.order(use.digest)
                    newest = max(newest, use.counter)
                    if n % USES_STEP == 0:
                        await asyncio.sleep(0)
            await self.on_counting()
            if self._upkeep is not None:
                await self._upkeep.measure()
        except StoreError as error:
            self._count_until = self._clock.monotonic()  # waiting would not help
            self._why_uncounted = f"cannot count the store, nothing new is kept: {error}"
            self._observe(Noticed("error", self._why_uncounted))
            self._count_ended.set()
            return
        for _ in self.ledger.order_by_age():
            await asyncio.sleep(0)
        self._counter += newest
        self._dirty = {digest: newest + n for digest, n in self._dirty.items() if digest in self.ledger}
        for digest in self._dirty:
            self.ledger.touch(digest)
        self.ledger.uncounted = 0
        self._follow_upkeep()
        self._deleted.clear()
        self._counted.set()
        self._count_ended.set()
        await self._map()
        await self._shrink_to_capacity()
        await self._lower_bound()

    async def _map(self) -> None:
        """Learn from the links what every stored manifest names. Where they cannot be read, images are not known whole,
        and blobs go one by one."""
        if self._records is not None:
            try:
                async for _, _, links in self._records.scan():
                    for link in links:
                        if link.is_manifest and link.names:
                            self.ledger.names(link.descriptor.digest, [named.digest for named in link.names])
            except StoreError as error:
                self._observe(Noticed("error", f"cannot read all links, images may be evicted in parts: {error}"))
        self._mapped.set()

    async def _shrink_to_capacity(self) -> None:
        """A capacity that was lowered between two runs holds from the start."""
        try:
            while not self.ledger.fits(0):
                async with self._making_room:
                    await self._evict_some(0)
        except OutOfSpace as error:
            self._observe(Noticed("error", str(error)))

    async def _lower_bound(self) -> None:
        """The bound comes down only here and at the end of a life: what was deleted may come back with a power cut."""
        if self._bound is None:
            return
        try:
            async with self._making_room:
                await self._bound.lower(self.ledger.held)
        except StoreError as error:
            self._observe(Noticed("warning", f"cannot write down how much the store holds: {error}"))

    def _note_use(self, digest: Digest) -> None:
        self._counter += 1
        self._dirty.pop(digest, None)
        self._dirty[digest] = self._counter
        self._forgotten.discard(digest)

    async def _remember_forever(self) -> None:
        await self._counted.wait()
        while True:
            await self._clock.sleep(REMEMBER_EVERY_S)
            await self.remember()

    async def remember(self) -> None:
        """Write down the uses since the last time."""
        if not (self._dirty or self._forgotten) or not self.is_counted:
            return
        dirty, self._dirty = self._dirty, {}
        forgotten, self._forgotten = self._forgotten, set()
        uses = [Use(d, size, n) for d, n in dirty.items() if (size := self.ledger.size_of(d)) is not None]
        await self._facts.remember(uses, list(forgotten))

    async def aclose(self) -> None:
        """Write down what the next life starts from. Never raises. After the last transfer."""
        await self.remember()
        if self.is_counted:
            await self._lower_bound()


async def _nothing() -> None:
    """Nothing to let go of."""


class _Kept:
    """What eviction passes over, as `Ledger.victims` asks for it."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, Digest) and not self._capacity.may_go(digest)
