"""Tasks have owners: the only place in the package that creates one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from proxy.ports import Clock

T = TypeVar("T")


class TaskOwner:
    """Holds every background task it spawned until that ends, and ends them all with `aclose`.

    A task that fails with nobody waiting is reported by name in one line through `report`, never swallowed.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hops: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` in a task of this owner. Whoever awaits the task sees its result or error as usual."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Like `spawn`, for work that nobody waits for: a failure is reported."""
        task = self.spawn(work, name)
        task.add_done_callback(self._report_failure)
        return task

    async def uninterrupted(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Await `work` to its end even when the caller is cancelled meanwhile; the cancellation is raised after it.

        For hops to worker threads, which cannot be cancelled: a descriptor must not be closed under a running write.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._hops.add(task)  # `aclose` waits for these and does not cancel them
        task.add_done_callback(self._hops.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    continue  # still not before the thread is done; the first cancellation is raised below
            if not task.cancelled():
                task.exception()  # looked at: nobody else will, and a failure of what was given up is no news
            raise

    @asynccontextmanager
    async def deadline(self, clock: Clock, seconds: float) -> AsyncIterator[None]:
        """What `asyncio.timeout` is, by a clock that is an argument: raises TimeoutError after `seconds` inside."""
        async with asyncio.timeout(None) as scope:

            async def expire() -> None:
                await clock.sleep(seconds)
                scope.reschedule(asyncio.get_running_loop().time())

            timer = self.spawn(expire(), "deadline")
            try:
                yield
            finally:
                timer.cancel()

    def _report_failure(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(f"background task {task.get_name()!r} failed: {type(error).__name__}: {error}")

    def __len__(self) -> int:
        return len(self._tasks)

    async def aclose(self) -> None:
        """Cancel what is left and wait until all of it has ended; running hops end by themselves."""
        while self._tasks or self._hops:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.wait((*self._tasks, *self._hops))
