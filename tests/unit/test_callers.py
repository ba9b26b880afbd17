"""Log-in as clients do it: Basic, and tokens from an endpoint of our own; over a real port."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from proxy.rules.gates.access import Access, Robot
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute
from proxy.rules.secret_hash import SecretHash
from proxy.web.tokens import LIFETIME_S
from tests.support.appliance import Answer, Appliance, appliance
from tests.support.images import Image, image
from tests.support.registry import ScriptedRegistry

SECRET, NEXT_SECRET = "bw_one", "bw_two"
HASHES = tuple(SecretHash.of(secret, bytes([n]) * 16) for n, secret in enumerate((SECRET, NEXT_SECRET)))
PRIVATE = "/v2/~team/library/alpine/manifests/1"
PUBLIC = "/v2/library/alpine/manifests/1"


@asynccontextmanager
async def guarded(tmp_path: Path, *, expires_at: float | None = None) -> AsyncIterator[Appliance]:
    """Project team for robot ci; everything else for everybody."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        async with appliance(upstream, tmp_path, projects=(ProjectRoute("team"),)) as running:
            accounts(running, {"ci": Robot("ci", HASHES[:1], frozenset({"team"}), expires_at)})
            yield running


IMAGE: Image = image(1, (2000,))


def accounts(running: Appliance, robots: Mapping[str, Robot]) -> None:
    """Swap in a plan with these robots, as a reload does."""
    pull = running.engine.pull
    access = {"team": Access.of("team", ("ci", "dev"), robots), DEFAULT_PROJECT: Access(DEFAULT_PROJECT)}
    pull.plan = replace(pull.plan, robots=robots, access=access)


def basic(name: str, secret: str) -> dict[str, str]:
    """RFC 7617."""
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()}


def challenge_of(answer: Answer) -> dict[str, str]:
    """The parameters of a Bearer challenge."""
    header = answer.headers["www-authenticate"]
    assert header.startswith("Bearer ") and "basic" not in header.lower()
    return dict(re.findall(r'(\w+)="([^"]*)"', header))


async def token_for(running: Appliance, answer: Answer, who: Mapping[str, str] | None = None) -> Answer:
    """Ask for a token as the challenge says."""
    words = challenge_of(answer)
    url = urlsplit(words["realm"])
    assert url.netloc == f"127.0.0.1:{running.port}"
    query = f"service={words['service']}" + (f"&scope={words['scope']}" if "scope" in words else "")
    return await running.get(f"{url.path}?{query}", more=who)


def bearer(answer: Answer) -> dict[str, str]:
    """The header that a token answer is for."""
    assert answer.status == 200, answer
    document = json.loads(answer.body)
    assert document["token"] == document["access_token"] and document["expires_in"] == LIFETIME_S
    return {"Authorization": f"Bearer {document['token']}"}


async def test_without_robots_nothing_is_asked_for(tmp_path: Path) -> None:
    """Clients of a plain mirror never see a challenge, whatever they send."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        async with appliance(upstream, tmp_path) as running:
            assert (await running.get("/v2/")).status == 200
            assert (await running.get("/v2/", more=basic("a", "b"))).status == 200
            assert (await running.get(PUBLIC, more={"Authorization": "Bearer x"})).status == 200
            assert (await running.get("/token")).status == 404


async def test_the_token_flow_opens_what_the_robot_may_read(tmp_path: Path) -> None:
    """401 with a challenge, a token with name and secret, then the content."""
    async with guarded(tmp_path) as running:
        refused = await running.get(PRIVATE)
        assert (refused.status, refused.code) == (401, "UNAUTHORIZED")
        assert challenge_of(refused)["scope"] == "repository:library/alpine:pull"
        shown = bearer(await token_for(running, refused, basic("ci", SECRET)))
        assert (await running.get(PRIVATE, more=shown)).body == IMAGE.body
        assert (await running.get("/v2/", more=shown)).status == 200


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
async def test_basic_is_understood_and_never_asked_for(tmp_path: Path, scheme: str) -> None:
    """A header in hosts.toml may carry it (peers.md §5.1); the challenge is Bearer in any case."""
    async with guarded(tmp_path) as running:
        shown = {"Authorization": basic("ci", SECRET)["Authorization"].replace("Basic", scheme)}
        assert (await running.get(PRIVATE, more=shown)).status == 200
        assert (await running.get("/v2/", more=shown)).status == 200
        wrong = await running.get(PRIVATE, more=basic("ci", "bw_wrong"))
        assert wrong.status == 401 and challenge_of(wrong)


async def test_the_version_check_challenges_and_anonymous_tokens_pass_it(tmp_path: Path) -> None:
    """Once any robot exists: clients that log in find the way, those without a name are let on."""
    async with guarded(tmp_path) as running:
        refused = await running.get("/v2/")
        assert refused.status == 401 and "scope" not in challenge_of(refused)
        shown = bearer(await token_for(running, refused))
        assert (await running.get("/v2/", more=shown)).status == 200
        assert (await running.get(PUBLIC, more=shown)).status == 200
        assert (await running.get(PRIVATE, more=shown)).status == 401, "access is judged per request"


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param({}, id="nothing"),
        pytest.param(basic("alice", "password-for-upstream"), id="somebody else's name and password"),
        pytest.param(basic("ci", "bw_wrong"), id="a robot's name with a wrong secret"),
        pytest.param({"Authorization": "Bearer ey.from.elsewhere"}, id="somebody else's token"),
        pytest.param({"Authorization": "Negotiate abc"}, id="a scheme we do not know"),
        pytest.param({"Authorization": "Basic not-base64!"}, id="broken Basic"),
        pytest.param({"Authorization": ""}, id="an empty header"),
    ],
)
async def test_unknown_credentials_count_as_anonymous(tmp_path: Path, shown: Mapping[str, str]) -> None:
    """Kubelets send a registry's pull secrets to its mirrors unasked: that must neither open nor close anything."""
    async with guarded(tmp_path) as running:
        assert (await running.get(PUBLIC, more=shown)).status == 200
        assert (await running.get(PRIVATE, more=shown)).status == 401
        assert (await running.get("/v2/", more=shown)).status == 401
        with_scope = await token_for(running, await running.get(PRIVATE), shown)
        assert (await running.get(PUBLIC, more=bearer(with_scope))).status == 200
        assert (await running.get(PRIVATE, more=bearer(with_scope))).status == 401


async def test_a_log_in_with_a_wrong_secret_says_so(tmp_path: Path) -> None:
    """A token asked for without a scope is a log-in (`docker login`): its user wants to know."""
    async with guarded(tmp_path) as running:
        refused = await token_for(running, await running.get("/v2/"), basic("ci", "bw_wrong"))
        assert (refused.status, refused.code) == (401, "UNAUTHORIZED")
        assert (await token_for(running, await running.get("/v2/"), basic("ci", SECRET))).status == 200


async def test_a_rotated_secret_overlaps_and_then_ends_at_once_with_its_tokens(tmp_path: Path) -> None:
    """Two hashes stand while nodes change over; a removed one is dead with the reload, remembered or not."""
    async with guarded(tmp_path) as running:
        old = bearer(await token_for(running, await running.get(PRIVATE), basic("ci", SECRET)))
        assert (await running.get(PRIVATE, more=basic("ci", SECRET))).status == 200
        accounts(running, {"ci": Robot("ci", HASHES, frozenset({"team"}))})
        for shown in (old, basic("ci", SECRET), basic("ci", NEXT_SECRET)):
            assert (await running.get(PRIVATE, more=shown)).status == 200
        accounts(running, {"ci": Robot("ci", HASHES[1:], frozenset({"team"}))})
        for shown in (old, basic("ci", SECRET)):
            assert (await running.get(PRIVATE, more=shown)).status == 401
        assert (await running.get(PRIVATE, more=basic("ci", NEXT_SECRET))).status == 200


async def test_a_robot_and_its_tokens_end_when_its_time_is_over(tmp_path: Path) -> None:
    """`expires` holds for what is remembered, too."""
    async with guarded(tmp_path, expires_at=1_800_000_000.0 + 100) as running:
        token = bearer(await token_for(running, await running.get(PRIVATE), basic("ci", SECRET)))
        for shown in (token, basic("ci", SECRET)):
            assert (await running.get(PRIVATE, more=shown)).status == 200
        await running.engine.clock.advance(100)
        for shown in (token, basic("ci", SECRET)):
            assert (await running.get(PRIVATE, more=shown)).status == 401


async def test_a_token_ends_by_itself(tmp_path: Path) -> None:
    """Tokens are short-lived."""
    async with guarded(tmp_path) as running:
        token = bearer(await token_for(running, await running.get(PRIVATE), basic("ci", SECRET)))
        await running.engine.clock.advance(LIFETIME_S)
        assert (await running.get(PRIVATE, more=token)).status == 401


async def test_a_forged_token_is_nobodys(tmp_path: Path) -> None:
    """Neither another key, nor none ("alg": "none"), nor a changed subject."""
    import jwt

    claims = {"iss": "breakwater", "sub": "ci", "mark": HASHES[0].mark, "iat": 1_799_999_999, "exp": 1_900_000_000}
    async with guarded(tmp_path) as running:
        real = json.loads((await token_for(running, await running.get("/v2/"))).body)["token"]
        head, _, signature = real.split(".")
        body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
        for token in (
            jwt.encode(claims, "k" * 32, algorithm="HS256"),
            jwt.encode(claims, "", algorithm="none"),
            f"{head}.{body}.{signature}",
        ):
            assert (await running.get(PRIVATE, more={"Authorization": f"Bearer {token}"})).status == 401


async def test_a_robot_that_is_no_reader_is_refused_with_the_rule(tmp_path: Path) -> None:
    """403 for one who is known and may not; logging in again would not help."""
    async with guarded(tmp_path) as running:
        robots = {name: Robot(name, HASHES[:1], frozenset({name})) for name in ("ci", "dev")}
        accounts(running, robots)
        refused = await running.get(PRIVATE, more=basic("dev", SECRET))
        assert (refused.status, refused.code) == (403, "DENIED")
        assert "rule 'access' of project 'team'" in refused.message
        assert running.answered[-1].rule == "access" and running.answered[-1].caller == "dev"


async def test_failures_are_slowed_and_the_right_secret_never_is(tmp_path: Path) -> None:
    """Delays grow for one who guesses; the node beside it, with the right secret, notices nothing; nobody is locked
    out."""
    async with guarded(tmp_path) as running:
        clock, login = running.engine.clock, await running.get("/v2/")
        taken = []
        for n in range(6):
            before = clock.monotonic()
            assert (await token_for(running, login, basic("ci", f"bw_{n}"))).status == 401
            taken.append(clock.monotonic() - before)
            before = clock.monotonic()
            assert (await running.get(PRIVATE, more=basic("ci", SECRET))).status == 200
            assert clock.monotonic() == before
        assert taken == [0, 0, 0, 0.25, 0.5, 1.0]


async def test_credentials_never_go_upstream(tmp_path: Path) -> None:
    """INV-7: what a client shows us is for us."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        async with appliance(upstream, tmp_path, projects=(ProjectRoute("team"),)) as running:
            accounts(running, {"ci": Robot("ci", HASHES[:1], frozenset({"team"}))})
            for who in (basic("ci", SECRET), basic("alice", "hers")):
                await running.get(PRIVATE, more=who)
                await running.get(PUBLIC, more=who)
            assert upstream.requests and not any("authorization" in request.names() for request in upstream.requests)


@pytest.mark.parametrize("way", ["Basic", "token"])
async def test_the_warm_path_is_as_short_with_a_name_as_without(tmp_path: Path, way: str) -> None:
    """The third manifest with the same secret is answered from ready bytes: nothing is checked, parsed or judged
    again; and no password is kept. A reload that takes the secret away ends it at once."""
    async with guarded(tmp_path) as running:
        shown = basic("ci", SECRET)
        if way == "token":
            shown = bearer(await token_for(running, await running.get(PRIVATE), shown))
        for _ in ("fetched", "here"):
            assert (await running.get(PRIVATE, more=shown)).status == 200
        assert len(running.ready) == 1
        calls = running.engine.pull.manifest
        running.engine.pull.manifest = None  # type: ignore[assignment, method-assign]  # nobody asks the engine
        try:
            assert (await running.get(PRIVATE, more=shown)).body == IMAGE.body
            assert running.answered[-1].caller == "ci"
        finally:
            running.engine.pull.manifest = calls  # type: ignore[method-assign]
        kept = repr(list(running.ready._answers))
        assert SECRET not in kept and basic("ci", SECRET)["Authorization"] not in kept
        assert (await running.get(PRIVATE, more=basic("ci", "bw_wrong"))).status == 401
        accounts(running, {"ci": Robot("ci", HASHES[1:], frozenset({"team"}))})
        assert (await running.get(PRIVATE, more=shown)).status == 401
