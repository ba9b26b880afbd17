"""Ports of 127.0.0.1 for processes that cannot tell which one they got, or must come back on the same one.

Asking the kernel for port 0 and closing the socket leaves a gap in which another test process may be given the same
port. Here a port belongs to whoever holds the lock on its file, for as long as the test process lives, and the range
lies below the one the kernel hands out by itself (ip_local_port_range starts at 32768).
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_FIRST, _LAST = 20_000, 31_999
_LOCKS = Path(tempfile.gettempdir()) / f"breakwater-ports-{os.getuid()}"
#: Held until this process ends; closing a descriptor would give its port away.
_held: dict[int, int] = {}


def take() -> int:
    """A port of 127.0.0.1 on which nothing listens, ours alone until this process ends."""
    _LOCKS.mkdir(mode=0o700, exist_ok=True)
    for port in random.sample(range(_FIRST, _LAST + 1), k=_LAST + 1 - _FIRST):
        if port in _held:
            continue
        lock = os.open(_LOCKS / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _is_ours(lock) and _is_free(port):
            _held[port] = lock
            return port
        os.close(lock)
    raise RuntimeError(f"no free port between {_FIRST} and {_LAST}")


def _is_ours(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
