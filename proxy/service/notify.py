"""sd_notify(3): tells the service manager how we are.

The watchdog is fed by a timer of the loop and by nothing else. Whether disks and upstreams are well is readiness's
business: a restart mends neither, and would take the cached away from everybody. What a restart does mend is a loop
that turns no more, and then the timer does not fire.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping

#: The manager's patience is shared out: a feeding that comes late by one period still comes in time.
FEEDINGS_PER_PATIENCE = 3
#: One line of `systemctl status`.
MAX_STATUS_CHARS = 400


class Notifier:
    """Speaks to the service manager that started us, or to nobody. Never raises and never waits."""

    def __init__(self, environ: Mapping[str, str], pid: int, monotonic: Callable[[], float]) -> None:
        """Reads $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID. `monotonic`: seconds of CLOCK_MONOTONIC."""
        self._monotonic = monotonic
        self._socket = _connected(environ.get("NOTIFY_SOCKET", ""))
        self._patience_s = _patience_s(environ, pid) if self._socket is not None else 0.0
        self._feeding: asyncio.TimerHandle | None = None
        self._status = ""

    def ready(self, status: str) -> None:
        """Start-up, or a reload, is done."""
        self._status = status
        self._send("READY=1", _status_line(status))

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it. The instant lets the manager tell this reload from an earlier one."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1_000_000)}")

    def stopping(self, status: str) -> None:
        """We end by our own will, and take our time for it."""
        self._status = status
        self._send("STOPPING=1", _status_line(status))

    def say(self, status: str) -> None:
        """The line that `systemctl status` shows, if it has changed."""
        if status != self._status:
            self._status = status
            self._send(_status_line(status))

    def feed_watchdog(self, status: Callable[[], str]) -> None:
        """Feed the watchdog from the running loop until `aclose`, and bring `status` up to date while at it.

        Without a watchdog the status is brought up to date all the same, every ten seconds.
        """
        if self._socket is None:
            return
        every_s = self._patience_s / FEEDINGS_PER_PATIENCE if self._patience_s else 10.0
        loop = asyncio.get_running_loop()

        def feed() -> None:
            if self._patience_s:
                self._send("WATCHDOG=1")
            self.say(status())
            self._feeding = loop.call_later(every_s, feed)

        feed()

    def close(self) -> None:
        """Feed no more and let go of the socket. May be called more than once."""
        if self._feeding is not None:
            self._feeding.cancel()
            self._feeding = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(lines).encode())
        except OSError:
            pass  # full, or gone: the manager will act as it sees fit, and serving goes on


def _connected(address: str) -> socket.socket | None:
    """A datagram socket to `address`: a path, or "@name" in Linux's abstract namespace; None where there is none."""
    if not address.startswith(("/", "@")):
        return None  # unset, or a kind (vsock) that only machines use
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    ours.setblocking(False)
    try:
        ours.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        ours.close()
        return None
    return ours


def _patience_s(environ: Mapping[str, str], pid: int) -> float:
    """How long the manager waits between feedings, in seconds; 0 without a watchdog (sd_watchdog_enabled(3))."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    try:
        return max(0, int(environ.get("WATCHDOG_USEC", "0"))) / 1_000_000
    except ValueError:
        return 0.0


def _status_line(status: str) -> str:
    return "STATUS=" + " ".join(status.split())[:MAX_STATUS_CHARS]
