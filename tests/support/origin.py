"""The origin: a real docker-registry in a scratch folder, and what it says about the requests that reached it."""

from __future__ import annotations

import http.client
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ports
from tests.support.images import Image, push, push_blob
from tests.support.process import Child, eventually, program

_SAMPLE = re.compile(r"^registry_http_(requests_total|in_flight_requests)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_ACCESS = re.compile(
    r'^\S+ - \S+ \[[^\]]+\] "(?P<method>[A-Z]+) (?P<target>\S+) HTTP/[\d.]+" (?P<status>\d+) ', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the registry's access log."""

    method: str
    target: str
    status: int

    @property
    def names_a_digest(self) -> bool:
        """Whether content was asked for by digest, which never changes and so need never be asked for again."""
        return "/sha256:" in self.target or "/sha512:" in self.target

    def __str__(self) -> str:
        return f"{self.method} {self.target} -> {self.status}"


class Origin(Child):
    """A docker-registry on 127.0.0.1. Stopped and started again it is the same registry on the same ports."""

    def __init__(self, scratch: Path, *, remote_url: str | None = None, auth: Mapping[str, Any] | None = None) -> None:
        """With `remote_url` it is a pull-through cache of that registry: the peer to compare with. `auth` is that section
        of its settings. Over the same folder it has the same content."""
        scratch.mkdir(parents=True, exist_ok=True)
        self.port = ports.take()
        self._debug_port = ports.take()
        settings: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(scratch / "content"), "maxthreads": 400},
                "delete": {"enabled": True},
            },
            "http": {
                "addr": f"127.0.0.1:{self.port}",
                "secret": "nothing to hide",
                "debug": {"addr": f"127.0.0.1:{self._debug_port}", "prometheus": {"enabled": True}},
            },
        }
        if remote_url:
            settings["proxy"] = {"remoteurl": remote_url}
        if auth:
            settings["auth"] = auth
        path = scratch / "origin.yml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        super().__init__("docker-registry", [program("docker-registry"), "serve", str(path)], scratch / "origin.log")

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://{self.address}"

    def is_ready(self) -> bool:
        """Whether it listens, found out where asking leaves no trace in its log or its metrics."""
        try:
            self._metrics()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.connect()
            connection.close()
        except (OSError, http.client.HTTPException):
            return False
        return True

    def push(self, repository: str, tag: str | None, wanted: Image) -> Image:
        """Put an image here, byte for byte."""
        push(self.url, repository, tag, wanted)
        return wanted

    def push_blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> str:
        """Put one blob here and return its digest."""
        return push_blob(self.url, repository, content, algorithm)

    def n_requests(self, handler: str, method: str = "get") -> int:
        """How many requests its own metrics count, whatever their status, once none is in flight.

        Args: `handler` is base, tags, manifest or blob; `method` is lower case. Counted since it was last started.
        """
        return sum(
            n
            for (its_handler, its_method, _), n in self.handled().items()
            if (its_handler, its_method) == (handler, method)
        )

    def handled(self) -> Counter[tuple[str, str, str]]:
        """Its own metrics: requests by handler, method and status, once none is in flight. As `n_requests` counts."""
        self.settle()
        counts: Counter[tuple[str, str, str]] = Counter()
        for name, labels, value in self._samples():
            if name == "requests_total":
                counts[labels["handler"], labels["method"], labels["code"]] += int(float(value))
        return counts

    def requests(self) -> list[Request]:
        """Every request that ever reached it, from its access log, once none is in flight."""
        if self.is_running:
            self.settle()
        return [Request(m["method"], m["target"], int(m["status"])) for m in _ACCESS.finditer(self.log())]

    def settle(self) -> None:
        """Wait until it works on nothing: both its counters and its log are written when a response is done."""
        eventually(self._is_idle, "the origin has no request in flight")

    def _is_idle(self) -> bool:
        return all(float(value) == 0 for name, _, value in self._samples() if name == "in_flight_requests")

    def _samples(self) -> list[tuple[str, dict[str, str], str]]:
        return [(name, dict(_LABEL.findall(labels)), value) for name, labels, value in _SAMPLE.findall(self._metrics())]

    def _metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._debug_port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()
