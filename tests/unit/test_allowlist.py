"""rules/gates/allowlist.py: what a project's lists let through (INV-8; product.md, "Rules on tags")."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob

ALPINE, ETCD = "docker.io/library/alpine", "quay.io/coreos/etcd"
DIGEST, OTHER = Digest.of(b"content"), Digest.of(b"other")


def rules(
    allow: Iterable[str] = (), deny: Iterable[str] = (), policy: Iterable[str] = (), *, closed: bool = False
) -> Rules:
    allowed, denied, ruled = (tuple(map(Glob.parse, map(str, texts))) for texts in (allow, deny, policy))
    return Rules("team", allowed, denied, ruled, closed)


def lets_tag(lists: Rules, reference: str, tag: str) -> bool:
    try:
        lists.check_tag(reference, Tag.parse(tag))
    except Denied:
        return False
    return True


def lets_digest(lists: Rules, reference: str, digest: Digest, *tags: str) -> bool:
    try:
        lists.check_digest(reference, digest, lambda: tags)
    except Denied:
        return False
    return True


ONLY_3 = rules(["docker.io/library/alpine:3.*", "quay.io/**"])


@pytest.mark.parametrize(
    ("lists", "reference", "tag", "is_let"),
    [
        pytest.param(rules(), ALPINE, "latest", True, id="no lists"),
        pytest.param(ONLY_3, ALPINE, "3.20", True, id="an allowed tag"),
        pytest.param(ONLY_3, ALPINE, "latest", False, id="a tag that no entry covers"),
        pytest.param(ONLY_3, ETCD, "anything", True, id="a repository that is allowed whole"),
        pytest.param(ONLY_3, "docker.io/library/busybox", "3.1", False, id="a repository that no entry covers"),
        pytest.param(rules(deny=["**:latest"]), ALPINE, "latest", False, id="a denied tag"),
        pytest.param(rules(deny=["**:latest"]), ALPINE, "3", True, id="another tag than the denied"),
        pytest.param(rules(["docker.io/**"], ["docker.io/library/*"]), ALPINE, "3", False, id="deny wins over allow"),
        pytest.param(rules(policy=["docker.io/**"]), ALPINE, "3", False, id="the policy of all"),
        pytest.param(rules(closed=True), ALPINE, "3", False, id="what belongs to no project, refused"),
        pytest.param(rules([DIGEST]), ALPINE, "3", False, id="only a digest is allowed: no tag is"),
    ],
)
def test_a_tag_is_let_through_or_not(lists: Rules, reference: str, tag: str, is_let: bool) -> None:
    """Deny wins; an empty allow list allows everything; a list of tags, too, is hidden by what it denies."""
    assert lets_tag(lists, reference, tag) is is_let


@pytest.mark.parametrize(
    ("lists", "digest", "tags", "is_let"),
    [
        pytest.param(rules(), DIGEST, (), True, id="no lists"),
        pytest.param(rules(["docker.io/library/*"]), DIGEST, (), True, id="the repository is allowed whole"),
        pytest.param(ONLY_3, DIGEST, (), False, id="a tag rule, and no tag resolved to it here"),
        pytest.param(ONLY_3, DIGEST, ("latest", "3.20"), True, id="an allowed tag resolved to it here"),
        pytest.param(ONLY_3, DIGEST, ("latest",), False, id="only a tag that is not allowed did"),
        pytest.param(rules([DIGEST]), DIGEST, (), True, id="the digest itself is allowed"),
        pytest.param(rules([DIGEST]), OTHER, (), False, id="another digest is"),
        pytest.param(rules(deny=[DIGEST]), DIGEST, ("3.20",), False, id="the digest is denied under every name"),
        pytest.param(rules([DIGEST], policy=[DIGEST]), DIGEST, (), False, id="the policy of all wins"),
        pytest.param(rules(deny=["**:latest"]), DIGEST, ("latest",), True, id="denying a tag denies the name only"),
        pytest.param(rules(deny=["docker.io/**"]), DIGEST, (), False, id="the repository is denied"),
        pytest.param(rules(closed=True), DIGEST, (), False, id="what belongs to no project, refused"),
    ],
)
def test_a_digest_is_let_through_or_not(lists: Rules, digest: Digest, tags: tuple[str, ...], is_let: bool) -> None:
    """INV-8: kubelets fetch by digest, so a tag rule allows what allowed tags resolved to here, and nothing else."""
    assert lets_digest(lists, ALPINE, digest, *tags) is is_let


def test_links_are_looked_up_only_when_nothing_else_could_allow() -> None:
    """The look-up walks the links; most requests need not pay for it."""

    def unasked() -> Iterable[str]:
        raise AssertionError("asked for tags")

    rules(["docker.io/**"]).check_digest(ALPINE, DIGEST, unasked)
    rules([DIGEST]).check_digest(ALPINE, DIGEST, unasked)
    rules().check_digest(ALPINE, DIGEST, unasked)


@pytest.mark.parametrize(
    ("lists", "rule", "owner"),
    [
        (rules(deny=["docker.io/**"]), "docker.io/**", "project 'team'"),
        (rules(policy=["docker.io/**"]), "docker.io/**", "[policy]"),
        (rules(["quay.io/**"]), "allow", "project 'team'"),
        (rules(closed=True), 'policy.unmatched = "deny"', "[policy]"),
    ],
)
def test_a_refusal_says_which_rule_of_which_project(lists: Rules, rule: str, owner: str) -> None:
    """product.md: for a refusal, which rule of which project; the same words in logs, metrics and the answer."""
    with pytest.raises(Denied) as refused:
        lists.check_repository(ALPINE)
    assert (refused.value.rule, refused.value.project) == (rule, "team")
    assert owner in str(refused.value) and ALPINE in str(refused.value)


@pytest.mark.parametrize(
    ("lists", "is_open"),
    [(rules(), True), (rules(["**"]), False), (rules(deny=["**:x"]), False), (rules(policy=[DIGEST]), False),
     (rules(closed=True), False)],
)  # fmt: skip
def test_lists_that_refuse_nothing_are_known_as_such(lists: Rules, is_open: bool) -> None:
    """Then nothing need be asked, which is most of the warm path."""
    assert lists.is_open is is_open


def test_a_list_of_tags_shows_what_may_be_pulled() -> None:
    """What is denied is not advertised."""
    lists = rules(["docker.io/library/alpine:3.*"], ["**:3.1"])
    assert [tag for tag in ("3.1", "3.2", "latest") if lists.lists_tag(ALPINE, tag)] == ["3.2"]
