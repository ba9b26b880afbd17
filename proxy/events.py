"""Facts worth counting or logging. Values only; what becomes of them is telemetry's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The six words for how a request ended (house.md §6.3), the same in metrics, logs and headers.
Outcome = Literal["hit", "coalesced", "miss", "stale", "denied", "failed"]


@dataclass(frozen=True, slots=True)
class UpstreamAsked:
    """One HTTP request was sent to an upstream. `status` is 0 when no answer came. `kind`: manifest, blob, token, …"""

    upstream: str
    kind: str
    method: str
    status: int


@dataclass(frozen=True, slots=True)
class UpstreamBytes:
    """Body bytes arrived from an upstream."""

    upstream: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """A transfer came to its end. `failure` is "" when it was kept; `n_bytes` were received."""

    upstream: str
    repository: str
    digest: str
    n_bytes: int
    seconds: float
    failure: str


@dataclass(frozen=True, slots=True)
class TagMoved:
    """Upstream now answers a tag with another digest."""

    upstream: str
    repository: str
    tag: str
    was: str
    now: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """Blobs were deleted to make room."""

    n_blobs: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Noticed:
    """Something an operator should read, in one sentence. `level` as in logging."""

    level: Literal["info", "warning", "error"]
    sentence: str


Event = UpstreamAsked | UpstreamBytes | TransferEnded | TagMoved | Evicted | Noticed
