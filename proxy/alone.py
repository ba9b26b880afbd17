"""Commands without a server: their work is done in this process, with the store's lock held and nothing listening."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from proxy.clock import SystemClock
from proxy.engine.freight import Freight
from proxy.engine.pins import Pins
from proxy.engine.scrub import Scrub
from proxy.settings import Settings
from proxy.telemetry.log import EventLog, LineWriter
from proxy.web import operations
from proxy.wiring import Appliance

T = TypeVar("T")


def carry(settings: Settings, work: Callable[[Freight], Awaitable[T]]) -> T:
    """Prefetch, export or import.

    Raises Unavailable when a server has the store, and whatever `work` raises.
    """
    return _run(settings, lambda appliance: work(appliance.freight))


def verify(settings: Settings, work: Callable[[Scrub], Awaitable[T]]) -> T:
    """Like `carry`, for the hashing of what is stored. Raises alike."""

    async def counted(appliance: Appliance) -> T:
        await appliance.kept.capacity.counted()
        return await work(appliance.scrub)

    return _run(settings, counted)


def look(settings: Settings, work: Callable[[operations.Seen], Awaitable[T]]) -> T:
    """Like `carry`, for what operators look at and take out. Raises alike."""

    async def counted(appliance: Appliance) -> T:
        await appliance.kept.capacity.counted()
        return await work(appliance.seen())

    return _run(settings, counted)


def keep(settings: Settings, work: Callable[[Pins], Awaitable[T]]) -> T:
    """Like `carry`, for what is pinned. Raises alike."""
    return _run(settings, lambda appliance: work(appliance.kept.pins))


def _run(settings: Settings, work: Callable[[Appliance], Awaitable[T]]) -> T:
    writer = LineWriter(sys.stderr)
    log = EventLog(writer, SystemClock().wall, as_json=False, level="error", requests="off")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_started(settings, work, log))
    finally:
        writer.close()


async def _started(settings: Settings, work: Callable[[Appliance], Awaitable[T]], log: EventLog) -> T:
    appliance = await Appliance.start(settings, log, listens=False)
    try:
        return await work(appliance)
    finally:
        await appliance.aclose()
