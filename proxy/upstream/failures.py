"""What went wrong upstream, told apart: exceptions of aiohttp and the system, and status codes, to our classes.

Foreign exceptions stop here. Their own texts are not passed on: they quote URLs with signatures and headers with
tokens.

The rules for status codes, where the RFCs leave a choice:
- 503 with a readable Retry-After is `Throttled`, because it asks for what a 429 asks for: stay away this long. Without
  one it is an outage, `Unreachable`, as every other 5xx and 408.
- 401 and 403 from a host that we were redirected to, and that so never saw our credentials, is `Unreachable`: what was
  refused is a signed address, and asking the registry again yields a new one.
- 404 and 410 are `NotFound`, and only those: nothing else proves absence.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import aiohttp

from proxy.errors import (
    BreakwaterError,
    Misbehaved,
    Throttled,
    Timeout,
    Unauthorised,
    UnknownBlob,
    UnknownManifest,
    UnknownName,
    Unreachable,
    UpstreamError,
)

#: Longer than this nobody waits because a header says so; an upstream that means a day says it again in an hour.
MAX_RETRY_AFTER_S = 3600.0


class AddressDenied(OSError):
    """A name resolved to nothing that may be connected to (INV-7). Travels through aiohttp as an OSError does."""


# -- exceptions --------------------------------------------------------------------------------------------------------


def _denied(error: BaseException) -> str | None:
    """The sentence of an AddressDenied that aiohttp wrapped, however deep."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return str(error) if isinstance(error, AddressDenied) else None


def _strerror(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
        if isinstance(error, ConnectionResetError) and not error.errno:
            return "it broke off the TLS handshake"  # a reset that the system tells of has a number
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if isinstance(number, int) and number > 0 else "the connection failed"


def _certificate(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    return f"its TLS certificate does not hold: {getattr(error, 'verify_message', '') or 'verification failed'}"


def _tls(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    reason = getattr(error, "reason", None)
    return f"TLS failed: {reason.lower().replace('_', ' ') if isinstance(reason, str) else 'the handshake broke'}"


def _says(words: str) -> Callable[[BaseException], str]:
    return lambda _: words


#: The one table. The first entry whose exception matches counts, so children stand before their parents; a test keeps
#: it total over aiohttp.ClientError's subclasses.
_TABLE: tuple[tuple[type[BaseException], type[UpstreamError], Callable[[BaseException], str]], ...] = (
    (aiohttp.ClientConnectorDNSError, Unreachable, _says("its name does not resolve")),
    (aiohttp.ClientConnectorCertificateError, Unreachable, _certificate),
    (aiohttp.ClientSSLError, Unreachable, _tls),
    (aiohttp.ServerFingerprintMismatch, Misbehaved, _says("its TLS certificate is not the expected one")),
    (aiohttp.ClientHttpProxyError, Unreachable, _says("the HTTP proxy in between refused to connect")),
    (aiohttp.ClientProxyConnectionError, Unreachable, _says("the HTTP proxy in between cannot be reached")),
    (aiohttp.ConnectionTimeoutError, Timeout, _says("connecting took too long")),
    (aiohttp.ServerTimeoutError, Timeout, _says("it fell silent")),
    (aiohttp.ClientConnectorError, Unreachable, _strerror),
    (aiohttp.ServerDisconnectedError, Unreachable, _says("it closed the connection without an answer")),
    (aiohttp.ClientOSError, Unreachable, _strerror),
    (aiohttp.ClientConnectionError, Unreachable, _says("the connection broke")),
    (aiohttp.ClientPayloadError, Unreachable, _says("the body broke off before its end")),
    (aiohttp.TooManyRedirects, Misbehaved, _says("it redirects in circles")),
    (aiohttp.RedirectClientError, Misbehaved, _says("it redirects to something that is not a URL")),
    (aiohttp.InvalidURL, Misbehaved, _says("it leads to something that is not a URL")),
    (aiohttp.NonHttpUrlClientError, Misbehaved, _says("it leads away from HTTP")),
    (aiohttp.ClientResponseError, Misbehaved, _says("its answer is not HTTP that can be read")),
    (aiohttp.ClientError, Misbehaved, _says("the exchange failed in an unusual way")),
    (ssl.SSLCertVerificationError, Unreachable, _certificate),
    (ssl.SSLError, Unreachable, _tls),
    (asyncio.TimeoutError, Timeout, _says("it took too long")),
    (OSError, Unreachable, _strerror),
)

#: What `of_exception` has a class for; anything else is a bug of ours and stays visible as one.
FOREIGN = (aiohttp.ClientError, ssl.SSLError, asyncio.TimeoutError, OSError)


def of_exception(error: BaseException, *, upstream: str, place: str) -> UpstreamError:
    """The failure that `error`, one of `FOREIGN`, means. `place` is the host that was asked, for the sentence."""
    where = f"upstream {upstream}" if place == upstream else f"upstream {upstream} at {place}"
    if words := _denied(error):
        return Misbehaved(f"{where}: {words}", upstream=upstream)
    for foreign, ours, sentence in _TABLE:
        if isinstance(error, foreign):
            return ours(f"{where}: {sentence(error)}", upstream=upstream)
    raise TypeError(f"{type(error).__name__} is not a failure of an upstream") from error


# -- status codes ------------------------------------------------------------------------------------------------------


def of_status(
    status: int,
    *,
    upstream: str,
    what: str,
    absent: type[UnknownName] | type[UnknownManifest] | type[UnknownBlob] = UnknownName,
    words: str = "",
    retry_after_s: float | None = None,
    is_home: bool = True,
) -> BreakwaterError:
    """The failure that an answer with `status` is, where none that could be used was hoped for.

    `what` was asked for ("manifest library/alpine:3"); `words` are upstream's own, already made safe to print; `absent`
    is the NotFound that a 404 means; `is_home` is false where we had been redirected to another origin.
    """
    said = f": {words}" if words else ""
    if status in (404, 410):
        return absent(f"upstream {upstream} has no {what}{said}")
    if status in (401, 403) and not is_home:
        return Unreachable(
            f"upstream {upstream} redirected to a host that refuses its address for {what} ({status}{said})",
            upstream=upstream,
        )
    if status in (401, 403):
        return Unauthorised(f"upstream {upstream} refuses us {what} ({status}{said})", upstream=upstream)
    if status == 429 or (status == 503 and retry_after_s is not None):
        return Throttled(
            f"upstream {upstream} asks to come back later ({status}{said})",
            upstream=upstream,
            retry_after_s=retry_after_s,
        )
    if status == 408 or 500 <= status <= 599:
        return Unreachable(f"upstream {upstream} cannot answer for {what} ({status}{said})", upstream=upstream)
    return Misbehaved(f"upstream {upstream} answers {status} for {what}{said}", upstream=upstream)


def retry_after_s(value: str | None, *, now_at: float) -> float | None:
    """The seconds that a Retry-After header asks for: a number or an HTTP date (RFC 9110 §10.2.3), at most an hour.

    `now_at` is the wall clock, in seconds since 1970. None where there is no header or it cannot be read.

    >>> retry_after_s("120", now_at=0.0), retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", now_at=30.0),
    retry_after_s("soon", now_at=0.0) (120.0, 30.0, None)
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # what the parser raises on garbage, release by release
        return None
    return min(max(at - now_at, 0.0), MAX_RETRY_AFTER_S)
