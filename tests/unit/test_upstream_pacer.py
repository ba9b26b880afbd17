"""How slow a body may be: at least so many bytes over any window of time spent waiting for it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proxy.upstream.body import Pacer, RegistryBody
from proxy.upstream.policy import Pace
from tests.support.clock import ManualClock

PACE = Pace(min_bytes_per_s=100, window_s=32)  # 3,200 bytes in 32 s


def test_silence_is_waited_for_as_long_as_the_window() -> None:
    """Nothing at all for a whole window is too slow."""
    assert Pacer(PACE).patience_s == 32


def test_patience_runs_out_while_too_little_comes() -> None:
    """Bytes that do not add up to the minimum buy no time."""
    pacer = Pacer(PACE)
    for second in range(1, 32):
        pacer.record(1.0, 10)
        assert pacer.patience_s == 32 - second
    pacer.record(1.0, 10)
    assert pacer.patience_s <= 0


def test_pace_that_is_kept_never_runs_out_of_patience() -> None:
    """A slow body is a body: at the minimum it may take hours."""
    pacer = Pacer(PACE)
    for _ in range(10_000):
        pacer.record(1.0, 101)
        assert pacer.patience_s > 0


def test_good_start_does_not_pay_for_a_stall() -> None:
    """The window slides: a gigabyte in the first second is forgotten a window later."""
    pacer = Pacer(PACE)
    pacer.record(1.0, 1 << 30)
    assert pacer.patience_s <= 32
    pacer.record(31.5, 0)
    assert pacer.patience_s <= 0.5


def test_time_in_which_nobody_waited_does_not_count() -> None:
    """What was buffered when it was asked for cost no waiting: a slow disk of ours is not a slow upstream."""
    pacer = Pacer(PACE)
    for _ in range(1000):
        pacer.record(0.0, 1)
    assert pacer.patience_s == 32


@pytest.mark.parametrize("seed", range(20))
def test_no_window_of_too_few_bytes_is_missed(seed: int) -> None:
    """Against a plain account of every window; the samples may be off by one grain, a sixteenth of the window."""
    chance = random.Random(seed)
    pacer, now, events = Pacer(PACE), 0.0, [(0.0, 0)]
    for _ in range(300):
        waited, n_bytes = chance.choice([0.1, 1.0, 3.0, 9.0]), chance.choice([0, 50, 400, 3000])
        now += waited
        events.append((now, n_bytes))
        pacer.record(waited, n_bytes)
        longer = sum(n for at, n in events if at > now - 32 * 17 / 16)
        shorter = sum(n for at, n in events if at > now - 32)
        if now >= 34 and longer < 3200:
            assert pacer.patience_s <= 0
        if now >= 32 and shorter >= 3200 + 9000:
            assert pacer.patience_s > 0


class Bursts:
    """An answer that comes in bursts: ten bytes after a wait, and two thousand with them that nobody had to wait for."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._buffered = b""

    def buffered(self) -> bytes:
        """What came with the last ones."""
        piece, self._buffered = self._buffered, b""
        return piece

    async def piece(self) -> bytes:
        """The first of the next burst."""
        await self._clock.advance(10)
        self._buffered = bytes(2000)
        return bytes(10)

    def close(self) -> None:
        """Nothing is held."""


async def test_bytes_that_were_buffered_count_for_the_pace() -> None:
    """Of a burst only the first piece was waited for; all of it came in that time."""
    clock = ManualClock()
    reply: Any = Bursts(clock)
    body = RegistryBody(reply, size=None, offset=0, source="", upstream="registry.test", clock=clock, pace=PACE)
    for _ in range(100):
        assert await body.read()
