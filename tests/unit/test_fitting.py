"""proxy/fitting.py: what of an upstream outlives a reload, and what each of its addresses is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

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
