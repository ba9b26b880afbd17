"""Logins that expire: kept, renewed before they do, and fetched once for all who wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxy.errors import UpstreamError
from proxy.ports import Clock
from proxy.upstream.credentials import Login
from proxy.upstream.tokens import Spawn

#: A login is renewed when this share of its life has passed, or this many seconds before its end, whichever is first.
_SHARE = 0.8
_EARLY_S = 300.0
#: While the old login still holds, a renewal that failed is tried again after so many seconds; else after fewer, so
#: that a source that refuses is not asked by every request.
_AGAIN_S = 30.0
_AGAIN_WITHOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A login and for how many seconds from now it holds."""

    login: Login
    lifetime_s: float


class RenewingCredentials:
    """Passes the `Credentials` port over `fetch`, which brings a fresh lease or raises as `Credentials.login` may."""

    def __init__(self, identity: str, fetch: Callable[[], Awaitable[Lease]], *, clock: Clock, spawn: Spawn) -> None:
        self._identity = identity
        self._fetch = fetch
        self._clock = clock
        self._spawn = spawn
        self._login: Login | None = None
        self._renew_at = 0.0
        self._ends_at = 0.0
        self._failure: UpstreamError | None = None
        self._ask_again_at = 0.0
        self._flight: asyncio.Task[None] | None = None

    @property
    def identity(self) -> str:
        """Who it is for and where it comes from."""
        return self._identity

    async def login(self) -> Login:
        """The login of now. One that is due for renewal is still given while it holds; the renewal runs beside it."""
        now = self._clock.monotonic()
        if self._login is not None and now < self._ends_at:
            if now >= self._renew_at and now >= self._ask_again_at:
                self._start()
            return self._login
        if self._failure is not None and now < self._ask_again_at:
            raise type(self._failure)(str(self._failure), upstream=self._failure.upstream)
        await asyncio.shield(self._start())
        if self._failure is not None:
            raise type(self._failure)(str(self._failure), upstream=self._failure.upstream)
        assert self._login is not None
        return self._login

    def __repr__(self) -> str:
        return f"RenewingCredentials({self._identity!r})"

    def _start(self) -> asyncio.Task[None]:
        if self._flight is None or self._flight.done():
            self._flight = self._spawn(self._renew(), f"login {self._identity}")
        return self._flight

    async def _renew(self) -> None:
        try:
            lease = await self._fetch()
        except UpstreamError as error:
            now = self._clock.monotonic()
            self._failure = error
            holds = self._login is not None and now < self._ends_at
            self._ask_again_at = now + (_AGAIN_S if holds else _AGAIN_WITHOUT_S)
            return
        now = self._clock.monotonic()
        self._failure = None
        self._login = lease.login
        self._ends_at = now + lease.lifetime_s
        self._renew_at = now + min(lease.lifetime_s * _SHARE, max(lease.lifetime_s - _EARLY_S, lease.lifetime_s / 2))
        self._ask_again_at = 0.0
