"""The machine's time, for `ports.Clock`."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """Real time. Passes the `Clock` port."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never backwards."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970 by the machine's clock."""
        return time.time()  # noqa: TID251  # the one place where the wall clock is read

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await asyncio.sleep(seconds)
