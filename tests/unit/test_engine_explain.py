"""Explain says what a pull would meet: the same verdict, the same rule; it fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.engine.explain import Explain, parsed
from proxy.engine.origins import PassThrough
from proxy.errors import BreakwaterError, Denied
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.oci.names import Tag
from proxy.rules.gates.access import ANONYMOUS, Access, Caller, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute
from tests.support.engine import Engine, FakeUpstream, engine
from tests.support.images import image

IMAGE = image(1, (5000,))
TEAM = (ProjectRoute("team", match=(Glob.parse("docker.io/library/**"),)),)
LISTS = [
    "docker.io/library/alpine:3.*",
    "docker.io/library/alpine",
    "docker.io/**",
    "**:latest",
    "**:1",
    "quay.io/**",
    IMAGE.digest,
    IMAGE.all_blobs()[1].digest,
    "media-type:application/vnd.oci.image.layer.*",
    "media-type:**",
    "media-type:application/vnd.oci.image.config.v1+json",
]


def globs(texts: Iterable[str]) -> tuple[Glob, ...]:
    """Rules."""
    return tuple(map(Glob.parse, texts))


def explain_of(running: Engine) -> Explain:
    """As wiring makes it."""
    return Explain(lambda: running.pull.plan, running.links, running.store.records, running.charges)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(
    allow=st.lists(st.sampled_from(LISTS), max_size=3),
    deny=st.lists(st.sampled_from(LISTS), max_size=2),
    policy=st.lists(st.sampled_from(LISTS), max_size=1),
    target=st.sampled_from(["1", "3.1", "latest", IMAGE.digest]),
    max_blob=st.sampled_from([None, 100, 1 << 20]),
    quota=st.sampled_from([None, 100, 1 << 20]),
    is_known=st.booleans(),
)
async def test_explain_and_a_pull_agree(
    allow: list[str],
    deny: list[str],
    policy: list[str],
    target: str,
    max_blob: int | None,
    quota: int | None,
    is_known: bool,
) -> None:
    """Where explain says no, the pull is refused by that rule; what is known here is judged whole."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, "1", "3.1", "latest")
    allowances = {"team": Allowance(quota, "deny")}
    async with engine(upstream, projects=TEAM, allowances=allowances) as running:
        asked = (
            ManifestGet(RepositoryPath(None, "library/alpine"), parsed(f"x@{target}")[1], None)
            if ":" in target
            else (ManifestGet(RepositoryPath(None, "library/alpine"), Tag(target), None))
        )
        rules = Rules("team", globs(allow), globs(deny), globs(policy), max_blob=max_blob)
        running.pull.plan = replace(running.pull.plan, rules={**running.pull.plan.rules, "team": rules})
        if is_known:
            try:
                await running.pull.manifest(asked)
            except Denied:
                pass
        n_asked = len(upstream.asked)
        mark = "@" if ":" in target else ":"
        answer = await explain_of(running).of(f"docker.io/library/alpine{mark}{target}", "")
        assert len(upstream.asked) == n_asked, "explain fetches nothing"
        rule = ""
        try:
            await running.pull.manifest(asked)
        except Denied as error:
            rule = error.rule
        if answer["verdict"] == "deny":
            assert answer["rule"] == rule
            assert answer["route"]["project"] == "team" and answer["steps"]
        else:
            is_judged_later = any("not known here" in step["why"] for step in answer["steps"])
            assert rule == "" or is_judged_later


async def test_explain_names_route_project_rules_and_verdict() -> None:
    """Everything somebody needs who was refused."""
    upstream = FakeUpstream()
    async with engine(upstream, projects=TEAM) as running:
        robots = {"ci": Robot("ci", (), frozenset({"team"}))}
        rules = Rules("team", globs(["docker.io/library/alpine:3.*"]), globs(["**:latest"]))
        running.pull.plan = replace(
            running.pull.plan,
            rules={**running.pull.plan.rules, "team": rules},
            robots=robots,
            access={"team": Access.of("team", ("ci",), robots), DEFAULT_PROJECT: Access(DEFAULT_PROJECT)},
        )
        explain = explain_of(running)
        answer = await explain.of("alpine:latest", "ci")
        assert answer["route"] == {
            "project": "team",
            "upstream": "docker.io",
            "repository": "library/alpine",
            "why": "matched by 'docker.io/library/**'",
        }
        assert [(step["rule"], step["result"]) for step in answer["steps"]] == [
            ("ci", "allows"),
            ("**:latest", "denies"),
        ]
        assert (answer["verdict"], answer["rule"]) == ("deny", "**:latest")
        anybody = await explain.of("alpine:3.1", "")
        assert (anybody["verdict"], anybody["rule"]) == ("deny", "access")
        assert (await explain.of("~team/alpine:3.1", "ci"))["verdict"] == "allow"
        assert (await explain.of("~nobody/alpine:3.1", "ci"))["verdict"] == "deny"
        with pytest.raises(BreakwaterError, match="no robot is called 'dev'"):
            await explain.of("alpine", "dev")


async def test_explain_says_who_decides_where_logins_are_passed_through() -> None:
    """Upstream does, at the pull; explain asks nobody, and says so."""
    upstream = FakeUpstream()
    logins = {"docker.io": PassThrough(lambda _: upstream, 60.0)}
    async with engine(upstream, projects=TEAM, logins=logins) as running:
        answer = await explain_of(running).of("alpine:3", "")
        steps = [(step["owner"], step["rule"], step["result"]) for step in answer["steps"]]
        assert ("upstream 'docker.io'", "pass_through", "passes") in steps
        assert not upstream.asked


@pytest.mark.parametrize(
    ("text", "project", "name", "target"),
    [
        ("alpine", None, "alpine", "latest"),
        ("alpine:3", None, "alpine", "3"),
        ("registry.test:5000/x/y", None, "registry.test:5000/x/y", "latest"),
        ("registry.test:5000/x/y:1", None, "registry.test:5000/x/y", "1"),
        ("~team/quay.io/x:1", "team", "quay.io/x", "1"),
        (f"x:1@{IMAGE.digest}", None, "x", IMAGE.digest),
    ],
)
def test_a_reference_is_what_stands_after_the_registrys_address(
    text: str, project: str | None, name: str, target: str
) -> None:
    """A colon after the last slash is a tag's."""
    path, found = parsed(text)
    assert (path.project, path.name, str(found)) == (project, name, target)
    assert isinstance(found, Digest) == (":" in target)


def test_the_caller_of_the_operators_own_work_reads_everything() -> None:
    """What was begun from the admin side is judged by rules, not by readers."""
    access = Access("team", is_public=False)
    assert not access.allows(ANONYMOUS) and not access.allows(Caller("ci"))
