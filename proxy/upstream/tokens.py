"""From a challenge to an Authorization header (distribution's token specification; peers.md §5.5).

Keeps INV-7 for credentials: they go to the upstream's own origin and to the realms that the settings name, and a realm
that is neither is asked without them (CVE-2026-33540). A token is fetched once for all who wait for it, used until
shortly before it expires, and sent at once with the next request for the same repository. A login that is refused is
not repeated for a minute, so that a wrong password cannot lock an account (Harbor #22569).

What is remembered is true for one process, one upstream, one identity; all tables are bounded.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

from cachetools import TLRUCache, TTLCache
from yarl import URL

from proxy.errors import Misbehaved, Timeout, Unauthorised, UpstreamError
from proxy.oci import challenge as challenges
from proxy.oci.names import Repository
from proxy.ports import Clock
from proxy.upstream import answers, failures
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.targets import Targets, shown
from proxy.upstream.wire import Wire

T = TypeVar("T")

#: A token answer of more than this is not one.
MAX_TOKEN_ANSWER_BYTES = 64 * 1024
#: Where a token answer does not say (distribution's token specification).
DEFAULT_LIFETIME_S = 60.0
#: Longer than this no token is kept, whatever it says of itself.
MAX_LIFETIME_S = 24 * 3600.0
#: For this long a refused login is not tried again.
REFUSAL_S = 60.0
#: Repositories whose way to log in is remembered, and tokens kept.
MAX_KEPT = 4096

_TOKEN = re.compile(r"[\x21-\x7e]+")


class Spawn(Protocol):
    """Starts a task that somebody owns: `engine.tasks.TaskOwner.spawn`."""

    def __call__(self, work: Coroutine[Any, Any, T], name: str, /) -> asyncio.Task[T]:
        """Run `work` in a task called `name`."""
        ...


@dataclass(frozen=True, slots=True)
class _Way:
    """How to authenticate for a repository: by Basic (without a realm), or by a token from `realm`."""

    realm: URL | None
    service: str
    scope: str

    @property
    def is_basic(self) -> bool:
        return self.realm is None


#: Stands for the login as such, whatever it is used for.
_BASIC = _Way(None, "", "")
_BASIC_SCHEME = "Basic "


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    lifetime_s: float


class Tokens:
    """The Authorization headers of one upstream for one identity."""

    def __init__(
        self,
        policy: UpstreamPolicy,
        targets: Targets,
        wire: Wire,
        *,
        clock: Clock,
        spawn: Spawn,
        chance: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._targets = targets
        self._wire = wire
        self._clock = clock
        self._spawn = spawn
        self._chance = chance
        self._ways: TTLCache[Repository, _Way] = TTLCache(MAX_KEPT, ttl=MAX_LIFETIME_S, timer=clock.monotonic)
        self._headers: TLRUCache[_Way, _Token] = TLRUCache(MAX_KEPT, ttu=self._use_until, timer=clock.monotonic)
        #: Refused for a way, or under _BASIC for the login as such; with the sentence to repeat.
        self._refused: TTLCache[_Way, str] = TTLCache(MAX_KEPT, ttl=REFUSAL_S, timer=clock.monotonic)
        self._flights: dict[_Way, asyncio.Task[_Token | UpstreamError]] = {}
        #: Once a login has worked, a refusal is about what was asked for and not about the login.
        self._has_worked = False
        #: Held while a login that has not worked yet is tried.
        self._unproven = asyncio.Lock()

    async def ready(self, repository: Repository) -> str | None:
        """The Authorization header to send at once with a request for `repository`, or None when none is known.

        Raises Unauthorised, without asking anybody, when sending it would repeat a login that was refused within the
        last minute; and what a source of logins may raise. A login is taken from its source each time: one that has
        been renewed meanwhile counts at once, because some registries answer an expired one with 403 (ECR).
        """
        way = self._ways.get(repository)
        if way is None:
            return None
        if way.is_basic:
            self._raise_if_refused(_BASIC, way)
        token = self._headers.get(way)
        if token is not None and way.is_basic:
            return await self._basic()
        return token.header if token else None

    async def obtain(self, headers: Mapping[str, str], repository: Repository, *, rejected: str | None) -> str:
        """The Authorization header that answers the challenge in a 401's `headers`; `rejected` was sent and refused.

        Raises Unauthorised when there is none or the login was refused, and what fetching a token may raise.
        """
        way = self._way(headers, repository)
        self._ways[repository] = way
        kept = self._headers.get(way)
        if kept is not None and kept.header != rejected:
            return kept.header  # somebody else fetched it meanwhile
        self._headers.pop(way, None)
        self._raise_if_refused(_BASIC, way)
        if not way.is_basic:
            return (await self._fetched_once(way)).header
        header = await self._basic()
        if header == rejected:
            raise self.refusal(repository, f"upstream {self._policy.host} refuses our login for {repository} (401)")
        self._headers[way] = _Token(header, MAX_LIFETIME_S)
        return header

    @asynccontextmanager
    async def trial(self, header: str | None) -> AsyncIterator[None]:
        """To be held while `header` is on its way to upstream: a login that has not worked yet goes alone.

        Else everybody who asks at once would try the same wrong password. Raises as `ready`.
        """
        if header is None or not header.startswith(_BASIC_SCHEME) or self._has_worked:
            yield
            return
        async with self._unproven:
            self._raise_if_refused(_BASIC)
            yield

    def accepted(self, header: str | None) -> None:
        """Upstream knows who we are by this header: its answer was about what was asked for."""
        if header is not None and header.startswith(_BASIC_SCHEME):
            self._has_worked = True

    def refusal(self, repository: Repository, sentence: str) -> Unauthorised:
        """Upstream refused what had just been obtained: for a minute there is no point in obtaining another."""
        way = self._ways.get(repository, _BASIC)
        if way.realm is not None:
            sentence += self._hint(way.realm)  # some realms give everybody a token, that then opens nothing
        self._refused[_BASIC if way.is_basic and not self._has_worked else way] = sentence
        return Unauthorised(sentence, upstream=self._policy.host)

    # -- which way -----------------------------------------------------------------------------------------------------

    def _way(self, headers: Mapping[str, str], repository: Repository) -> _Way:
        offered = {challenge.scheme.lower(): challenge for challenge in reversed(challenges.parse(_all(headers)))}
        if bearer := offered.get("bearer"):
            realm = bearer.params.get("realm", "")
            if not realm:
                raise Misbehaved(
                    f"upstream {self._policy.host} asks for a token and does not say where from",
                    upstream=self._policy.host,
                )
            scope = bearer.params.get("scope") or challenges.pull_scope(repository)
            return _Way(self._targets.realm(realm), bearer.params.get("service", ""), scope)
        if "basic" in offered:
            return _Way(None, "", str(repository))
        told = ", ".join(sorted(offered))[:100] or "nothing that can be read"
        raise Unauthorised(
            f"upstream {self._policy.host} wants another kind of login than we have: {told}", upstream=self._policy.host
        )

    def _raise_if_refused(self, *ways: _Way) -> None:
        for way in ways:
            if sentence := self._refused.get(way):
                raise Unauthorised(f"{sentence}; not tried again within a minute", upstream=self._policy.host)

    # -- Basic ---------------------------------------------------------------------------------------------------------

    async def _basic(self) -> str:
        credentials = self._policy.credentials
        if credentials is None:
            raise Unauthorised(
                f"upstream {self._policy.host} wants a user name and password, and none are set for it",
                upstream=self._policy.host,
            )
        login = await credentials.login()
        return _basic_header(login.username, login.secret)

    # -- Bearer --------------------------------------------------------------------------------------------------------

    async def _fetched_once(self, way: _Way) -> _Token:
        """One request for all who wait, in a task with an owner of its own: a waiter who leaves does not end it."""
        flight = self._flights.get(way)
        if flight is None:
            flight = self._spawn(self._flight(way), f"token for {way.scope} of {self._policy.host}")
            self._flights[way] = flight
            flight.add_done_callback(lambda _: self._flights.pop(way, None))
        outcome = await asyncio.shield(flight)
        if isinstance(outcome, _Token):
            return outcome
        # One exception for all waiters: without this its traceback would grow by the frames of each.
        raise outcome.with_traceback(None)

    async def _flight(self, way: _Way) -> _Token | UpstreamError:
        try:
            token = await self._fetch(way)
        except UpstreamError as error:
            return error
        self._headers[way] = token
        return token

    async def _fetch(self, way: _Way) -> _Token:
        assert way.realm is not None
        headers = {"Accept": "application/json"}
        credentials = self._policy.credentials
        carries_login = credentials is not None and self._targets.receives_credentials(way.realm)
        try:
            async with asyncio.timeout(self._policy.deadlines.token_s), AsyncExitStack() as held:
                if credentials is not None and carries_login:
                    login = await credentials.login()
                    headers["Authorization"] = _basic_header(login.username, login.secret)
                    await held.enter_async_context(self.trial(headers["Authorization"]))
                reply = await self._wire.send("GET", _with_query(way), headers, kind="token")
                body = await reply.at_most(MAX_TOKEN_ANSWER_BYTES)
                if reply.status != 200:
                    raise self._realm_refusal(way, reply.status, reply.headers, body, carries_login=carries_login)
                self._has_worked = self._has_worked or carries_login
        except TimeoutError:
            raise Timeout(
                f"upstream {self._policy.host}: no token came from {shown(way.realm)} in time",
                upstream=self._policy.host,
            ) from None
        return self._read(way.realm, body)

    def _realm_refusal(
        self, way: _Way, status: int, headers: Mapping[str, str], body: bytes, *, carries_login: bool
    ) -> UpstreamError:
        assert way.realm is not None
        place, host = shown(way.realm), self._policy.host
        words = answers.words_of(body, headers)
        said = f" ({status}{f': {words}' if words else ''})"
        if status in (401, 403):
            as_whom = f"the login {self._policy.identity!r}" if carries_login else "anonymous access"
            sentence = f"upstream {host}: {place} refuses {as_whom} to {way.scope}{said}{self._hint(way.realm)}"
            is_login = status == 401 and carries_login and not self._has_worked
            self._refused[_BASIC if is_login else way] = sentence
            return Unauthorised(sentence, upstream=host)
        wait_s = failures.retry_after_s(headers.get("Retry-After"), now_at=self._clock.wall())
        error = failures.of_status(status, upstream=host, what=f"token from {place}", words=words, retry_after_s=wait_s)
        # A realm that is not there says nothing about what was asked of the registry.
        return (
            error
            if isinstance(error, UpstreamError)
            else Misbehaved(f"upstream {host}: no token from {place}{said}", upstream=host)
        )

    def _hint(self, realm: URL) -> str:
        if self._policy.credentials is None or self._targets.receives_credentials(realm):
            return ""
        return f"; the credentials were not sent there, because {realm.raw_authority} is not in token_realms"

    def _read(self, realm: URL, body: bytes) -> _Token:
        try:
            document = json.loads(body) if len(body) <= MAX_TOKEN_ANSWER_BYTES else None
        except (ValueError, RecursionError):
            document = None
        found = (document.get("token") or document.get("access_token")) if isinstance(document, dict) else None
        if not isinstance(document, dict) or not isinstance(found, str) or not _TOKEN.fullmatch(found):
            raise Misbehaved(
                f"upstream {self._policy.host}: {shown(realm)} answers without a token in it",
                upstream=self._policy.host,
            )
        return _Token(f"Bearer {found}", _lifetime_s(document.get("expires_in")))

    def _use_until(self, way: _Way, token: _Token, now: float) -> float:
        """Refreshed after 80 to 90 % of its life: before it can expire on the way, and not by every node at once."""
        return now + token.lifetime_s * (0.8 + 0.1 * self._chance())


def _all(headers: Mapping[str, str]) -> Sequence[str]:
    getall = getattr(headers, "getall", None)
    return list(getall("WWW-Authenticate", [])) if getall else [headers.get("WWW-Authenticate", "")]


def _basic_header(username: str, secret: str) -> str:
    return _BASIC_SCHEME + base64.b64encode(f"{username}:{secret}".encode()).decode("ascii")


def _with_query(way: _Way) -> URL:
    """The realm's own query stays as it is; scopes that came in one string go as one parameter each."""
    asked = ([("service", way.service)] if way.service else []) + [("scope", scope) for scope in way.scope.split()]
    text = str(way.realm)
    return URL(f"{text}{'&' if '?' in text else '?'}{urlencode(asked)}", encoded=True)


def _lifetime_s(value: object) -> float:
    """`expires_in`, believed where it is a sensible number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return DEFAULT_LIFETIME_S
    return min(float(value), MAX_LIFETIME_S)
