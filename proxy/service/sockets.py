"""sd_listen_fds(3): sockets that the service manager opened, and keeps open while we restart.

Connections that come meanwhile wait in the kernel's queue, so that a restart refuses none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Where the first of them is.
_FIRST_FD = 3
#: The name (FileDescriptorName=) of sockets for the admin listener; all others are for clients.
ADMIN_NAME = "admin"

#: Addresses that stand for every address of a family. "::" takes IPv4 too, unless the socket says otherwise.
_EVERY = {"0.0.0.0", "::", "", "*"}


@dataclass(frozen=True, slots=True)
class Handed:
    """The sockets handed to this process. Whoever takes them closes them."""

    data: tuple[socket.socket, ...] = ()
    admin: tuple[socket.socket, ...] = ()

    def close(self) -> None:
        """For a start that comes to nothing: let go of all of them."""
        for each in (*self.data, *self.admin):
            each.close()


NOTHING_HANDED = Handed()


def handed(environ: Mapping[str, str], pid: int) -> Handed:
    """What $LISTEN_FDS and $LISTEN_FDNAMES hand to the process `pid`; nothing where $LISTEN_PID names another.

    Descriptors that are no listening stream sockets are left alone.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return Handed()
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    data: list[socket.socket] = []
    admin: list[socket.socket] = []
    for index in range(int(environ.get("LISTEN_FDS", "0"))):
        try:
            each = socket.socket(fileno=_FIRST_FD + index)
        except OSError:
            continue
        if each.type != socket.SOCK_STREAM or not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            each.detach()
            continue
        os.set_inheritable(_FIRST_FD + index, False)
        (admin if names[index : index + 1] == [ADMIN_NAME] else data).append(each)
    return Handed(tuple(data), tuple(admin))


def not_covered(listen: Sequence[str], sockets: Sequence[socket.socket]) -> list[str]:
    """Those of `listen` ("host:port", "unix:path") on which none of `sockets` listens already.

    So that a settings file and a socket unit may name the same port, which is what both would do by themselves.
    """
    return [address for address in listen if not any(_covers(each, address) for each in sockets)]


def _covers(listening: socket.socket, address: str) -> bool:
    if listening.family == socket.AF_UNIX:
        return address == f"unix:{listening.getsockname()}"
    if address.startswith("unix:"):
        return False
    host, _, port = address.rpartition(":")
    its_host, its_port = listening.getsockname()[:2]
    if str(its_port) != port:
        return False
    host = host.strip("[]")
    return its_host in _EVERY or host == its_host or (host == "localhost" and its_host in ("127.0.0.1", "::1"))
