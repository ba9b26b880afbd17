"""Who may ask the admin listener what: by which name, from which page, and with a token for every change.

Three ways in are closed. A web page that gives its own name this machine's address (DNS rebinding) fails at Host: the
name is not one of ours. A page elsewhere that makes a browser send a form here fails at Origin and Sec-Fetch-Site
(CSRF). A program that reaches the port but may not change anything fails for want of the token. A Unix socket needs
neither name nor token: who may connect to it is decided by its folder and mode.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import hdrs, web

#: Methods that change nothing (RFC 9110 §9.2.1).
SAFE = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
#: What a page's form carries the token in.
TOKEN_FIELD = "token"
_FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered: a status and a sentence."""

    status: int
    sentence: str

    @property
    def headers(self) -> dict[str, str]:
        """What else belongs to the status."""
        return {"WWW-Authenticate": 'Bearer realm="breakwater admin"'} if self.status == 401 else {}


class Guard:
    """Judges requests to the admin listener."""

    def __init__(self, token: str, names: Collection[str], token_place: str) -> None:
        """`names`: host names of ours besides addresses and localhost. `token_place`: where people find the token."""
        self._token = token.encode()
        self._names = frozenset(name.lower() for name in names)
        self._token_place = token_place

    async def judge(self, request: web.Request) -> Refusal | None:
        """Why not, or None. A form's body is read for its token."""
        is_local = is_unix(request)
        if not is_local and (refusal := self._misdirected(request)) is not None:
            return refusal
        if request.method in SAFE:
            return None
        if (refusal := _cross_site(request)) is not None:
            return refusal
        if is_local or await self._has_token(request):
            return None
        return Refusal(401, f"changing something needs the token in {self._token_place}")

    def _misdirected(self, request: web.Request) -> Refusal | None:
        named = request.headers.getall(hdrs.HOST, [])
        host = _host_of(named[0]) if len(named) == 1 else None
        if host is None:
            return Refusal(400, "expected one Host header, with a host in it")
        if host == "localhost" or host in self._names or _is_address(host):
            return None
        return Refusal(
            421, f"{host[:150]!r} is not a name of this admin listener; add it to server.admin_hosts if it is"
        )

    async def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        if request.content_type != _FORM or request.path.startswith("/api/"):
            return False
        try:
            form = await request.post()
        except (web.HTTPException, ValueError):
            return False
        given_in_form = form.get(TOKEN_FIELD)
        return isinstance(given_in_form, str) and self._is_token(given_in_form.strip())

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)


def is_unix(request: web.Request) -> bool:
    """Whether the request came over a Unix socket."""
    ours = request.transport.get_extra_info("socket") if request.transport is not None else None
    return ours is not None and ours.family == socket.AF_UNIX


def _cross_site(request: web.Request) -> Refusal | None:
    """A browser says where a request comes from: by Sec-Fetch-Site, older ones by Origin. Programs say nothing."""
    refusal = Refusal(403, "this came from another site's page; changes are made from the dashboard or by programs")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return refusal
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return None
    # The scheme is not compared: a reverse proxy may have taken TLS off. "null" has no host, and is nobody's page.
    try:
        theirs = urlsplit(origin).netloc
    except ValueError:
        return refusal
    return None if theirs and theirs.lower() == request.headers.get(hdrs.HOST, "").lower() else refusal


def _host_of(value: str) -> str | None:
    """The host of a Host header in lower case, without its port and without brackets; None for what is none."""
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port  # raises for what is no port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == value and "@" not in value else None


def _is_address(host: str) -> bool:
    """An address cannot be rebound: whoever asks under it has reached it as such."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
