"""proxy/fitting.py: what of an upstream outlives a reload, and what each of its addresses is told."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.engine.access import Login
from proxy.engine.tasks import TaskOwner
from proxy.errors import Throttled, Unauthorised, Unreachable
from proxy.fitting import Address, Fitting, conditions_shown
from proxy.oci.names import Tag
from proxy.ports import Upstream
from proxy.rules.breaker import TRIPS_AFTER
from proxy.settings import parse
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.registry import Guard, ScriptedRegistry, Twist, authority
from tests.support.upstream import ALPINE

HOST = "registry.test"
IMAGE = images.image(4, (100,))
ONE = Tag("1")


class Fits:
    """A fitting, and the settings that it is given again and again."""

    def __init__(self, fitting: Fitting, clock: ManualClock) -> None:
        self.fitting = fitting
        self.clock = clock

    async def take(self, upstream: Mapping[str, Any], **sections: Any) -> None:
        """As a reload does."""
        wanted = parse({"store": {"path": "/s"}, "upstreams": {HOST: dict(upstream)}, **sections})
        self.fitting.use(await asyncio.to_thread(self.fitting.fit, wanted))

    @property
    def upstream(self) -> Upstream:
        """What the engine asks."""
        return self.fitting.upstreams[HOST]

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Those in use."""
        return self.fitting._current[HOST].addresses

    async def ask(self) -> bytes:
        """The image's manifest."""
        return (await self.upstream.manifest(ALPINE, ONE)).body


@asynccontextmanager
async def fits() -> AsyncIterator[Fits]:
    """Closed at the end."""
    clock, owner = ManualClock(), TaskOwner(print)
    fitting = Fitting(clock, owner, lambda _: None)
    try:
        yield Fits(fitting, clock)
    finally:
        await owner.aclose()
        await fitting.aclose()


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as made:
        made.put(str(ALPINE), IMAGE, "1")
        yield made


# -- what outlives a reload --------------------------------------------------------------------------------------------

BASE = {"url": ["https://a.test", "https://b.test"], "credentials": {"username": "u", "password": "one"}}
#: What is changed -> whether the client, the circuit and the budget of an address outlive it.
CHANGES: dict[str, tuple[dict[str, Any], tuple[bool, bool, bool]]] = {
    "nothing": ({}, (True, True, True)),
    "how long tags hold": ({"tag_ttl": "1m"}, (True, True, True)),
    "bandwidth": ({"bandwidth": "1MiB/s"}, (True, True, True)),
    "foreign layers": ({"foreign_layers": "refuse"}, (True, True, True)),
    "the floor": ({"rate_limit_floor": 50}, (True, True, True)),
    "the order of its addresses": ({"url": ["https://b.test", "https://a.test"]}, (True, True, True)),
    "the password": ({"credentials": {"username": "u", "password": "two"}}, (False, True, True)),
    "the user": ({"credentials": {"username": "v", "password": "one"}}, (False, True, False)),
    "realms": ({"token_realms": ["auth.test"]}, (False, True, True)),
    "a timeout": ({"connect_timeout": "9s"}, (False, True, True)),
    "an HTTP proxy": ({"http_proxy": "http://proxy.test:3128"}, (False, False, True)),
    "private addresses": ({"allow_private": True}, (False, False, True)),
    "the oldest TLS": ({"min_tls": "1.3"}, (False, False, True)),
}


@pytest.mark.parametrize(("change", "outlives"), CHANGES.values(), ids=CHANGES.keys())
async def test_what_is_known_of_an_address_outlives_a_reload(
    change: dict[str, Any], outlives: tuple[bool, bool, bool]
) -> None:
    """A client goes with what it was made of; the circuit with the way there, the budget with who we are there."""
    async with fits() as fitted:
        await fitted.take(BASE)
        before = {one.client.policy.url: one for one in fitted.addresses}
        await fitted.take({**BASE, **change})
        for now in fitted.addresses:
            was = before[now.client.policy.url]
            same = (
                now.client is was.client,
                now.guard.breaker is was.guard.breaker,
                now.guard.budget is was.guard.budget,
            )
            assert same == outlives
            assert now.guard.budget.floor == change.get("rate_limit_floor", 10)


async def test_a_new_authority_is_a_new_way(tmp_path: Path) -> None:
    """Whoever mends the trust is not made to wait for a circuit that opened for want of it."""
    ca, file = trustme.CA(), tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    async with fits() as fitted:
        await fitted.take({**BASE, "ca": str(file)})
        before = fitted.addresses[0]
        await fitted.take({**BASE, "ca": str(file), "tag_ttl": "1m"})
        assert fitted.addresses[0] is before
        trustme.CA().cert_pem.write_to_path(str(file))
        await fitted.take({**BASE, "ca": str(file)})
        assert fitted.addresses[0].guard.breaker is not before.guard.breaker


async def test_a_reload_does_not_ask_an_upstream_that_throttles(registry: ScriptedRegistry) -> None:
    """What it asked for holds for who we are, and not for the client that was told."""
    registry.rewrite(Twist(status=429, body=b"", add=[("Retry-After", "120")]))
    async with fits() as fitted:
        await fitted.take({"url": registry.url})
        with pytest.raises(Throttled):
            await fitted.ask()
        await fitted.take({"url": registry.url}, transfers={"min_rate": "1KiB/s"})
        with pytest.raises(Throttled) as told:
            await fitted.ask()
        assert told.value.retry_after_s == 120.0
        assert len(registry.requests) == 1
        shown = conditions_shown(fitted.fitting.conditions(HOST))["addresses"]
        assert [(one["url"], one["throttled_for_s"]) for one in shown] == [(registry.url, 120.0)]


async def test_a_reload_does_not_close_an_open_circuit(registry: ScriptedRegistry) -> None:
    """Else each reload would send a storm at an upstream that is down."""
    registry.rewrite(Twist(no_answer="rst"))
    async with fits() as fitted:
        await fitted.take({"url": registry.url})
        for _ in range(TRIPS_AFTER):
            with pytest.raises(Unreachable):
                await fitted.ask()
        await fitted.take({"url": registry.url, "connect_timeout": "9s"})
        with pytest.raises(Unreachable, match="is asked again in"):
            await fitted.ask()
        assert len(registry.requests) == TRIPS_AFTER
        assert conditions_shown(fitted.fitting.conditions(HOST))["state"] == "open"


async def test_a_login_that_was_refused_is_not_repeated_after_a_reload(registry: ScriptedRegistry) -> None:
    """A reload about something else must not cost another attempt; one that brings a new password is tried at once."""
    registry.guard = Guard(scheme="basic", login=("u", "right"))
    wrong = {"url": registry.url, "credentials": {"username": "u", "password": "wrong"}}
    async with fits() as fitted:
        await fitted.take(wrong)
        for _ in range(3):
            with pytest.raises(Unauthorised):
                await fitted.ask()
            await fitted.take({**wrong, "tag_ttl": f"{len(registry.requests)}m"})
        assert len([one for one in registry.requests if one.header("Authorization")]) == 1
        await fitted.take({**wrong, "credentials": {"username": "u", "password": "right"}})
        assert await fitted.ask() == IMAGE.body


# -- several addresses, each with what is its own ----------------------------------------------------------------------


async def test_each_address_has_its_own_login_and_realms(registry: ScriptedRegistry) -> None:
    """INV-7: a realm that the settings give to one address gets nothing of another's, where it has realms of its own."""
    async with ScriptedRegistry() as other, ScriptedRegistry() as realm, ScriptedRegistry() as theirs:
        other.put(str(ALPINE), IMAGE, "1")
        registry.guard = Guard(scheme="bearer", login=("first", "one"), realm=f"{realm.url}/token")
        realm.guard = registry.guard
        other.guard = Guard(scheme="bearer", login=("second", "two"), realm=f"{theirs.url}/token")
        theirs.guard = other.guard
        upstream: dict[str, Any] = {
            "allow_private": True,
            "credentials": {"username": "first", "password": "one"},
            "token_realms": [authority(realm.url)],
            "url": [
                registry.url,
                {
                    "url": other.url,
                    "credentials": {"username": "second", "password": "two"},
                    "token_realms": [authority(theirs.url)],
                },
            ],
        }
        async with fits() as fitted:
            await fitted.take(upstream)
            assert await fitted.ask() == IMAGE.body
            registry.rewrite(Twist(no_answer="rst"))
            assert await fitted.ask() == IMAGE.body
            assert len(realm.asked("/token")) == len(theirs.asked("/token")) == 1
            # The second address now names the first one's realm: it may be asked, and is told nothing.
            other.guard.realm = f"{realm.url}/token"
            other.revoke()
            with pytest.raises((Unauthorised, Unreachable)):
                await fitted.ask()
            assert not realm.asked("/token")[-1].header("Authorization")
            # Without realms of its own it has the upstream's.
            upstream["url"][1].pop("token_realms")
            realm.guard = other.guard
            await fitted.take(upstream)
            assert await fitted.ask() == IMAGE.body
            assert realm.asked("/token")[-1].header("Authorization")


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_a_secret_that_is_rotated_reaches_upstream(
    registry: ScriptedRegistry, tmp_path: Path, scheme: Any
) -> None:
    """From its file, with nothing reloaded: what upstream is shown is what the file holds now."""
    secret = tmp_path / "secret"
    secret.write_text("one\n")
    registry.guard = Guard(scheme=scheme, login=("u", "one"))
    async with fits() as fitted:
        await fitted.take({"url": registry.url, "credentials": {"username": "u", "password_file": str(secret)}})
        assert await fitted.ask() == IMAGE.body
        rotated = tmp_path / "rotated"
        rotated.write_text("two\n")
        rotated.replace(secret)
        registry.guard.login = ("u", "two")
        registry.revoke()
        assert await fitted.ask() == IMAGE.body
        assert len(fitted.fitting._retired) == 0


async def test_a_login_that_was_routed_before_a_reload_leaves_no_client_behind(registry: ScriptedRegistry) -> None:
    """`pass_through`: its client is made for an upstream that is replaced already, used, and seen out like the others."""
    asked = {"url": registry.url, "pass_through": True}
    async with fits() as fitted:
        await fitted.take(asked)
        before = fitted.fitting.logins[HOST]
        await fitted.take({**asked, "pass_through_ttl": "1m"})
        assert not fitted.fitting._retired
        await before.as_login(Login("mark", "u", "secret")).manifest_head(ALPINE, ONE)
        (client,) = fitted.fitting._retired
        while fitted.fitting._retired:
            await fitted.clock.advance(1.0)
        with pytest.raises(Unreachable):
            await client.manifest_head(ALPINE, ONE)


# -- TLS, programs, what is told ---------------------------------------------------------------------------------------


class Certified:
    """A registry behind TLS, and the files that its settings name."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.clients = trustme.CA(), trustme.CA()
        self.ca = self._written(folder / "ca.pem", self.authority.cert_pem)
        issued = self.clients.issue_cert("breakwater")
        self.cert = self._written(folder / "client.pem", *issued.cert_chain_pems)
        self.key = self._written(folder / "client-key.pem", issued.private_key_pem)
        self.served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(self.served)

    @staticmethod
    def _written(path: Path, *pems: trustme.Blob) -> str:
        path.write_bytes(b"".join(pem.bytes() for pem in pems))
        return str(path)


@pytest.mark.parametrize(
    ("server", "keys", "is_let_in"),
    [
        ("plain", ["ca"], True),
        ("plain", [], False),
        ("wants a certificate", ["ca", "client_cert", "client_key"], True),
        ("wants a certificate", ["ca"], False),
        ("speaks 1.2", ["ca"], True),
        ("speaks 1.2", ["ca", "min_tls"], False),
        ("speaks 1.3", ["ca", "min_tls"], True),
    ],
)
async def test_the_settings_of_tls_act(server: str, keys: list[str], is_let_in: bool, tmp_path: Path) -> None:
    """Further authorities, certificates of our own, the oldest version: over real handshakes; never less than asked."""
    made = Certified(tmp_path)
    if server == "wants a certificate":
        made.served.verify_mode = ssl.CERT_REQUIRED
        made.clients.configure_trust(made.served)
    if server == "speaks 1.2":
        made.served.maximum_version = ssl.TLSVersion.TLSv1_2
    given = {"ca": made.ca, "client_cert": made.cert, "client_key": made.key, "min_tls": "1.3"}
    async with ScriptedRegistry(tls=made.served) as registry, fits() as fitted:
        registry.put(str(ALPINE), IMAGE, "1")
        await fitted.take({"url": registry.url, **{key: given[key] for key in keys}})
        if is_let_in:
            assert await fitted.ask() == IMAGE.body
            return
        with pytest.raises(Unreachable, match=r"TLS|certificate|closed|broke|reset"):
            await fitted.ask()
        assert registry.requests == []


async def test_a_credential_helper_opens_a_registry(
    registry: ScriptedRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real executable on the PATH, once for all who ask; what it was asked for is the registry, on its input."""
    program = tmp_path / "docker-credential-vault"
    program.write_text(
        '#!/bin/sh\nread server\necho "$@ $server" >> "$0.log"\n'
        """echo '{"ServerURL":"x","Username":"u","Secret":"5ecret"}'\n"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    registry.guard = Guard(scheme="basic", login=("u", "5ecret"))
    async with fits() as fitted:
        await fitted.take({"url": registry.url, "credentials": {"helper": "vault"}})
        assert set(await asyncio.gather(*(fitted.ask() for _ in range(10)))) == {IMAGE.body}
    assert (tmp_path / "docker-credential-vault.log").read_text() == f"get {authority(registry.url)}\n"


async def test_what_each_address_grants_is_told(registry: ScriptedRegistry) -> None:
    """Status has it by address, metrics the best of them."""
    registry.rewrite(Twist(add=[("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "7;w=21600")]))
    told: dict[str, Any] = {}
    async with fits() as fitted:
        await fitted.take({"url": [registry.url, "http://127.0.0.1:1"]})
        await fitted.ask()
        shown = conditions_shown(fitted.fitting.conditions(HOST))
        fitted.fitting.gauge(lambda name, _, values, __: told.update({name: values}))
    first, second = shown["addresses"]
    assert first["budget"] == shown["budget"] == {"limit": 100, "remaining": 7, "window_s": 21600}
    assert (first["is_low"], first["circuit"], second["budget"], second["is_low"]) == (True, "closed", None, False)
    assert told["breakwater_upstream_budget_remaining"] == {(HOST,): 7.0}
    assert told["breakwater_upstream_budget_limit"] == {(HOST,): 100.0}
    assert told["breakwater_upstream_circuit_open"] == {(HOST,): 0.0}
