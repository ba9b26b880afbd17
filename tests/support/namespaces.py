"""Network namespaces: two sides with no way between them, in one test.

`inside` moves the calling thread, and with it every process that it starts and every socket that it opens.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.support.process import program, run

_CLONE_NEWNET = 0x40000000
_OUT = re.compile(r"(connect|sendto|sendmsg|sendmmsg)\(.*AF_INET")


class Namespace:
    """A network of its own: loopback, and a way out that leads nowhere and counts what is sent to it."""

    def __init__(self, name: str) -> None:
        """`name` must not be taken."""
        self.name = name

    def __enter__(self) -> Self:
        run([program("ip"), "netns", "add", self.name])
        self._ip("link", "set", "lo", "up")
        # Not a lack of routes: whatever tries to go out must be able to, and be seen.
        self._ip("link", "add", "out", "type", "veth", "peer", "name", "nowhere")
        with self.inside():
            for device in ("out", "nowhere"):
                Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6").write_text("1")
        self._ip("addr", "add", "192.0.2.2/24", "dev", "out")
        self._ip("link", "set", "out", "up")
        self._ip("link", "set", "nowhere", "up")
        self._ip("route", "add", "default", "via", "192.0.2.1")
        return self

    def __exit__(self, *_: object) -> None:
        run([program("ip"), "netns", "delete", self.name])

    def _ip(self, *arguments: str) -> str:
        return run([program("ip"), "-n", self.name, *arguments])

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/var/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _move(there)
            try:
                yield
            finally:
                _move(home)
        finally:
            os.close(there)
            os.close(home)

    def n_packets_out(self) -> int:
        """Packets that anything here has sent towards the outside, questions for an address (ARP) included."""
        return int(run([program("ip"), "netns", "exec", self.name, "cat", "/sys/class/net/out/statistics/tx_packets"]))


def _move(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns: is this root?")


def traced(log: Path) -> list[str]:
    """A prefix that writes down every connection and datagram that a process and its threads begin."""
    return [program("strace"), "-D", "-f", "-qq", "-o", str(log), "-e", "trace=connect,sendto,sendmsg,sendmmsg"]


def attempts(log: Path) -> list[str]:
    """What such a process tried to reach over the network."""
    return [line for line in log.read_text(errors="replace").splitlines() if _OUT.search(line)]
