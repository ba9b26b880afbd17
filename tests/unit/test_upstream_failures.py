"""What went wrong upstream, told apart (peers.md §5.5; reliability.md §3)."""

from __future__ import annotations

import socket
import ssl
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.client_exceptions import UnixClientConnectorError, UploadAbortedError
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from proxy import errors
from proxy.upstream import failures

_KEY = ConnectionKey("cdn.test", 443, True, True, None, None, None)
_SECRET = "https://cdn.test/blob?X-Amz-Signature=5ecret"
_INFO: Any = SimpleNamespace(real_url=URL(_SECRET), headers={"Authorization": "Bearer 5ecret"})


def _certificate_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] 5ecret")
    error.verify_message = "certificate has expired"
    return error


def _tls_error() -> ssl.SSLError:
    error = ssl.SSLError(1, "[SSL] 5ecret")
    error.reason = "WRONG_VERSION_NUMBER"
    return error


#: One of each: exception, our class, a piece of its sentence.
EXCEPTIONS: list[tuple[BaseException, type[errors.UpstreamError], str]] = [
    (
        aiohttp.ClientConnectorDNSError(_KEY, socket.gaierror(-2, "Name or service not known")),
        errors.Unreachable,
        "does not resolve",
    ),
    (
        aiohttp.ClientConnectorDNSError(_KEY, failures.AddressDenied("resolves to 10.0.0.1 (private)")),
        errors.Misbehaved,
        "10.0.0.1 (private)",
    ),
    (
        aiohttp.ClientConnectorCertificateError(_KEY, _certificate_error()),
        errors.Unreachable,
        "certificate has expired",
    ),
    (aiohttp.ClientConnectorSSLError(_KEY, _tls_error()), errors.Unreachable, "wrong version number"),
    (aiohttp.ClientSSLError(_KEY, _tls_error()), errors.Unreachable, "TLS failed"),
    (aiohttp.ServerFingerprintMismatch(b"", b"", "cdn.test", 443), errors.Misbehaved, "certificate"),
    (aiohttp.ClientHttpProxyError(_INFO, ()), errors.Unreachable, "HTTP proxy"),
    (aiohttp.ClientProxyConnectionError(_KEY, OSError(111, "x")), errors.Unreachable, "HTTP proxy"),
    (
        aiohttp.ConnectionTimeoutError(f"Connection timeout to host {_SECRET}"),
        errors.Timeout,
        "connecting took too long",
    ),
    (aiohttp.SocketTimeoutError("x"), errors.Timeout, "silent"),
    (aiohttp.ServerTimeoutError("x"), errors.Timeout, "silent"),
    (aiohttp.ClientConnectorError(_KEY, OSError(111, "x")), errors.Unreachable, "connection refused"),
    (aiohttp.ClientConnectorError(_KEY, OSError("Multiple exceptions: 5ecret")), errors.Unreachable, "failed"),
    (UnixClientConnectorError("/run/x", _KEY, OSError(2, "x")), errors.Unreachable, "no such file"),
    (aiohttp.ServerDisconnectedError(_SECRET), errors.Unreachable, "without an answer"),
    (aiohttp.ClientConnectionResetError(104, "x"), errors.Unreachable, "broke"),
    (aiohttp.ClientOSError(104, "Connection reset by peer"), errors.Unreachable, "connection reset by peer"),
    (aiohttp.ServerConnectionError(), errors.Unreachable, "broke"),
    (aiohttp.ClientConnectionError("x"), errors.Unreachable, "broke"),
    (aiohttp.ClientPayloadError(_SECRET), errors.Unreachable, "before its end"),
    (aiohttp.TooManyRedirects(_INFO, ()), errors.Misbehaved, "circles"),
    (aiohttp.InvalidUrlRedirectClientError(_SECRET), errors.Misbehaved, "not a URL"),
    (aiohttp.NonHttpUrlRedirectClientError(_SECRET), errors.Misbehaved, "not a URL"),
    (aiohttp.RedirectClientError(_SECRET), errors.Misbehaved, "not a URL"),
    (aiohttp.InvalidUrlClientError(_SECRET), errors.Misbehaved, "not a URL"),
    (aiohttp.InvalidURL(_SECRET), errors.Misbehaved, "not a URL"),
    (aiohttp.NonHttpUrlClientError(_SECRET), errors.Misbehaved, "away from HTTP"),
    (aiohttp.ContentTypeError(_INFO, ()), errors.Misbehaved, "not HTTP"),
    (aiohttp.WSServerHandshakeError(_INFO, ()), errors.Misbehaved, "not HTTP"),
    (aiohttp.ClientResponseError(_INFO, (), message="5ecret"), errors.Misbehaved, "not HTTP"),
    (UploadAbortedError(_SECRET), errors.Misbehaved, "unusual"),
    (aiohttp.ClientError(_SECRET), errors.Misbehaved, "unusual"),
    (_certificate_error(), errors.Unreachable, "certificate has expired"),
    (_tls_error(), errors.Unreachable, "TLS failed"),
    (TimeoutError(), errors.Timeout, "too long"),
    (ConnectionResetError(104, "x"), errors.Unreachable, "connection reset by peer"),
    (OSError("5ecret"), errors.Unreachable, "failed"),
]


@pytest.mark.parametrize(
    ("error", "ours", "piece"), EXCEPTIONS, ids=[f"{type(row[0]).__name__}-{n}" for n, row in enumerate(EXCEPTIONS)]
)
def test_exception_becomes_a_class_and_a_sentence(
    error: BaseException, ours: type[errors.UpstreamError], piece: str
) -> None:
    """Each foreign exception has one meaning, says who, and passes on no URL, header or text of its own."""
    failure = failures.of_exception(error, upstream="registry.test", place="cdn.test")
    assert type(failure) is ours
    assert failure.upstream == "registry.test"
    assert piece in str(failure) and "registry.test" in str(failure) and "cdn.test" in str(failure)
    assert "5ecret" not in str(failure)


def _subclasses(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind} | {deeper for child in kind.__subclasses__() for deeper in _subclasses(child)}


def test_table_is_total_over_the_exceptions_of_aiohttp() -> None:
    """A new aiohttp with a new exception makes this fail, and not a request."""
    theirs = {kind for kind in _subclasses(aiohttp.ClientError) if kind.__module__.startswith("aiohttp")}
    tried = {type(error) for error, _, _ in EXCEPTIONS}
    assert theirs - tried <= {kind for kind in theirs if kind.__name__.startswith("_")}


def test_mistake_of_ours_is_not_called_a_failure_upstream() -> None:
    """A bug stays visible as one."""
    with pytest.raises(TypeError):
        failures.of_exception(KeyError("x"), upstream="registry.test", place="registry.test")


@pytest.mark.parametrize(
    ("status", "ours"),
    [
        (301, errors.Misbehaved),
        (304, errors.Misbehaved),
        (400, errors.Misbehaved),
        (401, errors.Unauthorised),
        (403, errors.Unauthorised),
        (404, errors.UnknownBlob),
        (405, errors.Misbehaved),
        (406, errors.Misbehaved),
        (408, errors.Unreachable),
        (410, errors.UnknownBlob),
        (416, errors.Misbehaved),
        (418, errors.Misbehaved),
        (429, errors.Throttled),
        (500, errors.Unreachable),
        (502, errors.Unreachable),
        (503, errors.Unreachable),
        (504, errors.Unreachable),
        (599, errors.Unreachable),
        (999, errors.Misbehaved),
        (204, errors.Misbehaved),
    ],
)
def test_status_becomes_a_class(status: int, ours: type[errors.BreakwaterError]) -> None:
    """404 and 410 alone prove absence; everything else is "could not find out"."""
    failure = failures.of_status(
        status, upstream="registry.test", what="blob a@b", absent=errors.UnknownBlob, words="no luck"
    )
    assert type(failure) is ours
    assert "registry.test" in str(failure) and "no luck" in str(failure)


@pytest.mark.parametrize("status", [429, 503])
def test_asking_to_come_back_later_is_throttling(status: int) -> None:
    """503 with Retry-After asks for what 429 asks for (RFC 9110 §15.6.4)."""
    failure = failures.of_status(status, upstream="registry.test", what="x", retry_after_s=7.0)
    assert isinstance(failure, errors.Throttled) and failure.retry_after_s == 7.0


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_by_storage_is_not_a_refusal_of_our_login(status: int) -> None:
    """A signed address that expired is had anew by asking the registry again; our login is not in question."""
    failure = failures.of_status(status, upstream="registry.test", what="x", is_home=False)
    assert isinstance(failure, errors.Unreachable)


NOON_AT = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        (" 120 ", 120.0),
        ("3601", 3600.0),
        ("9" * 400, 3600.0),
        ("-5", None),
        ("1.5", None),
        ("1e3", None),
        ("٣", None),
        ("soon", None),
        ("Fri, 15 Jan 2027 08:01:30 GMT", 90.0),
        ("Friday, 15-Jan-27 08:01:30 GMT", 90.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("Fri, 15 Jan 2037 08:00:00 GMT", 3600.0),
        ("Fri, 99 Jan 2027 08:00:00 GMT", None),
        ("Fri, 15 Jan 99999 08:00:00 GMT", None),
        ("\x00", None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_garbage_is_tolerated(header: str | None, seconds: float | None) -> None:
    """RFC 9110 §10.2.3; at most an hour, so that a wrong clock upstream does not close it for a year."""
    assert failures.retry_after_s(header, now_at=NOON_AT) == seconds
