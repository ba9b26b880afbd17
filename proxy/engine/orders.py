"""Prefetches that were ordered from a page: they run behind it, and the last of them are remembered.

A command waits for its own prefetch (web/freight.py); somebody at a browser goes on looking. True for this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxy.engine.freight import Freight, Order
from proxy.engine.tasks import TaskOwner
from proxy.engine.walk import Scope
from proxy.errors import BadRequest, BreakwaterError, Overloaded
from proxy.ports import Clock
from proxy.rules.closure import Platforms
from proxy.rules.lists import in_lines

#: Orders remembered, and orders that run at a time: each takes a few images at a time already.
MAX_KEPT = 20
MAX_RUNNING = 4


@dataclass(slots=True)
class Placed:
    """One order and how far it is. Sizes in bytes; `placed_at` in seconds since 1970."""

    number: int
    references: tuple[str, ...]
    placed_at: float
    state: Literal["running", "done", "incomplete", "failed"] = "running"
    total_bytes: int = 0
    here_bytes: int = 0
    #: What is missing or went wrong, a sentence each.
    troubles: tuple[str, ...] = ()

    def tell(self, step: Mapping[str, Any]) -> None:
        """Take a step of the prefetch into account."""
        if step.get("what") == "resolved":
            self.total_bytes += int(step.get("of_bytes") or 0)
        elif step.get("what") == "bytes":
            self.here_bytes += int(step.get("n_bytes") or 0)


class Orders:
    """Takes orders."""

    def __init__(self, freight: Freight, clock: Clock, owner: TaskOwner) -> None:
        self._freight = freight
        self._clock = clock
        self._owner = owner
        self._placed: deque[Placed] = deque(maxlen=MAX_KEPT)
        self._n_placed = 0

    def all(self) -> Sequence[Placed]:
        """Those that are remembered, the latest first."""
        return tuple(reversed(self._placed))

    def place(self, references: str, platforms: str, *, project: str = "", pin: bool = False) -> Placed:
        """Begin. `references`: one on each line; `platforms`: "all", or as linux/amd64,linux/arm64.

        Raises BadRequest with everything that is wrong, Overloaded when as many run as may.
        """
        order = _order_of(references, platforms, project, pin)
        if sum(placed.state == "running" for placed in self._placed) >= MAX_RUNNING:
            raise Overloaded(f"{MAX_RUNNING} prefetches run already; wait until one of them is done")
        self._n_placed += 1
        placed = Placed(self._n_placed, tuple(map(str, order.references)), self._clock.wall())
        self._placed.append(placed)
        self._owner.spawn_background(self._run(placed, order), "prefetch for the dashboard")
        return placed

    async def _run(self, placed: Placed, order: Order) -> None:
        try:
            report = await self._freight.prefetch(order, placed.tell)
        except BreakwaterError as error:
            placed.state, placed.troubles = "failed", (str(error),)
            return
        troubles = (f"{what}: {why}" for image in report["images"] for what, why in image["missing"].items())
        placed.troubles = tuple(troubles)[:MAX_KEPT]
        placed.state = "incomplete" if placed.troubles else "done"


def _order_of(references: str, platforms: str, project: str, pin: bool) -> Order:
    asked = in_lines(references)
    if asked.problems:
        raise BadRequest("; ".join(asked.problems))
    if not asked.references:
        raise BadRequest("name at least one image")
    try:
        scope = Scope(Platforms.parse(platforms), True)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return Order(asked.references, scope, project or None, pin=pin)
