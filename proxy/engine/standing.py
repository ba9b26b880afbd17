"""A list of images that is to be here at all times: fetched at the start, and again by a schedule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from proxy.engine.freight import Freight, Order
from proxy.errors import BreakwaterError
from proxy.events import Event, Noticed
from proxy.ports import Clock

#: How soon a run that left something missing is tried again, in seconds, where the schedule is slower.
SOON_S = 900.0


class Standing:
    """The standing order of this process (`[prefetch]`)."""

    def __init__(
        self,
        freight: Freight,
        read: Callable[[], Awaitable[Order]],
        every_s: float,
        *,
        clock: Clock,
        observe: Callable[[Event], None],
    ) -> None:
        """`read` gives the order as it is at the time of each run: lists are files that people change."""
        self._freight = freight
        self._read = read
        self._every_s = every_s
        self._clock = clock
        self._observe = observe
        #: What the last run came to, for status; empty before the first.
        self.last: dict[str, Any] = {}

    async def run_forever(self) -> None:
        """Run by the schedule, sooner after a run that left something missing."""
        while True:
            is_whole = await self.run()
            await self._clock.sleep(self._every_s if is_whole else min(self._every_s, SOON_S))

    async def run(self) -> bool:
        """Once; whether all of it is here now. Never raises: what goes wrong is said in the log and in status."""
        try:
            report = await self._freight.prefetch(await self._read(), lambda _: None)
        except BreakwaterError as error:
            self.last = {"at": round(self._clock.wall(), 3), "error": str(error)}
            self._observe(Noticed("error", f"[prefetch]: {error}"))
            return False
        missing = {
            each["reference"]: next(iter(each["missing"].values())) for each in report["images"] if each["missing"]
        }
        fetched = sum(each["fetched_bytes"] for each in report["images"])
        self.last = {
            "at": round(self._clock.wall(), 3),
            "images": report["n_images"],
            "fetched_bytes": fetched,
            "missing": missing,
        }
        for reference, why in list(missing.items())[:20]:
            self._observe(Noticed("warning", f"[prefetch] {reference} is not whole: {why}"))
        whole = report["n_images"] - len(missing)
        self._observe(
            Noticed("info", f"[prefetch] {whole} of {report['n_images']} images are here, {fetched} bytes new")
        )
        return not missing
