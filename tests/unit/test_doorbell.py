"""engine/transfers.py: the doorbell that wakes the readers of a transfer."""

from __future__ import annotations

import asyncio

from proxy.engine.transfers import Doorbell


async def test_a_waiter_that_is_cancelled_takes_only_itself_away() -> None:
    """It may be rung between the cancelling of some waiters and their own end: all the others wake."""
    bell = Doorbell()
    waiters = [asyncio.create_task(bell.wait()) for _ in range(20)]
    await asyncio.sleep(0)
    for leaving in waiters[::2]:
        leaving.cancel()
    bell.ring()
    await asyncio.wait(waiters, timeout=5)
    assert [waiter.done() for waiter in waiters] == [True] * len(waiters)
    assert not any(waiter.cancelled() for waiter in waiters[1::2])


async def test_it_is_rung_for_those_who_wait_now() -> None:
    """Who comes after a ring waits for the next."""
    bell = Doorbell()
    bell.ring()
    late = asyncio.create_task(bell.wait())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not late.done()
    bell.ring()
    await late
