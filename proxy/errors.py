"""What can go wrong, by meaning.

No HTTP and no I/O here: `web/errors.py` has the one table from these to status codes and the spec's error codes, and
a test keeps that table total. Each error carries a sentence for a person (`str(error)`): what happened, to which
upstream or file, and what to do next.
"""

from __future__ import annotations

from typing import Literal


class BreakwaterError(Exception):
    """The root. Raised only through its children."""


# -- what the client asked for -------------------------------------------------------------------------------------


class BadRequest(BreakwaterError):
    """The request cannot be understood; asking again the same way will not help."""


class InvalidName(BadRequest):
    """A repository name or source host outside the distribution-spec's grammar."""


class InvalidTag(BadRequest):
    """A tag outside the distribution-spec's grammar."""


class InvalidDigest(BadRequest):
    """A digest of an unknown algorithm, or not in lower-case hex of the right length."""


class BadArchive(BadRequest):
    """An archive that is refused: damaged, hostile, or not what its contents say."""


class InvalidManifest(BreakwaterError):
    """Bytes that claim to be a manifest and are not (CVE-2021-41190 and its kin), or exceed the 4 MiB limit."""


class Unsupported(BreakwaterError):
    """A verb that a read-only registry does not have."""


class NotFound(BreakwaterError):
    """Absent for certain. "Could not find out" is an `UpstreamError`, never this."""

    what: Literal["name", "manifest", "blob"] = "name"


class UnknownName(NotFound):
    """No such repository, or no upstream is configured for it."""

    what = "name"


class UnknownManifest(NotFound):
    """The repository has no such tag or manifest digest."""

    what = "manifest"


class UnknownBlob(NotFound):
    """The repository has no such blob."""

    what = "blob"


class Denied(BreakwaterError):
    """Refused by a rule. `rule` and `project` are the words that logs, metrics and the error body share."""

    def __init__(self, sentence: str, *, rule: str, project: str) -> None:
        super().__init__(sentence)
        self.rule = rule
        self.project = project


class Unauthenticated(BreakwaterError):
    """The caller must say who they are. `challenge` is the WWW-Authenticate value to answer with.

    `rule` and `project` as in Denied, where a project's readers are what refuses; else "".
    """

    def __init__(self, sentence: str, *, challenge: str, rule: str = "", project: str = "") -> None:
        super().__init__(sentence)
        self.challenge = challenge
        self.rule = rule
        self.project = project


class Overloaded(BreakwaterError):
    """We have too much to do; come back in `retry_after_s` seconds, or ask somebody else."""

    def __init__(self, sentence: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


# -- an upstream ---------------------------------------------------------------------------------------------------

FailureClass = Literal["unreachable", "timeout", "throttled", "unauthorised", "misbehaved"]


class UpstreamError(BreakwaterError):
    """An upstream did not give a usable answer. `upstream` is its source host; `failure` the class of it."""

    failure: FailureClass = "misbehaved"

    def __init__(self, sentence: str, *, upstream: str) -> None:
        super().__init__(sentence)
        self.upstream = upstream


class Unreachable(UpstreamError):
    """No connection, a connection that broke, or a 5xx."""

    failure = "unreachable"


class Timeout(UpstreamError):
    """A deadline of ours passed: connect, headers, or the minimum throughput of a body."""

    failure = "timeout"


class Throttled(UpstreamError):
    """429, or a budget that is spent. `retry_after_s` seconds, where upstream said or we know."""

    failure = "throttled"

    def __init__(self, sentence: str, *, upstream: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence, upstream=upstream)
        self.retry_after_s = retry_after_s


class Unauthorised(UpstreamError):
    """Upstream refused our credentials (401 after the token dance, or 403)."""

    failure = "unauthorised"


class Misbehaved(UpstreamError):
    """Upstream lied: wrong digest, wrong length, nonsense in place of an answer, a redirect we do not follow."""

    failure = "misbehaved"


# -- our store -----------------------------------------------------------------------------------------------------


class StoreError(BreakwaterError):
    """The local disk did not do what was asked."""


class OutOfSpace(StoreError):
    """No room within capacity, or the file system said ENOSPC or EDQUOT."""


class OverQuota(OutOfSpace):
    """There is room in the store, but no project that asks may use more of it. The store itself is well."""


class Unavailable(StoreError):
    """The file system failed: EIO, read-only, permission. Hits may still work."""


class Corrupt(StoreError):
    """Stored bytes are not what their name or checksum says."""


# -- settings and commands -----------------------------------------------------------------------------------------


class InvalidSettings(BreakwaterError):
    """Every problem of a settings file at once. `problems` is one sentence per problem, each with its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
