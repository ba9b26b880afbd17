"""What one project may take of the fetching: transfers at once, and bytes a second from upstream.

A transfer keeps to the limits of the project that began it; whoever joins it rides along. Limits may change at any
time, for transfers that run, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from proxy.engine.bandwidth import Share
from proxy.ports import Clock
from proxy.rules.bandwidth import UNLIMITED, Bandwidth


@dataclass(frozen=True, slots=True)
class Limit:
    """Transfers at once (None: as many as come), and how fast they may be, all together."""

    transfers: int | None = None
    bandwidth: Bandwidth = UNLIMITED


class Turns:
    """A place for each of `most` at once; the next one waits, in the order of coming. An async context manager."""

    def __init__(self) -> None:
        self.most: int | None = None
        self._n_inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        """How many are inside."""
        return self._n_inside

    async def __aenter__(self) -> None:
        if self._waiting or not self._has_room:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn  # whoever lets us in has counted us
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._n_inside -= 1
                else:
                    self._waiting.remove(turn)
                self.let_in()
                raise
        else:
            self._n_inside += 1

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._n_inside -= 1
        self.let_in()

    def let_in(self) -> None:
        """Let those in for whom there is room now."""
        while self._waiting and self._has_room:
            turn = self._waiting.popleft()
            if not turn.done():
                self._n_inside += 1
                turn.set_result(None)

    @property
    def _has_room(self) -> bool:
        return self.most is None or self._n_inside < self.most


class ProjectLimits:
    """Every project's turns and share. True for this process."""

    def __init__(self, clock: Clock, limits: Mapping[str, Limit] | None = None) -> None:
        self._clock = clock
        self._turns: dict[str, Turns] = {}
        self._shares: dict[str, Share] = {}
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

    def turn(self, project: str) -> Turns:
        """What a transfer of this project enters before it begins."""
        turns = self._turns.get(project)
        if turns is None:
            turns = self._turns[project] = Turns()
            turns.most = self._limits.get(project, Limit()).transfers
        return turns

    def share(self, project: str) -> Share:
        """The rate that this project's bodies keep to, all together."""
        share = self._shares.get(project)
        if share is None:
            share = self._shares[project] = Share(self._clock, self._limits.get(project, Limit()).bandwidth)
        return share
