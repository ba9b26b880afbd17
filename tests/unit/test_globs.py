"""rules/globs.py: patterns over references."""

from __future__ import annotations

import pytest

from proxy.oci.digest import Digest
from proxy.rules.globs import Glob

DIGEST = Digest.of(b"x")


@pytest.mark.parametrize(
    ("pattern", "reference", "is_covered"),
    [
        ("docker.io/library/alpine", "docker.io/library/alpine", True),
        ("docker.io/library/alpine", "docker.io/library/alpine2", False),
        ("docker.io/library/alpine", "xdocker.io/library/alpine", False),
        ("docker.io/library/*", "docker.io/library/alpine", True),
        ("docker.io/library/*", "docker.io/library/a/b", False),
        ("docker.io/library/*", "docker.io/library/", True),
        ("docker.io/library/**", "docker.io/library/a/b/c", True),
        ("docker.io/**", "docker.io/library/alpine", True),
        ("docker.io/**", "docker.io", False),
        ("**", "anything/at/all", True),
        ("**/alpine", "docker.io/library/alpine", True),
        ("quay.io/**/x", "quay.io/x", True),
        ("quay.io/**/x", "quay.io/a/b/x", True),
        ("quay.io/**/x", "quay.io/a/bx", False),
        ("*.io/library/alpine", "docker.io/library/alpine", True),
        ("docker.io/lib*/al*e", "docker.io/library/alpine", True),
        ("docker.io/a.b", "docker.io/aXb", False),
        ("docker.io/library/alpine:3.*", "docker.io/library/alpine", True),
        ("registry.test:5000/a/b", "registry.test:5000/a/b", True),
        ("registry.test:5000/**", "registry.test:5000/a/b", True),
    ],
)
def test_stars_stay_within_an_element_and_two_cross_them(pattern: str, reference: str, is_covered: bool) -> None:
    """A pattern covers a whole `<host>/<repository>`, from the first character to the last."""
    assert Glob.parse(pattern).covers(reference) is is_covered


@pytest.mark.parametrize(
    ("pattern", "tag", "is_covered"),
    [
        ("docker.io/a:3.*", "3.20", True),
        ("docker.io/a:3.*", "3", False),
        ("docker.io/a:3.*", "13.2", False),
        ("**:latest", "latest", True),
        ("**:latest", "Latest", False),
        ("docker.io/a", "whatever", True),
        ("docker.io/a:v*", "v1.2", True),
    ],
)
def test_the_part_behind_the_colon_is_about_tags(pattern: str, tag: str, is_covered: bool) -> None:
    """A pattern without one speaks about every tag. Tags are case-sensitive."""
    assert Glob.parse(pattern).covers_tag(tag) is is_covered


def test_a_port_is_not_a_tag() -> None:
    """The colon that counts is in the last element."""
    assert Glob.parse("registry.test:5000/a").tag is None
    assert Glob.parse("registry.test:5000/a:1").tag is not None


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_digest_is_a_digest_and_covers_no_name(algorithm: str) -> None:
    """A digest entry is about content under every name; as a name it matches none."""
    digest = Digest.of(b"x", algorithm)
    glob = Glob.parse(str(digest))
    assert glob.digest == digest
    assert not glob.covers("docker.io/library/alpine")
    assert glob.text == str(digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " docker.io/a",
        "docker.io/a ",
        "docker.io/a b",
        "docker.io/a@sha256:00",
        "docker.io/a:",
        "sha256:00",
        "a\n",
        "é/x",
    ],
)
def test_what_can_never_match_is_refused_with_a_sentence(text: str) -> None:
    """A rule that silently matches nothing is a hole in a policy."""
    with pytest.raises(ValueError, match=r".{20,}"):
        Glob.parse(text)


@pytest.mark.parametrize("path", ["docker.io/a.+", "docker.io/(a)", "docker.io/a|b", "docker.io/a?"])
def test_nothing_in_a_pattern_is_a_regular_expression(path: str) -> None:
    """Characters that mean something there are refused here."""
    with pytest.raises(ValueError):
        Glob.parse(path)
