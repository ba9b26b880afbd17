"""The store's worker threads: small pools, so that one kind of work cannot keep another waiting.

With one shared pool of the default size, six slow reads stall every write and every name lookup (reliability.md §4.1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, ParamSpec, TypeVar

from proxy.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

Pool = Literal["reads", "writes", "syncs"]

#: Threads in each pool.
#: reads: opening and listing; they wait for the disk, and more of them only deepen its queue.
#: writes: hashing and appending; this is processor time, and two processors are what a small node has.
#: syncs: fsync, rename, unlink. Apart from `writes`, where two commits that wait for the disk would stall every
#: transfer.
N_THREADS: dict[Pool, int] = {"reads": 4, "writes": 2, "syncs": 4}


class Workers:
    """Runs synchronous functions in threads. Belongs to the loop it was made on; `aclose` waits for all of it."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._report = report
        self._pools = {
            name: ThreadPoolExecutor(n_threads, thread_name_prefix=f"store-{name}")
            for name, n_threads in N_THREADS.items()
        }
        self._running: set[asyncio.Future[Any]] = set()
        self.is_closed = False

    def start(self, pool: Pool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Begin `function` in a thread.

        It runs to its end even when nobody waits for it. Raises Unavailable when closed.
        """
        if self.is_closed:
            raise Unavailable("the store is closed")
        future = self._loop.run_in_executor(self._pools[pool], lambda: function(*args, **kwargs))
        self._running.add(future)
        future.add_done_callback(self._ended)
        return future

    async def run(self, pool: Pool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function`. When the caller is cancelled the function still runs to its end."""
        return await asyncio.shield(self.start(pool, function, *args, **kwargs))

    async def opened(self, pool: Pool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function`, which opens something. When the caller is cancelled that is closed as it comes."""
        hop = self.start(pool, function, *args, **kwargs)
        try:
            return await asyncio.shield(hop)
        except asyncio.CancelledError:
            hop.add_done_callback(_close_what_came)
            raise

    async def ended(self, pool: Pool, function: Callable[[], None]) -> None:
        """Run what ends something, closed or not; when the caller is cancelled it still runs."""
        if self.is_closed:
            function()
        else:
            await self.run(pool, function)

    def tell(self, sentence: str) -> None:
        """Report something to a person, from any thread; `report` is called on the loop."""
        try:
            self._loop.call_soon_threadsafe(self._report, sentence)
        except RuntimeError:
            pass  # the loop is closed, and nobody is left to listen

    async def aclose(self) -> None:
        """Wait for what runs, then let the threads go. Nothing can be started afterwards."""
        self.is_closed = True
        while self._running:
            await asyncio.wait(self._running)
        for pool in self._pools.values():
            pool.shutdown(wait=False)  # every thread is idle and ends by itself; waiting for that would block the loop

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._running.discard(future)
        if not future.cancelled():
            future.exception()  # seen: a caller that was cancelled meanwhile does not come back for it


def _close_what_came(hop: asyncio.Future[Any]) -> None:
    if not hop.cancelled() and hop.exception() is None and (opened := hop.result()) is not None:
        opened.close()
