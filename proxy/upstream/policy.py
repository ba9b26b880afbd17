"""How to speak to one upstream as one identity: a value that wiring makes from the settings."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

from proxy.upstream.credentials import Credentials


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds of wall time that an upstream has. No deadline covers a whole blob: `Pace` does."""

    #: Name, TCP and TLS over all addresses of a host, and over one of them.
    connect_s: float = 10.0
    sock_connect_s: float = 5.0
    #: A whole document, or the headers of a blob; redirects, challenge and token included. Within the 25 seconds in
    #: which our own headers leave (product.md, promise 3).
    answer_s: float = 20.0
    #: A token, of which the asker above waits for the smaller part of its own deadline.
    token_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest body that is still waited for: `min_bytes_per_s` over any `window_s` seconds of waiting for it."""

    min_bytes_per_s: float = 10 * 1024
    window_s: float = 30.0


@dataclass(frozen=True, slots=True)
class UpstreamPolicy:
    """One upstream at one address, with one set of credentials.

    `host` is the source host, for sentences and metrics; `url` its address, with or without a path before /v2/.
    `token_realms` are hosts (`auth.docker.io`, or with a port to mean that port alone) that may receive the credentials
    besides the origin of `url`. `tls` None means the system's trust.
    """

    host: str
    url: str
    credentials: Credentials | None = None
    token_realms: frozenset[str] = frozenset()
    allow_private: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    deadlines: Deadlines = Deadlines()
    pace: Pace = Pace()
    #: The HTTP proxy to go through, "" for none; and what is excepted from it (upstream/detour.py).
    http_proxy: str = ""
    no_proxy: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Who we are to this upstream, without any secret."""
        return self.credentials.identity if self.credentials else "anonymous"
