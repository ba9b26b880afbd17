"""Challenges, tokens and logins (peers.md §5.5; INV-7; reliability.md T13, T35)."""

from __future__ import annotations

import asyncio
import base64
import traceback
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from proxy.errors import BreakwaterError, Misbehaved, Throttled, Timeout, Unauthorised, Unreachable, UpstreamError
from proxy.oci.names import Repository, Tag
from proxy.upstream.credentials.static import StaticCredentials
from proxy.upstream.policy import Deadlines
from tests.support import images
from tests.support.registry import Gate, Guard, ScriptedRegistry, Twist, authority
from tests.support.upstream import ALPINE, Asking, asking

IMAGE = images.image(2, (1000,))
OTHER = Repository.parse("library/other")
LATEST = Tag("latest")
SECRET = "c0rrect-h0rse"
LOGIN = ("robot", SECRET)
CREDENTIALS = StaticCredentials(*LOGIN)
BASIC = "Basic " + base64.b64encode(f"robot:{SECRET}".encode()).decode()


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    """Behind a token realm of its own that takes everybody."""
    async with ScriptedRegistry(guard=Guard(scheme="bearer")) as scripted:
        for repository in (ALPINE, OTHER):
            scripted.put(str(repository), IMAGE, "latest")
        yield scripted


@pytest.fixture
async def asked(registry: ScriptedRegistry) -> AsyncIterator[Asking]:
    async with asking(registry) as made:
        yield made


def guard_of(registry: ScriptedRegistry) -> Guard:
    assert registry.guard is not None
    return registry.guard


async def pull(asked: Asking, repository: Repository = ALPINE) -> None:
    found = await asked.client.manifest(repository, LATEST)
    assert found.body == IMAGE.body


# -- the dance ---------------------------------------------------------------------------------------------------------


async def test_challenge_is_answered_with_a_token(registry: ScriptedRegistry, asked: Asking) -> None:
    """401, token, 200; the realm is asked for what the challenge named."""
    await pull(asked)
    assert asked.asked == [("manifest", "GET", 401), ("token", "GET", 200), ("manifest", "GET", 200)]
    token = registry.asked("/token")[0]
    assert token.query == [("service", "registry.test"), ("scope", "repository:library/alpine:pull")]
    assert "authorization" not in token.names()
    assert registry.requests[-1].header("Authorization").startswith("Bearer token-1")


async def test_token_is_sent_at_once_with_the_next_request(registry: ScriptedRegistry, asked: Asking) -> None:
    """No second 401 for a repository whose challenge is known: one request for one call."""
    await pull(asked)
    for _ in range(3):
        await pull(asked)
    await asked.client.manifest_head(ALPINE, LATEST)
    assert (len(registry.requests), registry.n_tokens) == (3 + 4, 1)


async def test_each_repository_has_its_token(registry: ScriptedRegistry, asked: Asking) -> None:
    """Scopes are not mixed: pulp's process-wide token table did."""
    await pull(asked)
    await pull(asked, OTHER)
    await pull(asked)
    assert [dict(one.query)["scope"] for one in registry.asked("/token")] == [
        "repository:library/alpine:pull",
        "repository:library/other:pull",
    ]
    assert registry.requests[-1].header("Authorization").startswith("Bearer token-1")


async def test_hundred_who_ask_at_once_share_one_token(registry: ScriptedRegistry, asked: Asking) -> None:
    """T35: one refresh for all who wait."""
    gate = Gate()
    registry.rewrite(Twist(path="/token", gate=gate, holds_headers=True))
    pulls = [asyncio.ensure_future(pull(asked)) for _ in range(100)]
    await gate.reached.wait()
    while sum(kind == "manifest" for kind, _, _ in asked.asked) < 100:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(*pulls)
    assert registry.n_tokens == 1


async def test_asker_who_leaves_does_not_end_the_token_for_others(registry: ScriptedRegistry, asked: Asking) -> None:
    """The fetch is a task with an owner, and not of the first who wanted it."""
    gate = Gate()
    registry.rewrite(Twist(path="/token", gate=gate, holds_headers=True))
    first, second = (asyncio.ensure_future(pull(asked)) for _ in range(2))
    await gate.reached.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open()
    await second
    assert registry.n_tokens == 1


async def test_token_is_renewed_before_it_expires(registry: ScriptedRegistry, asked: Asking) -> None:
    """At 80 % of its life, so that none expires on the way; without a 401."""
    await pull(asked)
    await asked.clock.advance(300 * 0.8 - 1)
    await pull(asked)
    assert registry.n_tokens == 1
    await asked.clock.advance(2)
    await pull(asked)
    assert registry.n_tokens == 2


@pytest.mark.parametrize(
    ("says", "lifetime_s"),
    [
        ({}, 60),
        ({"expires_in": None}, 60),
        ({"expires_in": "300"}, 60),
        ({"expires_in": 0}, 60),
        ({"expires_in": -1}, 60),
        ({"expires_in": True}, 60),
        ({"expires_in": 1e400}, 60),
        ({"expires_in": 1200.5}, 1200),
        ({"expires_in": 10**12}, 86_400),
    ],
    ids=str,
)
async def test_expiry_is_believed_where_it_makes_sense(
    registry: ScriptedRegistry, asked: Asking, says: dict[str, Any], lifetime_s: float
) -> None:
    """60 seconds where it is missing (distribution's token specification), a day at most."""
    guard_of(registry).token_says = says
    await pull(asked)
    await asked.clock.advance(lifetime_s * 0.8 - 1)
    await pull(asked)
    assert registry.n_tokens == 1
    await asked.clock.advance(2)
    await pull(asked)
    assert registry.n_tokens == 2


async def test_token_may_be_called_access_token(registry: ScriptedRegistry, asked: Asking) -> None:
    """OAuth2's name for it."""
    guard_of(registry).token_key = "access_token"
    await pull(asked)


async def test_token_that_is_refused_is_renewed_once(registry: ScriptedRegistry, asked: Asking) -> None:
    """Revoked, or signed with a key that was rotated: one new token, and the call succeeds."""
    await pull(asked)
    registry.revoke()
    await pull(asked)
    assert registry.n_tokens == 2
    assert asked.asked[3:] == [("manifest", "GET", 401), ("token", "GET", 200), ("manifest", "GET", 200)]


CHALLENGES: dict[str, tuple[Sequence[str], str]] = {
    "without a scope": (['Bearer realm="{realm}",service="s"'], "repository:library/alpine:pull"),
    "without a service": (['Bearer realm="{realm}",scope="repository:x:pull"'], "repository:x:pull"),
    "in another case": (['bEARER REALM="{realm}", Scope="repository:x:pull"'], "repository:x:pull"),
    "after Basic in one header": (
        ['Basic realm="b", Bearer realm="{realm}",service="s",scope="repository:x:pull"'],
        "repository:x:pull",
    ),
    "before Basic in one header": (
        ['Bearer realm="{realm}",service="s",scope="repository:x:pull", Basic realm="b"'],
        "repository:x:pull",
    ),
    "in a header of its own": (["Negotiate", 'Bearer realm="{realm}",scope="repository:x:pull"'], "repository:x:pull"),
    "with a realm that has a query": (
        ['Bearer realm="{realm}?account=a%2Fb",scope="repository:x:pull"'],
        "repository:x:pull",
    ),
}


@pytest.mark.parametrize(("challenges", "scope"), CHALLENGES.values(), ids=CHALLENGES.keys())
async def test_challenge_is_understood(
    registry: ScriptedRegistry, asked: Asking, challenges: Sequence[str], scope: str
) -> None:
    """RFC 9110 §11.6.1, in the forms that registries send."""
    guard_of(registry).challenges = challenges
    await pull(asked)
    token = registry.asked("/token")[0]
    assert dict(token.query)["scope"] == scope
    if "account" in challenges[0]:
        assert token.target.startswith("/token?account=a%2Fb&")


@pytest.mark.parametrize(
    ("challenge", "failure"),
    [
        ("", Unauthorised),
        ("Negotiate", Unauthorised),
        ("Digest realm=x, nonce=y", Unauthorised),
        ("Bearer", Misbehaved),
        ('Bearer service="s"', Misbehaved),
        ('Bearer realm=""', Misbehaved),
        ('Bearer realm="not a url"', Misbehaved),
        ('Basic realm="r"', Unauthorised),
    ],
)
async def test_challenge_that_cannot_be_met_is_a_failure(
    registry: ScriptedRegistry, asked: Asking, challenge: str, failure: type[UpstreamError]
) -> None:
    """Each with a sentence, and without another request."""
    guard_of(registry).challenges = [challenge]
    with pytest.raises(failure):
        await pull(asked)
    assert len(registry.requests) == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_endless_401_ends_after_one_token(registry: ScriptedRegistry, asked: Asking) -> None:
    """A 401 with a token just obtained is an answer. For a minute no further token is asked for."""
    guard_of(registry).refuses_all = True
    with pytest.raises(Unauthorised):
        await pull(asked)
    assert asked.asked == [("manifest", "GET", 401), ("token", "GET", 200), ("manifest", "GET", 401)]
    for _ in range(5):
        with pytest.raises(Unauthorised):
            await pull(asked)
    assert registry.n_tokens == 1
    await asked.clock.advance(61)
    guard_of(registry).refuses_all = False
    await pull(asked)


async def test_refused_repository_closes_no_other(registry: ScriptedRegistry, asked: Asking) -> None:
    """A tenant who asks for what nobody may have must not take everybody's away."""
    await pull(asked, OTHER)
    registry.rewrite(Twist(path="/v2/library/alpine/*", status=401, body=b"", add=challenge_to(registry)))
    with pytest.raises(Unauthorised):
        await pull(asked)
    await pull(asked, OTHER)


def challenge_to(registry: ScriptedRegistry) -> list[tuple[str, str]]:
    return [("WWW-Authenticate", f'Bearer realm="{registry.url}/token",scope="repository:library/alpine:pull"')]


async def test_failed_login_is_not_repeated_within_a_minute(registry: ScriptedRegistry) -> None:
    """Harbor #22569: a wrong password repeated by every pull locks the account. Across repositories."""
    guard_of(registry).login = ("robot", "another")
    async with asking(registry, credentials=CREDENTIALS) as asked:
        for repository in (ALPINE, ALPINE, OTHER):
            with pytest.raises(Unauthorised) as caught:
                await pull(asked, repository)
            assert "robot" in str(caught.value)
        assert len(registry.asked("/token")) == 1
        await asked.clock.advance(61)
        guard_of(registry).login = LOGIN
        await pull(asked)


async def test_login_that_has_worked_is_not_doubted_as_a_whole(registry: ScriptedRegistry) -> None:
    """After a success a refusal is about the repository, and others go on."""
    guard_of(registry).login = LOGIN
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked)
        registry.rewrite(Twist(path="/token", times=1, status=401, body=b""))
        with pytest.raises(Unauthorised):
            await pull(asked, OTHER)
        with pytest.raises(Unauthorised):
            await pull(asked, OTHER)
        await pull(asked)
        await asked.clock.advance(61)
        await pull(asked, OTHER)


ANSWERS: dict[str, tuple[dict[str, Any], type[BreakwaterError]]] = {
    "403": ({"status": 403}, Unauthorised),
    "404": ({"status": 404}, Misbehaved),
    "400": ({"status": 400}, Misbehaved),
    "429": ({"status": 429, "add": [("Retry-After", "7")]}, Throttled),
    "500": ({"status": 500}, Unreachable),
    "503": ({"status": 503}, Unreachable),
    "a redirect": ({"status": 307, "add": [("Location", "/elsewhere")]}, Misbehaved),
    "HTML": ({"body": b"<html>login here</html>"}, Misbehaved),
    "a list": ({"body": b"[]"}, Misbehaved),
    "no token": ({"body": b"{}"}, Misbehaved),
    "a token that is a number": ({"body": b'{"token": 5}'}, Misbehaved),
    "an empty token": ({"body": b'{"token": ""}'}, Misbehaved),
    "a token with a line break": ({"body": b'{"token": "a\\r\\nX: y"}'}, Misbehaved),
    "nested too deeply": ({"body": b"[" * 60_000}, Misbehaved),
    "more than 64 KiB": ({"body": b'{"token": "' + b"x" * 70_000 + b'"}'}, Misbehaved),
    "a broken body": ({"cut_at": 3}, Unreachable),
    "nothing": ({"no_answer": "fin"}, Unreachable),
}


@pytest.mark.parametrize(("twist", "failure"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_realm_without_a_token_is_a_failure(
    registry: ScriptedRegistry, asked: Asking, twist: dict[str, Any], failure: type[BreakwaterError]
) -> None:
    """Never a NotFound of what was asked for, and never followed anywhere; the next call may succeed."""
    registry.rewrite(Twist(path="/token", times=1, **twist))
    with pytest.raises(failure) as caught:
        await pull(asked)
    assert "token" in str(caught.value) or failure is not Misbehaved
    assert [one.path for one in registry.requests] == ["/v2/library/alpine/manifests/latest", "/token"]
    await asked.clock.advance(61)
    await pull(asked)


async def test_realm_that_hangs_has_a_deadline_of_its_own(registry: ScriptedRegistry) -> None:
    """Its own, so that the asker learns who was slow."""
    registry.rewrite(Twist(path="/token", gate=Gate(), holds_headers=True))
    async with asking(registry, deadlines=Deadlines(token_s=0.05)) as asked:
        with pytest.raises(Timeout, match="token"):
            await pull(asked)


# -- where credentials go (INV-7) --------------------------------------------------------------------------------------


async def test_credentials_go_to_the_own_realm(registry: ScriptedRegistry) -> None:
    """The upstream's own origin may have what is meant for it; the registry itself gets the token alone."""
    guard_of(registry).login = LOGIN
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked)
    assert registry.asked("/token")[0].header("Authorization") == BASIC
    assert not any(one.header("Authorization") == BASIC for one in registry.asked("/v2/*"))


async def test_credentials_go_to_a_named_realm_and_to_no_other(registry: ScriptedRegistry) -> None:
    """INV-7, CVE-2026-33540: the realm is whatever the upstream says; who may have the password the settings say."""
    async with ScriptedRegistry(guard=Guard(scheme="bearer")) as elsewhere:
        guard_of(registry).realm = f"{elsewhere.url}/token"
        guard_of(registry).valid = guard_of(elsewhere).valid
        async with asking(registry, credentials=CREDENTIALS, allow_private=True) as asked:
            await pull(asked)
        assert "authorization" not in elsewhere.requests[-1].names()
        assert SECRET.encode() not in b"".join(one.raw for one in elsewhere.requests)
        named = frozenset({authority(elsewhere.url)})
        async with asking(registry, credentials=CREDENTIALS, allow_private=True, token_realms=named) as asked:
            await pull(asked)
        assert elsewhere.requests[-1].header("Authorization") == BASIC


async def test_refusal_says_that_the_credentials_were_kept_back(registry: ScriptedRegistry) -> None:
    """Whoever forgot token_realms reads what to do."""
    async with ScriptedRegistry(guard=Guard(scheme="bearer", login=LOGIN)) as elsewhere:
        guard_of(registry).realm = f"{elsewhere.url}/token"
        async with asking(registry, credentials=CREDENTIALS, allow_private=True) as asked:
            with pytest.raises(Unauthorised, match="not in token_realms") as caught:
                await pull(asked)
        assert authority(elsewhere.url) in str(caught.value)


async def test_refusal_of_an_anonymous_token_says_so_too(registry: ScriptedRegistry) -> None:
    """Docker Hub's realm gives everybody a token for what is private; it is the registry then that refuses."""
    async with ScriptedRegistry() as realm:
        realm.guard = Guard(scheme="bearer")
        registry.guard = Guard(scheme="bearer", realm=f"{realm.url}/token", refuses_all=True)
        async with asking(registry, allow_private=True, credentials=CREDENTIALS) as asked:
            with pytest.raises(Unauthorised, match="not in token_realms"):
                await pull(asked)
        assert not realm.asked("/token")[0].header("Authorization")


async def test_realm_at_another_port_of_a_literal_url_is_not_asked(registry: ScriptedRegistry) -> None:
    """INV-7: a literal url permits its own address and port; the realm is judged like any other place."""
    async with ScriptedRegistry(guard=Guard(scheme="bearer")) as trap:
        guard_of(registry).realm = f"{trap.url}/token"
        async with asking(registry, credentials=CREDENTIALS) as asked:
            with pytest.raises(Misbehaved):
                await pull(asked)
        assert trap.n_connections == 0


async def test_basic_challenge_is_answered_at_the_own_origin(registry: ScriptedRegistry) -> None:
    """Then sent at once: one request for one call."""
    registry.guard = Guard(scheme="basic", login=LOGIN)
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked)
        await pull(asked)
        assert asked.asked == [("manifest", "GET", 401), ("manifest", "GET", 200), ("manifest", "GET", 200)]


async def test_wrong_password_is_tried_once_a_minute(registry: ScriptedRegistry) -> None:
    """With Basic each request is a login: after a refusal none is sent for a minute."""
    registry.guard = Guard(scheme="basic", login=("robot", "another"))
    async with asking(registry, credentials=CREDENTIALS) as asked:
        for _ in range(5):
            with pytest.raises(Unauthorised):
                await pull(asked)
        assert sum(one.header("Authorization") == BASIC for one in registry.requests) == 1
        await asked.clock.advance(61)
        registry.guard.login = LOGIN
        await pull(asked)


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_wrong_password_is_tried_once_by_many_who_ask_at_once(registry: ScriptedRegistry, scheme: Any) -> None:
    """Whatever repositories they ask for: a login that has not worked yet is tried alone, and its refusal is
    everybody's.
    """
    registry.guard = Guard(scheme=scheme, login=("robot", "another"))
    async with asking(registry, credentials=CREDENTIALS) as asked:
        repositories = [Repository.parse(f"library/number{n}") for n in range(20)]
        outcomes = await asyncio.gather(*(pull(asked, each) for each in repositories), return_exceptions=True)
    assert all(isinstance(one, Unauthorised) for one in outcomes)
    assert sum(one.header("Authorization") == BASIC for one in registry.requests) == 1


async def test_basic_refusal_of_one_repository_closes_no_other(registry: ScriptedRegistry) -> None:
    """Once the login has worked, a 401 is about what was asked for: no tenant can take everybody's pulls away."""
    registry.guard = Guard(scheme="basic", login=LOGIN)
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked, OTHER)
        challenge = [("WWW-Authenticate", 'Basic realm="r"')]
        registry.rewrite(Twist(path="/v2/library/alpine/*", status=401, body=b"", add=challenge))
        for _ in range(3):
            with pytest.raises(Unauthorised):
                await pull(asked)
        await pull(asked, OTHER)
        assert len(registry.asked("/v2/library/alpine/*")) == 2
        await asked.clock.advance(61)
        registry.rewrite()
        await pull(asked)


async def test_basic_password_that_is_withdrawn_is_noticed(registry: ScriptedRegistry) -> None:
    """The same header again is the same answer again: refused at once, and tried again after a minute."""
    registry.guard = Guard(scheme="basic", login=LOGIN)
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked)
        registry.guard.login = ("robot", "another")
        for _ in range(3):
            with pytest.raises(Unauthorised):
                await pull(asked)
        assert len(registry.requests) == 3
        registry.guard.login = LOGIN
        await asked.clock.advance(61)
        await pull(asked)


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
async def test_secrets_are_in_no_sentence_traceback_or_repr(registry: ScriptedRegistry, scheme: Any) -> None:
    """T17: what ends in a log says who, and never with what."""
    registry.guard = Guard(scheme=scheme, login=LOGIN)
    async with asking(registry, credentials=CREDENTIALS) as asked:
        await pull(asked)
        texts = [repr(asked.client), repr(asked.client.policy), repr(CREDENTIALS), repr(await CREDENTIALS.login())]
        texts += [repr(value) for value in vars(asked.client).values()]
        texts += [repr(value) for value in vars(asked.client._tokens).values()]
        token = registry.requests[-1].header("Authorization").partition(" ")[2]
        for twist in (Twist(status=401, body=b""), Twist(no_answer="rst"), Twist(raw=b"nonsense\r\n\r\n")):
            registry.rewrite(twist)
            with pytest.raises(BreakwaterError) as caught:
                await asked.client.manifest(OTHER if twist.status else ALPINE, LATEST)
            texts += traceback.format_exception(caught.value, chain=True)
        everything = "".join(texts)
    assert token and SECRET not in everything and BASIC.partition(" ")[2] not in everything
    assert token not in everything
