"""Lanes: threads that move bytes from files to connections, so that the loop spends no time on bodies.

sendfile releases the interpreter lock, so a lane costs the loop a few microseconds a turn, and two of them are two
cores' worth of TCP from one process. A lane is a thread with a selector: every connection that can be written to has
one turn of at most `TURN_BYTES`, then the next. A lane never waits for a client (the descriptors do not block) and
never for the disk (what is not in memory is handed back; see `Splice.is_cold`).

Rejected: turns on the loop itself, of 4 MiB a round. That was one core's worth of TCP, shared with everything else the
loop does (docs/performance.md has both).
"""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

#: Bytes a connection may send before the others of its lane have their turn.
TURN_BYTES = 1 << 20
#: What the kernel is asked to read ahead once a window was found cold.
READ_AHEAD_BYTES = 8 << 20

#: `preadv` that answers EAGAIN instead of waiting for the disk. 0 where there is none: every window is cold then.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class Disk:
    """What sending asks of the operating system about a file. Tests put delays and faults here."""

    def is_resident(self, fd: int, start: int, end: int) -> bool:
        """Whether the first and the last page of the window are in memory, which tells for all of it in practice."""
        return self.read_resident(fd, start, 1) is not None and self.read_resident(fd, end - 1, 1) is not None

    def read_resident(self, fd: int, offset: int, n_bytes: int) -> bytes | None:
        """The bytes, or None when that would wait for the disk (or cannot be known, or fails)."""
        if not _NOWAIT:
            return None
        piece = bytearray(n_bytes)
        try:
            n = os.preadv(fd, [piece], offset, _NOWAIT)
        except OSError:
            return None  # not in memory; a real fault is met again, and reported, by whoever reads next
        return bytes(piece[:n]) if n == n_bytes else None

    def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        """At most `n_bytes`, waiting for the disk; b"" at the end of the file. For a worker thread."""
        return os.pread(fd, n_bytes, offset)

    def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        """Bytes sent; 0 at the end of the file. Raises BlockingIOError when the connection takes no more."""
        return os.sendfile(out, fd, offset, n_bytes)

    def sendfile_cold(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        """As `sendfile`, having what follows read ahead first. For a worker thread."""
        os.posix_fadvise(fd, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        return self.sendfile(out, fd, offset, n_bytes)


class Splice:
    """A range of a file on its way to a connection. Its lane moves it; once `over` is done, the lane has let go of it.

    How it ended: `offset` is how far it came; `error` what sendfile said, if it failed; `is_cold`: what follows is not
    in memory; `is_short`: the file ended before the range did. None of these and offset < end: it was dropped.
    """

    __slots__ = (
        "_count", "_disk", "_fd", "_is_watched", "_lane", "_out", "_warm_until",
        "end", "error", "is_cold", "is_dropped", "is_ended", "is_short", "offset", "over",
    )  # fmt: skip

    def __init__(
        self, lane: _Lane, disk: Disk, out: int, fd: int, offset: int, end: int, count: Callable[[int], None]
    ) -> None:
        self._lane = lane
        self._disk = disk
        self._out = out
        self._fd = fd
        self._count = count
        self._warm_until = offset
        self._is_watched = False
        self.offset = offset
        self.end = end
        self.error: Exception | None = None
        self.is_cold = False
        self.is_short = False
        self.is_dropped = False
        self.is_ended = False
        self.over: asyncio.Future[None] = lane.loop.create_future()

    def drop(self) -> None:
        """Ask the lane to let go, soon; `over` says when it has."""
        if not self.over.done():
            self.is_dropped = True
            self._lane.post(self)

    def turn(self, selector: selectors.BaseSelector) -> bool:
        """Send once, and see to being called again when more can be sent; True when it is over. On the lane's thread."""
        if self.is_dropped or self._is_done():
            return True
        if not self._is_watched:
            selector.register(self._out, selectors.EVENT_WRITE, self)
            self._is_watched = True
        return False

    def end_on(self, selector: selectors.BaseSelector) -> None:
        """Let go of the descriptors. On the lane's thread, once."""
        self.is_ended = True
        if self._is_watched:  # before the descriptor is closed: epoll would go on reporting its twin
            selector.unregister(self._out)

    def _is_done(self) -> bool:
        if self.offset >= self._warm_until:
            window_end = min(self.offset + TURN_BYTES, self.end)
            if not self._disk.is_resident(self._fd, self.offset, window_end):
                self.is_cold = True
                return True
            self._warm_until = window_end
        try:
            n = self._disk.sendfile(self._out, self._fd, self.offset, self._warm_until - self.offset)
        except BlockingIOError:
            return False
        except OSError as error:
            self.error = error
            return True
        if n == 0:
            self.is_short = True
            return True
        self.offset += n
        self._count(n)
        return self.offset == self.end


class Lanes:
    """The lanes of one loop. Threads are started when they are needed, and end with `close`."""

    def __init__(self, n_lanes: int | None = None) -> None:
        """`n_lanes`: at most so many; None: one for each core we may run on, up to four."""
        self._n_lanes = n_lanes or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        self._lanes: list[_Lane] = []

    def begin(
        self, disk: Disk, out: int, fd: int, offset: int, end: int, count: Callable[[int], None]
    ) -> Splice | None:
        """Send bytes `offset` to `end` of the file `fd` to `out`, a descriptor of a connection that does not block.

        Both must stay open until `Splice.over` is done. `count` is told of bytes as they leave, on another thread, but
        never after `over`. None where there is no lane and none can be had, for want of descriptors or threads.
        """
        lane = min(self._lanes, key=len, default=None)
        if lane is None or (len(lane) and len(self._lanes) < self._n_lanes):
            lane = self._another(lane)
        if lane is None:
            return None
        splice = Splice(lane, disk, out, fd, offset, end, count)
        lane.begin(splice)
        return splice

    def _another(self, instead: _Lane | None) -> _Lane | None:
        """A new one, or else the one that there is."""
        try:
            lane = _Lane(asyncio.get_running_loop())
        except (OSError, RuntimeError):  # RuntimeError: no thread can be started
            return instead
        self._lanes.append(lane)
        return lane

    def close(self) -> None:
        """Let the threads end. After the last splice."""
        for lane in self._lanes:
            lane.post(None)
        self._lanes.clear()


class _Lane:
    """One thread and what passes between it and the loop: two queues, each with a bell that is rung only when needed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError or RuntimeError for want of descriptors or threads."""
        self.loop = loop
        self._posted: deque[Splice | None] = deque()
        self._ended: deque[Splice] = deque()
        self._is_asleep = False
        self._is_told = False
        self._n_splices = 0
        with ExitStack() as opened:
            self._selector = opened.enter_context(selectors.DefaultSelector())
            self._bell, self._rings = map(opened.enter_context, socket.socketpair())
            self._bell.setblocking(False)
            self._rings.setblocking(False)
            self._selector.register(self._bell, selectors.EVENT_READ)
            threading.Thread(target=self._run, name="lane", daemon=True).start()
            opened.pop_all()  # from here on they are the thread's, which closes them

    def __len__(self) -> int:
        """Splices that are on their way."""
        return self._n_splices

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def begin(self, splice: Splice) -> None:
        """Take it on."""
        self._n_splices += 1
        self.post(splice)

    def post(self, splice: Splice | None) -> None:
        """Have the lane look at it: to begin it, to let go of it where it was dropped; None: to end itself."""
        self._posted.append(splice)
        if self._is_asleep:
            self._is_asleep = False
            self._rings.send(b"\0")

    def _let_go(self) -> None:
        self._is_told = False
        while self._ended:
            splice = self._ended.popleft()
            self._n_splices -= 1
            splice.over.set_result(None)

    # -- on the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._selector as selector, self._bell, self._rings:
            while True:
                self._is_asleep = True  # first, and then the look: whoever posts after the look rings
                ready = selector.select(0 if self._posted else None)
                self._is_asleep = False
                for key, _ in ready:
                    if key.data is None:
                        self._bell.recv(64)
                    else:
                        self._turn(key.data)
                for _ in range(len(self._posted)):
                    posted = self._posted.popleft()
                    if posted is None:
                        return
                    self._turn(posted)

    def _turn(self, splice: Splice) -> None:
        if splice.is_ended:
            return  # it ended while its drop was on the way
        try:
            is_over = splice.turn(self._selector)
        except Exception as error:  # noqa: BLE001 – whoever waits raises it; here it would stop everybody's bodies
            splice.error = error
            is_over = True
        if not is_over:
            return
        splice.end_on(self._selector)
        self._ended.append(splice)
        if not self._is_told:
            self._is_told = True
            try:
                self.loop.call_soon_threadsafe(self._let_go)
            except RuntimeError:
                pass  # the loop is closed: nobody waits
