"""Facts worth counting or logging. Values only; what becomes of them is telemetry's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: The six words for how a request ended (house.md §6.3), the same in metrics, logs and headers.
Outcome = Literal["hit", "coalesced", "miss", "stale", "denied", "failed"]


#: What kind of thing was asked for: the bounded label of request metrics.
Kind = Literal["version", "manifest", "blob", "tags", "referrers", "other"]


@dataclass(slots=True)
class Answered:
    """One request of a client was answered. Strings from the client are raw: whoever writes them escapes them."""

    request_id: str
    remote: str
    method: str
    path: str
    user_agent: str
    kind: Kind = "other"
    status: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    #: "" for what is neither a manifest, a blob nor a list.
    outcome: Outcome | Literal[""] = ""
    upstream: str = ""
    repository: str = ""
    project: str = ""
    rule: str = ""
    #: The robot that asked, or the mark of the login that was passed through; "" for anybody.
    caller: str = ""
    #: How the body ended: "whole", "gone" (the client left), "slow" (cut), "short" (the transfer failed).
    ending: str = "whole"
    error: str = ""


#: Told that an answer was given again, from the table of ready answers: request id, the client's address, and when, in
#: seconds since 1970. Whoever watches events and prepares one leaves the same behind as for the event.
Repeat = Callable[[str, str, float], None]


@dataclass(frozen=True, slots=True)
class UpstreamAsked:
    """One HTTP request was sent to an upstream. `status` is 0 when no answer came. `kind`: manifest, blob, token, …"""

    upstream: str
    kind: str
    method: str
    status: int


@dataclass(frozen=True, slots=True)
class UpstreamUnreached:
    """A request could not even be sent: no name, no connection, no TLS. Upstream counts nothing, and neither do we."""

    upstream: str
    why: str


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
class TagHeld:
    """Upstream moved a tag that is immutable here: it keeps `kept`. `now` is "" where upstream has it no longer."""

    project: str
    upstream: str
    repository: str
    tag: str
    kept: str
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


@dataclass(frozen=True, slots=True)
class Changed:
    """What is allowed or kept was changed. `what`: robot, rules, blob, …; `how`: added, removed, changed, purged."""

    what: str
    name: str
    how: str


Event = (
    Answered
    | UpstreamAsked
    | UpstreamUnreached
    | UpstreamBytes
    | TransferEnded
    | TagMoved
    | TagHeld
    | Evicted
    | Changed
    | Noticed
)


# -- what events add up to ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RepositoryUse:
    """How much one repository was used since the start. `last_at` is wall-clock seconds since 1970."""

    project: str
    upstream: str
    repository: str
    n_requests: int
    n_bytes: int
    last_at: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """One request that a rule refused. Strings from the client are raw, and cut to a bounded length."""

    at: float
    remote: str
    method: str
    path: str
    project: str
    rule: str
    upstream: str
    repository: str
    sentence: str
