"""Single flight: any number of askers, one asking.

The flight is registered before its first await, so nothing leaks past it (the window that Traffic Server's
read-while-writer leaves open until the headers is what TS-3549 measured). An asker that leaves does not end it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from proxy.engine.tasks import TaskOwner

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


async def landing(flight: asyncio.Task[V]) -> V:
    """The answer of a flight, which goes on when its asker is cancelled. Raises what the flight raised.

    That is one exception for all askers. Without cutting its traceback it would grow by the frames of each, and keep
    alive what they hold: requests, connections, bodies.
    """
    await asyncio.wait([flight])  # not a shield: that one complains about flights that fail after their asker has left
    if not flight.cancelled() and (error := flight.exception()) is not None:
        raise error.with_traceback(None)
    return flight.result()


class Flights(Generic[K, V]):
    """Running questions by key. True for this process."""

    def __init__(self, owner: TaskOwner, name: str) -> None:
        self._owner = owner
        self._name = name
        self._running: dict[K, asyncio.Task[V]] = {}

    def start(self, key: K, ask: Callable[[], Coroutine[Any, Any, V]]) -> tuple[asyncio.Task[V], bool]:
        """The running flight for `key`, or a new one; and whether it is new."""
        running = self._running.get(key)
        if running is not None:
            return running, False
        task = self._owner.spawn(ask(), f"{self._name} {key}")
        self._running[key] = task
        task.add_done_callback(lambda done: self._landed(key, done))
        return task, True

    async def join(self, key: K, ask: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The answer of the one flight for `key`. Raises what the flight raised, for every asker alike."""
        task, _ = self.start(key, ask)
        return await landing(task)

    def _landed(self, key: K, task: asyncio.Task[V]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # all askers may have left; an error nobody waits for is not a leak

    def __len__(self) -> int:
        return len(self._running)
