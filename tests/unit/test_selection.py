"""What an operator's words select."""

from __future__ import annotations

import pytest

from proxy.errors import BadRequest
from proxy.rules.selection import MAX_CHARS, Selection

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "reference", "tag", "is_covered", "takes_tag"),
    [
        pytest.param("alpine:3", "docker.io/library/alpine", "3", True, True, id="a short name, as docker reads it"),
        pytest.param("alpine:3", "docker.io/library/alpine", "3.1", True, False, id="another tag"),
        pytest.param("alpine", "docker.io/library/alpine", "3", True, True, id="no tag: the whole repository"),
        pytest.param("quay.io/a/b", "quay.io/a/b/c", "1", False, True, id="a repository is not what lies below it"),
        pytest.param("quay.io/**", "quay.io/a/b", "1", True, True, id="a pattern over repositories"),
        pytest.param("quay.io/*/b:1.*", "quay.io/a/b", "1.2", True, True, id="a pattern over tags"),
        pytest.param("quay.io/*/b:1.*", "quay.io/a/b", "2.0", True, False, id="a tag outside the pattern"),
        pytest.param("registry.test:5000/x", "registry.test:5000/x", "1", True, True, id="a port is no tag"),
        pytest.param(DIGEST, "quay.io/a/b", "1", True, False, id="a digest covers every repository and no name"),
        pytest.param(f"quay.io/a/b@{DIGEST}", "quay.io/c", "1", False, False, id="a digest in one repository"),
    ],
)
def test_words_select(text: str, reference: str, tag: str, is_covered: bool, takes_tag: bool) -> None:
    """Names as docker reads them, patterns as in rules; and no tag means the repository, never `latest`."""
    selection = Selection.parse(text)
    assert (selection.covers(reference), selection.takes_tag(tag)) == (is_covered, takes_tag)


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ("quay.io/**", True),
        ("quay.io/a", True),
        ("quay.io/a:1", False),
        (f"quay.io/a@{DIGEST}", False),
        (DIGEST, False),
    ],
)
def test_a_selection_knows_whether_it_takes_whole_repositories(text: str, is_whole: bool) -> None:
    """So that manifests that no tag leads to go as well."""
    assert Selection.parse(text).is_whole is is_whole


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("   ", id="blanks"),
        pytest.param("sha256:abc", id="a digest that is none"),
        pytest.param("Quay.io/UPPER", id="a repository in capitals"),
        pytest.param("quay.io/a:", id="a colon without a tag"),
        pytest.param("quay.io/*/b:", id="a pattern with a colon and no tag"),
        pytest.param("quay.io/* b", id="a pattern with a blank"),
        pytest.param("a" * (MAX_CHARS + 1), id="far too long"),
    ],
)
def test_what_selects_nothing_is_said_to(text: str) -> None:
    """A purge that quietly did nothing, or quietly did more, would be worse than an error."""
    with pytest.raises(BadRequest) as caught:
        Selection.parse(text)
    assert str(caught.value)
