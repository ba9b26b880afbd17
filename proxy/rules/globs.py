"""Globs over references: `*` stays within a path element, `**` crosses them.

A pattern is `sha256:…` (a digest entry), `media-type:…`, or `<host>/<repository>[:<tag>]` with stars anywhere. One
without a tag speaks about the whole repository; one with a tag speaks about names, see gates/allowlist.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.errors import InvalidDigest
from proxy.oci.digest import ALGORITHMS, Digest

#: What a rule about media types begins with. No source host has such a port.
MEDIA_TYPE = "media-type:"


@dataclass(frozen=True, slots=True)
class Glob:
    """One pattern. `text` is what the operator wrote, and what denials quote."""

    text: str
    digest: Digest | None
    path: re.Pattern[str] | None
    tag: re.Pattern[str] | None
    media_type: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str) -> Glob:
        """The glob that `text` spells. Raises ValueError with a sentence for what can never match."""
        if text.partition(":")[0] in ALGORITHMS and "/" not in text:
            try:
                return cls(text, Digest.parse(text), None, None)
            except InvalidDigest as error:
                raise ValueError(str(error)) from None
        if text.startswith(MEDIA_TYPE):
            rest = text.removeprefix(MEDIA_TYPE)
            if not re.fullmatch(r"[a-z0-9!#$&^_.+*-]+(?:/[a-z0-9!#$&^_.+*-]+)+|\*\*", rest):
                raise ValueError(f"{text!r} is not a pattern for media types: write {MEDIA_TYPE}<type>/<subtype>")
            return cls(text, None, None, None, _compile(rest))
        if not text or text != text.strip() or re.search(r"[^A-Za-z0-9._:/*@\[\]-]", text) or "@" in text:
            raise ValueError(
                f"{text!r} is not a pattern: write <host>/<repository>[:<tag>] with * and **, or sha256:<64 hex>"
            )
        head, slash, last = text.rpartition("/")
        name, colon, tag = last.partition(":")
        if colon and not tag:
            raise ValueError(f"{text!r} ends in a colon: a tag pattern is missing")
        return cls(text, None, _compile(head + slash + name), _compile(tag) if colon else None)

    def covers(self, reference: str) -> bool:
        """Whether `<host>/<repository>` is within the pattern, whatever its tag part says."""
        return self.path is not None and self.path.fullmatch(reference) is not None

    def covers_type(self, media_type: str) -> bool:
        """Whether this is a pattern for media types, and this is one of them."""
        return self.media_type is not None and self.media_type.fullmatch(media_type) is not None

    def covers_tag(self, tag: str) -> bool:
        """Whether the tag part matches; a pattern without one matches every tag."""
        return self.tag is None or self.tag.fullmatch(tag) is not None


def _compile(text: str) -> re.Pattern[str]:
    """`**/` also matches nothing, so that `quay.io/**/x` covers `quay.io/x`."""
    out, i = [], 0
    while i < len(text):
        if text.startswith("**/", i):
            out.append(r"(?:.+/)?")
            i += 3
        elif text.startswith("**", i):
            out.append(r".*")
            i += 2
        elif text[i] == "*":
            out.append(r"[^/]*")
            i += 1
        else:
            out.append(re.escape(text[i]))
            i += 1
    return re.compile("".join(out))
