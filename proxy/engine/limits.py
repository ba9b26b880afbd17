"""What one project may take of the fetching: transfers at once, and bytes a second from upstream.

A transfer may have readers of several projects, and is held back by none of them alone: it begins as soon as one of
them has a turn for it, and each of its pieces is paid for by one of them, the one whose turn comes first. So every byte
that comes from upstream counts once, no project exceeds its own rate, and a reader of a project without limits is never
slowed by those it shares a transfer with. Limits may change at any time, for transfers that run, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakSet

from proxy.engine.bandwidth import LOOK_EVERY_S, Share
from proxy.engine.tasks import TaskOwner
from proxy.engine.transfers import Doorbell
from proxy.ports import Clock
from proxy.rules.bandwidth import UNLIMITED, Bandwidth


@dataclass(frozen=True, slots=True)
class Limit:
    """Transfers at once (None: as many as come), and how fast they may be, all together."""

    transfers: int | None = None
    bandwidth: Bandwidth = UNLIMITED


class Turns:
    """A place for each of `most` at once; the next one waits, in the order of coming.

    Who waits is a future, and may wait at several: whoever lets it in first sets itself as its result.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._n_inside = 0
        self._waiting: deque[asyncio.Future[Turns]] = deque()

    def __len__(self) -> int:
        """How many are inside."""
        return self._n_inside

    def enter(self, waiter: asyncio.Future[Turns]) -> None:
        """Let `waiter` in when its turn comes, at once where there is room. One that is done has given up."""
        self._waiting.append(waiter)
        self.let_in()

    def leave(self) -> None:
        """One of those inside is done."""
        self._n_inside -= 1
        self.let_in()

    def let_in(self) -> None:
        """Let those in for whom there is room now."""
        while self._waiting and (self.most is None or self._n_inside < self.most):
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._n_inside += 1
                waiter.set_result(self)


class Dues:
    """What one transfer takes of the limits of its readers' projects. A `bandwidth.Toll` for its body."""

    def __init__(self, limits: ProjectLimits, first: str, readers: Callable[[], Set[str]]) -> None:
        self._limits = limits
        #: The projects that read it; those who read last once nobody does, and it goes on for the store's sake.
        self._projects: Set[str] = {first}
        self._readers = readers
        self._waiter: asyncio.Future[Turns] | None = None
        #: What the last piece was charged to, with its bytes.
        self._charged: tuple[Share, int] | None = None
        #: Rung when terms may have become better.
        self.changed = Doorbell()

    def join(self, project: str) -> None:
        """A reader of this project has joined: what the transfer waits for, it may have by this project's leave."""
        if self._waiter is not None and not self._waiter.done() and project not in self._projects:
            self._limits.turns(project).enter(self._waiter)
        self._projects = {*self._projects, project}
        self.changed.ring()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until one of the projects has a turn for the transfer, and hold that."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            for project in self._projects:
                self._limits.turns(project).enter(waiter)
            inside = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                waiter.result().leave()  # let in, in the very moment of giving up
            waiter.cancel()
            raise
        try:
            yield
        finally:
            inside.leave()

    # -- bandwidth.Toll -----------------------------------------------------------------------------------------------

    def charge(self, n_bytes: int) -> float:
        """See bandwidth.Toll."""
        self._projects = self._readers() or self._projects
        share = self._best(n_bytes)
        self._charged = None if share is None else (share, n_bytes)
        return 0.0 if share is None else share.charge(n_bytes)

    async def reached(self, mark: float) -> None:
        """See bandwidth.Toll. The wait is over at once when a project without a rate joins, and shorter when one joins
        whose turn comes sooner."""
        while self._charged is not None and (wait_s := self._charged[0].wait_s(mark)) > 0:
            try:
                async with self._limits.owner.deadline(self._limits.clock, min(LOOK_EVERY_S, wait_s)):
                    await self.changed.wait()
            except TimeoutError:
                continue
            share, n_bytes = self._charged
            best = self._best(n_bytes)
            if best is None or (best is not share and best.wait_for_s(n_bytes) < share.wait_s(mark)):
                share.refund(n_bytes)
                self._charged = None if best is None else (best, n_bytes)
                mark = 0.0 if best is None else best.charge(n_bytes)

    def _best(self, n_bytes: int) -> Share | None:
        """The share where so many bytes would wait least; None where one of the projects has no rate."""
        shares = [self._limits.share(project) for project in self._projects]
        if any(share.rate is None for share in shares):
            return None
        return min(shares, key=lambda share: share.wait_for_s(n_bytes))


class ProjectLimits:
    """Every project's turns and share. True for this process."""

    def __init__(self, clock: Clock, owner: TaskOwner, limits: Mapping[str, Limit] | None = None) -> None:
        self.clock = clock
        self.owner = owner
        self._turns: dict[str, Turns] = {}
        self._shares: dict[str, Share] = {}
        self._running: WeakSet[Dues] = WeakSet()
        self._limits: Mapping[str, Limit] = {}
        self.allow(limits or {})

    def allow(self, limits: Mapping[str, Limit]) -> None:
        """Take over the limits of new settings."""
        self._limits = limits
        for project, turns in self._turns.items():
            turns.most = limits.get(project, Limit()).transfers
            turns.let_in()
        for project, share in self._shares.items():
            share.follow(limits.get(project, Limit()).bandwidth)
        for dues in self._running:
            dues.changed.ring()

    def dues(self, project: str, readers: Callable[[], Set[str]]) -> Dues:
        """For a transfer that a reader of this project begins; `readers` gives the projects that read it now."""
        dues = Dues(self, project, readers)
        self._running.add(dues)
        return dues

    def turns(self, project: str) -> Turns:
        """What a transfer of this project waits for before it begins."""
        turns = self._turns.get(project)
        if turns is None:
            turns = self._turns[project] = Turns(self._limits.get(project, Limit()).transfers)
        return turns

    def share(self, project: str) -> Share:
        """The rate that this project's bodies keep to, all together."""
        share = self._shares.get(project)
        if share is None:
            share = self._shares[project] = Share(self.clock, self._limits.get(project, Limit()).bandwidth)
        return share
