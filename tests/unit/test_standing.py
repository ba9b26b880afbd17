"""The standing order: by schedule, sooner when something is missing, and never the end of its task."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from proxy.engine.freight import Freight, Order, Tell
from proxy.engine.standing import SOON_S, Standing
from proxy.engine.walk import Scope
from proxy.errors import BadRequest
from proxy.events import Event, Noticed
from proxy.oci.names import Reference
from tests.support.clock import ManualClock

ORDER = Order((Reference.parse("a.test/x:1"),), Scope(), pin=True)


class Fetching:
    """Answers prefetches from a script: what is missing, run by run."""

    def __init__(self, *missing: dict[str, str]) -> None:
        self.missing = list(missing)

    async def prefetch(self, order: Order, _tell: Tell) -> dict[str, Any]:
        assert order is ORDER
        images = [{"reference": "a.test/x:1", "fetched_bytes": 7, "missing": self.missing.pop(0)}]
        return {"n_images": 1, "images": images}


def standing(fetching: Fetching, reads: list[Order | BadRequest], said: list[Event]) -> Standing:
    async def read() -> Order:
        answer = reads.pop(0)
        if isinstance(answer, BadRequest):
            raise answer
        return answer

    return Standing(cast(Freight, fetching), read, 86_400.0, clock=ManualClock(), observe=said.append)


async def test_a_run_says_what_came_and_what_is_missing() -> None:
    """In the log for now, in status for later."""
    said: list[Event] = []
    one = standing(Fetching({}, {"a.test/x:1": "gone"}), [ORDER, ORDER], said)
    assert await one.run()
    assert one.last["missing"] == {}
    assert not await one.run()
    assert one.last["missing"] == {"a.test/x:1": "gone"}
    assert [event.level for event in said if isinstance(event, Noticed)] == ["info", "warning", "info"]


async def test_a_list_that_cannot_be_read_is_said_and_tried_again() -> None:
    """A file that is being edited ends nothing."""
    said: list[Event] = []
    one = standing(Fetching({}), [BadRequest("no list"), ORDER], said)
    assert not await one.run()
    assert one.last["error"] == "no list"
    assert await one.run()


async def test_it_runs_by_the_schedule_and_sooner_after_trouble() -> None:
    """At the start, a quarter of an hour after trouble, and then by the schedule."""
    slept: list[float] = []

    class Noting(ManualClock):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                raise asyncio.CancelledError
            await asyncio.sleep(0)

    async def read() -> Order:
        return ORDER

    fetching = cast(Freight, Fetching({"a.test/x:1": "gone"}, {}))
    one = Standing(fetching, read, 86_400.0, clock=Noting(), observe=lambda _: None)
    try:
        await one.run_forever()
    except asyncio.CancelledError:
        pass
    assert slept == [SOON_S, 86_400.0]
