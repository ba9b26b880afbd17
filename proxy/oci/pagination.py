"""Pages of tags: `n`, `last` and the Link header (distribution-spec § Listing Tags, RFC 8288)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, urlsplit

_LINK = re.compile(r"<([^<>]*)>((?:[^,\"<]|\"(?:[^\"\\]|\\.)*\")*)")
_REL = re.compile(r";\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,\"]+))", re.IGNORECASE)


def lexical(tag: str) -> tuple[str, str]:
    """The key of the spec's "lexical order (i.e. case-insensitive alphanumeric order)".

    Case decides between tags that differ by nothing else, so that the order is total and no page skips one of them.
    """
    return tag.lower(), tag


def page(tags: Iterable[str], n: int | None, last: str | None) -> tuple[tuple[str, ...], str | None]:
    """At most `n` of `tags` after `last`, in lexical order, each once; and the next page's `last`, None at the end.

    `last` need not be a tag that exists. Without `n` it is all of them; `n=0` is an empty page with nothing after it,
    as the spec wants.
    """
    if n == 0:
        return (), None
    ordered = sorted(set(tags), key=lexical)
    start = 0 if last is None else bisect_right(ordered, lexical(last), key=lexical)
    chosen = tuple(ordered[start:] if n is None else ordered[start : start + n])
    more = start + len(chosen) < len(ordered)
    return chosen, chosen[-1] if more else None


def link_header(path: str, *, n: int | None, last: str, ns: str | None) -> str:
    """The Link header of a page that is not the last: `path` with the query for what follows the tag `last`."""
    words = {"n": None if n is None else str(n), "last": last, "ns": ns}
    query = "&".join(f"{key}={quote(word, safe='')}" for key, word in words.items() if word is not None)
    return f'<{path}?{query}>; rel="next"'


def parse_next(link_header_value: str) -> str | None:
    """The target of the first link whose relation is `next`, as written (it may be relative), or None. Never raises."""
    for target, params in _LINK.findall(link_header_value):
        rel = _REL.search(params)
        if rel is not None and "next" in (rel[1] or rel[2] or "").lower().split() and target.strip():
            return target.strip() if target.isprintable() else None
    return None


def last_of(url: str) -> str | None:
    """The `last` parameter of a link's target, or None: some registries page by a token of their own. Never raises."""
    try:
        return dict(parse_qsl(urlsplit(url).query, max_num_fields=32)).get("last")
    except ValueError:  # of urlsplit (brackets) and parse_qsl (more fields than any registry sends)
        return None
