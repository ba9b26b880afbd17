"""Upstreams that judge each client's own login (`pass_through`): nobody reads here what upstream would not show them.

Bytes, links and tags are shared by all logins of a repository; the right to them is not. Before anything of the
repository is looked up, upstream is asked with the client's own login for the very thing that the client asks for: a
HEAD, whether it is cached, on its way or neither, so that neither the answer nor its cost tells a stranger what is here
(INV-8). A yes opens this repository to this login for the time that the settings give it, a no closes it for a minute
at most. Only a keyed hash of a login is remembered with what was decided about it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cachetools import TLRUCache

from proxy.engine.flights import Flights
from proxy.engine.origins import Origin, PassThrough
from proxy.engine.tasks import TaskOwner
from proxy.errors import Denied, NotFound, Overloaded, Throttled, Unauthenticated, Unauthorised
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, TagsList
from proxy.ports import Clock, Upstream
from proxy.rules.gates.access import Caller, Login
from proxy.rules.routes import Route

#: The word that a refusal, the log and `explain` use for it.
RULE = "pass_through"
#: How long a refusal is remembered at most, in seconds: as long as upstream/tokens.py repeats no refused login, and
#: short enough for somebody who was just given the right.
REFUSED_FOR_S = 60.0
#: Decisions, and answers of "not found", remembered at a time.
MAX_REMEMBERED = 50_000

Asked = ManifestGet | BlobGet | TagsList | ReferrersList
#: The mark of a login ("" for none), source host, repository.
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Decision:
    """What upstream decided about one login and one repository. `refusal` is its sentence, "" for a yes."""

    by: PassThrough
    lasts_s: float
    refusal: str = ""


class Admissions:
    """What upstreams decided about logins. True for this process; a restart asks again."""

    def __init__(self, *, clock: Clock, owner: TaskOwner) -> None:
        self._clock = clock
        self._decided: TLRUCache[Key, _Decision] = TLRUCache(
            MAX_REMEMBERED, ttu=lambda _, decision, now: now + decision.lasts_s, timer=clock.monotonic
        )
        #: For how long, and what is said: an error that was raised would keep the frames of its askers alive.
        self._absent: TLRUCache[tuple[Key, str], tuple[float, type[NotFound], str]] = TLRUCache(
            MAX_REMEMBERED, ttu=lambda _, value, now: now + value[0], timer=clock.monotonic
        )
        self._asking: Flights[tuple[Key, str], _Decision] = Flights(owner, "ask with a login")

    @asynccontextmanager
    async def admitted(self, route: Route, origin: Origin, asked: Asked, caller: Caller) -> AsyncIterator[Origin]:
        """The origin to ask for this caller, who may read the route's repository; to be held while it is asked.

        Raises Unauthenticated for a client that shows no login where upstream wants one, Denied for a login that
        upstream refuses, NotFound for what upstream does not have, and what upstream raises: it is not known then.
        """
        through = origin.pass_through
        if through is None or caller.is_operator:
            yield origin
            return
        key = _key(route, caller.login)
        upstream = through.as_login(caller.login)
        await self._check(key, route, origin, upstream, asked)
        try:
            yield replace(origin, upstream=upstream)
        except Unauthorised:
            # Decided otherwise since, about this login or about the one that a shared fetch was begun with.
            self._decided.pop(key, None)
            await self._check(key, route, origin, upstream, asked)
            raise Overloaded(f"{route.host} refused another login than yours meanwhile; ask again") from None

    def vouch(self, route: Route, origin: Origin, caller: Caller) -> Callable[[], bool] | None:
        """Says, each time it is asked, whether the caller is still admitted; None where nobody need be."""
        if origin.pass_through is None or caller.is_operator:
            return None
        key = _key(route, caller.login)
        decision = self._decided.get(key)
        return lambda: decision is not None and self._decided.get(key) is decision

    async def _check(self, key: Key, route: Route, origin: Origin, upstream: Upstream, asked: Asked) -> None:
        decision = self._decided.get(key)
        if decision is None or decision.by is not origin.pass_through:
            what = _what(asked)
            if (absent := self._absent.get((key, what))) is not None:
                _, kind, sentence = absent
                raise kind(sentence)
            decision = await self._asking.join((key, what), lambda: self._ask(key, route, origin, upstream, asked))
        if decision.refusal:
            raise _refused(route, is_named=bool(key[0]), why=decision.refusal)

    async def _ask(self, key: Key, route: Route, origin: Origin, upstream: Upstream, asked: Asked) -> _Decision:
        through = origin.pass_through
        assert through is not None
        try:
            await _shown(upstream, route, asked)
            decision = _Decision(through, through.remembered_s)
        except Unauthorised as error:
            decision = _Decision(through, min(REFUSED_FOR_S, through.remembered_s), str(error))
        except NotFound as error:
            self._absent[key, _what(asked)] = (origin.negative_ttl_s, type(error), str(error))
            raise
        self._decided[key] = decision
        return decision


def _key(route: Route, login: Login | None) -> Key:
    return (login.mark if login is not None else "", route.host, route.repository.value)


def _what(asked: Asked) -> str:
    """What upstream is asked for, as a word: equal words are asked for once."""
    if isinstance(asked, ManifestGet):
        return f"manifest {asked.target}"
    return f"blob {asked.digest}" if isinstance(asked, BlobGet) else "tags"


async def _shown(upstream: Upstream, route: Route, asked: Asked) -> None:
    """Have upstream show what is asked for, or of a list the first entry. Raises what it raises."""
    if isinstance(asked, BlobGet):
        await upstream.blob_size(route.repository, asked.digest)
    elif not isinstance(asked, ManifestGet):
        # The referrers of a digest are no proof: registries without that API say 404 to everybody.
        await upstream.tags(route.repository, n=1, last=None)
    else:
        try:
            await upstream.manifest_head(route.repository, asked.target)
        except Throttled as error:
            if error.retry_after_s is not None:
                raise
            # Only the rest of a budget was kept back, and that is for what cannot be had otherwise: as this.
            await upstream.manifest(route.repository, asked.target)


def _refused(route: Route, *, is_named: bool, why: str) -> Unauthenticated | Denied:
    if is_named:
        return Denied(
            f"{route.reference} is refused by rule {RULE!r} of upstream {route.host!r}, which does not take the login "
            f"that was shown: {why}",
            rule=RULE,
            project=route.project,
        )
    return Unauthenticated(
        f"{route.reference} is not for everybody at upstream {route.host!r}; log in with a name and secret of its own",
        challenge="",
        rule=RULE,
        project=route.project,
    )
