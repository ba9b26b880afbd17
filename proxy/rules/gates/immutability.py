"""Tags that never move here, once seen: what a move upstream means for them.

Upstream may move such a tag, or take it away; here it keeps the digest that it had when it was first seen, and somebody
is told. The digest itself stays under every other rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.oci.names import Tag
from proxy.rules.globs import Glob


@dataclass(frozen=True, slots=True)
class Immutable:
    """The patterns of one project, in the order of the file."""

    patterns: tuple[Glob, ...] = ()

    @classmethod
    def of(cls, texts: tuple[str, ...]) -> Immutable:
        """From patterns for tags, as the settings write them. Raises ValueError for what can never match."""
        return cls(tuple(Glob.parse(f"**:{text}") for text in texts))

    def covers(self, tag: Tag) -> bool:
        """Whether this tag keeps its digest."""
        return any(glob.covers_tag(tag.value) for glob in self.patterns)
