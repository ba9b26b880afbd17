"""Asking a running Breakwater over its admin listener. Standard library only: a command must start fast."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from proxy.errors import BreakwaterError
from proxy.settings.values import Address, UnixAddress

#: Seconds for a whole answer of the admin listener, which does no I/O for it.
PATIENCE_S = 10.0


class NoAnswer(BreakwaterError):
    """Nobody there, or not a Breakwater."""


class Refused(BreakwaterError):
    """What was asked cannot be answered, and the server said why."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)  # as for TCP: whoever asks for long work has set it meanwhile
        self.sock.connect(self._path)


def ask(address: Address, path: str) -> Any:
    """The JSON that GET `path` answers. Raises NoAnswer with a sentence that names the address."""
    connection = connection_to(address)
    try:
        connection.request("GET", path, headers={"Accept": "application/json"})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NoAnswer(f"no answer from {address}: {why}; is it running, with these settings?") from error
    finally:
        connection.close()
    if response.status in (400, 404) and (said := sentence_of(body)):
        raise Refused(said)
    if response.status != 200:
        raise NoAnswer(f"{address} answered {response.status} to {path}; is that the admin listener of a Breakwater?")
    try:
        return json.loads(body)
    except ValueError as error:
        raise NoAnswer(f"{address} answered no JSON to {path}; is that the admin listener of a Breakwater?") from error


def sentence_of(body: bytes) -> str:
    """The sentence of an error, in the registry's envelope or the plain one; "" where there is none."""
    try:
        document = json.loads(body)
        return str(document["errors"][0]["message"] if "errors" in document else document["error"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


def connection_to(address: Address) -> http.client.HTTPConnection:
    """A connection that is not open yet. Raises NoAnswer where the address cannot be connected to."""
    if isinstance(address, UnixAddress):
        return _UnixConnection(address.path)
    if address.port == 0:
        raise NoAnswer("the admin listener's port is 0, any free one; name the real one with --admin-listen")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return http.client.HTTPConnection(host, address.port, timeout=PATIENCE_S)
