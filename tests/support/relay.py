"""A relay in front of the origin: it sees every request on the wire, and can hold back the end of a body.

Speaks just enough HTTP/1.1 to know where bodies begin and end, and shares no code with the package under test. Threads
and blocking sockets on purpose: few connections come here (that is what is being shown), and a test can hold and
release them from wherever it runs.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Self

_PIECE = 64 * 1024
#: How long a held body waits for `release` before the relay cuts it: a test that forgets must not hang. Seconds.
_HOLD_S = 110


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it passed: header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]


class Relay:
    """Listens on a port of its own and passes everything to `target`. A context manager."""

    def __init__(self, target_port: int, *, hold_back: int = 0, holds: Callable[[str], bool] | None = None) -> None:
        """`hold_back` is in bytes: the end of each GET's body for whose target `holds` is true waits for `release`."""
        self._target_port = target_port
        self._hold_back = hold_back
        self._holds = holds or (lambda _target: True)
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._seen: list[Seen] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.n_connections = 0
        #: Set when a body has been passed on up to the part held back.
        self.is_holding = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        # shutdown and not only close: a thread that blocks in accept or recv is woken by it.
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the relay does not end"

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def release(self) -> None:
        """Let every held body go on, now and from now on."""
        self._released.set()

    def seen(self, method: str = "", part: str = "") -> list[Seen]:
        """The requests so far with this method (any if empty) whose target contains `part`."""
        with self._lock:
            return [each for each in self._seen if method in ("", each.method) and part in each.target]

    # -- threads -----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            self.n_connections += 1
            self._spawn(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        far = socket.socket()
        self._open |= {near, far}
        with near, far:
            # The other side may hang up at any point; that ends this pair and nothing else.
            with contextlib.suppress(OSError, EOFError):
                far.connect(("127.0.0.1", self._target_port))
                client, server = near.makefile("rb"), far.makefile("rb")
                with client, server:
                    while self._exchange(client, server, near, far):
                        pass
        self._open -= {near, far}

    def _exchange(
        self, client: BufferedReader, server: BufferedReader, near: socket.socket, far: socket.socket
    ) -> bool:
        """One request and its response. False when the connection is not to be used again."""
        line, headers, raw = _read_head(client)
        method, target, _ = line.split(" ", 2)
        with self._lock:
            self._seen.append(Seen(method, target, headers))
        far.sendall(raw)
        for piece in _pieces(client, int(headers.get("content-length", "0"))):
            far.sendall(piece)

        line, answered, raw = _read_head(server)
        status = int(line.split(" ", 2)[1])
        near.sendall(raw)
        if method == "HEAD" or status in (204, 304) or status < 200:
            return True
        if answered.get("transfer-encoding", "") == "chunked":
            _pass_chunked(server, near)
        elif "content-length" in answered:
            self._pass_body(server, near, int(answered["content-length"]), method == "GET" and self._holds(target))
        else:
            while piece := server.read1(_PIECE):
                near.sendall(piece)
            return False
        return "close" not in (headers.get("connection", "").lower(), answered.get("connection", "").lower())

    def _pass_body(self, server: BufferedReader, near: socket.socket, size: int, may_hold: bool) -> None:
        held = self._hold_back if may_hold and self._hold_back < size else 0
        for piece in _pieces(server, size - held):
            near.sendall(piece)
        if held:
            self.is_holding.set()
            if not self._released.wait(_HOLD_S):
                raise EOFError("held back and never released")
            for piece in _pieces(server, held):
                near.sendall(piece)


def _read_head(stream: BufferedReader) -> tuple[str, dict[str, str], bytes]:
    lines = [_read_line(stream)]
    while lines[-1] != b"\r\n":
        lines.append(_read_line(stream))
    fields = (line.decode("latin-1").split(":", 1) for line in lines[1:-1])
    return lines[0].decode("latin-1").strip(), {k.strip().lower(): v.strip() for k, v in fields}, b"".join(lines)


def _read_line(stream: BufferedReader) -> bytes:
    line: bytes = stream.readline(65536)
    if not line.endswith(b"\n"):
        raise EOFError("the connection ended")
    return line


def _pieces(stream: BufferedReader, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = stream.read1(min(size, _PIECE))
        if not piece:
            raise EOFError("the body ended short")
        size -= len(piece)
        yield piece


def _pass_chunked(server: BufferedReader, near: socket.socket) -> None:
    while True:
        line = _read_line(server)
        near.sendall(line)
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        for piece in _pieces(server, size + 2):
            near.sendall(piece)
    while (line := _read_line(server)) != b"\r\n":
        near.sendall(line)
    near.sendall(b"\r\n")
