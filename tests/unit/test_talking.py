"""cli/talking.py: a body out and lines back, both at once, and how that ends when one of them breaks."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.asking import Refused, connection_to
from proxy.cli.talking import PATIENCE_S, told
from proxy.errors import BadArchive
from proxy.settings import Settings, UnixAddress, parse


@contextmanager
def answering(answer: bytes, folder: Path) -> Iterator[Settings]:
    """An admin listener that begins its answer at once, and then waits for all of the body, as a real one does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            theirs, _ = listening.accept()
            with theirs:
                theirs.sendall(answer)
                while theirs.recv(1 << 16):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        server: dict[str, Any] = {"admin_listen": f"127.0.0.1:{listening.getsockname()[1]}"}
        yield parse({"server": server, "store": {"path": str(folder)}})
        thread.join()


BEGINNING = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
REFUSAL = b'HTTP/1.1 403 Forbidden\r\nContent-Length: 18\r\nConnection: close\r\n\r\n{"error": "never"}'


@pytest.mark.parametrize(
    "failure",
    [BadArchive("the bundle is damaged"), OSError(errno.EIO, os.strerror(errno.EIO))],
    ids=["damaged", "unreadable"],
)
def test_a_body_that_cannot_be_read_on_ends_it_with_the_reason(failure: Exception, tmp_path: Path) -> None:
    """A server waits for the rest of a body, and we for its answer: without a word from us that is for a quarter of an
    hour, and then the wrong reason."""

    def body() -> Iterator[bytes]:
        yield b"the beginning"
        raise failure

    with answering(BEGINNING, tmp_path) as settings, pytest.raises(type(failure)) as raised:
        told(settings, "/api/v1/import", body(), {}, lambda _: None)
    assert raised.value is failure


def test_a_refusal_ends_the_sending(tmp_path: Path) -> None:
    """However long the body would have been."""

    def body() -> Iterator[bytes]:
        while True:
            yield b"more"

    with answering(REFUSAL, tmp_path) as settings, pytest.raises(Refused, match="never"):
        told(settings, "/api/v1/import", body(), {}, lambda _: None)


def test_long_work_is_waited_for_over_a_unix_socket_too(tmp_path: Path) -> None:
    """Hashing one blob may take minutes without a line."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        connection = connection_to(UnixAddress(str(path)))
        connection.timeout = PATIENCE_S
        connection.connect()
        try:
            assert connection.sock.gettimeout() == PATIENCE_S
        finally:
            connection.close()
