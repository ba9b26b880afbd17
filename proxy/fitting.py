"""The clients of upstreams, made from settings, and made again when those are read again.

The client of an address is kept over a reload when nothing that it was made of has changed, the contents of its files
among it: its tokens and its pooled connections are worth keeping. One that is replaced lives on until nothing uses it: a
transfer that is running ends with the client it began with.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proxy.engine.bandwidth import LimitedUpstream, Share
from proxy.engine.failover import Failover
from proxy.engine.foreign import WithoutForeignLayers
from proxy.engine.guarded import Condition, GuardedUpstream
from proxy.engine.origins import PassThrough
from proxy.engine.tasks import TaskOwner
from proxy.errors import InvalidSettings
from proxy.events import Event
from proxy.guests import Guest, Guests
from proxy.ports import Clock, Upstream
from proxy.rules.bandwidth import Bandwidth, Hours
from proxy.settings import Credentials as CredentialSettings
from proxy.settings import Endpoint, Settings, TimedRate, Transfers
from proxy.settings import Upstream as UpstreamSettings
from proxy.settings.contradictions import TOKEN_USERNAMES
from proxy.upstream.answers import Budget
from proxy.upstream.client import RegistryClient
from proxy.upstream.credentials import Credentials
from proxy.upstream.credentials.acr import AcrCredentials
from proxy.upstream.credentials.docker_config import HUB_KEY, DockerConfigCredentials, ProgramCredentials
from proxy.upstream.credentials.ecr import EcrCredentials
from proxy.upstream.credentials.files import FileCredentials
from proxy.upstream.credentials.gar import GarCredentials
from proxy.upstream.credentials.static import StaticCredentials
from proxy.upstream.policy import Deadlines, Pace, UpstreamPolicy
from proxy.upstream.tokens import Spawn

#: A replaced client is closed after it was unused for this long, in seconds. Longer than a request can wait in the
#: transfers' queue, or a transfer between two attempts, before it turns to its client.
QUIET_S = 60.0
_LOOK_EVERY_S = 5.0
#: What the key of a project's own client begins with.
_OF_PROJECT = "~"


@dataclass(frozen=True, slots=True)
class Address:
    """One of an upstream's addresses as one identity: its client, behind its guard, and all that the client was made
    of, files by their hashes. Equal ingredients make equal clients."""

    client: RegistryClient
    guard: GuardedUpstream
    #: How it is reached, whom we say that we are, and how much time it has.
    way: tuple[object, ...] = field(repr=False)
    login: tuple[object, ...] = field(repr=False)
    terms: tuple[object, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Visitors:
    """Those who show an upstream logins of their own: their clients, made as they come, how the engine asks for them,
    and all that the clients are made of."""

    guests: Guests
    pass_through: PassThrough
    made_of: tuple[object, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Fitted:
    """An upstream: its addresses, and `upstream`, which is what the engine asks. The rest holds once it is used."""

    upstream: Upstream
    addresses: tuple[Address, ...]
    bandwidth: Bandwidth
    floor: int
    visitors: Visitors | None = None

    @property
    def clients(self) -> tuple[RegistryClient, ...]:
        """One for each address, and those of guests."""
        guests = self.visitors.guests.clients if self.visitors is not None else ()
        return (*(address.client for address in self.addresses), *guests)


@dataclass(frozen=True, slots=True)
class _Around:
    """What sources of logins that expire need: time, and an owner for their renewals."""

    clock: Clock
    spawn: Spawn


class Fitting:
    """Makes and keeps the clients. One for the process."""

    def __init__(self, clock: Clock, owner: TaskOwner, observe: Callable[[Event], None]) -> None:
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._current: Mapping[str, Fitted] = {}
        self._retired: set[RegistryClient] = set()
        #: By source host, for good: what still runs with a replaced client keeps to the rate of now.
        self._shares: dict[str, Share] = {}

    @property
    def upstreams(self) -> Mapping[str, Upstream]:
        """Those in use, by source host; a sealed upstream has none."""
        return asked_of(self._current)

    @property
    def logins(self) -> Mapping[str, PassThrough]:
        """Those of them that judge clients' own logins."""
        return logins_of(self._current)

    def conditions(self, host: str) -> Sequence[Condition]:
        """How each address of an upstream is now; of a sealed one there is nothing to say."""
        fitted = self._current.get(host)
        return tuple(address.guard.condition() for address in fitted.addresses) if fitted else ()

    def fit(self, settings: Settings) -> Mapping[str, Fitted]:
        """The clients that `settings` ask for, those of now where they still fit. Changes nothing yet.

        Reads files: not for the loop. Raises InvalidSettings with the first thing that cannot be read or used.
        """
        files = _Files()
        return {
            key: self._fitted(key, host, upstream, settings.transfers, files)
            for key, host, upstream in _wanted(settings)
        }

    def _fitted(self, key: str, host: str, upstream: UpstreamSettings, transfers: Transfers, files: _Files) -> Fitted:
        addresses = tuple(self._address(key, host, upstream, endpoint, transfers, files) for endpoint in upstream.url)
        asked = self._behind(host, upstream, [address.guard for address in addresses])
        visitors = self._visitors(key, host, upstream, addresses) if upstream.pass_through else None
        return Fitted(asked, addresses, bandwidth_of(upstream.bandwidth), upstream.rate_limit_floor, visitors)

    def _behind(self, host: str, upstream: UpstreamSettings, guards: Sequence[GuardedUpstream]) -> Upstream:
        """What the engine asks: the addresses in their order, at the upstream's rate, under its rules."""
        asked: Upstream = guards[0] if len(guards) == 1 else Failover(guards, self._clock)
        asked = LimitedUpstream(asked, self._shares.setdefault(host, Share(self._clock)))
        return WithoutForeignLayers(asked, host) if upstream.foreign_layers == "refuse" else asked

    def _visitors(self, key: str, host: str, upstream: UpstreamSettings, addresses: Sequence[Address]) -> Visitors:
        """Those of now where nothing has changed that their clients are made of: what upstream decided about them still
        stands. An address that does not answer does so for everybody, so they share its circuit; what it grants, it
        grants to each."""
        made_of = (*addresses, upstream.foreign_layers, upstream.rate_limit_floor, upstream.pass_through_ttl)
        current = self._current.get(key)
        if current is not None and current.visitors is not None and current.visitors.made_of == made_of:
            return current.visitors

        def made(credentials: Credentials | None) -> Guest:
            clients, guards = [], []
            for address in addresses:
                policy = replace(address.client.policy, credentials=credentials)
                client = RegistryClient(policy, clock=self._clock, spawn=self._owner.spawn, observer=self._observe)
                guard = GuardedUpstream(
                    client,
                    host=host,
                    address=policy.url,
                    clock=self._clock,
                    chance=random.random,
                    observe=self._observe,
                    quote=partial(_quote, client),
                    breaker=address.guard.breaker,
                )
                guard.budget.floor = upstream.rate_limit_floor
                clients.append(client)
                guards.append(guard)
            return Guest(self._behind(host, upstream, guards), tuple(clients))

        guests = Guests(made, self._retire)
        return Visitors(guests, PassThrough(guests, upstream.pass_through_ttl), made_of)

    def _address(
        self, key: str, host: str, upstream: UpstreamSettings, endpoint: Endpoint, transfers: Transfers, files: _Files
    ) -> Address:
        """The address as it is now where nothing has changed that its client was made of, else a new client.

        What is known of the address outlives the client: its circuit while the way to it is the same (whoever mends
        the way is not made to wait), its budget while we are the same to it.
        """
        url, credentials = str(endpoint.url), endpoint.credentials or upstream.credentials
        realms = upstream.token_realms if endpoint.token_realms is None else endpoint.token_realms
        way = (
            *(upstream.min_tls, upstream.allow_private, upstream.http_proxy, upstream.no_proxy),
            *(upstream.ca, upstream.client_cert, upstream.client_key),
            *(files.mark(host, path) for path in _trust_of(upstream)),
        )
        login = (credentials, realms, *(files.mark(host, path) for path in _secrets_of(credentials)))
        # They share the time that an answer has, so that the last one gets its turn.
        deadlines = Deadlines(
            sock_connect_s=upstream.connect_timeout, answer_s=transfers.queue_deadline / len(upstream.url)
        )
        terms = (deadlines, Pace(transfers.min_rate, transfers.min_rate_window))
        known = self._known(key, url)
        if known is not None and (known.way, known.login, known.terms) == (way, login, terms):
            return known
        policy = UpstreamPolicy(
            host=host,
            url=url,
            credentials=_credentials(host, url, credentials, _Around(self._clock, self._owner.spawn)),
            token_realms=frozenset(str(realm) for realm in realms),
            allow_private=upstream.allow_private,
            tls=files.trust(host, upstream),
            deadlines=deadlines,
            pace=terms[1],
            http_proxy=upstream.http_proxy or "",
            no_proxy=upstream.no_proxy,
        )
        client = RegistryClient(policy, clock=self._clock, spawn=self._owner.spawn, observer=self._observe)
        is_same_way = known is not None and known.way == way
        is_same_identity = known is not None and known.client.policy.identity == policy.identity
        guard = GuardedUpstream(
            client,
            host=host,
            address=url,
            clock=self._clock,
            chance=random.random,
            observe=self._observe,
            quote=partial(_quote, client),
            breaker=known.guard.breaker if known is not None and is_same_way else None,
            budget=known.guard.budget if known is not None and is_same_identity else None,
        )
        return Address(client, guard, way, login, terms)

    def _known(self, key: str, url: str) -> Address | None:
        current = self._current.get(key)
        addresses = current.addresses if current is not None else ()
        return next((address for address in addresses if address.client.policy.url == url), None)

    def use(self, fitted: Mapping[str, Fitted]) -> None:
        """From now on these. What they replace is closed once nothing uses it."""
        kept = {client for each in fitted.values() for client in each.clients}
        still = {id(each.visitors) for each in fitted.values()}
        for each in self._current.values():
            if each.visitors is not None and id(each.visitors) not in still:
                each.visitors.guests.replaced()
        self._retire(client for each in self._current.values() for client in each.clients if client not in kept)
        self._current = fitted
        for host, each in fitted.items():
            for address in each.addresses:
                address.guard.budget.floor = each.floor
            if not host.startswith(_OF_PROJECT):
                self._shares[host].follow(each.bandwidth)

    def _retire(self, replaced: Iterable[RegistryClient]) -> None:
        for client in replaced:
            self._retired.add(client)
            self._owner.spawn_background(self._see_out(client), "retire an upstream's client")

    def gauge(self, set_gauge: Callable[..., None]) -> None:
        """Set the gauges of what is granted and who is left alone, by upstream: the best of its addresses counts."""
        conditions = {host: self.conditions(host) for host in self._current if not host.startswith(_OF_PROJECT)}
        limits = _best(conditions, lambda each: each.limit)
        left = _best(conditions, lambda each: each.remaining)
        is_open = {(host,): float(all(each.circuit == "open" for each in of)) for host, of in conditions.items()}
        waits = {(host,): min(each.throttled_for_s or 0.0 for each in of) for host, of in conditions.items()}
        what = "Requests that upstream's rate limit"
        set_gauge("breakwater_upstream_budget_limit", f"{what} allows in its window.", limits, "upstream")
        set_gauge("breakwater_upstream_budget_remaining", f"{what} still allows.", left, "upstream")
        set_gauge(
            "breakwater_upstream_circuit_open", "1 while it is left alone: it does not answer.", is_open, "upstream"
        )
        set_gauge("breakwater_upstream_throttled_seconds", "How long it is to be left alone.", waits, "upstream")

    async def aclose(self) -> None:
        """Close all of them, used or not."""
        for client in (*self._retired, *(client for each in self._current.values() for client in each.clients)):
            await client.aclose()
        self._retired.clear()
        self._current = {}

    async def _see_out(self, client: RegistryClient) -> None:
        quiet_s = 0.0
        while quiet_s < QUIET_S:
            await self._clock.sleep(_LOOK_EVERY_S)
            quiet_s = 0.0 if client.is_used else quiet_s + _LOOK_EVERY_S
        await client.aclose()
        self._retired.discard(client)


def ignored_proxies(environ: Mapping[str, str]) -> str:
    """A sentence about HTTP proxies that the environment names and nobody here goes through; "" when it names none."""
    names = sorted(
        name
        for name, value in environ.items()
        if name.upper() in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") and value.strip()
    )
    if not names:
        return ""
    return f"{' and '.join(names)} in the environment: not used; an upstream's http_proxy says which to go through"


def _best(
    conditions: Mapping[str, Sequence[Condition]], number: Callable[[Condition], int | None]
) -> dict[tuple[str, ...], float]:
    """The greatest number among each upstream's addresses, for those that have one."""
    found = {host: [n for each in of if (n := number(each)) is not None] for host, of in conditions.items()}
    return {(host,): float(max(numbers)) for host, numbers in found.items() if numbers}


def conditions_shown(conditions: Sequence[Condition]) -> dict[str, Any]:
    """What the status document says of an upstream's addresses; "open" only when none of them is asked."""
    addresses = [
        {
            "url": each.address,
            "circuit": each.circuit,
            "budget": _budget_shown(each),
            "is_low": each.is_low,
            "throttled_for_s": None if each.throttled_for_s is None else round(each.throttled_for_s, 1),
        }
        for each in conditions
    ]
    is_open = bool(conditions) and all(each.circuit == "open" for each in conditions)
    budget = next((shown for each in conditions if (shown := _budget_shown(each)) is not None), None)
    return {"budget": budget, "addresses": addresses} | ({"state": "open"} if is_open else {})


def _budget_shown(condition: Condition) -> dict[str, int | None] | None:
    if condition.limit is None and condition.remaining is None:
        return None
    return {"limit": condition.limit, "remaining": condition.remaining, "window_s": condition.window_s}


def key_of(project: str, host: str) -> str:
    """What a project's own client of an upstream is kept under: no source host begins like it."""
    return f"{_OF_PROJECT}{project}/{host}"


def _wanted(settings: Settings) -> Iterator[tuple[str, str, UpstreamSettings]]:
    """(key, source host, upstream) of each client: one for each upstream, and one for each project with credentials of
    its own, which are then the only ones that it shows."""
    unsealed = (
        {}
        if settings.server.sealed
        else {str(name): upstream for name, upstream in settings.upstreams.items() if not upstream.sealed}
    )
    for host, upstream in unsealed.items():
        yield host, host, upstream
    for name, project in settings.projects.items():
        host = str(project.upstream)
        if project.credentials is not None and host in unsealed:
            addresses = tuple(each.model_copy(update={"credentials": None}) for each in unsealed[host].url)
            own = {"credentials": project.credentials, "url": addresses}
            yield key_of(str(name), host), host, unsealed[host].model_copy(update=own)


def asked_of(fitted: Mapping[str, Fitted]) -> Mapping[str, Upstream]:
    """What the engine asks, by source host."""
    return {host: each.upstream for host, each in fitted.items()}


def logins_of(fitted: Mapping[str, Fitted]) -> Mapping[str, PassThrough]:
    """The upstreams that judge clients' own logins, by source host."""
    return {host: each.visitors.pass_through for host, each in fitted.items() if each.visitors is not None}


def _quote(client: RegistryClient) -> Budget | None:
    return client.budget


class _Files:
    """The files that clients are made of, each read once for all of them. Raises InvalidSettings when one cannot be."""

    def __init__(self) -> None:
        self._marks: dict[str, bytes] = {}
        self._trusts: dict[tuple[object, ...], ssl.SSLContext] = {}

    def mark(self, host: str, path: str) -> bytes:
        """The hash of what the file holds."""
        if path not in self._marks:
            try:
                self._marks[path] = sha256(Path(path).read_bytes()).digest()
            except OSError as error:
                raise InvalidSettings([f'[upstreams."{host}"] cannot read {path}: {error.strerror}']) from error
        return self._marks[path]

    def trust(self, host: str, upstream: UpstreamSettings) -> ssl.SSLContext:
        """How to speak TLS with it. Those who trust alike share a context: reading the system's CAs takes longer than
        all the rest of a start."""
        words = (upstream.min_tls, upstream.ca, upstream.client_cert, upstream.client_key)
        if words not in self._trusts:
            self._trusts[words] = _client_tls(host, upstream)
        return self._trusts[words]


def _secrets_of(credentials: CredentialSettings | None) -> Iterator[str]:
    if credentials is None:
        return
    named = (credentials.password_file, credentials.docker_config, credentials.key_file, credentials.secret_file)
    yield from (path for path in named if path is not None)


def _trust_of(upstream: UpstreamSettings) -> Iterator[str]:
    """The system's own trust is one of them: a new CA there is taken up, too."""
    yield from (path for path in (upstream.ca, upstream.client_cert, upstream.client_key) if path is not None)
    if (system := ssl.get_default_verify_paths().cafile) is not None:
        yield system


def bandwidth_of(entries: Iterable[TimedRate]) -> Bandwidth:
    """What the settings say of a bandwidth, as the rule that it is."""
    return Bandwidth(
        tuple(
            (Hours(entry.between.start_min, entry.between.end_min, entry.zone) if entry.between else None, entry.rate)
            for entry in entries
        )
    )


def _credentials(host: str, url: str, given: CredentialSettings | None, around: _Around) -> Credentials | None:
    """The source of logins that the settings name. Raises InvalidSettings when it lacks something."""
    if given is None:
        return None
    username = given.username or TOKEN_USERNAMES.get(given.helper or "")
    if username is not None:
        if given.password is not None:
            return StaticCredentials(username, given.password.get_secret_value())
        if given.password_file is not None:
            return FileCredentials(username, given.password_file, upstream=host)
        return None
    words: dict[str, Any] = {"clock": around.clock, "spawn": around.spawn}
    endpoint = given.endpoint or ""
    try:
        if given.docker_config is not None:
            registry = host if host == "docker.io" else urlsplit(url).netloc
            return DockerConfigCredentials(given.docker_config, registry, upstream=host, **words)
        if given.helper in ("ecr", "ecr-public"):
            is_public = given.helper == "ecr-public"
            return EcrCredentials(
                urlsplit(url).hostname or host,
                is_public=is_public,
                region=given.region or "",
                endpoint=endpoint,
                environ=os.environ,
                **words,
            )
        if given.helper == "gar":
            return GarCredentials(host, key_file=given.key_file or "", endpoint=endpoint, **words)
        if given.helper == "acr":
            return AcrCredentials(
                host,
                url,
                tenant=given.tenant or "",
                client_id=given.client_id or "",
                secret_file=given.secret_file or "",
                endpoint=endpoint,
                environ=os.environ,
                **words,
            )
    except ValueError as error:
        raise InvalidSettings([f'[upstreams."{host}"] credentials: {error}']) from error
    if given.helper is None:
        return None
    server = HUB_KEY if host == "docker.io" else urlsplit(url).netloc
    return ProgramCredentials(given.helper, server, upstream=host, **words)


def _client_tls(host: str, upstream: UpstreamSettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if upstream.min_tls == "1.3":
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        if upstream.ca is not None:
            context.load_verify_locations(cafile=upstream.ca)
        if upstream.client_cert is not None:
            context.load_cert_chain(upstream.client_cert, upstream.client_key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings([f'[upstreams."{host}"] ca or client_cert: {error}']) from error
    return context
