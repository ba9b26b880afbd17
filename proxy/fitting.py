"""The clients of upstreams, made from settings, and made again when those are read again.

A client is kept over a reload when nothing that it was made of has changed, the contents of its files among it: its
tokens, its pooled connections and what it knows of upstream's budget are worth keeping. One that is replaced lives on
until nothing uses it: a transfer that is running ends with the client it began with.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from proxy.engine.tasks import TaskOwner
from proxy.errors import InvalidSettings
from proxy.events import Event
from proxy.ports import Clock
from proxy.settings import Credentials as CredentialSettings
from proxy.settings import Settings
from proxy.settings import Upstream as UpstreamSettings
from proxy.upstream.client import RegistryClient
from proxy.upstream.credentials import Credentials
from proxy.upstream.credentials.static import StaticCredentials
from proxy.upstream.policy import Deadlines, Pace, UpstreamPolicy

#: A replaced client is closed after it was unused for this long, in seconds. Longer than a request can wait in the
#: transfers' queue, or a transfer between two attempts, before it turns to its client.
QUIET_S = 60.0
_LOOK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A client and everything that it was made of, files by their hashes; equal ingredients make an equal client."""

    client: RegistryClient
    ingredients: tuple[object, ...] = field(repr=False)


class Fitting:
    """Makes and keeps the clients. One for the process."""

    def __init__(self, clock: Clock, owner: TaskOwner, observe: Callable[[Event], None]) -> None:
        self._clock = clock
        self._owner = owner
        self._observe = observe
        self._current: Mapping[str, Fitted] = {}
        self._retired: set[RegistryClient] = set()

    @property
    def clients(self) -> Mapping[str, RegistryClient]:
        """Those in use, by source host; a sealed upstream has none."""
        return {host: fitted.client for host, fitted in self._current.items()}

    def fit(self, settings: Settings) -> Mapping[str, Fitted]:
        """The clients that `settings` ask for, those of now where they still fit. Changes nothing yet.

        Reads files: not for the loop. Raises InvalidSettings with the first thing that cannot be read or used.
        """
        trusts: dict[tuple[object, ...], ssl.SSLContext] = {}
        marks: dict[str, bytes] = {}
        fitted = {}
        for name, upstream in settings.upstreams.items():
            if upstream.sealed or settings.server.sealed:
                continue
            host = str(name)
            for path in _files_of(upstream):
                if path not in marks:
                    marks[path] = sha256(_contents(host, path)).digest()
            ingredients = (upstream, settings.transfers, *(marks[path] for path in _files_of(upstream)))
            if (kept := self._current.get(host)) is not None and kept.ingredients == ingredients:
                fitted[host] = kept
                continue
            policy = _policy(host, upstream, settings, trusts)
            client = RegistryClient(policy, clock=self._clock, spawn=self._owner.spawn, observer=self._observe)
            fitted[host] = Fitted(client, ingredients)
        return fitted

    def use(self, fitted: Mapping[str, Fitted]) -> None:
        """From now on these. What they replace is closed once nothing uses it."""
        kept = {each.client for each in fitted.values()}
        for replaced in self._current.values():
            if replaced.client not in kept:
                self._retired.add(replaced.client)
                self._owner.spawn_background(self._see_out(replaced.client), "retire an upstream's client")
        self._current = fitted

    async def aclose(self) -> None:
        """Close all of them, used or not."""
        for client in (*self._retired, *self.clients.values()):
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


def _files_of(upstream: UpstreamSettings) -> Iterator[str]:
    """Every file that a client is made of. The system's own trust is one: a new CA there is taken up, too."""
    for credentials in (upstream.credentials, *(endpoint.credentials for endpoint in upstream.url)):
        if credentials is not None and credentials.password_file is not None:
            yield credentials.password_file
    yield from (path for path in (upstream.ca, upstream.client_cert, upstream.client_key) if path is not None)
    if (system := ssl.get_default_verify_paths().cafile) is not None:
        yield system


def _contents(host: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidSettings([f'[upstreams."{host}"] cannot read {path}: {error.strerror}']) from error


def _policy(
    host: str, upstream: UpstreamSettings, settings: Settings, trusts: dict[tuple[object, ...], ssl.SSLContext]
) -> UpstreamPolicy:
    if len(upstream.url) > 1:
        raise InvalidSettings([f'[upstreams."{host}"] url: several addresses are not in this version yet; give one'])
    endpoint = upstream.url[0]
    transfers = settings.transfers
    # Those who trust alike share a context: reading the system's CAs takes longer than all the rest of a start.
    trust = (upstream.min_tls, upstream.ca, upstream.client_cert, upstream.client_key)
    if trust not in trusts:
        trusts[trust] = _client_tls(host, upstream)
    return UpstreamPolicy(
        host=host,
        url=str(endpoint.url),
        credentials=_credentials(host, endpoint.credentials or upstream.credentials),
        token_realms=frozenset(str(realm) for realm in upstream.token_realms),
        allow_private=upstream.allow_private,
        tls=trusts[trust],
        deadlines=Deadlines(sock_connect_s=upstream.connect_timeout, answer_s=transfers.queue_deadline),
        pace=Pace(transfers.min_rate, transfers.min_rate_window),
    )


def _credentials(host: str, given: CredentialSettings | None) -> Credentials | None:
    if given is None or given.username is None:
        return None
    if given.password is not None:
        return StaticCredentials(given.username, given.password.get_secret_value())
    assert given.password_file is not None
    try:
        secret = _contents(host, given.password_file).decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidSettings([f'[upstreams."{host}"] cannot read {given.password_file}: it is not text']) from error
    return StaticCredentials(given.username, secret)


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
