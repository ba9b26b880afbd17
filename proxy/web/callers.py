"""Who asks: the Authorization header becomes a caller, and the token endpoint gives out tokens for it.

Once any robot exists, `/v2/` is answered with a Bearer challenge, as container clients expect of a registry with
accounts; anonymous tokens are issued to whoever shows nothing. Basic is understood, because a header in hosts.toml may
carry it, and never asked for: a client that is asked for Basic sends its user's password for another registry
(peers.md §5.1, 10).

Where upstreams judge clients' own logins (`pass_through`), the same challenge brings those: a client that has one shows
it to the token endpoint, one that has none gets a token for nobody. Such a login is kept in memory for as long as its
token lives, and a token stands for it by a keyed hash.

Who may read what is not decided here: that is a gate's, on every request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qs

from aiohttp import web
from cachetools import TTLCache

from proxy import errors
from proxy.engine.access import ANONYMOUS, Caller, Login, Robot
from proxy.engine.robots import Robots
from proxy.oci.endpoints import VersionCheck
from proxy.oci.names import HOST
from proxy.ports import Clock
from proxy.web.tokens import LIFETIME_S, Tokens

#: Where tokens are. Not below /v2/, where every name could be somebody's repository.
TOKEN_PATH = "/token"
#: How long a token that was read is remembered, in seconds, and how many are.
REMEMBERED_S, MAX_REMEMBERED = 60.0, 20_000
#: Names and secrets beyond this are nobody's.
MAX_HEADER = 8192
MAX_SCOPES = 32

_HOST_HEADER = re.compile(HOST, re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a request showed of its sender.

    `is_known`: it showed something that is ours, a secret or a token (an anonymous one, too). `good_until` is
    monotonic. `delay_s`: how long a refusal waits, for one who has failed before. `may_be_kept`: an answer to these very
    bytes may be kept beside them, or, where `is_secret`, beside a keyed hash of them alone: they hold a password.
    """

    caller: Caller = ANONYMOUS
    is_known: bool = False
    good_until: float = float("inf")
    delay_s: float = 0.0
    may_be_kept: bool = True
    is_secret: bool = False


_NOTHING = Shown()
#: Something that is not ours.
_SOMETHING = Shown(may_be_kept=False)


class Callers:
    """Reads credentials and gives out tokens. True for this process."""

    def __init__(
        self,
        robots: Robots,
        accounts: Callable[[], Mapping[str, Robot]],
        *,
        clock: Clock,
        is_tls: bool,
        public_url: str = "",
        takes_logins: Callable[[], bool] = lambda: False,
    ) -> None:
        """`accounts` gives the robots of the settings in effect, `takes_logins` whether any upstream of theirs judges
        clients' own logins; never both. `public_url`: where clients reach us, if not by the name that they ask with."""
        self._robots = robots
        self._accounts = accounts
        self._clock = clock
        self._scheme = "https" if is_tls else "http"
        self._public_url = public_url
        self._takes_logins = takes_logins
        self._key = secrets.token_bytes(32)
        self._tokens = Tokens(clock)
        #: The logins that tokens stand for, by their marks.
        self._logins: TTLCache[str, Login] = TTLCache(MAX_REMEMBERED, LIFETIME_S, timer=clock.monotonic)
        self._remembered: TTLCache[str, tuple[str, str, float]] = TTLCache(
            MAX_REMEMBERED, REMEMBERED_S, timer=clock.monotonic
        )

    async def of(self, request: web.BaseRequest) -> Shown:
        """Who sent this. Whatever is not ours counts as nothing."""
        header = request.headers.get("Authorization")
        if header is None:
            return _NOTHING
        accounts = self._accounts()
        if not self._asks or len(header) > MAX_HEADER:
            return _SOMETHING
        scheme, _, rest = header.partition(" ")
        if scheme.lower() == "bearer":
            return self._bearer(accounts, rest.strip())
        if scheme.lower() == "basic" and (given := _name_and_secret(rest)) is not None:
            if self._takes_logins():
                return Shown(Caller(login=self._login(*given)) if any(given) else ANONYMOUS, True, is_secret=True)
            return await self._secret(accounts, *given, request.remote or "unix")
        return _SOMETHING

    def must_log_in(self, shown: Shown) -> bool:
        """Whether `/v2/` challenges: where there are accounts, here or at an upstream, whoever shows none."""
        return self._asks and not shown.is_known

    def challenge(self, request: web.BaseRequest, repository: str = "") -> str:
        """The WWW-Authenticate value: where the token endpoint is, by the name that the client knows us by."""
        scope = f',scope="repository:{repository}:pull"' if repository else ""
        return f'Bearer realm="{self._url(request)}{TOKEN_PATH}",service="{_service(request)}"{scope}'

    async def token(self, request: web.BaseRequest) -> web.Response:
        """GET /token: a token for the robot whose name and secret came with it, or for anybody.

        Wrong ones get 401 when they ask for no repository (that is a log-in, and its user wants to know), else a token
        for anybody: the request it is used for will be judged. Where upstreams judge, any login gets a token that
        stands for it. Raises UnknownName where there is nobody to log in as.
        """
        accounts = self._accounts()
        if not self._asks:
            raise errors.UnknownName("there are no accounts here, and so no tokens; the registry is under /v2/")
        if request.method != "GET":
            raise errors.Unsupported("tokens are asked for with GET")
        try:
            query = parse_qs(request.raw_path.partition("?")[2], max_num_fields=100)
        except ValueError:
            raise errors.BadRequest("a token is asked for with fewer parameters") from None
        scopes = [scope for line in query.get("scope", ()) for scope in line.split()][:MAX_SCOPES]
        robot = mark = ""
        header = request.headers.get("Authorization", "")
        given = _name_and_secret(header.partition(" ")[2]) if header.lower().startswith("basic ") else None
        if given is not None and any(given) and self._takes_logins():
            login = self._login(*given)
            mark, self._logins[login.mark] = login.mark, login
        elif given is not None and accounts:
            verdict = await self._robots.check(accounts, *given, request.remote or "unix")
            robot, mark = verdict.robot, verdict.mark
            if not robot and not scopes:
                await self._clock.sleep(verdict.delay_s)
                raise errors.Unauthenticated(
                    "no robot has this name and secret, or its time is over", challenge=self.challenge(request)
                )
        now = datetime.fromtimestamp(int(self._clock.wall()), UTC)
        token = self._tokens.issue(robot, mark, _service(request), scopes)
        document = {
            "token": token,
            "access_token": token,
            "expires_in": LIFETIME_S,
            "issued_at": now.isoformat().replace("+00:00", "Z"),
        }
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(headers=headers, body=json.dumps(document).encode())

    async def _secret(self, accounts: Mapping[str, Robot], name: str, secret: str, source: str) -> Shown:
        verdict = await self._robots.check(accounts, name, secret, source)
        if not verdict.robot:
            return Shown(delay_s=verdict.delay_s, may_be_kept=False)
        return Shown(Caller(verdict.robot), True, self._until(accounts[name].expires_at), is_secret=True)

    def _bearer(self, accounts: Mapping[str, Robot], token: str) -> Shown:
        known = self._remembered.get(token)
        if known is None:
            bearer = self._tokens.read(token)
            if bearer is None:
                return _SOMETHING
            known = self._remembered[token] = (bearer.robot, bearer.mark, bearer.expires_at)
        name, mark, expires_at = known
        now = self._clock.wall()
        if now >= expires_at:
            return _SOMETHING
        if not name and mark:
            login = self._logins.get(mark)
            if login is None or not self._takes_logins():
                return _SOMETHING
            return Shown(Caller(login=login), True, self._until(expires_at))
        if not name:
            return Shown(is_known=True, good_until=self._until(expires_at))
        robot = accounts.get(name)
        # A token dies with the secret it was given for, and with the robot.
        if robot is None or robot.is_expired(now) or all(one.mark != mark for one in robot.hashes):
            return _SOMETHING
        ends_at = min(expires_at, robot.expires_at or expires_at)
        return Shown(Caller(name), True, self._until(ends_at))

    @property
    def _asks(self) -> bool:
        """Whether anybody can log in at all."""
        return bool(self._accounts()) or self._takes_logins()

    def _login(self, name: str, secret: str) -> Login:
        """What an upstream is to judge. The mark is of no use to whoever reads it in a token or a log."""
        words = f"{name}\0{secret}".encode("utf-8", "surrogatepass")
        return Login(hashlib.blake2b(words, key=self._key, digest_size=16).hexdigest(), name, secret)

    def _until(self, wall: float | None) -> float:
        return float("inf") if wall is None else self._clock.monotonic() + (wall - self._clock.wall())

    def _url(self, request: web.BaseRequest) -> str:
        return self._public_url or f"{self._scheme}://{_service(request)}"


def repository_of(asked: object) -> str:
    """The name in a request's path, for the scope of a challenge; "" for `/v2/`."""
    if isinstance(asked, VersionCheck):
        return ""
    path = getattr(asked, "path", None)
    return path.name if path is not None else ""


def _service(request: web.BaseRequest) -> str:
    """The name that the client knows us by, where it is one."""
    host = request.headers.get("Host", "")
    return host if _HOST_HEADER.fullmatch(host) else "breakwater"


def _name_and_secret(encoded: str) -> tuple[str, str] | None:
    """RFC 7617. None for what is not Basic credentials."""
    try:
        name, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return (name, secret) if colon else None
