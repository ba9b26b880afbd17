"""What transfers left unfinished: kept where going on is worth it, counted while it is kept, swept where not.

A transfer that breaks for want of upstream, or because this process ends or is killed, leaves its file under ingest/. A
later one of the same digest goes on where it ended: the bytes are hashed again first, and prove nothing until the whole
agrees. When it does not, upstream is not to blame, and the next transfer starts over.

What is kept takes room that was promised and not released. It goes before anything is evicted, and after an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.engine.capacity import Capacity, Reservation
from proxy.engine.tasks import TaskOwner
from proxy.errors import Overloaded, StoreError
from proxy.events import Event, Noticed
from proxy.oci.digest import Digest, Verifier
from proxy.ports import Clock, Ingest, Leftovers

#: Less than this is fetched again: reading and hashing it, and a request with a range, save too little.
WORTH_BYTES = 16 << 20
#: How long it waits for somebody who asks.
KEPT_FOR_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    reservation: Reservation
    n_bytes: int
    since: float


class Remains:
    """The unfinished files of this store. True for this process."""

    def __init__(
        self,
        leftovers: Leftovers,
        capacity: Capacity,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        self._leftovers = leftovers
        self._capacity = capacity
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._kept: dict[Digest, _Kept] = {}
        capacity.on_tight = self.let_go
        capacity.on_counting = self.load

    def __len__(self) -> int:
        return len(self._kept)

    def start(self) -> None:
        """Let go of what nobody has asked for in time, in the background."""
        self._owner.spawn_background(self._expire_forever(), "watch what was left")

    async def load(self) -> None:
        """Keep what earlier lives left and is worth it, sweep the rest. Never raises."""
        names = []
        try:
            for kept in await self._leftovers.kept_ingests():  # longest first
                if kept.n_bytes < WORTH_BYTES or kept.digest in self._kept:
                    continue
                reservation = self._capacity.reserve_what_is_there(kept.n_bytes)
                if reservation is not None:
                    names.append(kept.name)
                    self._kept[kept.digest] = _Kept(reservation, kept.n_bytes, self._clock.monotonic())
            await self._leftovers.sweep_ingest(names)
        except StoreError as error:
            self._observe(Noticed("error", f"cannot sweep what transfers left: {error}"))

    async def resume(self, digest: Digest, verifier: Verifier, size: int | None) -> tuple[Ingest, Reservation] | None:
        """The unfinished file of `digest`, its bytes fed to `verifier`, with room for all `size` of it; or None.

        After None the verifier may have been fed: make another.
        """
        kept = self._kept.pop(digest, None)
        if kept is None:
            return None
        opened: list[Ingest] = []  # also when the one who asks is gone by the time that it is
        is_resumed = False
        try:
            if size is not None and kept.n_bytes < size:
                await self._owner.uninterrupted(self._open(digest, verifier, opened), "resume")
                if opened and opened[0].n_bytes < size:
                    await kept.reservation.cover(size)
                    is_resumed = True
        except (StoreError, Overloaded) as error:
            self._observe(Noticed("warning", f"{digest} starts over: {error}"))
        finally:
            if not is_resumed:
                await self._owner.uninterrupted(self._give_up(opened, kept), "abort an ingest")
        return (opened[0], kept.reservation) if is_resumed else None

    async def _open(self, digest: Digest, verifier: Verifier, opened: list[Ingest]) -> None:
        ingest = await self._leftovers.resume_ingest(digest, verifier)
        if ingest is not None:
            opened.append(ingest)

    async def _give_up(self, opened: Iterable[Ingest], kept: _Kept) -> None:
        for ingest in opened:
            await ingest.abort()
            ingest.close()
        await self._swept([kept])

    def is_worth(self, n_bytes: int) -> bool:
        """Whether so much of a blob should be kept for going on."""
        return n_bytes >= WORTH_BYTES

    def keep(self, digest: Digest, n_bytes: int, reservation: Reservation) -> None:
        """A file of `n_bytes` was left under ingest/; the reservation is ours now."""
        older = self._kept.pop(digest, None)
        if older is not None:
            older.reservation.release()
        reservation.shrink(n_bytes)
        self._kept[digest] = _Kept(reservation, n_bytes, self._clock.monotonic())

    async def let_go(self) -> None:
        """Sweep all of it: the room is wanted."""
        if self._kept:
            kept, self._kept = self._kept, {}
            await self._owner.uninterrupted(self._swept(kept.values()), "sweep what transfers left")

    async def _swept(self, gone: Iterable[_Kept]) -> None:
        """Remove every file that is neither kept nor being written; and then the room of these is free again."""
        try:
            names = [each.name for each in await self._leftovers.kept_ingests() if each.digest in self._kept]
            await self._leftovers.sweep_ingest(names)
        except StoreError as error:
            self._observe(Noticed("warning", f"cannot sweep what transfers left: {error}"))
        for each in gone:
            each.reservation.release()

    async def _expire_forever(self) -> None:
        while True:
            await self._clock.sleep(KEPT_FOR_S / 4)
            until = self._clock.monotonic() - KEPT_FOR_S
            old = [self._kept.pop(digest) for digest, each in tuple(self._kept.items()) if each.since < until]
            if old:
                await self._swept(old)
