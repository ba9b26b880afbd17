"""Every route to bytes, in every state they can be in, for every way to be refused: no way round (INV-8).

The same requests are sent to a store that has nothing, one that has everything and one that is fetching right now; allowed
they are answered, denied they are refused, and a refusal looks the same whatever is here and costs upstream nothing.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.rules.gates.access import Access, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute
from proxy.rules.secret_hash import SecretHash
from tests.support.appliance import Answer, Appliance, appliance
from tests.support.images import OCI_LAYER, Image, artifact, image
from tests.support.registry import Gate, ScriptedRegistry, Twist

IMAGE: Image = image(1, (300_000, 4000))
LAYER = IMAGE.blobs[1]
SIGNATURE = artifact(IMAGE, "application/vnd.example.signature", b"signed")
PROJECTS = (
    ProjectRoute("team", path="team", upstream="docker.io", match=(Glob.parse("docker.io/library/**"),)),
    ProjectRoute("free"),
)
ROBOTS = {"ci": Robot("ci", (SecretHash.of("bw_ci", bytes(16)),), frozenset({"team"}))}
CI = {"Authorization": "Basic " + base64.b64encode(b"ci:bw_ci").decode()}

#: How the same repository is reached: each is project team's.
PREFIXES = {"~project": "/v2/~team/library/alpine", "path": "/v2/team/library/alpine", "ns": "/v2/library/alpine"}

#: name -> (method, what follows the repository, headers)
ROUTES: dict[str, tuple[str, str, dict[str, str]]] = {
    "GET tag": ("GET", "/manifests/1", {}),
    "HEAD tag": ("HEAD", "/manifests/1", {}),
    "GET digest": ("GET", f"/manifests/{IMAGE.digest}", {}),
    "HEAD digest": ("HEAD", f"/manifests/{IMAGE.digest}", {}),
    "GET blob": ("GET", f"/blobs/{LAYER.digest}", {}),
    "HEAD blob": ("HEAD", f"/blobs/{LAYER.digest}", {}),
    "GET range": ("GET", f"/blobs/{LAYER.digest}", {"Range": "bytes=5-20"}),
    "GET many ranges": ("GET", f"/blobs/{LAYER.digest}", {"Range": "bytes=5-20,100-120"}),
    "conditional": ("GET", f"/blobs/{LAYER.digest}", {"If-None-Match": f'"{LAYER.digest}"'}),
    "referrers": ("GET", f"/referrers/{IMAGE.digest}", {}),
    "tags": ("GET", "/tags/list", {}),
}

#: The rules that refuse, and the routes that they are about (None: all).
RULES: dict[str, tuple[Rules, set[str] | None]] = {
    "access": (Rules("team"), None),
    "repository denied": (Rules("team", deny=(Glob.parse("docker.io/library/alpine"),)), None),
    "host denied": (Rules("team", policy_deny=(Glob.parse("docker.io/**"),)), None),
    "not allowed": (Rules("team", allow=(Glob.parse("quay.io/**"),)), None),
    "unmatched denied": (Rules("team", closed=True), None),
    "layer's digest denied": (
        Rules("team", policy_deny=(Glob.parse(LAYER.digest),)),
        {*ROUTES} - {"referrers", "tags"},
    ),
    "layer too large": (Rules("team", max_blob=100_000), {*ROUTES} - {"referrers", "tags"}),
    "media type denied": (
        Rules("team", deny=(Glob.parse(f"media-type:{OCI_LAYER}"),)),
        {*ROUTES} - {"referrers", "tags"},
    ),
    "manifest's digest denied": (
        Rules("team", deny=(Glob.parse(IMAGE.digest),)),
        {"GET tag", "HEAD tag", "GET digest", "HEAD digest", "referrers"},
    ),
    "tag denied": (Rules("team", deny=(Glob.parse("**:1"),)), {"GET tag", "HEAD tag"}),
    "another tag allowed": (Rules("team", allow=(Glob.parse("**:2"),)), {*ROUTES} - {"tags"}),
}


def rule(running: Appliance, rules: Rules, *, is_private: bool = False) -> None:
    """Swap in a plan, as a reload does."""
    pull = running.engine.pull
    access = {name: Access(name) for name in ("team", "free", DEFAULT_PROJECT)}
    if is_private:
        access["team"] = Access.of("team", ("ci",), ROBOTS)
    robots = ROBOTS if is_private else {}
    pull.plan = replace(pull.plan, rules={**pull.plan.rules, "team": rules}, robots=robots, access=access)


async def ask(running: Appliance, route: str, prefix: str, who: Iterable[tuple[str, str]] = ()) -> Answer:
    """One of the routes, by one of the ways to the repository."""
    method, rest, headers = ROUTES[route]
    target = PREFIXES[prefix] + rest + ("?ns=docker.io" if prefix == "ns" else "")
    return await running.get(target, method=method, more={**headers, **dict(who)})


async def warm(running: Appliance) -> None:
    """Everything, through every route, while it is allowed."""
    for route in ROUTES:
        assert (await ask(running, route, "~project")).status in (200, 206, 304), route
    await running.quiet()
    assert await running.engine.stored(Digest.parse(LAYER.digest)) == LAYER.content


def seen(answer: Answer) -> tuple[int, dict[str, str], bytes, str]:
    """What a client can tell of an answer, but for the time of day."""
    return (
        answer.status,
        {key: value for key, value in answer.headers.items() if key != "date"},
        answer.body,
        answer.end,
    )


@pytest.mark.parametrize("state", ["cold", "warm", "in flight"])
@pytest.mark.parametrize("reason", RULES)
async def test_no_way_round(tmp_path: Path, reason: str, state: str) -> None:
    """Denied on every route and by every spelling, in the same words whatever is here; allowed again, answered."""
    rules, about = RULES[reason]
    is_private = reason == "access"
    gate = Gate()
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        upstream.put("library/alpine", SIGNATURE)
        async with appliance(upstream, tmp_path, projects=PROJECTS) as running:
            fetching: asyncio.Task[Answer] | None = None
            if state == "warm":
                await warm(running)
            elif state == "in flight":
                upstream.script.append(Twist(path=f"*/blobs/{LAYER.digest}", method="GET", gate=gate, hold_at=(1000,)))
                await ask(running, "GET tag", "~project")
                fetching = asyncio.get_running_loop().create_task(ask(running, "GET blob", "~project"))
                await gate.reached.wait()
            rule(running, rules, is_private=is_private)

            n_before = len(upstream.requests)
            for route in sorted(about or ROUTES):
                answers = [await ask(running, route, prefix) for prefix in PREFIXES]
                for answer in answers:
                    assert answer.status == (401 if is_private else 403), (route, answer)
                    assert not answer.body or LAYER.content[:50] not in answer.body
                    for header in ("etag", "docker-content-digest", "accept-ranges", "content-range", "last-modified"):
                        assert header not in answer.headers, (route, header)
                    if ROUTES[route][0] == "GET":
                        assert answer.code == ("UNAUTHORIZED" if is_private else "DENIED")
            if about is None:
                assert len(upstream.requests) == n_before, "a refusal costs upstream nothing, so it tells nothing"
            if state == "cold":
                gets = [one for one in upstream.requests if one.method == "GET" and LAYER.digest in one.path]
                assert not gets, "what is refused is not fetched"

            # And allowed it is answered, the verdict was the rules' alone.
            gate.open()
            if fetching is not None:
                assert (await fetching).body == LAYER.content
            if is_private:
                for route in ROUTES:
                    assert (await ask(running, route, "ns", CI.items())).status in (200, 206, 304)
            rule(running, Rules("team"))
            for route in ROUTES:
                assert (await ask(running, route, "ns")).status in (200, 206, 304)


@pytest.mark.parametrize("reason", [name for name, (_, about) in RULES.items() if about is None])
async def test_cached_and_uncached_look_the_same_to_those_who_may_not_read(tmp_path: Path, reason: str) -> None:
    """Status, headers, body and what it costs upstream: nothing tells a stranger what is here."""
    rules, _ = RULES[reason]
    told: dict[str, list[object]] = {}
    for state in ("cold", "warm"):
        async with ScriptedRegistry() as upstream:
            upstream.put("library/alpine", IMAGE, "1")
            upstream.put("library/alpine", SIGNATURE)
            async with appliance(upstream, tmp_path / state, projects=PROJECTS) as running:
                if state == "warm":
                    await warm(running)
                rule(running, rules, is_private=reason == "access")
                n_before = len(upstream.requests)
                answers = [seen(await ask(running, route, prefix)) for route in ROUTES for prefix in PREFIXES]
                port = str(running.port)
                told[state] = [repr(answer).replace(port, "PORT") for answer in answers]
                told[state].append(len(upstream.requests) - n_before)
    assert told["cold"] == told["warm"]


async def test_a_digest_known_from_elsewhere_opens_nothing(tmp_path: Path) -> None:
    """What one repository or project has is asked for upstream before another may see it: cached or not, alike."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        upstream.put("library/other", image(9, (10,)), "1")
        async with appliance(upstream, tmp_path, projects=PROJECTS) as running:
            asked: list[list[str]] = []
            for state in ("cold", "warm"):
                if state == "warm":
                    await running.get("/v2/~free/library/alpine/manifests/1")
                    for blob in IMAGE.all_blobs():
                        await running.get(f"/v2/~free/library/alpine/blobs/{blob.digest}")
                    await running.quiet()
                    await running.engine.clock.advance(11)  # what was not found is remembered for ten seconds
                n_before = len(upstream.requests)
                for method in ("HEAD", "GET"):
                    answer = await running.get(f"/v2/~team/library/other/blobs/{LAYER.digest}", method=method)
                    assert answer.status == 404
                    answer = await running.get(f"/v2/~team/library/other/manifests/{IMAGE.digest}", method=method)
                    assert answer.status == 404
                asked.append([f"{one.method} {one.path}" for one in upstream.requests[n_before:]])
            assert asked[0] == asked[1] and asked[0]


async def test_tags_that_are_not_allowed_are_not_listed(tmp_path: Path) -> None:
    """tags/list shows what could be pulled, page by page, cold and warm."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "3.1", "3.2", "latest", "edge")
        async with appliance(upstream, tmp_path, projects=PROJECTS) as running:
            rule(
                running,
                Rules("team", allow=(Glob.parse("**:3.*"), Glob.parse("**:latest")), deny=(Glob.parse("**:3.2"),)),
            )
            for _ in range(2):
                answer = await running.get("/v2/~team/library/alpine/tags/list")
                assert answer.body == b'{"name": "library/alpine", "tags": ["3.1", "latest"]}'


async def test_a_tag_rule_lets_through_what_the_tag_resolved_to(tmp_path: Path) -> None:
    """Kubelets fetch by digest: after the tag was pulled its digests are allowed, before they are not; and the answer is
    kept over a restart of nothing but the memory."""
    async with ScriptedRegistry() as upstream:
        upstream.put("library/alpine", IMAGE, "1")
        async with appliance(upstream, tmp_path, projects=PROJECTS) as running:
            rule(running, Rules("team", allow=(Glob.parse("docker.io/library/alpine:1"),)))
            for route in ("GET digest", "GET blob", "HEAD blob"):
                assert (await ask(running, route, "ns")).status == 403
            assert (await ask(running, "GET tag", "ns")).status == 200
            for route in ("GET digest", "GET blob", "HEAD blob", "GET range"):
                assert (await ask(running, route, "ns")).status in (200, 206)
