"""Lanes alone: fair between connections, and never holding what it was told to let go of."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.web.lanes import TURN_BYTES, Disk, Lanes, Splice
from tests.support.serving import PATTERN, FileBlob, none_left


class Pretending(Disk):
    """Says that it sent; writes down to whom, and starts when it is told."""

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.may_begin = threading.Event()

    def is_resident(self, fd: int, start: int, end: int) -> bool:
        return True

    def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        assert self.may_begin.wait(30)
        self.turns.append(out)
        return n_bytes


def nothing(_: int) -> None:
    """Counts nothing."""


def begun(running: Lanes, disk: Disk, out: socket.socket, fd: int, end: int) -> Splice:
    """A splice from the beginning of a file, on a lane that is there."""
    splice = running.begin(disk, out.fileno(), fd, 0, end, nothing)
    assert splice is not None
    return splice


@asynccontextmanager
async def lanes(n_lanes: int, n_pairs: int) -> AsyncIterator[tuple[Lanes, list[socket.socket]]]:
    """Lanes, and connections that nobody reads from."""
    pairs = [socket.socketpair() for _ in range(n_pairs)]
    for ours, _ in pairs:
        ours.setblocking(False)
    open_lanes = Lanes(n_lanes)
    try:
        yield open_lanes, [ours for ours, _ in pairs]
    finally:
        open_lanes.close()
        for pair in pairs:
            for end in pair:
                end.close()


async def test_connections_that_can_all_be_written_to_have_one_turn_each_round() -> None:
    """Fair between connections: nobody gets ahead of the others by more than its turn."""
    disk = Pretending()
    async with lanes(1, 5) as (running, connections):
        splices = [begun(running, disk, each, -1, 8 * TURN_BYTES) for each in connections]
        disk.may_begin.set()
        await asyncio.gather(*(splice.over for splice in splices))
        assert all(splice.offset == splice.end for splice in splices)
        counts = Counter({each.fileno(): 0 for each in connections})
        for out in disk.turns:
            counts[out] += 1
            assert max(counts.values()) - min(counts.values()) <= 2  # two: the first was alone when it began


async def test_splices_are_spread_over_as_many_lanes_as_there_may_be() -> None:
    """A thread is started only when those there are have something to do, and no more than were allowed."""
    disk = Pretending()
    before = threading.active_count()
    async with lanes(3, 7) as (running, connections):
        one = begun(running, disk, connections[0], -1, 1)
        assert threading.active_count() == before + 1
        others = [begun(running, disk, each, -1, 1) for each in connections[1:]]
        assert threading.active_count() == before + 3
        disk.may_begin.set()
        await asyncio.gather(*(splice.over for splice in [one, *others]))


@pytest.mark.parametrize("is_full", [True, False], ids=["waiting for its client", "between turns"])
async def test_a_splice_that_is_dropped_is_over_and_its_descriptor_is_not_touched_again(
    tmp_path: Path, is_full: bool
) -> None:
    """Once `over` is done the descriptor may be closed, and its number may be another connection's."""
    path = tmp_path / "blob"
    path.write_bytes(PATTERN)
    touched: list[int] = []

    class Watched(Disk):
        def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            touched.append(out)
            return super().sendfile(out, fd, offset, n_bytes if is_full else 1)

    disk = Watched()
    async with lanes(1, 1) as (running, connections):
        blob = FileBlob(path)
        splice = begun(running, disk, connections[0], blob.fd, len(PATTERN))
        await until(lambda: len(touched) >= 1)
        splice.drop()
        splice.drop()
        await splice.over
        blob.close()
        n_touched = len(touched)
        connections[0].close()
        other, its_end = socket.socketpair()  # takes the number
        other.setblocking(False)
        with other, its_end:
            blob = FileBlob(path)
            small = begun(running, disk, other, blob.fd, 1)
            await small.over
            splice.drop()  # long over: nothing happens
            assert its_end.recv(10) == PATTERN[:1]
            blob.close()
        assert len(touched) == n_touched + 1


async def test_a_bug_while_sending_ends_one_splice_and_not_the_lane() -> None:
    """Whoever waits is told, and nothing of its connection is watched any more; the others go on."""

    class Broken(Pretending):
        def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
            if fd == -2 and offset:
                raise ZeroDivisionError
            return super().sendfile(out, fd, offset, 1)

    disk = Broken()
    disk.may_begin.set()
    async with lanes(1, 1) as (running, connections):
        broken = begun(running, disk, connections[0], -2, 10)
        await broken.over
        assert isinstance(broken.error, ZeroDivisionError)
        sound = begun(running, disk, connections[0], -1, 10)
        await sound.over
        assert (sound.offset, sound.error) == (10, None)


async def test_without_descriptors_there_is_no_further_lane_and_nothing_is_left_open() -> None:
    """Whoever has none is told so and sends otherwise; those there are take what comes."""
    disk = Pretending()
    async with lanes(2, 2) as (running, connections):
        with none_left():
            assert running.begin(disk, connections[0].fileno(), -1, 0, 1, nothing) is None
        first = begun(running, disk, connections[0], -1, 1)
        n_threads = threading.active_count()
        with none_left():
            second = begun(running, disk, connections[1], -1, 1)
        assert threading.active_count() == n_threads
        disk.may_begin.set()
        await asyncio.gather(first.over, second.over)


async def until(holds: Callable[[], bool]) -> None:
    """Turn the loop until it does."""
    while not holds():
        await asyncio.sleep(0)
