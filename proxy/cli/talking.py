"""Long work of a running server over its admin listener: a body out, lines of JSON back while it is worked on.

Both directions at once: the answer is read while the body is still being sent, so that a refusal ends the sending.
Standard library only, as in asking.py.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from proxy import admin_token
from proxy.cli.asking import NoAnswer, Refused, ask, connection_to, sentence_of
from proxy.settings import Settings

#: Seconds without a line before a server counts as gone: one blob of any size may pass between two lines.
PATIENCE_S = 900.0


def serves(settings: Settings) -> bool:
    """Whether a Breakwater with this very store runs and answers on its admin listener."""
    try:
        answer = ask(settings.server.admin_listen, "/api/v1/status")
    except NoAnswer:
        return False
    there = answer.get("store", {}).get("path") if isinstance(answer, dict) else None
    return isinstance(there, str) and os.path.realpath(os.path.dirname(there)) == os.path.realpath(settings.store.path)


def told(
    settings: Settings,
    path: str,
    body: Iterable[bytes],
    headers: Mapping[str, str],
    each: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """POST `body` to `path`; `each` gets every line but the last, which is the report.

    Raises Refused for an error that the server tells, NoAnswer where it stops answering, and what reading `body` raises.
    """
    address = settings.server.admin_listen
    connection = connection_to(address)
    connection.timeout = PATIENCE_S
    sending: _Sending | None = None
    try:
        connection.connect()
        connection.putrequest("POST", path)
        for name, value in {**headers, **_token(settings), "Transfer-Encoding": "chunked"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        sending = _Sending(connection, body)
        sending.start()
        try:
            for line in _lines(connection):
                if line.get("event") == "report":
                    return line
                if line.get("event") == "error":
                    raise Refused(str(line.get("error")))
                each(line)
        finally:
            sending.end()
        raise NoAnswer(f"{address} stopped in the middle of its answer to {path}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if sending is not None and error is sending.failure:
            raise
        raise NoAnswer(f"{address}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


def fetched(settings: Settings, path: str, body: bytes, take: Callable[[bytes], None]) -> dict[str, Any] | None:
    """POST an order in JSON, and hand what comes back to `take`, piece by piece; None then. A report in its stead is
    returned. Raises Refused, or NoAnswer where the answer breaks off.
    """
    address = settings.server.admin_listen
    connection = connection_to(address)
    connection.timeout = PATIENCE_S
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **_token(settings)})
        response = connection.getresponse()
        if response.status != 200:
            raise _refused(response)
        if response.getheader("Content-Type", "").startswith("application/json"):
            report: dict[str, Any] = json.loads(response.read())
            return report
        while piece := response.read(1 << 20):
            take(piece)
        return None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{address}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


class _Sending(threading.Thread):
    """Sends the body in chunks (RFC 9112 §7.1) while the answer is read elsewhere."""

    def __init__(self, connection: http.client.HTTPConnection, body: Iterable[bytes]) -> None:
        super().__init__(name="send", daemon=True)
        self._socket = connection.sock
        self._body = body
        self._is_over = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Until the body ends, or nobody wants more of it."""
        try:
            for piece in self._body:
                if self._is_over.is_set() or (piece and not self._sent(b"%x\r\n%b\r\n" % (len(piece), piece))):
                    return
            self._sent(b"0\r\n\r\n")
        except BaseException as error:  # noqa: BLE001  # raised again by `end`, in the thread that waits
            self.failure = error
            # To close it would wake nobody: the answer's reader has it open as well, and would wait for a server that
            # waits for the rest of the body.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _sent(self, chunk: bytes) -> bool:
        try:
            self._socket.sendall(chunk)
        except OSError:
            return False  # the server has said why, or its answer ends short
        return True

    def end(self) -> None:
        """Stop sending. Raises what reading the body raised."""
        self._is_over.set()
        self.join(timeout=10.0)
        if self.failure is not None:
            raise self.failure


def _lines(connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
    response = connection.getresponse()
    if response.status != 200:
        raise _refused(response)
    while line := response.readline():
        yield json.loads(line)


def _refused(response: http.client.HTTPResponse) -> Refused:
    return Refused(sentence_of(response.read(1 << 16)) or f"the server answered {response.status}")


def _token(settings: Settings) -> dict[str, str]:
    """What a server wants to see before it changes anything, unless we come by its unix socket."""
    token = admin_token.read(settings)
    return {"Authorization": f"Bearer {token}"} if token else {}
