"""Many clients at once, on one thread: raw HTTP/1.1 over non-blocking sockets, every body hashed as it arrives.

A client library would hide what matters here: whether the first byte came while the transfer still ran, and whether a
body ended whole, short, or with a reset.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

End = Literal["", "whole", "short", "reset", "left"]


@dataclass(slots=True)
class Visit:
    """One client: what it asks for, and what became of it. Header names are lower case."""

    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    #: Hang up after this many bytes of body, as clients do that open ranges and change their minds.
    leave_after: int | None = None

    status: int = 0
    answered: dict[str, str] = field(default_factory=dict)
    n_bytes: int = 0
    end: End = ""
    _head: bytearray = field(default_factory=bytearray, repr=False)
    _hash: object = field(default_factory=hashlib.sha256, repr=False)

    @property
    def digest(self) -> str:
        """sha256:<hex> of the body as far as it came."""
        return f"sha256:{self._hash.hexdigest()}"  # type: ignore[attr-defined]

    @property
    def expects(self) -> int:
        """Bytes of body that the response's Content-Length promised."""
        return 0 if self.method == "HEAD" else int(self.answered["content-length"])

    def take(self, piece: memoryview) -> None:
        """Bytes as they came off the socket."""
        if self.status:
            return self._take_body(piece)
        self._head += piece
        head, found, body = bytes(self._head).partition(b"\r\n\r\n")
        if not found:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        self.answered = {k.strip().lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
        self.status = int(first.split(" ", 2)[1])
        return self._take_body(memoryview(body))

    def _take_body(self, piece: memoryview) -> None:
        if self.leave_after is not None:
            piece = piece[: self.leave_after - self.n_bytes]
        self._hash.update(piece)  # type: ignore[attr-defined]
        self.n_bytes += len(piece)
        if self.leave_after is not None and self.n_bytes >= self.leave_after:
            self.end = "left"
        elif self.n_bytes >= self.expects:
            self.end = "whole"


def visit_all(
    port: int, visits: Sequence[Visit], *, after_each_round: Callable[[], None] = lambda: None, patience_s: float = 100
) -> None:
    """Run every visit at the same time against 127.0.0.1:`port`, until each has an `end`.

    All connections are open before the first request leaves, so that the requests arrive together. `after_each_round`
    is called between rounds of reading, to act on how far everybody is. Raises AssertionError when nothing has arrived
    for `patience_s` seconds.
    """
    buffer = memoryview(bytearray(256 * 1024))
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in visits]
    with selectors.DefaultSelector() as selector:
        try:
            for connection, visit in zip(connections, visits, strict=True):
                lines = [f"{visit.method} {visit.target} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
                lines += [f"{name}: {value}" for name, value in visit.headers.items()]
                connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, visit)
            last_at = time.monotonic()
            while selector.get_map():
                for key, _ in selector.select(timeout=0.05):
                    last_at = time.monotonic()
                    _read(key.fileobj, key.data, buffer)  # type: ignore[arg-type]
                    if key.data.end:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
                after_each_round()
                assert time.monotonic() - last_at < patience_s, _stuck(visits)
        finally:
            for connection in connections:
                connection.close()


def _read(connection: socket.socket, visit: Visit, buffer: memoryview) -> None:
    try:
        n = connection.recv_into(buffer)
    except BlockingIOError:
        return
    except ConnectionError:
        visit.end = "reset"
        return
    if n == 0:
        visit.end = "short"
        return
    visit.take(buffer[:n])


def _stuck(visits: Sequence[Visit]) -> str:
    waiting = [visit for visit in visits if not visit.end]
    return f"{len(waiting)} of {len(visits)} clients get nothing more, the first of them: {waiting[0]}"
