"""`pass_through`: each client reads what upstream shows to its own login, on every route, whatever is here (INV-8).

A registry with three accounts: alice and carol may read library/alpine, bob may not; library/open is for everybody.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from proxy.engine.admission import REFUSED_FOR_S, RULE, Admissions
from proxy.engine.origins import Origin, PassThrough
from proxy.engine.tasks import TaskOwner
from proxy.errors import UnknownManifest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.rules.freshness import TagPolicy
from proxy.rules.gates.access import ANONYMOUS, OPERATOR
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.web.tokens import LIFETIME_S
from tests.support.appliance import Answer, Appliance, appliance
from tests.support.clock import ManualClock
from tests.support.engine import HOST, FakeUpstream
from tests.support.engine import route as route_of
from tests.support.images import Image, artifact, image
from tests.support.registry import Gate, Guard, Request, ScriptedRegistry, Twist

IMAGE: Image = image(1, (300_000, 4000))
LAYER = IMAGE.blobs[1]
SIGNATURE = artifact(IMAGE, "application/vnd.example.signature", b"signed")
PUBLIC: Image = image(2, (2000,))
SECRETS = {"alice": "hers", "bob": "his", "carol": "carols"}
#: How long a decision stands in these tests, in seconds; tags are asked about again after 600.
TTL_S = 300.0

#: name -> (method, what follows the repository, headers)
ROUTES: dict[str, tuple[str, str, dict[str, str]]] = {
    "GET tag": ("GET", "manifests/1", {}),
    "HEAD tag": ("HEAD", "manifests/1", {}),
    "GET digest": ("GET", f"manifests/{IMAGE.digest}", {}),
    "HEAD digest": ("HEAD", f"manifests/{IMAGE.digest}", {}),
    "GET blob": ("GET", f"blobs/{LAYER.digest}", {}),
    "HEAD blob": ("HEAD", f"blobs/{LAYER.digest}", {}),
    "GET range": ("GET", f"blobs/{LAYER.digest}", {"Range": "bytes=5-20"}),
    "GET many ranges": ("GET", f"blobs/{LAYER.digest}", {"Range": "bytes=5-20,100-120"}),
    "conditional": ("GET", f"blobs/{LAYER.digest}", {"If-None-Match": f'"{LAYER.digest}"'}),
    "referrers": ("GET", f"referrers/{IMAGE.digest}", {}),
    "tags": ("GET", "tags/list", {}),
}
#: Those who may not, and what they are told: nobody is asked to log in, the others are refused.
STRANGERS = {
    "nobody": ({}, 401),
    "bob": ({"Authorization": "Basic " + base64.b64encode(b"bob:his").decode()}, 403),
    "a wrong secret": ({"Authorization": "Basic " + base64.b64encode(b"alice:guessed").decode()}, 403),
    "an unknown name": ({"Authorization": "Basic " + base64.b64encode(b"eve:hers").decode()}, 403),
}
SCHEMES: tuple[Literal["basic", "bearer"], ...] = ("basic", "bearer")


def basic(name: str) -> dict[str, str]:
    """RFC 7617."""
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{SECRETS[name]}".encode()).decode()}


async def token(running: Appliance, name: str) -> dict[str, str]:
    """The header that our token endpoint gives out for a login, "" for nobody's."""
    answer = await running.get(
        "/token?service=x&scope=repository:library/alpine:pull", more=basic(name) if name else {}
    )
    return {"Authorization": f"Bearer {json.loads(answer.body)['token']}"}


def guard(scheme: Literal["basic", "bearer"] = "bearer") -> Guard:
    """Who may read what."""
    readers = {"library/alpine": {"alice", "carol"}, "library/open": {""}}
    return Guard(scheme=scheme, accounts=dict(SECRETS), readers=readers)


@asynccontextmanager
async def running_before(upstream: ScriptedRegistry, folder: Path, **more: Any) -> AsyncIterator[Appliance]:
    """Breakwater before a registry with both images."""
    upstream.put("library/alpine", IMAGE, "1")
    upstream.put("library/alpine", SIGNATURE)
    upstream.put("library/open", PUBLIC, "1")
    async with appliance(upstream, folder, decides_for_s=TTL_S, **more) as running:
        yield running


async def ask(running: Appliance, route: str, who: Mapping[str, str], repository: str = "library/alpine") -> Answer:
    """One of the routes."""
    method, rest, headers = ROUTES[route]
    return await running.get(f"/v2/{repository}/{rest}", method=method, more={**headers, **who})


async def warm(running: Appliance) -> None:
    """Everything, through every route, as alice."""
    for route in ROUTES:
        assert (await ask(running, route, basic("alice"))).status in (200, 206, 304), route
    await running.quiet()


def seen(answer: Answer) -> tuple[object, ...]:
    """What a client can tell of an answer, but for the time of day."""
    headers = {key: value for key, value in answer.headers.items() if key != "date"}
    return answer.status, headers, answer.body, answer.end


def work(requests: list[Request]) -> list[str]:
    """What was asked of upstream, but for its own tokens."""
    return [f"{one.method} {one.path}" for one in requests if one.path != "/token"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("state", ["cold", "warm", "in flight"])
@pytest.mark.parametrize("stranger", STRANGERS)
async def test_no_way_round(tmp_path: Path, stranger: str, state: str, scheme: Literal["basic", "bearer"]) -> None:
    """Who may not read there does not read here: each route judged first, and again when the refusal is remembered. Who
    may does, and joins what is on its way after a HEAD of their own."""
    who, status = STRANGERS[stranger]
    gate = Gate()
    async with ScriptedRegistry(guard=guard(scheme)) as upstream, running_before(upstream, tmp_path) as running:
        fetching: asyncio.Task[Answer] | None = None
        if state == "warm":
            await warm(running)
        elif state == "in flight":
            upstream.script.append(Twist(path=f"*/blobs/{LAYER.digest}", method="GET", gate=gate, hold_at=(1000,)))
            await ask(running, "GET tag", basic("alice"))
            fetching = asyncio.get_running_loop().create_task(ask(running, "GET blob", basic("alice")))
            await gate.reached.wait()

        for route in ROUTES:
            for _ in ("judged", "remembered"):
                answer = await ask(running, route, who)
                assert answer.status == status, (route, answer)
                assert LAYER.content[:50] not in answer.body
                for header in ("etag", "docker-content-digest", "accept-ranges", "content-range"):
                    assert header not in answer.headers, (route, header)
                said = running.answered[-1]
                assert (said.rule, said.outcome) == (RULE, "denied")
            await running.engine.clock.advance(REFUSED_FOR_S)  # so that the next route is judged by itself

        n_before = len(upstream.requests)
        joining = asyncio.get_running_loop().create_task(ask(running, "GET blob", basic("carol")))
        while f"HEAD /v2/library/alpine/blobs/{LAYER.digest}" not in work(upstream.requests[n_before:]):
            await asyncio.sleep(0)
        gate.open()
        assert (await joining).body == LAYER.content
        if fetching is not None:
            assert (await fetching).body == LAYER.content
        gets = [one for one in upstream.asked(f"*/blobs/{LAYER.digest}", "GET") if one.header("Authorization")]
        n_whole = sum(not one.header("Range") for one in gets)  # a body that slept through the minutes above is resumed
        assert n_whole == 1, "one upstream GET, whoever asks"
        for route in ROUTES:
            assert (await ask(running, route, basic("carol"))).status in (200, 206, 304), route


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_cached_and_uncached_look_the_same_to_those_who_may_not_read(tmp_path: Path, stranger: str) -> None:
    """Status, headers, body and the work upstream: nothing tells a stranger what is here, or that a digest exists."""
    who, _ = STRANGERS[stranger]
    told: dict[str, list[object]] = {}
    for state in ("cold", "warm"):
        async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path / state) as running:
            if state == "warm":
                await warm(running)
            told[state] = []
            for route in ROUTES:
                n_before = len(upstream.requests)
                answer = seen(await ask(running, route, who))
                ports = {str(running.port): "PORT", str(upstream.port): "THERE"}
                said = repr(answer)
                for port, word in ports.items():
                    said = said.replace(port, word)
                mark = running.answered[-1].caller.removeprefix("login:")
                told[state] += [said.replace(mark, "MARK") if mark else said, work(upstream.requests[n_before:])]
                await running.engine.clock.advance(REFUSED_FOR_S)
    assert told["cold"] == told["warm"]
    assert any(told["cold"][1::2]), "upstream was asked"


async def test_a_digest_of_another_repository_opens_nothing(tmp_path: Path) -> None:
    """Alice has the layer here; bob may read library/open, and asks for the layer there."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        await warm(running)
        assert (await ask(running, "GET tag", basic("bob"), "library/open")).body == PUBLIC.body
        for route in ("GET blob", "HEAD blob", "GET range", "GET digest", "HEAD digest"):
            assert (await ask(running, route, basic("bob"), "library/open")).status == 404


async def test_nobody_sees_what_everybody_may_see(tmp_path: Path) -> None:
    """Without a login, and with a token for nobody; warmed by somebody or not."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        for who in ({}, await token(running, ""), basic("bob")):
            assert (await ask(running, "GET tag", who, "library/open")).body == PUBLIC.body


async def test_a_decision_lasts_as_long_as_the_settings_say_and_no_longer(tmp_path: Path) -> None:
    """Within its time nothing is asked, and upstream may be down; after it, what is cached is closed until it answers."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        await warm(running)
        upstream.rewrite(Twist(no_answer="fin"))
        for route in ROUTES:
            if route not in ("tags", "referrers"):
                assert (await ask(running, route, basic("alice"))).status in (200, 206, 304), route
            assert (await ask(running, route, basic("carol"))).status == 502, "nobody knows whether she may"
        await running.engine.clock.advance(TTL_S)
        for route in ROUTES:
            assert (await ask(running, route, basic("alice"))).status == 502, route
        upstream.rewrite()
        assert (await ask(running, "GET tag", basic("alice"))).status == 200
        n_before = len(upstream.requests)
        for route in ("GET digest", "GET blob", "GET tag"):
            assert (await ask(running, route, basic("alice"))).status == 200
        assert not upstream.requests[n_before:]


async def test_who_loses_the_right_loses_it_within_that_time(tmp_path: Path) -> None:
    """And who gains it has it within a minute."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        await warm(running)
        assert (await ask(running, "GET blob", basic("bob"))).status == 403
        assert upstream.guard is not None
        upstream.guard.readers["library/alpine"] = {"bob"}
        assert (await ask(running, "GET blob", basic("alice"))).status == 200
        await running.engine.clock.advance(REFUSED_FOR_S)
        assert (await ask(running, "GET blob", basic("bob"))).status == 200
        await running.engine.clock.advance(TTL_S - REFUSED_FOR_S)
        assert (await ask(running, "GET blob", basic("alice"))).status == 403
        assert (await ask(running, "GET blob", basic("bob"))).status == 200


async def test_a_refusal_on_the_way_takes_the_decision_back_at_once(tmp_path: Path) -> None:
    """Alice was let in, and upstream refuses the fetch that follows: she is out, cached or not; carol is not."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        assert (await ask(running, "GET tag", basic("alice"))).status == 200
        assert upstream.guard is not None
        upstream.guard.readers["library/alpine"] = {"carol"}
        assert (await ask(running, "GET blob", basic("alice"))).status == 403
        assert (await ask(running, "GET tag", basic("alice"))).status == 403
        assert (await ask(running, "GET blob", basic("carol"))).body == LAYER.content


async def test_anothers_refusal_is_not_ones_own(tmp_path: Path) -> None:
    """Carol joined a fetch that was begun with alice's login, which is refused meanwhile: alice is out, and carol is
    told to ask again."""
    gate = Gate()
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        for name in ("alice", "carol"):
            assert (await ask(running, "tags", basic(name))).status == 200
        assert upstream.guard is not None
        upstream.script.append(Twist(path="*/manifests/1", method="GET", status=403, gate=gate, holds_headers=True))
        both = [
            asyncio.get_running_loop().create_task(ask(running, "GET tag", basic(name))) for name in ("alice", "carol")
        ]
        await gate.reached.wait()
        upstream.guard.readers["library/alpine"] = {"carol"}
        upstream.rewrite()
        gate.open()
        assert [(await each).status for each in both] == [403, 503]
        assert (await ask(running, "GET tag", basic("carol"))).status == 200


async def test_a_token_stands_for_the_login_it_was_given_for(tmp_path: Path) -> None:
    """As docker and containerd log in: challenge, token, content; kept answers are the asker's own, and end in time."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        challenged = await running.get("/v2/")
        assert challenged.status == 401 and challenged.headers["www-authenticate"].startswith("Bearer ")
        refused = await ask(running, "GET tag", {})
        assert 'scope="repository:library/alpine:pull"' in refused.headers["www-authenticate"]
        alice, bob, nobody = await token(running, "alice"), await token(running, "bob"), await token(running, "")
        assert (await running.get("/v2/", more=nobody)).status == 200
        for _ in range(3):
            assert (await ask(running, "GET tag", alice)).body == IMAGE.body
            assert (await ask(running, "GET tag", bob)).status == 403
            assert (await ask(running, "GET tag", nobody)).status == 401
        assert running.answered[-3].caller == running.answered[-6].caller != ""
        await running.engine.clock.advance(LIFETIME_S)
        assert (await ask(running, "GET tag", alice)).status == 401


async def test_a_kept_answer_ends_with_the_decision(tmp_path: Path) -> None:
    """The warm path keeps alice's answer beside her token's bytes: not for longer than she may read."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        await ask(running, "GET tag", basic("alice"))
        await running.engine.clock.advance(TTL_S / 2)
        alice = await token(running, "alice")
        for _ in range(2):
            assert (await ask(running, "GET digest", alice)).status == 200
        assert upstream.guard is not None
        upstream.guard.readers["library/alpine"] = set()
        upstream.revoke()
        await running.engine.clock.advance(TTL_S / 2)
        assert (await ask(running, "GET digest", alice)).status == 403


async def test_a_hundred_parallel_askers_with_one_login_are_one_question(tmp_path: Path) -> None:
    """A rollout with one pull secret costs upstream one HEAD and one GET."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        answers = await asyncio.gather(*(ask(running, "GET tag", basic("alice")) for _ in range(100)))
        assert {answer.status for answer in answers} == {200}
        heads, gets = (upstream.asked("*/manifests/1", method) for method in ("HEAD", "GET"))
        assert len([one for one in heads if one.header("Authorization")]) == 1
        assert len([one for one in gets if one.header("Authorization")]) == 1


async def test_a_login_goes_to_its_upstream_and_its_realm_and_is_written_nowhere(tmp_path: Path) -> None:
    """INV-7: the secret reaches the token realm alone; no event, no file of the store and no name has it."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        await warm(running)
        await ask(running, "GET tag", STRANGERS["a wrong secret"][0])
        shown = {one.path for one in upstream.requests if "Basic" in one.header("Authorization")}
        assert shown == {"/token"}
        told = repr(running.events)
        for word in ("hers", "guessed", "alice", base64.b64encode(b"alice:hers").decode()):
            assert word not in told
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or b"alice" not in path.read_bytes()


async def test_other_upstreams_never_see_a_login(tmp_path: Path) -> None:
    """Where `pass_through` is not written, what a client shows is for nobody."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        async with appliance(upstream, tmp_path) as running:
            assert (await ask(running, "GET tag", basic("alice"))).status == 200
            assert not any(one.header("Authorization") for one in upstream.requests)


async def test_a_repository_that_is_denied_here_is_not_asked_about(tmp_path: Path) -> None:
    """A refusal of ours costs upstream nothing, whoever asks."""
    rules = Rules("default", deny=(Glob.parse("docker.io/library/alpine"),))
    async with (
        ScriptedRegistry(guard=guard()) as upstream,
        running_before(upstream, tmp_path, rules=[rules]) as running,
    ):
        for route in ROUTES:
            for who in (basic("alice"), {}):
                assert (await ask(running, route, who)).status == 403
        assert not upstream.requests


async def test_what_is_not_there_is_asked_about_once_in_a_while(tmp_path: Path) -> None:
    """ "Not found" is remembered for `negative_ttl` (10 s), for each login by itself."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        for _ in range(3):
            answer = await running.get("/v2/library/alpine/manifests/none", more=basic("alice"))
            assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
        n_alice = len(upstream.requests)
        assert len([one for one in upstream.asked("*/manifests/none") if one.header("Authorization")]) == 1
        assert (await running.get("/v2/library/alpine/manifests/none", more=basic("bob"))).status == 403
        assert len(upstream.requests) > n_alice
        await running.engine.clock.advance(11)
        assert (await running.get("/v2/library/alpine/manifests/none", more=basic("alice"))).status == 404
        assert len([one for one in upstream.asked("*/manifests/none") if one.header("Authorization")]) == 3


async def test_what_an_operator_began_is_asked_for_with_the_upstreams_own_credentials(tmp_path: Path) -> None:
    """Prefetch and scrub show no client's login; what they bring is read by those who may, after a HEAD."""
    async with ScriptedRegistry(guard=guard()) as upstream, running_before(upstream, tmp_path) as running:
        pull = running.engine.pull
        from proxy.oci.digest import Digest

        asked = BlobGet(RepositoryPath(None, "library/open"), Digest.parse(PUBLIC.blobs[0].digest), None)
        _, opened = await pull.blob(asked, OPERATOR)
        opened.source.leave()  # type: ignore[union-attr]
        await running.quiet()
        assert (await running.get(f"/v2/library/open/blobs/{PUBLIC.blobs[0].digest}", more=basic("bob"))).status == 200


async def test_what_upstream_does_not_have_is_told_to_each_asker_anew() -> None:
    """An error that is kept and raised again would keep the requests of all who were told it."""
    owner, upstream = TaskOwner(print), FakeUpstream()
    admissions = Admissions(clock=ManualClock(), owner=owner)
    origin = Origin(HOST, upstream, TagPolicy(), pass_through=PassThrough(lambda _: upstream, TTL_S))
    asked = ManifestGet(RepositoryPath(None, "library/alpine"), Tag("gone"), None)
    told = []
    for _ in range(3):
        with pytest.raises(UnknownManifest, match="has no manifest") as found:
            async with admissions.admitted(route_of(), origin, asked, ANONYMOUS):
                pass
        told.append(found.value)
    assert len({id(error) for error in told}) == 3
    assert upstream.count("manifest head") == 1
    await owner.aclose()
