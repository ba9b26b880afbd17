"""Rules that can never be asked are reported, each with its place in the file."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidSettings
from proxy.rules.globs import Glob
from proxy.settings import file_layer, read
from proxy.settings.overlaps import _compiled, covers

BASE = """
[store]
path = "/x"
capacity = "10GiB"
[upstreams."docker.io"]
url = "https://registry-1.docker.io"
[upstreams."quay.io"]
url = "https://quay.io"
"""


def problems_of(text: str) -> list[str]:
    """What is said about a settings file."""
    try:
        read([file_layer(BASE + text, "b.toml", folder="")])
    except InvalidSettings as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        pytest.param(
            '[projects.a]\nmatch = ["docker.io/**"]\n[projects.b]\nmatch = ["docker.io/library/**"]',
            "b.toml:12: projects.b.match (entry 1): ",
            "project a stands before",
            id="a project that an earlier one hides",
        ),
        pytest.param(
            '[projects.a]\nmatch = ["docker.io/x/*"]\n[projects.b]\nmatch = ["quay.io/**", "docker.io/x/*"]',
            "b.toml:12: projects.b.match (entry 2): ",
            "is matched there, too",
            id="the same match in two projects",
        ),
        pytest.param(
            '[projects.a]\nallow = ["docker.io/library/alpine"]\ndeny = ["docker.io/library/*"]',
            "b.toml:10: projects.a.allow (entry 1): ",
            "deny has docker.io/library/*, and deny wins",
            id="an allow entry that a denial covers",
        ),
        pytest.param(
            '[projects.a]\nallow = ["docker.io/library/alpine:latest"]\n[policy]\ndeny = ["**:latest"]',
            "b.toml:10: projects.a.allow (entry 1): ",
            "policy.deny has **:latest",
            id="an allowed tag that the policy denies",
        ),
        pytest.param(
            '[projects.a]\ndeny = ["**:latest", "quay.io/**", "**:latest"]',
            "b.toml:10: projects.a.deny (entry 3): ",
            "written twice",
            id="an entry written twice",
        ),
        pytest.param(
            '[projects.a]\nquota = "11GiB"',
            "b.toml:10: projects.a.quota: ",
            "larger than store.capacity",
            id="a quota over the capacity",
        ),
        pytest.param(
            '[projects.a]\naccess = ["nobody"]',
            "b.toml:10: projects.a.access (entry 1): ",
            "nobody is not defined under [robots]",
            id="an unknown robot",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_place(text: str, place: str, says: str) -> None:
    """File, line, key and entry; one problem for one mistake."""
    (problem,) = problems_of(text)
    assert problem.startswith(place) and says in problem, problem


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            '[projects.a]\nmatch = ["docker.io/library/**"]\n[projects.b]\nmatch = ["docker.io/**"]',
            id="the exception first, then the rest",
        ),
        pytest.param(
            '[projects.a]\nallow = ["docker.io/**"]\ndeny = ["**:latest"]', id="a denial within what is allowed"
        ),
        pytest.param('[projects.a]\nallow = ["docker.io/x/*"]\ndeny = ["docker.io/x/y"]', id="one of many denied"),
        pytest.param('[projects.a]\nallow = ["docker.io/a:1"]\ndeny = ["docker.io/a:2"]', id="another tag denied"),
        pytest.param(
            '[projects.a]\nallow = ["media-type:application/**"]\ndeny = ["**"]', id="types and names are two lists"
        ),
    ],
)
def test_what_can_be_asked_is_no_mistake(text: str) -> None:
    """Overlaps in part are how exceptions are written."""
    tomllib.loads(BASE + text)
    assert problems_of(text.replace("docker.io/a", "docker.io/library/a")) == []


@pytest.mark.parametrize(
    ("glob", "other", "is_covered"),
    [
        ("**", "docker.io/**", True),
        ("docker.io/**", "docker.io/library/*", True),
        ("docker.io/*", "docker.io/**", False),
        ("docker.io/*/*", "docker.io/**", False),
        ("docker.io/lib*/**", "docker.io/library/**", True),
        ("docker.io/library/**", "docker.io/lib*/**", False),
        ("**/alpine", "docker.io/library/alpine", True),
        ("*/x", "quay.io/x", True),
        ("quay.io/**/x", "quay.io/x", True),
        ("quay.io/x", "quay.io/**/x", False),
    ],
)
def test_one_pattern_covers_another(glob: str, other: str, is_covered: bool) -> None:
    """What the second takes, the first takes."""
    assert covers(glob, other) is is_covered


_PIECES = st.lists(st.sampled_from(["a", "b", "/", "*", "**", "**/", "."]), min_size=1, max_size=8).map("".join)


@given(glob=_PIECES, name=st.text("ab/.", max_size=8))
def test_a_pattern_is_read_as_the_rules_read_it(glob: str, name: str) -> None:
    """Two readings of one grammar, held together: settings may not know the rules' own."""
    assert (_compiled(glob).fullmatch(name) is not None) == Glob.parse(glob).covers(name)
