"""Listening of the admin listener: sockets that are bound with the right family and mode, and errors that say where."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from aiohttp import web

from proxy.settings import Address, TcpAddress, UnixAddress


async def listen(runner: web.AppRunner, address: Address) -> tuple[str, ...]:
    """Listen on an address of the settings; returns the real ones."""
    if isinstance(address, UnixAddress):
        await web.SockSite(runner, _unix_socket(address)).start()
        return (str(address),)
    return await _tcp_sites(runner, address)


def _unix_socket(address: UnixAddress) -> socket.socket:
    """Bound so that only its owner and group may connect: over it no token is asked for. A socket that nobody listens
    on any more is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path = Path(address.path)
        if path.is_socket() and listening.connect_ex(address.path) != 0:
            path.unlink(missing_ok=True)
        listening.close()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        masked = os.umask(0o117)
        try:
            listening.bind(address.path)
        finally:
            os.umask(masked)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on admin address {address}: {error.strerror}") from error
    return listening


async def _tcp_sites(runner: web.AppRunner, address: TcpAddress) -> tuple[str, ...]:
    """Listen on each address the name stands for; all but the first may be missing (no IPv6 here)."""
    names = []
    for i, host in enumerate(address.hosts):
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listening.family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((host, address.port))
        except OSError as error:
            listening.close()
            if i == 0:
                raise OSError(error.errno, f"cannot listen on admin address {address}: {error.strerror}") from error
            continue
        port = listening.getsockname()[1]
        await web.SockSite(runner, listening).start()
        names.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return tuple(names)
