"""rules/bandwidth.py and engine/bandwidth.py: how fast, when, and who gets how much of it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from proxy.engine.bandwidth import LOOK_EVERY_S, LimitedUpstream, Share
from proxy.oci.digest import Digest
from proxy.rules.bandwidth import DAY_MIN, UNLIMITED, Bandwidth, Hours
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.registry import ScriptedRegistry
from tests.support.upstream import ALPINE, asking

BERLIN = ZoneInfo("Europe/Berlin")
DAY = Hours(8 * 60, 18 * 60, UTC)
NIGHT = Hours(22 * 60, 6 * 60, UTC)


def at(text: str) -> float:
    """Seconds since 1970 of a moment in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("hours", "moment", "holds"),
    [
        (DAY, "2027-01-15T07:59:59", False),
        (DAY, "2027-01-15T08:00:00", True),
        (DAY, "2027-01-15T17:59:59", True),
        (DAY, "2027-01-15T18:00:00", False),
        (NIGHT, "2027-01-15T21:59:59", False),
        (NIGHT, "2027-01-15T22:00:00", True),
        (NIGHT, "2027-01-16T05:59:59", True),
        (NIGHT, "2027-01-16T06:00:00", False),
        (Hours(0, DAY_MIN, UTC), "2027-01-15T23:59:59", True),
        (Hours(18 * 60, DAY_MIN, UTC), "2027-01-15T00:00:00", False),
        (Hours(8 * 60, 18 * 60, BERLIN), "2027-01-15T07:00:00", True),
        (Hours(8 * 60, 18 * 60, BERLIN), "2027-07-15T06:00:00", True),
        (Hours(8 * 60, 18 * 60, BERLIN), "2027-07-15T16:00:00", False),
    ],
)
def test_hours_hold_as_the_clocks_of_their_zone_show(hours: Hours, moment: str, holds: bool) -> None:
    """The start belongs to them and the end does not; over midnight, and in summer time, too."""
    assert hours.hold(at(moment)) is holds


def test_the_first_entry_whose_hours_hold_counts() -> None:
    """An entry without hours is what holds otherwise; without one it is as fast as it comes."""
    both = Bandwidth(((DAY, 10.0), (Hours(0, DAY_MIN // 2, UTC), 20.0)))
    assert [both.at(at(f"2027-01-15T{hour:02}:30:00")) for hour in (7, 8, 11, 13, 18)] == [20.0, 10.0, 10.0, 10.0, None]
    assert Bandwidth(((DAY, 10.0), (None, 50.0))).at(at("2027-01-15T20:00:00")) == 50.0
    assert Bandwidth(((NIGHT, None), (None, 50.0))).at(at("2027-01-15T23:00:00")) is None
    assert UNLIMITED.at(0.0) is None


# -- shared ------------------------------------------------------------------------------------------------------------


async def settled(n: int = 20) -> None:
    """Let everybody run who can."""
    for _ in range(n):
        await asyncio.sleep(0)


async def taken_in(share: Share, clock: ManualClock, seconds: float) -> float:
    """How many bytes one takes who takes 100 at a time, all the time."""
    taken = 0.0

    async def take() -> None:
        nonlocal taken
        while True:
            mark = share.charge(100)
            taken += 100
            await share.reached(mark)

    taker = asyncio.get_running_loop().create_task(take())
    for _ in range(int(seconds * 4)):
        await settled()
        await clock.advance(0.25)
    await settled()
    taker.cancel()
    await asyncio.gather(taker, return_exceptions=True)
    return taken


async def test_the_rate_changes_with_the_time_of_day() -> None:
    """Without a reload, and for what runs: whoever waits looks again within two seconds."""
    clock = ManualClock(wall=at("2027-01-15T07:59:00"))
    share = Share(clock, Bandwidth(((DAY, 100.0), (None, 1000.0))))
    assert share.rate == 1000.0
    assert await taken_in(share, clock, 60.0) == pytest.approx(60_000, rel=0.02)
    await clock.advance(1.0)  # past the minute, whatever adding up fractions has left
    assert share.rate == 100.0
    assert await taken_in(share, clock, 60.0) == pytest.approx(6_000, rel=0.05)


async def test_whoever_waits_by_an_old_rate_notices_the_new_one() -> None:
    """A limit that was far too low is mended by a reload, and not by waiting for what it had cost."""
    clock = ManualClock()
    share = Share(clock, Bandwidth.always(1.0))
    mark = share.charge(1_000_000)
    waiting = asyncio.get_running_loop().create_task(share.reached(mark))
    await settled()
    await clock.advance(10.0)
    assert not waiting.done()
    share.follow(Bandwidth.always(1_000_000.0))
    await clock.advance(LOOK_EVERY_S)
    await settled()
    assert waiting.done()


async def test_time_in_which_nothing_comes_buys_nothing() -> None:
    """An hour without a pull is no licence for a burst."""
    clock = ManualClock()
    share = Share(clock, Bandwidth.always(100.0))
    await clock.advance(3600.0)
    assert await taken_in(share, clock, 10.0) <= 100 * 10 + 200


async def test_real_bodies_share_the_line_fairly() -> None:
    """Three layers over real sockets at 1 MiB/s: together the rate, each its third, but for a piece."""
    contents = [bytes([number]) * (6 * images.MIB) for number in range(3)]
    async with ScriptedRegistry() as registry:
        for content in contents:
            registry.put_blob(str(ALPINE), content)
        async with asking(registry) as asked:
            limited = LimitedUpstream(asked.client, Share(asked.clock, Bandwidth.always(images.MIB)))
            taken = [0, 0, 0]

            async def read(number: int) -> None:
                body = await limited.blob(ALPINE, Digest.of(contents[number]))
                while piece := await body.read():
                    taken[number] += len(piece)
                await body.close()

            readers = [asyncio.get_running_loop().create_task(read(number)) for number in range(3)]
            for second in range(1, 7):
                while asked.clock.sleepers < 3:
                    await asyncio.sleep(0)  # the sockets bring what there is, and then all three wait for the clock
                assert second * images.MIB <= sum(taken) + images.MIB and sum(taken) <= (second + 3) * images.MIB
                assert max(taken) - min(taken) <= images.MIB
                await asked.clock.advance(1.0)
            while not all(reader.done() for reader in readers):
                await asked.clock.advance(1.0)
                await asyncio.sleep(0)
            assert taken == [6 * images.MIB] * 3
