"""Names, tags, hosts and references of the distribution-spec."""

from __future__ import annotations

import pytest

from proxy.errors import BadRequest, InvalidDigest, InvalidName, InvalidTag
from proxy.oci.digest import Digest
from proxy.oci.names import MAX_NAME, Reference, Repository, SourceHost, Tag, parse_tag_or_digest

HEX = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "alpine",
        "library/alpine",
        "a/b/c/d",
        "0",
        "a.b",
        "a_b",
        "a__b",
        "a-b",
        "a---b",
        "a" * MAX_NAME,
        "manifests/tags",
    ],
)
def test_the_grammar_of_repository_names_is_accepted(text: str) -> None:
    """distribution-spec § Pulling manifests, <name>."""
    assert str(Repository.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("Alpine", id="upper case"),
        pytest.param("/alpine", id="a leading slash"),
        pytest.param("alpine/", id="a trailing slash"),
        pytest.param("a//b", id="an empty element"),
        pytest.param("..", id="the parent folder"),
        pytest.param("a/../b", id="the parent folder within"),
        pytest.param("a/.b", id="a hidden element"),
        pytest.param("a..b", id="two dots"),
        pytest.param("a___b", id="three underscores"),
        pytest.param("a._b", id="mixed separators"),
        pytest.param("-a", id="a leading dash"),
        pytest.param("a-", id="a trailing dash"),
        pytest.param("a\n", id="a trailing newline"),
        pytest.param("a\0b", id="a NUL"),
        pytest.param("a\\b", id="a backslash"),
        pytest.param("a b", id="a space"),
        pytest.param("~a", id="our own sign for projects"),
        pytest.param("é", id="another script"),
        pytest.param("host:5000/a", id="a port"),
        pytest.param("a" * (MAX_NAME + 1), id="256 characters"),
    ],
)
def test_what_is_outside_the_grammar_is_no_repository(text: str) -> None:
    """distribution-spec § Pulling manifests, <name>; fullmatch, so no newline slips by."""
    with pytest.raises(InvalidName):
        Repository.parse(text)


@pytest.mark.parametrize("text", ["latest", "3.20", "_x", "A-b.C_d", "v" * 128, "0", "manifests"])
def test_the_grammar_of_tags_is_accepted(text: str) -> None:
    """distribution-spec § Pulling manifests, <tag>."""
    assert str(Tag.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(".", id="a dot"),
        pytest.param("..", id="two dots"),
        pytest.param(".a", id="a leading dot"),
        pytest.param("-a", id="a leading dash"),
        pytest.param("v" * 129, id="129 characters"),
        pytest.param("a:b", id="a colon"),
        pytest.param("a/b", id="a slash"),
        pytest.param("a b", id="a space"),
        pytest.param("a\n", id="a trailing newline"),
        pytest.param("latest\0", id="a NUL"),
        pytest.param("é", id="another script"),
        pytest.param("٣", id="a digit of another script"),
    ],
)
def test_what_is_outside_the_grammar_is_no_tag(text: str) -> None:
    """distribution-spec § Pulling manifests, <tag>."""
    with pytest.raises(InvalidTag):
        Tag.parse(text)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("docker.io", "docker.io"),
        ("Registry.Example.COM", "registry.example.com"),
        ("registry.test:5000", "registry.test:5000"),
        ("localhost", "localhost"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        ("[::1]:5000", "[::1]:5000"),
        ("[fd00::1]", "[fd00::1]"),
        ("a" * 63 + ".test", "a" * 63 + ".test"),
    ],
)
def test_a_host_is_kept_in_lower_case(text: str, host: str) -> None:
    """Hosts are compared without case (RFC 3986 §3.2.2)."""
    assert str(SourceHost.parse(text)) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-a.test",
        "a-.test",
        "a..test",
        "a.test:",
        "a.test:123456",
        "a.test:x",
        "user@a.test",
        "http://a.test",
        "a.test/b",
        "a.test\n",
        "a_b.test",
        "[::1",
        "::1",
        "a" * 64 + ".test",
        ".".join(["a" * 63] * 5),
        "é.test",
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    """T11: no userinfo, scheme, path or port trick is a host."""
    with pytest.raises(InvalidName):
        SourceHost.parse(text)


def test_a_colon_tells_a_digest_from_a_tag() -> None:
    """distribution-spec <tag-or-digest>: tags have no colon."""
    assert parse_tag_or_digest("3.20") == Tag("3.20")
    assert parse_tag_or_digest(f"sha256:{HEX}") == Digest("sha256", HEX)
    with pytest.raises(InvalidDigest):
        parse_tag_or_digest("sha256:baddigeststring")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        pytest.param("alpine", "docker.io/library/alpine:latest", id="a bare name is an official image"),
        pytest.param("alpine:3.20", "docker.io/library/alpine:3.20", id="with a tag"),
        pytest.param("grafana/loki", "docker.io/grafana/loki:latest", id="an organisation on Docker Hub"),
        pytest.param("docker.io/alpine", "docker.io/library/alpine:latest", id="Docker Hub by name"),
        pytest.param("index.docker.io/alpine", "docker.io/library/alpine:latest", id="Docker Hub by its old name"),
        pytest.param("quay.io/a/b:1", "quay.io/a/b:1", id="another registry"),
        pytest.param("localhost/a:1", "localhost/a:1", id="localhost is a host"),
        pytest.param("registry.test:5000/a", "registry.test:5000/a:latest", id="a port is not a tag"),
        pytest.param(f"quay.io/a@sha256:{HEX}", f"quay.io/a@sha256:{HEX}", id="a digest"),
        pytest.param(f"quay.io/a:1@sha256:{HEX}", f"quay.io/a@sha256:{HEX}", id="a digest beats a tag"),
    ],
)
def test_a_reference_is_read_as_docker_reads_it(text: str, whole: str) -> None:
    """What people paste is what they mean; the whole form reads back to the same."""
    reference = Reference.parse(text)
    assert str(reference) == whole
    assert Reference.parse(whole) == reference


@pytest.mark.parametrize(
    "text",
    ["", ":", "@", "a@", "a:", "quay.io/", "quay.io/A", "a:b:c", "a/b:c/d", f"a@sha256:{HEX}x", f"a:!@sha256:{HEX}"],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    """A reference is complete or it is an error of the one who wrote it."""
    with pytest.raises(BadRequest):
        Reference.parse(text)
