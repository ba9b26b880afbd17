"""What an operator's words select: a reference, a pattern or a digest (`breakwater purge`, the dashboard, the API)."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.errors import BadRequest, BreakwaterError
from proxy.oci.digest import ALGORITHMS, Digest
from proxy.oci.names import Reference
from proxy.rules.globs import Glob

#: Longer words select nothing.
MAX_CHARS = 512


@dataclass(frozen=True, slots=True)
class Selection:
    """What is meant: repositories by `glob` (None: all of them), and in them a `digest`, some tags, or everything."""

    text: str
    glob: Glob | None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """The selection that `text` spells. Raises BadRequest with a sentence.

        `sha256:…` is that content in every repository; `name@sha256:…` in one; with a star it is a pattern as in rules
        (`quay.io/**`, `docker.io/library/alpine:3.*`). Else it is a name as docker reads it, but for one thing: without
        a tag it means the whole repository and not `latest`, as a pattern does.
        """
        text = text.strip()
        if not text or len(text) > MAX_CHARS:
            raise BadRequest(f"expected a reference, a pattern or a digest of at most {MAX_CHARS} characters")
        try:
            if text.partition(":")[0] in ALGORITHMS and "/" not in text:
                return cls(text, None, Digest.parse(text))
            if "*" in text:
                return cls(text, Glob.parse(text))
            reference = Reference.parse(text)
            name = f"{reference.host}/{reference.repository}"
            if isinstance(reference.target, Digest):
                return cls(text, Glob.parse(name), reference.target)
            has_tag = ":" in text.rpartition("/")[2]
            return cls(text, Glob.parse(f"{name}:{reference.target}" if has_tag else name))
        except (BreakwaterError, ValueError) as error:
            raise BadRequest(str(error)) from error

    @property
    def is_whole(self) -> bool:
        """Whether everything of the repositories is meant."""
        return self.digest is None and (self.glob is None or self.glob.tag is None)

    def covers(self, reference: str) -> bool:
        """Whether anything of `<host>/<repository>` is meant."""
        return self.glob is None or self.glob.covers(reference)

    def takes_tag(self, tag: str) -> bool:
        """Whether this tag of a covered repository is meant by its name."""
        return self.digest is None and (self.glob is None or self.glob.covers_tag(tag))
