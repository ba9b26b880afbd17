"""Blobs: from the store, from the running transfer, or from a new one; never two of them (INV-4)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from cachetools import TTLCache

from proxy.engine.bandwidth import LimitedUpstream
from proxy.engine.capacity import Capacity
from proxy.engine.charges import Tab
from proxy.engine.flights import Flights
from proxy.engine.limits import Dues, ProjectLimits
from proxy.engine.links import Links, blaming
from proxy.engine.manifests import MAX_NEGATIVES, holding_of
from proxy.engine.origins import Origin
from proxy.engine.pump import Pump, Work
from proxy.engine.tasks import TaskOwner
from proxy.engine.transfers import OnLastReaderGone, Source, Transfer, keeps_going
from proxy.engine.verification import Verification
from proxy.errors import BreakwaterError, Corrupt, Denied, Misbehaved, Overloaded, StoreError
from proxy.events import Noticed, Outcome, TransferEnded
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.ports import BlobSource, Holding, LocalFile, OpenBlob
from proxy.rules.backoff import BAD_FOR_S
from proxy.rules.routes import Route
from proxy.rules.transfer import State


@dataclass(frozen=True, slots=True)
class Opened:
    """A blob ready to be served: where its bytes come from, its size in bytes, and how it was had."""

    source: BlobSource
    size: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Limits:
    """How many transfers run at once, in all and from one upstream; the next waits `queue_s` seconds for its turn."""

    in_all: int = 64
    per_upstream: int = 32
    queue_s: float = 20.0


class _HeldFile:
    """An open blob that capacity must not evict while it is read."""

    def __init__(self, blob: OpenBlob, digest: Digest, capacity: Capacity) -> None:
        self._blob = blob
        self._digest = digest
        self._capacity = capacity
        self._is_open = True
        self.fd = blob.fd
        self.size = blob.size
        self.identity = blob.identity
        self.read = blob.read
        capacity.hold(digest)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._capacity.unhold(self._digest)
            self._blob.close()


class Blobs:
    """Blobs and the transfers that bring them. True for this process."""

    def __init__(
        self,
        work: Work,
        links: Links,
        verification: Verification,
        *,
        owner: TaskOwner,
        on_last_reader_gone: OnLastReaderGone = "finish",
        limits: Limits | None = None,
        projects: ProjectLimits | None = None,
    ) -> None:
        self._work = work
        self._links = links
        self._verification = verification
        self._owner = owner
        self._policy: OnLastReaderGone = on_last_reader_gone
        self._limits = limits or Limits()
        self._projects = projects or ProjectLimits(work.clock, owner)
        self._running: dict[Digest, Transfer] = {}
        self._tasks: dict[Transfer, asyncio.Task[None]] = {}
        self._tabs: dict[Transfer, Tab] = {}
        self._dues: dict[Transfer, Dues] = {}
        self._n_ended = 0
        self._slots = asyncio.Semaphore(self._limits.in_all)
        self._upstream_slots: dict[str, asyncio.Semaphore] = {}
        self._confirming: Flights[tuple[Holding, Digest], int | None] = Flights(owner, "confirm blob")
        self._bad: TTLCache[tuple[Source, Digest], Misbehaved] = TTLCache(
            MAX_NEGATIVES, BAD_FOR_S, timer=work.clock.monotonic
        )

    def running(self) -> Iterator[Transfer]:
        """The running transfers, for status."""
        return iter(tuple(self._running.values()))

    # -- what clients ask -------------------------------------------------------------------------------------------

    async def open(self, route: Route, origin: Origin, digest: Digest) -> Opened:
        """The blob, to be read. Raises UnknownBlob, or what upstream raises; the size is known when it returns."""
        expected = await self._authorise(route, origin, digest)
        source = _source(route)
        while True:
            if (stored := await self._here(digest, expected)) is not None:
                return self._paid(route, digest, stored)
            if (bad := self._bad.get((source, digest))) is not None:
                raise Misbehaved(f"{bad}; not asked again for {BAD_FOR_S:g} s", upstream=bad.upstream)
            transfer, outcome = self._joined(route, origin, digest, expected)
            reader = transfer.join(route.project)
            try:
                size = await reader.confirmed_size()
            except BaseException as error:
                reader.leave()
                if isinstance(error, BreakwaterError) and transfer.source != source:
                    continue  # another repository's trouble is not this one's: ask here
                raise
            if expected is not None and size != expected:
                # This asker's manifest and upstream contradict each other; others may have another manifest.
                reader.leave()
                said = f"{route.host} sends {digest} with {size} bytes, and said before that it has {expected}"
                raise Misbehaved(said, upstream=route.host)
            return Opened(reader, size, outcome)

    async def instead(self, route: Route, origin: Origin, digest: Digest, *, rotten: str = "") -> Opened:
        """The same blob from upstream, for a reader whose file could not be read on. Raises like `open`.

        What is fetched takes the file's place. The file itself goes to quarantine only where it is certainly not what
        its name says (`rotten` says why): a disk that fails for a moment must not cost what it holds.
        """
        self._verification.forget(digest)
        if rotten:
            await self._verification.condemn(digest, rotten)
        index = await self._links.known(holding_of(route))
        linked = index.descriptor(digest)
        # The last thing that is waited for: its request upstream must have ended before another begins (INV-4).
        while (running := self._running.get(digest)) is not None and running.is_given_up:
            await running.changed.wait()
        transfer, outcome = self._joined(route, origin, digest, linked.size if linked else None)
        reader = transfer.join(route.project)
        try:
            return Opened(reader, await reader.confirmed_size(), outcome)
        except BaseException:
            reader.leave()
            raise

    async def size(self, route: Route, origin: Origin, digest: Digest) -> tuple[int, Outcome]:
        """The size in bytes, for HEAD. An uncached blob costs an upstream HEAD, never a download. Raises like
        `open`."""
        index = await self._links.known(holding_of(route))
        linked = index.descriptor(digest)
        size = None
        if linked is None:
            with blaming(index.trouble):
                size = await self._confirmed(route, origin, digest)
        if (blob := await self._open_file(digest)) is not None:
            self._work.capacity.touch(digest)
            is_known = self._verification.is_verified(digest, blob.identity)
            blob.close()
            return blob.size if is_known or linked is None else linked.size, "hit"
        if (
            (running := self._running.get(digest)) is not None
            and running.is_size_confirmed
            and running.size is not None
        ):
            return running.size, "coalesced"
        if linked is not None:
            size = await self._confirmed(route, origin, digest) or linked.size
        if size is None:
            opened = await self.open(route, origin, digest)
            let_go(opened.source)
            size = opened.size
        return size, "miss"

    # -- who may ----------------------------------------------------------------------------------------------------

    async def _authorise(self, route: Route, origin: Origin, digest: Digest) -> int | None:
        """A link, or upstream's own word for this very repository (INV-8). Returns the size where it is known.

        Without a link upstream is asked in the same way whether the blob is cached or not, so that neither the answer
        nor what it costs upstream tells a stranger what is here.
        """
        index = await self._links.known(holding_of(route))
        if (linked := index.descriptor(digest)) is not None:
            return linked.size
        with blaming(index.trouble):
            return await self._confirmed(route, origin, digest)

    async def _confirmed(self, route: Route, origin: Origin, digest: Digest) -> int | None:
        return await self._confirming.join((holding_of(route), digest), lambda: self._confirm(route, origin, digest))

    async def _confirm(self, route: Route, origin: Origin, digest: Digest) -> int | None:
        size = await origin.upstream.blob_size(route.repository, digest)
        if size is not None:
            try:
                await self._links.put_blob(holding_of(route), Descriptor("application/octet-stream", digest, size))
            except StoreError as error:
                self._work.observe(Noticed("warning", f"the link of {digest} could not be kept: {error}"))
        return size

    # -- from the store ---------------------------------------------------------------------------------------------

    async def _open_file(self, digest: Digest) -> _HeldFile | None:
        try:
            blob = await self._work.blobs.open(digest)
        except StoreError as error:
            self._work.observe(Noticed("error", f"cannot read {digest} from the store, asking upstream: {error}"))
            return None
        return _HeldFile(blob, digest, self._work.capacity) if blob is not None else None

    async def _stored(self, digest: Digest, expected: int | None) -> Opened | None:
        """The stored file: as it is when it was verified since the start, else through the hashing of it.

        A file that is empty, or has another size than a manifest says, is hashed before anything of it leaves: an empty
        body ends at once, and where the manifest is right the file is not, and upstream answers without a short body
        first.
        """
        blob = await self._open_file(digest)
        if blob is None:
            return None
        self._work.capacity.touch(digest)
        if self._verification.is_verified(digest, blob.identity):
            return Opened(LocalFile(blob), blob.size, "hit")
        size = blob.size
        reader = self._verification.tail(digest, blob).join()
        if size == 0 or expected not in (None, size):
            try:
                await reader.agreed()
            except Corrupt:
                reader.leave()
                return None
            except BaseException:
                reader.leave()
                raise
        return Opened(reader, size, "hit")

    def _paid(self, route: Route, digest: Digest, stored: Opened) -> Opened:
        """The project pays for what it reads, or is refused."""
        try:
            self._work.charges.use(route.project, digest)
        except Denied:
            let_go(stored.source)
            raise
        return stored

    async def _here(self, digest: Digest, expected: int | None) -> Opened | None:
        """The stored blob, or None when it is to be had from a transfer: a running one, or one begun without an await
        after this."""
        while True:
            running = self._running.get(digest)
            if running is not None and not running.is_given_up:
                return None
            if running is not None:
                await running.changed.wait()  # its request upstream must have ended before another begins (INV-4)
                continue
            n_ended = self._n_ended
            if (stored := await self._stored(digest, expected)) is not None:
                return stored
            if self._n_ended == n_ended and digest not in self._running:
                return None  # no transfer can have ended between the look at the store and the look at the table

    # -- from upstream ----------------------------------------------------------------------------------------------

    def _joined(self, route: Route, origin: Origin, digest: Digest, expected: int | None) -> tuple[Transfer, Outcome]:
        """The running transfer, or a new one: looked up and registered without an await between (INV-4)."""
        running = self._running.get(digest)
        if running is not None and running.is_joinable:
            self._tabs[running].join(route.project, running.size)
            self._dues[running].join(route.project)
            return running, "coalesced"
        tab = self._work.charges.open(digest)
        tab.join(route.project, expected)  # may refuse: then nothing has begun
        transfer = Transfer(
            digest, _source(route), started_at=self._work.clock.monotonic(), policy=self._policy, expected=expected
        )
        transfer.on_ended = self._ended
        transfer.on_deserted = self._deserted
        transfer.on_closed = self._closed
        self._work.capacity.hold(digest)  # once it has its name, it is not evicted under its own readers
        self._running[digest] = transfer
        self._tabs[transfer] = tab
        dues = self._dues[transfer] = self._projects.dues(route.project, transfer.projects)
        pump = Pump(transfer, LimitedUpstream(origin.upstream, dues), route.repository, self._work, self._owner, tab)
        task = self._owner.spawn_background(self._run(transfer, pump, dues), f"transfer {digest}")
        self._tasks[transfer] = task
        task.add_done_callback(lambda _: self._over(transfer))
        return transfer, "miss"

    async def _run(self, transfer: Transfer, pump: Pump, dues: Dues) -> None:
        """Wait for a turn, then pump."""
        host = transfer.source.upstream
        per_upstream = self._upstream_slots.setdefault(host, asyncio.Semaphore(self._limits.per_upstream))
        async with AsyncExitStack() as turn:
            try:
                async with self._owner.deadline(self._work.clock, self._limits.queue_s):
                    await turn.enter_async_context(dues.turn())
                    await turn.enter_async_context(per_upstream)
                    await turn.enter_async_context(self._slots)
            except TimeoutError:
                said = "as many transfers run as may at once, and none ended in time"
                transfer.fail(Overloaded(f"{host}: {said}; ask again"))
                return
            await pump.run()
        if transfer.state is State.COMMITTED:
            await self._remember_verified(transfer.digest)

    def _over(self, transfer: Transfer) -> None:
        """The task has ended, also one that was cancelled before its first step."""
        self._tasks.pop(transfer, None)
        if not transfer.has_ended:
            transfer.fail(Overloaded(f"the transfer of {transfer.digest} was given up; ask again"))

    async def _remember_verified(self, digest: Digest) -> None:
        """What was hashed on its way in need not be hashed again by its first reader."""
        try:
            blob = await self._open_file(digest)
        except Overloaded:
            return  # no descriptor is left for it; then the first reader's is hashed
        if blob is not None:
            self._verification.remember(digest, blob.identity)
            blob.close()

    def _deserted(self, transfer: Transfer) -> None:
        """The last reader left: go on for the store's sake, or stop (setting `transfers.on_last_reader_gone`)."""
        has_file = transfer.ring is None
        if has_file and keeps_going(transfer.policy, received=transfer.received, size=transfer.size):
            return
        if (task := self._tasks.get(transfer)) is not None:
            transfer.is_given_up = True
            task.cancel()

    def _closed(self, transfer: Transfer) -> None:
        self._work.capacity.unhold(transfer.digest)

    def _ended(self, transfer: Transfer) -> None:
        self._n_ended += 1
        self._tabs.pop(transfer).close()
        self._dues.pop(transfer, None)
        if self._running.get(transfer.digest) is transfer:
            del self._running[transfer.digest]
        if isinstance(transfer.failure, Misbehaved):
            self._bad[transfer.source, transfer.digest] = transfer.failure
        self._work.observe(
            TransferEnded(
                transfer.source.upstream,
                transfer.source.repository,
                str(transfer.digest),
                transfer.received,
                self._work.clock.monotonic() - transfer.started_at,
                "" if transfer.state is State.COMMITTED else str(transfer.failure),
            )
        )


def let_go(source: BlobSource) -> None:
    """Nothing more of it will be read."""
    if isinstance(source, LocalFile):
        source.blob.close()
    else:
        source.leave()


def _source(route: Route) -> Source:
    return Source(route.host, route.repository.value)
