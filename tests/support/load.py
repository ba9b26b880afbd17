"""Clients that never stop asking while something is done to the server: reloads, restarts, signals.

Half of them keep their connection, half make a new one for each request. Whatever is not the expected answer, whole, is
a failure, and is kept with its reason.
"""

from __future__ import annotations

import http.client
import threading
from typing import Self

from tests.support.images import digest_of
from tests.support.process import START_S


class Load:
    """Asks for one blob or manifest over and over while it is entered. `failures` says what went wrong."""

    def __init__(self, port: int, path: str, digest: str, *, n_clients: int = 4, keep_alive: bool = True) -> None:
        """With `keep_alive` every second client keeps its connection; a server that ends may close those when idle."""
        self.n_answers = 0
        self.failures: list[str] = []
        self._port, self._path, self._digest = port, path, digest
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(keep_alive and number % 2 == 0,)) for number in range(n_clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, keeps: bool) -> None:
        connection = self._connection()
        while not self._is_over.is_set():
            problem = self._ask(connection)
            with self._lock:
                self.n_answers += 1
                if problem:
                    self.failures.append(problem)
            if problem or not keeps:
                connection.close()
                connection = self._connection()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_S)

    def _ask(self, connection: http.client.HTTPConnection) -> str:
        try:
            connection.request("GET", self._path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        if response.status != 200:
            return f"{response.status} {body[:200]!r}"
        return "" if digest_of(body) == self._digest else f"{len(body)} bytes of something else"
