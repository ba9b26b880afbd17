"""How long the loop is held while a store of very many blobs is counted, and while ten thousand of them are evicted.

    python -m bench.million FOLDER 60000 && python -m bench.holds FOLDER

Every callback of the loop is timed by the CPU that its thread took, which says little of what else the machine does: so
this is for a busy machine, where the slowest hit of P5 is not. It does not see a thread that keeps the interpreter.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio import events
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from proxy.clock import SystemClock
from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.tasks import TaskOwner
from proxy.rules.ledger import Ledger
from proxy.store.disk import DiskStore

N_EVICTED = 10_000
#: More than a million small blobs take, and little enough to be promised on any disk that holds them.
CAPACITY = 8 << 30


class Holds:
    """The longest callbacks of each phase, in milliseconds of CPU."""

    def __init__(self) -> None:
        self.phase = ""
        self.taken: defaultdict[str, list[float]] = defaultdict(list)
        plain: Callable[[events.Handle], None] = vars(events.Handle)["_run"]

        def timed(handle: events.Handle) -> None:
            began = time.thread_time()
            plain(handle)
            self.taken[self.phase].append(1000 * (time.thread_time() - began))

        type.__setattr__(events.Handle, "_run", timed)  # asyncio's own loop calls it for every callback

    def enter(self, phase: str) -> None:
        """What comes now is counted under this name; what came before is shown."""
        if taken := sorted(self.taken[self.phase]):
            print(f"{self.phase:9}{len(taken):>9,} callbacks, longest {taken[-1]:.1f} ms, then {taken[-2]:.1f} ms")
        self.phase = phase


async def main(path: Path) -> None:
    """Start over what is there, wait until it is counted, evict."""
    holds, clock, owner = Holds(), SystemClock(), TaskOwner(print)
    store = await DiskStore.open(path, clock=clock, report=print)
    capacity = Capacity(
        Ledger(CAPACITY), store.blobs, store.facts, min_free_bytes=lambda _: 0, min_free_inodes=lambda _: 0,
        clock=clock, owner=owner, observe=lambda _: None, notes=store.notes, records=store.records, upkeep=store.upkeep,
    )  # fmt: skip
    holds.enter("count")
    await capacity.prepare()
    charges = Charges({}, store.charges, capacity, clock=clock, owner=owner, observe=lambda _: None)
    await charges.begin()
    capacity.start()
    charges.start()
    await capacity.mapped()
    while not charges.is_loaded:
        await asyncio.sleep(0.1)
    n_blobs = len(capacity.ledger)
    holds.enter("evict")
    reservation = await capacity.reserve(capacity.ledger.free + N_EVICTED * 4096)
    print(f"{n_blobs:,} blobs, {n_blobs - len(capacity.ledger):,} of them evicted")
    reservation.release()
    holds.enter("end")
    await owner.aclose()
    await charges.aclose()
    await capacity.aclose()
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
