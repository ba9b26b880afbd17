"""One table from what went wrong to what a client reads: status, the spec's code, headers. A test keeps it total."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from aiohttp import web

from proxy import errors
from proxy.oci.codes import ErrorCode, envelope

#: Exception -> (code, status). The first entry whose class matches decides; so children stand before their parents.
#: Never 429: containerd hammers the same mirror on it and fails over on 5xx (peers.md §5.1, 6).
TABLE: tuple[tuple[type[errors.BreakwaterError], ErrorCode, int], ...] = (
    (errors.InvalidName, ErrorCode.NAME_INVALID, 400),
    (errors.InvalidTag, ErrorCode.TAG_INVALID, 400),
    (errors.InvalidDigest, ErrorCode.DIGEST_INVALID, 400),
    (errors.BadRequest, ErrorCode.REQUEST_INVALID, 400),
    (errors.Unsupported, ErrorCode.UNSUPPORTED, 405),
    (errors.UnknownManifest, ErrorCode.MANIFEST_UNKNOWN, 404),
    (errors.UnknownBlob, ErrorCode.BLOB_UNKNOWN, 404),
    (errors.NotFound, ErrorCode.NAME_UNKNOWN, 404),
    (errors.Denied, ErrorCode.DENIED, 403),
    (errors.Unauthenticated, ErrorCode.UNAUTHORIZED, 401),
    (errors.Overloaded, ErrorCode.UNAVAILABLE, 503),
    # Upstream's own fault, so a 5xx: the client should go elsewhere.
    (errors.InvalidManifest, ErrorCode.MANIFEST_INVALID, 502),
    (errors.Throttled, ErrorCode.TOOMANYREQUESTS, 503),
    (errors.Timeout, ErrorCode.UNAVAILABLE, 504),
    # Our credentials were refused, not the client's: a relayed 401 would make it log in here in vain.
    (errors.Unauthorised, ErrorCode.DENIED, 403),
    (errors.UpstreamError, ErrorCode.UNAVAILABLE, 502),
    (errors.StoreError, ErrorCode.UNAVAILABLE, 503),
    (errors.BreakwaterError, ErrorCode.UNKNOWN, 500),
)

#: What every answer says of us, and no library says for us.
COMMON: Mapping[str, str] = {
    "Server": "Breakwater",
    "Docker-Distribution-API-Version": "registry/2.0",
    "X-Content-Type-Options": "nosniff",
}

#: What a throttled client is told when upstream did not say, in seconds.
DEFAULT_RETRY_AFTER_S = 30.0


def answer(error: errors.BreakwaterError) -> web.Response:
    """The response for `error`: the spec's JSON envelope, exact and final."""
    code, status = next((code, status) for kind, code, status in TABLE if isinstance(error, kind))
    headers = {**COMMON, "Content-Type": "application/json", **_more(error)}
    return web.Response(status=status, headers=headers, body=envelope(code, str(error), _detail(error)))


def _more(error: errors.BreakwaterError) -> dict[str, str]:
    if isinstance(error, errors.Throttled):
        return {
            "Retry-After": str(ceil(error.retry_after_s if error.retry_after_s is not None else DEFAULT_RETRY_AFTER_S))
        }
    if isinstance(error, errors.Overloaded):
        return {"Retry-After": str(ceil(error.retry_after_s))}
    if isinstance(error, errors.Unauthenticated):
        # Docker's clients take this header for the sign that the challenge is a registry's.
        return {"WWW-Authenticate": error.challenge, "Docker-Distribution-API-Version": "registry/2.0"}
    if isinstance(error, errors.Unsupported):
        return {"Allow": "GET, HEAD"}
    return {}


def _detail(error: errors.BreakwaterError) -> Mapping[str, str] | None:
    if isinstance(error, errors.Denied) or (isinstance(error, errors.Unauthenticated) and error.rule):
        return {"rule": error.rule, "project": error.project}
    if isinstance(error, errors.UpstreamError):
        return {"upstream": error.upstream, "failure": error.failure}
    return None
