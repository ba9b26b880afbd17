"""Sockets to listen on: bound, named and, when they are a Unix socket's, removed. For the data port and for the admin
listener.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import suppress

from aiohttp import web

#: Over an admin listener's Unix socket no token is asked for: its owner and group may connect, and nobody else.
ADMIN_MODE = 0o660


async def bind(address: str, *, unix_mode: int | None = None) -> list[socket.socket]:
    """Sockets bound to "host:port", "[v6]:port", ":port" (every address of both families) or "unix:path"; several where
    a name has several addresses (localhost has two). `unix_mode`: of a Unix socket's file.

    A family that this machine does not have is left out. Raises OSError, with a sentence that names the address.
    """
    if address.startswith("unix:"):
        return [await asyncio.to_thread(_bind_unix, address.removeprefix("unix:"), unix_mode)]
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            None if host in ("", "*") else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:  # neither says which name; UnicodeError: it cannot be one
        why = error.strerror if isinstance(error, socket.gaierror) else "that is no name of a host"
        raise OSError(errno.EADDRNOTAVAIL, f"cannot listen on {address}: {why}") from error
    bound: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, target in dict.fromkeys(found):
        if bound and port == "0":
            target = (target[0], bound[0].getsockname()[1], *target[2:])  # one port for all families
        listening = None
        try:
            listening = socket.socket(family, kind, protocol)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(target)
            bound.append(listening)
        except OSError as error:
            if listening is not None:
                listening.close()
            refused = OSError(error.errno, f"cannot listen on {address}: {error.strerror}")
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for other in bound:
                    other.close()
                raise refused from error
    if not bound:
        raise refused or OSError(errno.EADDRNOTAVAIL, f"cannot listen on {address}: no such address")
    return bound


async def listen(runner: web.AppRunner, address: str) -> tuple[str, ...]:
    """Have an application listen on an address as `bind` takes it; returns where it really does. Raises OSError."""
    sockets = await bind(address, unix_mode=ADMIN_MODE)
    for listening in sockets:
        await web.SockSite(runner, listening).start()
    return tuple(name_of(listening) for listening in sockets)


def _bind_unix(path: str, mode: int | None) -> socket.socket:
    forget_unix(path)  # left over from a process that was killed
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        if mode is not None:
            os.chmod(path, mode)  # in time: nobody can connect before somebody listens
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on unix:{path}: {error.strerror}") from error
    return listening


def forget_unix(path: str) -> None:
    """Remove the name of a socket on which nobody listens. Not for the loop."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one whose queue is full is somebody's, and would make us wait
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with suppress(OSError):  # whoever may not remove it is told when it is bound
                os.unlink(path)
        except OSError:
            pass  # nothing there, or no socket, or not for us to say


def tune(listening: socket.socket, *, send_buffer_bytes: int, unacknowledged_s: int) -> None:
    """Set once what every accepted connection inherits (Linux), instead of once for each. `send_buffer_bytes`: 0 leaves
    it to the kernel; `unacknowledged_s`: when it gives up a peer that acknowledges nothing.
    """
    if send_buffer_bytes:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    if listening.family in (socket.AF_INET, socket.AF_INET6):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in (
            ("TCP_USER_TIMEOUT", unacknowledged_s * 1000),
            ("TCP_KEEPIDLE", 60),
            ("TCP_KEEPINTVL", 15),
        ):
            if hasattr(socket, option):
                listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def name_of(listening: socket.socket) -> str:
    """Where a socket listens: "127.0.0.1:5000", "[::1]:5000" or "unix:/run/x"."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
