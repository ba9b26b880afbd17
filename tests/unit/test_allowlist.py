"""rules/gates/allowlist.py: what a project's lists let through (INV-8; product.md, "Rules on tags")."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from proxy.errors import Denied
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob

ALPINE, ETCD = "docker.io/library/alpine", "quay.io/coreos/etcd"
DIGEST, OTHER = Digest.of(b"content"), Digest.of(b"other")


def rules(
    allow: Iterable[str | Digest] = (),
    deny: Iterable[str | Digest] = (),
    policy: Iterable[str | Digest] = (),
    *,
    closed: bool = False,
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


# -- media types, sizes ------------------------------------------------------------------------------------------------

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
HELM = "application/vnd.cncf.helm.config.v1+json"


def lets_part(lists: Rules, media_type: str, artifact_type: str = "", size: int = 10) -> bool:
    try:
        lists.check_part(ALPINE, Descriptor(media_type, DIGEST, size, artifact_type=artifact_type))
    except Denied:
        return False
    return True


@pytest.mark.parametrize(
    ("lists", "media_type", "artifact_type", "is_let"),
    [
        pytest.param(rules(), LAYER, "", True, id="no lists"),
        pytest.param(rules(deny=["media-type:application/vnd.cncf.helm.*"]), HELM, "", False, id="a denied type"),
        pytest.param(rules(deny=["media-type:application/vnd.cncf.helm.*"]), LAYER, "", True, id="another type"),
        pytest.param(rules(policy=["media-type:**"]), LAYER, "", False, id="the policy of all"),
        pytest.param(rules(["media-type:application/vnd.oci.image.*"]), LAYER, "", True, id="an allowed type"),
        pytest.param(rules(["media-type:application/vnd.oci.image.*"]), HELM, "", False, id="not among the allowed"),
        pytest.param(rules(["docker.io/**"]), HELM, "", True, id="an allow list of names says nothing about types"),
        pytest.param(rules(deny=["media-type:text/*"]), LAYER, "text/spdx", False, id="a denied artifact type"),
        pytest.param(rules(["media-type:text/*"]), LAYER, "text/spdx", True, id="an allowed artifact type"),
        pytest.param(rules(deny=["media-type:text/*"]), "", "", False, id="nobody says what it is"),
    ],
)
def test_media_types(lists: Rules, media_type: str, artifact_type: str, is_let: bool) -> None:
    """Content is judged by what it is, beside what it is called."""
    assert lets_part(lists, media_type, artifact_type) is is_let


def test_allowed_types_do_not_open_names_nor_close_them() -> None:
    """The two kinds of entries are two lists: types alone leave every name open."""
    assert lets_tag(rules(["media-type:application/**"]), ALPINE, "3")
    assert not lets_tag(rules(["media-type:application/**", "quay.io/**"]), ALPINE, "3")


def test_what_is_too_large_is_refused_by_its_own_rule() -> None:
    """`max_blob` is exact."""
    lists = Rules("team", max_blob=100)
    assert not lists.is_open and lets_part(lists, LAYER, size=100)
    with pytest.raises(Denied, match="101 bytes, and the largest that may be had is 100") as caught:
        lists.check_size(ALPINE, DIGEST, 101)
    assert caught.value.rule == "max_blob"


def test_verdicts_that_are_kept_are_the_verdicts() -> None:
    """Asked again, in any order, for any repository: kept answers are never another's."""
    lists = rules(["docker.io/library/alpine:3.*", "quay.io/**"], ["**:3.9"])
    asked = [(ALPINE, "3.1"), (ALPINE, "3.9"), (ETCD, "3.9"), (ETCD, "x"), (ALPINE, "x"), ("docker.io/a/b", "3.1")]
    fresh = [lets_tag(rules(["docker.io/library/alpine:3.*", "quay.io/**"], ["**:3.9"]), *one) for one in asked]
    for _ in range(3):
        assert [lets_tag(lists, *one) for one in asked] == fresh == [True, False, False, True, False, False]
        assert [lets_tag(lists, *one) for one in reversed(asked)] == fresh[::-1]
