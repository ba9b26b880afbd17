"""Pages of tags (distribution-spec § Listing Tags, RFC 8288)."""

from __future__ import annotations

import pytest

from proxy.oci.pagination import last_of, link_header, page, parse_next

TAGS = ["v2", "latest", "B", "a", "1.10", "1.9", "b", "a"]
ORDERED = ("1.10", "1.9", "a", "B", "b", "latest", "v2")


@pytest.mark.parametrize(
    ("n", "last", "expected", "following"),
    [
        pytest.param(None, None, ORDERED, None, id="everything"),
        pytest.param(3, None, ORDERED[:3], "a", id="the first page"),
        pytest.param(3, "a", ORDERED[3:6], "latest", id="the second page"),
        pytest.param(3, "latest", ORDERED[6:], None, id="the last page"),
        pytest.param(7, None, ORDERED, None, id="a page of exactly all"),
        pytest.param(1, "latest", ("v2",), None, id="the last tag"),
        pytest.param(1000, "v2", (), None, id="after the last tag"),
        pytest.param(None, "b", ORDERED[5:], None, id="the rest"),
        pytest.param(2, "az", ("B", "b"), "b", id="after a tag that does not exist"),
        pytest.param(0, None, (), None, id="no tags wanted"),
        pytest.param(0, "a", (), None, id="no tags wanted after one"),
    ],
)
def test_pages_follow_each_other(
    n: int | None, last: str | None, expected: tuple[str, ...], following: str | None
) -> None:
    """distribution-spec § Listing Tags: order without regard to case; no Link where nothing follows or n is 0."""
    assert page(TAGS, n, last) == (expected, following)


def test_no_tags_are_an_empty_page() -> None:
    """An empty list is 200, not 404."""
    assert page([], None, None) == page([], 5, "x") == ((), None)


def test_a_link_can_be_followed_to_the_next_page() -> None:
    """distribution-spec § Listing Tags: the Link header, whose target carries n, last and our ns."""
    link = link_header("/v2/a/tags/list", n=2, last="1.9", ns="registry.test:5000")
    assert link == '</v2/a/tags/list?n=2&last=1.9&ns=registry.test%3A5000>; rel="next"'
    target = parse_next(link)
    assert target == "/v2/a/tags/list?n=2&last=1.9&ns=registry.test%3A5000"
    assert last_of(target) == "1.9"


def test_a_link_says_nothing_that_was_not_asked() -> None:
    """Without n and ns the target has neither."""
    assert link_header("/v2/a/tags/list", n=None, last="x", ns=None) == '</v2/a/tags/list?last=x>; rel="next"'


@pytest.mark.parametrize(
    ("value", "target"),
    [
        pytest.param("</x>; rel=next", "/x", id="no quotes"),
        pytest.param("</x>;rel=next", "/x", id="no space"),
        pytest.param('</x>; REL="NEXT"', "/x", id="upper case"),
        pytest.param('</x>; rel="last next"', "/x", id="one of two relations"),
        pytest.param('</x>; title="a, b"; rel="next"', "/x", id="a comma in another parameter"),
        pytest.param('</p>; rel="prev", </x>; rel="next"', "/x", id="the second link"),
        pytest.param(
            '<https://r.test/v2/a/tags/list?last=b>; rel="next"', "https://r.test/v2/a/tags/list?last=b", id="whole"
        ),
        pytest.param('</x?a=1,2>; rel="next"', "/x?a=1,2", id="a comma in the target"),
        pytest.param('</x>; rel="nextish"', None, id="another relation"),
        pytest.param("</x>", None, id="no relation"),
        pytest.param('/x; rel="next"', None, id="no brackets"),
        pytest.param('<>; rel="next"', None, id="no target"),
        pytest.param('</x\x00y>; rel="next"', None, id="a NUL"),
        pytest.param('</x\r\ny>; rel="next"', None, id="a line break"),
        pytest.param("", None, id="nothing"),
        pytest.param("<" * 5000, None, id="brackets"),
        pytest.param('<a>; rel="' * 1000, None, id="never closed"),
    ],
)
def test_the_next_link_is_found_among_what_registries_send(value: str, target: str | None) -> None:
    """RFC 8288 §3, and its absence in anything else."""
    assert parse_next(value) == target


@pytest.mark.parametrize(
    ("url", "last"),
    [
        ("/v2/a/tags/list?last=b&n=5", "b"),
        ("/v2/a/tags/list?n=5&last=b%2Bc", "b+c"),
        ("/v2/a/tags/list?next_page=xyz", None),
        ("/v2/a/tags/list", None),
        ("http://[broken/?last=x", None),
        ("/x?" + "a=1&" * 100, None),
    ],
)
def test_where_the_next_page_begins_is_read_from_its_url(url: str, last: str | None) -> None:
    """Registries that page by tokens of their own have no last."""
    assert last_of(url) == last
