"""WWW-Authenticate, as registries write it (RFC 9110 §11.6.1)."""

from __future__ import annotations

import pytest

from proxy.oci.challenge import Challenge, parse, pull_scope
from proxy.oci.names import Repository

HUB = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull"'


def test_a_registry_s_challenge_is_read() -> None:
    """The one that Docker Hub sends."""
    assert parse([HUB]) == (
        Challenge(
            "bearer",
            {
                "realm": "https://auth.docker.io/token",
                "service": "registry.docker.io",
                "scope": "repository:library/alpine:pull",
            },
        ),
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param('Basic realm="x"', [("basic", {"realm": "x"}, "")], id="basic"),
        pytest.param("Basic", [("basic", {}, "")], id="a scheme alone"),
        pytest.param("Negotiate YIIab+/==", [("negotiate", {}, "YIIab+/==")], id="a token68"),
        pytest.param("BEARER Realm=x", [("bearer", {"realm": "x"}, "")], id="no regard to case"),
        pytest.param(
            'Bearer scope="repository:a:pull,push",realm="r"',
            [("bearer", {"scope": "repository:a:pull,push", "realm": "r"}, "")],
            id="a comma in quotes",
        ),
        pytest.param(r'Basic realm="a\"b\\c, d=e"', [("basic", {"realm": 'a"b\\c, d=e'}, "")], id="escapes"),
        pytest.param('Basic realm=""', [("basic", {"realm": ""}, "")], id="an empty value"),
        pytest.param(
            "Bearer realm=https://a.test/t?x=1,service=s",
            [("bearer", {"realm": "https://a.test/t?x=1", "service": "s"}, "")],
            id="a URL without quotes",
        ),
        pytest.param(
            'Bearer realm = "r" , service\t=\ts', [("bearer", {"realm": "r", "service": "s"}, "")], id="space around ="
        ),
        pytest.param(
            'Bearer realm="r" service="s"', [("bearer", {"realm": "r", "service": "s"}, "")], id="forgotten commas"
        ),
        pytest.param('Bearer realm="first", realm="second"', [("bearer", {"realm": "first"}, "")], id="given twice"),
        pytest.param(
            'Basic realm="b", Bearer realm="r",service="s"',
            [("basic", {"realm": "b"}, ""), ("bearer", {"realm": "r", "service": "s"}, "")],
            id="two in one line",
        ),
        pytest.param(
            'Negotiate, NTLM abc=, Bearer realm="r"',
            [("negotiate", {}, ""), ("ntlm", {}, "abc="), ("bearer", {"realm": "r"}, "")],
            id="three of three kinds",
        ),
        pytest.param('Basic Bearer realm="r"', [("basic", {}, ""), ("bearer", {"realm": "r"}, "")], id="no comma"),
        pytest.param(',, ,Bearer realm="r",,', [("bearer", {"realm": "r"}, "")], id="empty elements"),
        pytest.param(
            'Bearer realm="never closed, x=y', [("bearer", {"realm": "never closed, x=y"}, "")], id="unclosed"
        ),
        pytest.param('Bearer realm="ends\\', [("bearer", {"realm": "ends"}, "")], id="ends in a backslash"),
        pytest.param('"quoted, x=y", Bearer realm="r"', [("bearer", {"realm": "r"}, "")], id="garbage first"),
        pytest.param(
            'Bearer realm="r", @@, service="s"', [("bearer", {"realm": "r", "service": "s"}, "")], id="within"
        ),
        pytest.param('realm="r"', [], id="parameters of nothing"),
        pytest.param("", [], id="nothing"),
        pytest.param('=,=,"', [], id="punctuation"),
    ],
)
def test_challenges_are_read_as_they_come(header: str, expected: list[tuple[str, dict[str, str], str]]) -> None:
    """RFC 9110 §11.3 and §11.6.1, with patience for those who did not read it."""
    assert [(found.scheme, found.params, found.token68) for found in parse([header])] == expected


def test_several_lines_are_one_list() -> None:
    """RFC 9110 §5.3: repeated headers are a list, in their order."""
    assert [found.scheme for found in parse(['Basic realm="x"', HUB, ""])] == ["basic", "bearer"]


def test_a_line_made_to_be_slow_is_read_like_others() -> None:
    """Nothing here looks at a character more than a few times."""
    assert parse(['a="' * 20_000]) == ()
    assert len(parse(["a " * 20_000])) > 0
    assert parse(['"\\' * 20_000]) == ()


def test_the_scope_to_pull_one_repository() -> None:
    """For challenges that name none."""
    assert pull_scope(Repository("library/alpine")) == pull_scope("library/alpine") == "repository:library/alpine:pull"
